"""How many bits, how many models? R(D) and K(D) of the specialists, from their distances alone.

R(D): bits about the task that a hidden map must be told to reproduce the specialists with mean
squared distortion D. K(D): the least number of models with every task within D of one. Any function
of x counts as a model, so both are lower bounds for real merges.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import nnls
from scipy.spatial.distance import squareform
from scipy.special import logsumexp, softmax

from helpers.states.bound import minimax
from helpers.states.geometry import Array, checked, dispersion

EXACT_TASKS = 10  # up to here K(D) looks at every group of tasks
Groups = list[list[int]]


class RateCurve(NamedTuple):
    """Upper hull (distortion, rate) of R(D); `gap[s]` bits bound its excess on segment s."""

    distortion: Array
    rate: Array
    gap: Array


class Step(NamedTuple):
    """The centres of `groups` keep every task within `distortion`; no others below `lower`."""

    models: int
    distortion: float
    lower: float
    groups: Groups


# --- rate -----------------------------------------------------------------------------------------


class _Point(NamedTuple):
    distortion: float
    rate: float
    excess: float  # how far `rate` may lie above the curve

    def height(self, beta: float) -> float:
        return self.rate + beta * self.distortion / np.log(2)


def rate_distortion(d2: ArrayLike, tol: float = 1e-3) -> RateCurve:
    """R(D) in bits for a uniform task index, reproduced by any hidden map; squared distortion.

    R(D) = log2 N - max{E H(q) : E q = 1/N, E q'D2 q / 2 <= D}: from (0, entropy of the distinct
    specialists) to (V, 0). Sandwich: each chord is tried at its own slope; a lower point splits
    it, else the dual bound there certifies the chord. A segment's `gap` above `tol` says that the
    search for a better reproduction point stalled.
    """
    d2 = checked(d2)
    v = dispersion(d2)
    if v == 0:
        return RateCurve(np.zeros(1), np.zeros(1), np.zeros(0))
    same = (d2 <= 1e-12 * d2.max()).sum(1)
    start = _Point(0.0, float(np.mean(np.log2(len(d2) / same))), 0.0)
    chords = [(start, _Point(v, 0.0, 0.0))]
    nodes, gaps = [start], []
    while chords:
        left, right = chords.pop()
        drop = left.rate - right.rate
        beta = np.log(2) * drop / (right.distortion - left.distortion)
        point, lower = _at_slope(d2, beta, tol / 4)
        chord = left.height(beta)
        # the curve falls: it is never above a chord by more than at the chord's end
        gap = min(chord - lower, drop + right.excess)
        inside = left.distortion < point.distortion < right.distortion
        if gap <= tol or chord - point.height(beta) <= tol / 10 or not inside:
            nodes.append(right)
            gaps.append(max(gap, 0.0))
        else:
            point = point._replace(excess=point.height(beta) - lower)
            chords += [(point, right), (left, point)]
    distortion, rate, _ = np.array(nodes).T
    return RateCurve(distortion, rate, np.array(gaps))


def _at_slope(d2: Array, beta: float, tol: float) -> tuple[_Point, float]:
    """The point that minimises R + beta D / ln 2, and a lower bound on that minimum, in bits.

    Blahut-Arimoto over reproduction points c_{q_m} with masses r_m: at the optimum
    w(m|i) ~ r_m exp(-beta d(i, m)). Here the masses take constrained Newton steps (Wang, JRSS B
    69:185, 2007: the masses are those of a mixture likelihood) and the points are the modes where
    the dual is violated, found by mean-shift from many starts; the lower bound is as good as that
    search.
    """
    n = len(d2)
    q, r = np.eye(n), np.full(n, 1 / n)
    for _ in range(50):
        cost = _costs(d2, q)
        log_z = logsumexp(-beta * cost, b=r, axis=1)
        modes, violation = _modes(d2, beta, log_z, np.vstack([q, np.eye(n)]))
        if violation < tol:
            break
        q, r = np.vstack([q, modes]), np.append(r, np.zeros(len(modes)))
        r = _masses(-beta * _costs(d2, q), r)
        live = r > 1e-12
        q, r = q[live], r[live] / r[live].sum()
    log_ratio = -beta * cost - log_z[:, None]  # of w(m|i) to r_m
    w = r * np.exp(log_ratio)
    mass = w.mean(0)
    nats = (w * log_ratio).sum() / n - (mass * np.log(mass / r)).sum()
    point = _Point(float((w * cost).sum() / n), float(nats / np.log(2)), 0.0)
    return point, float(-log_z.mean() / np.log(2) - violation)


def _masses(log_kernel: Array, r: Array) -> Array:
    """One constrained Newton step up sum_i log sum_m r_m K[i, m] over the simplex."""
    kernel = np.exp(log_kernel - log_kernel.max(1, keepdims=True))
    score = kernel / (kernel @ r)[:, None] - 2
    # On the simplex |score r| is the quadratic model; the row of ones makes it least-distance.
    system = np.vstack([score, np.ones(len(r))])
    full, _ = nnls(system, np.append(np.zeros(len(score)), 1.0))
    move, now = full / full.sum() - r, np.log(kernel @ r).sum()
    step = 1.0
    while np.log(kernel @ (r + step * move)).sum() < now and step > 1e-9:
        step /= 2
    return np.maximum(r + step * move, 0.0)


def _costs(d2: Array, q: Array) -> Array:
    """d(i, m) = ||H_i - c_{q_m}||^2 for posteriors q (M, N); shape (N, M). Identity (A)."""
    row = q @ d2
    return (row - (row * q).sum(1, keepdims=True) / 2).T


def _modes(d2: Array, beta: float, log_z: Array, q: Array) -> tuple[Array, float]:
    """Distinct local maxima over q of log2 mean_i exp(-beta d(i, q)) / z_i, and the highest."""
    for _ in range(100):
        moved = softmax(-beta * _costs(d2, q) - log_z[:, None], axis=0).T
        still = np.abs(moved - q).max() < 1e-9
        q = moved
        if still:
            break
    height = logsumexp(-beta * _costs(d2, q) - log_z[:, None], axis=0) - np.log(len(d2))
    _, first = np.unique(np.round(q, 6), axis=0, return_index=True)
    return q[first], float(height.max() / np.log(2))


def rate_at(curve: RateCurve, distortion: ArrayLike) -> Array:
    """The hull of `curve` at given squared distortions; 0 from V on."""
    return np.interp(distortion, curve.distortion, curve.rate)


# --- number of models -----------------------------------------------------------------------------


def staircase(d2: ArrayLike) -> list[Step]:
    """For K = 1..N: the least worst-task distortion with K models, and who shares one.

    min over partitions into K groups of max_S R_S^2. Exact (lower == distortion) up to EXACT_TASKS
    tasks, by radii of all subsets and dynamic programming over them; above, complete linkage with
    local search, and a lower bound from K+1 far-apart tasks, two of which must share a model.
    """
    d2 = checked(d2)
    return _exact_steps(d2) if len(d2) <= EXACT_TASKS else heuristic_steps(d2)


def models_needed(steps: list[Step], distortion: float) -> tuple[int, int]:
    """K(D), the least number of models with every task within `distortion`, as (lower, upper)."""
    lower = min(s.models for s in steps if s.lower <= distortion)
    return lower, min(s.models for s in steps if s.distortion <= distortion)


def _within(d2: Array, group: Sequence[int]) -> Array:
    return d2[np.ix_(group, group)]


def _radius2(d2: Array, group: Sequence[int]) -> float:
    return minimax(_within(d2, group)).r2 if len(group) > 1 else 0.0


def _exact_steps(d2: Array) -> list[Step]:
    n = len(d2)
    radius = cache(partial(_radius2, d2))

    @cache
    def best(tasks: tuple[int, ...], models: int) -> tuple[float, Groups]:
        """Least worst radius of `tasks` in at most `models` groups, and the groups."""
        result = (radius(tasks), [list(tasks)])
        if models == 1 or len(tasks) == 1:
            return result
        first, others = tasks[0], tasks[1:]
        for mask in range(2 ** len(others) - 1):  # who shares with the first; never all
            group = (first, *(t for k, t in enumerate(others) if mask >> k & 1))
            rest = tuple(t for k, t in enumerate(others) if not mask >> k & 1)
            value, groups = best(rest, models - 1)
            value = max(radius(group), value)
            if value < result[0]:
                result = (value, [list(group), *groups])
        return result

    found = [best(tuple(range(n)), models) for models in range(1, n + 1)]
    return [Step(k, value, value, groups) for k, (value, groups) in enumerate(found, 1)]


def heuristic_steps(d2: ArrayLike) -> list[Step]:
    """`staircase` for many tasks: upper bounds by linkage and local search, with lower bounds."""
    d2 = checked(d2)
    n = len(d2)
    if n == 1:  # nothing to link
        return _exact_steps(d2)
    tree = linkage(squareform(np.sqrt(np.maximum(d2, 0)), checks=False), "complete")
    spread = _packing(d2)
    steps = []
    for models in range(1, n + 1):
        labels = fcluster(tree, models, "maxclust")
        groups = [np.flatnonzero(labels == k).tolist() for k in np.unique(labels)]
        groups, value = _local_search(d2, groups)
        lower = (
            value if models == 1 else float(spread[models]) / 4 if models < n else 0.0
        )
        steps.append(Step(models, value, lower, groups))
    return steps


def _packing(d2: Array) -> Array:
    """Least squared distance among the first k + 1 tasks of a farthest-first walk, for k < N."""
    chosen = [int(d2.max(1).argmax())]
    reach = np.full(len(d2), np.inf)
    for k in range(1, len(d2)):
        nearest = d2[chosen].min(0)
        chosen.append(int(nearest.argmax()))
        reach[k] = nearest.max()
    return reach


def _local_search(d2: Array, groups: Groups) -> tuple[Groups, float]:
    """Move single tasks out of the worst group while that lowers the largest radius."""
    groups = [list(group) for group in groups]
    radius = [_radius2(d2, group) for group in groups]
    while True:
        worst = int(np.argmax(radius))
        value, task, k = _best_move(d2, groups, worst)
        if value >= radius[worst] * (1 - 1e-12):
            return groups, radius[worst]
        groups[worst].remove(task)
        groups[k].append(task)
        for changed in (worst, k):
            radius[changed] = _radius2(d2, groups[changed])


def _best_move(d2: Array, groups: Groups, worst: int) -> tuple[float, int, int]:
    """The larger of the two radii after the best move of one task; the task; its new group."""
    best = (np.inf, -1, -1)
    ball = minimax(_within(d2, groups[worst]))
    for task, weight in zip(groups[worst], ball.weights, strict=True):
        if weight == 0:  # inside the ball: without it the radius stays
            continue
        left = _radius2(d2, [j for j in groups[worst] if j != task])
        for k, group in enumerate(groups):
            joined = group + [task]
            # V is no more than R^2, and cheap
            if k == worst or max(left, dispersion(_within(d2, joined))) >= best[0]:
                continue
            value = max(left, _radius2(d2, joined))
            if value < best[0]:
                best = (value, task, k)
    return best
