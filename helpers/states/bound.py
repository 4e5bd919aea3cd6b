"""What can no merge avoid? Distortion bounds from the distances between the specialists alone.

N specialists of one base give hidden states H_i(x) in R^d on P shared probes x. A merge is any
function h of x; its distortion for task i is delta_i(h) = E_x ||H_i(x) - h(x)||^2 (mean over
probes), and delta_max is the worst task's. Everything follows from D2[i, j] = E_x ||H_i - H_j||^2
and two identities for real weights a of sum 1 and c_a = sum_i a_i H_i:

    (A)  ||H_i - c_a||^2 = (D2 a)_i - a' D2 a / 2
    (B)  sum_i a_i delta_i(h) = a' D2 a / 2 + ||h - c_a||^2

Distances are squared and un-normalised, in the units of the states; rates are in bits.
Starting point: Theorem 1 of Cao et al., arXiv:2603.09463; notebook 04 derives what holds of it.
Pure NumPy and SciPy: no model is needed, any squared-distance matrix will do.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.linalg import helmert
from scipy.optimize import nnls
from scipy.spatial.distance import squareform
from scipy.special import logsumexp, softmax

Array = NDArray[np.float64]
EXACT_TASKS = 10  # up to here K(D) looks at every group of tasks
FLAT = 1e-11  # curvature of affinely dependent models, largest distance 1: rounding only


class Ball(NamedTuple):
    """Least L2 ball around the specialists: r2 <= R^2 <= r2 + gap, centre sum_i weights_i H_i."""

    r2: float
    weights: Array
    gap: float


class RateCurve(NamedTuple):
    """Upper hull (distortion, rate) of R(D); `gap[s]` bits bound its excess on segment s."""

    distortion: Array
    rate: Array
    gap: Array


class Step(NamedTuple):
    """`models` merged models keep every task within `distortion`; none does below `lower`."""

    models: int
    distortion: float
    lower: float
    groups: list[list[int]]


# --- distances ----------------------------------------------------------------------------------


def squared_distances(states: ArrayLike) -> Array:
    """D2_x[i, j, x] = ||H_i(x) - H_j(x)||^2 from states (N, P, d), in float64; shape (N, N, P).

    Its mean over x is D2. Further axes between probes and width (layers) are kept. Differences are
    taken before squaring: the Gram form would lose the digits of near neighbours. Raises
    ValueError if `states` has fewer than three axes.
    """
    states = np.asarray(states)
    if states.ndim < 3:
        raise ValueError(f"states must be (models, probes, .., width), not {states.shape}")
    d2_x = np.zeros((len(states), *states.shape[:-1]))
    for i in range(len(states)):
        for j in range(i):
            d2_x[i, j] = d2_x[j, i] = distortion_x(states[i], states[j])
    return d2_x


def distortion_x(states: ArrayLike, merged: ArrayLike) -> Array:
    """||H_i(x) - h(x)||^2 of states (N, P, d) and a merge's states (P, d); shape (N, P).

    The mean over the last axis is delta_i(h). Other axes before the width broadcast.
    """
    diff = np.asarray(states, dtype=np.float64) - np.asarray(merged, dtype=np.float64)
    return np.einsum("...d,...d->...", diff, diff)


def gram(d2: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """G[i, j] = <H_i - c_a, H_j - c_a>, the Gram matrix seen from c_a (default: the mean)."""
    d2 = np.asarray(d2, dtype=np.float64)
    a = np.full(len(d2), 1 / len(d2)) if weights is None else np.asarray(weights)
    row = d2 @ a
    return (row[:, None] + row[None, :] - d2 - a @ row) / 2


def coordinates(d2: ArrayLike, dims: int = 2) -> tuple[Array, float]:
    """Classical scaling: points (N, dims) about their mean, and the share of the spread they hold.

    Leading eigenvectors of the Gram matrix, scaled (Torgerson, Psychometrika 17:401, 1952).
    """
    values, vectors = np.linalg.eigh(gram(d2))
    values = np.maximum(values[::-1], 0)
    points = np.zeros((len(values), dims))
    points[:, : len(values)] = (vectors[:, ::-1] * np.sqrt(values))[:, :dims]
    return points, float(values[:dims].sum() / values.sum()) if values.any() else 1.0


def checked(d2: ArrayLike) -> Array:
    """`d2` in float64, or ValueError if no points in any space have these squared distances.

    Tolerances admit float32 records: 1e-6 of the largest distance, projected away.
    """
    d2 = np.asarray(d2, dtype=np.float64)
    if d2.ndim != 2 or d2.shape[0] != d2.shape[1] or not d2.size:
        raise ValueError(f"squared distances must be a square matrix, not of shape {d2.shape}")
    slack = 1e-6 * np.abs(d2).max()
    if not np.isfinite(d2).all() or np.abs(np.diag(d2)).max() > slack or d2.min() < -slack:
        raise ValueError("squared distances must be finite and >= 0, with a zero diagonal")
    if np.abs(d2 - d2.T).max() > slack:
        raise ValueError("squared distances must be symmetric")
    values, vectors = np.linalg.eigh(gram(d2))
    if values[0] < -slack * len(d2):
        raise ValueError(
            f"no points have these squared distances (Gram eigenvalue {values[0]:.3g}): average "
            "the squared distances over one set of probes, the same for every pair"
        )
    if values[0] < -1e-12 * np.abs(d2).max():  # the rounding of float32: take the nearest points
        points = vectors * np.sqrt(np.maximum(values, 0))
        d2 = squared_distances(points[:, None]).mean(-1)
    return d2


def to_centre(d2: ArrayLike, weights: ArrayLike) -> Array:
    """Squared distance of every H_i to c_a by identity (A); weights of sum 1, any sign."""
    row = np.asarray(d2) @ np.asarray(weights)
    return row - np.asarray(weights) @ row / 2


def dispersion(d2: ArrayLike, weights: ArrayLike | None = None) -> float:
    """a' D2 a / 2 = sum_i a_i ||H_i - c_a||^2; uniform weights (default) give V."""
    d2 = np.asarray(d2)
    a = np.full(len(d2), 1 / len(d2)) if weights is None else np.asarray(weights)
    return float(a @ d2 @ a / 2)


# --- the minimax radius ---------------------------------------------------------------------------


def minimax(d2: ArrayLike) -> Ball:
    """Least squared radius R^2 = max over the simplex of a' D2 a / 2, and its weights.

    R^2 is the least delta_max of any merge, attained by c_a. Active set on the Gram matrix (D2
    itself is indefinite, so it goes to no QP solver): Newton to the circumcentre of the support,
    drop the weights that reach 0, add the farthest task. Affinely dependent supports slide along
    their null direction. Any a certifies itself: gap = max_i (D2 a)_i - a' D2 a. Where the weights
    are not unique, those of least norm. Used as merge weights they are the "chebyshev" method.
    """
    d2 = checked(d2)
    scale = d2.max()
    if scale == 0:  # one point, or all the same: every weighting is optimal
        return Ball(0.0, np.full(len(d2), 1 / len(d2)), 0.0)
    unit = d2 / scale
    a = np.zeros(len(d2))
    a[list(np.unravel_index(unit.argmax(), unit.shape))] = 0.5
    for _ in range(20 * len(d2)):
        row = unit @ a
        if row.max() - a @ row < 1e-13:
            break
        a = _recentre(unit, a, np.union1d(np.flatnonzero(a), row.argmax()))
    spread = _least_norm(unit, a)
    if _gap(unit, spread) <= max(_gap(unit, a), 1e-10):
        a = spread
    return Ball(float(scale * dispersion(unit, a)), a, float(scale * _gap(unit, a)))


def _gap(d2: Array, a: Array) -> float:
    row = d2 @ a
    return float(max(row.max() - a @ row, 0.0))


def _principal(d2: Array) -> tuple[Array, Array]:
    """Curvatures and orthonormal directions of -a' D2 a / 2 among weights of sum 0."""
    basis = helmert(len(d2)).T  # leaves the constant direction out exactly
    values, vectors = np.linalg.eigh(-basis.T @ d2 @ basis / 2)
    return values, basis @ vectors


def _recentre(d2: Array, a: Array, support: NDArray[np.intp]) -> Array:
    """Maximise a' D2 a / 2 on the support: to the circumcentre, or to the first face in the way."""
    a = a.copy()
    while len(support) > 1:
        curvature, axes = _principal(d2[np.ix_(support, support)])
        slope = axes.T @ (d2[support] @ a) / 2
        flat = curvature < FLAT
        slide = axes[:, flat] @ slope[flat]
        if np.abs(slide).max() > FLAT:
            move, reach = slide, np.inf
        else:
            move, reach = axes[:, ~flat] @ (slope[~flat] / curvature[~flat]), 1.0
        shrinking = np.flatnonzero(move < 0)
        room = a[support[shrinking]] / -move[shrinking]
        if not len(room) or room.min() >= reach:
            a[support] += move
            break
        a[support] += room.min() * move
        out = support[shrinking[room.argmin()]]
        a[out] = 0.0
        support = support[support != out]
    a = np.maximum(a, 0.0)
    return a / a.sum()


def _least_norm(d2: Array, a: Array) -> Array:
    """Least-norm weights of the same centre among the tasks on the sphere.

    Least-distance programming (Lawson & Hanson, Solving Least Squares Problems, ch. 23).
    """
    on = np.flatnonzero(to_centre(d2, a) > dispersion(d2, a) * (1 - 1e-9))
    curvature, axes = _principal(d2[np.ix_(on, on)])
    free = axes[:, curvature < FLAT]  # these leave the centre in place
    if not free.shape[1]:
        return a
    start = a[on] - free @ (free.T @ a[on])
    system = np.vstack([free.T, -start])
    target = np.append(np.zeros(free.shape[1]), 1.0)
    dual, _ = nnls(system, target, maxiter=50 * len(on))
    residual = system @ dual - target
    out = np.zeros_like(a)
    out[on] = np.maximum(start - free @ (residual[:-1] / residual[-1]), 0.0)
    return out / out.sum()


def radii(d2_x: ArrayLike) -> Array:
    """Pointwise squared radii R(x)^2 of the states at each probe, from (N, N, P); shape (P,)."""
    return np.array([minimax(d2).r2 for d2 in np.moveaxis(np.asarray(d2_x), -1, 0)])


def bounds(d2_x: ArrayLike, width: int) -> dict[str, float]:
    """Everything that brackets R^2, from pointwise distances (N, N, P) of states in R^width.

    max(Delta^2/4, V) <= R^2 <= Delta^2 (N-1)/(2N), and R^2 <= E R(x)^2 <= E Delta(x)^2 m/(2(m+1))
    with m = min(width, N-1) (Jung's theorem at each probe; Delta is the largest distance).
    """
    d2_x = np.asarray(d2_x, dtype=np.float64)
    d2, n = d2_x.mean(-1), len(d2_x)
    m = min(width, n - 1)
    return {
        "quarter": d2.max() / 4,
        "dispersion": dispersion(d2),
        "r2": minimax(d2).r2,
        "mean_pointwise_r2": radii(d2_x).mean(),
        "jung_tasks": d2.max() * (n - 1) / (2 * n),
        "jung_width": d2_x.max(axis=(0, 1)).mean() * m / (2 * (m + 1)),
    }


# --- a measured merge ----------------------------------------------------------------------------


def offset2(d2: ArrayLike, weights: ArrayLike, delta: ArrayLike) -> float:
    """||h - c_a||^2 of a measured merge by identity (B); for h at sum a_i theta_i, the squared
    linearity gap g(a)^2.

    Task arithmetic: give the base as a point of its own with weight 1 - sum lambda. Raises
    ValueError if it is negative beyond rounding, which no function h of these probes can make.
    """
    d2, a, delta = checked(d2), np.asarray(weights), np.asarray(delta, dtype=np.float64)
    if abs(a.sum() - 1) > 1e-6:
        raise ValueError(f"weights must sum to 1 (the base is a point too), not {a.sum():.6g}")
    out = float(a @ delta) - dispersion(d2, a)
    if out < -1e-6 * np.abs(a).sum() ** 2 * max(d2.max(), delta.max()):
        raise ValueError(
            f"||h - c||^2 would be {out:.3g}: these distortions and distances cannot come from "
            "the same probes"
        )
    return max(out, 0.0)


def with_merge(d2: ArrayLike, delta: ArrayLike) -> Array:
    """`d2` with the merge as one more point at squared distances delta_i; refused like `checked`.

    The sharpest test of measured records: all of section "converse" follows if this is Euclidean.
    """
    d2, delta = np.asarray(d2, dtype=np.float64), np.asarray(delta, dtype=np.float64)
    return checked(np.block([[d2, delta[:, None]], [delta[None, :], np.zeros((1, 1))]]))


def readings(
    models: Sequence[str],
    states: ArrayLike,
    merged: ArrayLike,
    owner: ArrayLike,
    weights: Sequence[float] | None = None,
    flipped: ArrayLike | None = None,
    rho: ArrayLike | None = None,
) -> list[dict]:
    """Tidy rows of one merge, one per model, task of the probes and layer.

    `models` names the base and then the merged specialists by their tasks, with `states`
    (models, P, layers, d); `merged` (P, layers, d); `owner` (P,) is the task of each probe.
    `delta` is the distortion. `weights` of a plain weighted sum give each model's affine `weight`
    (the base 1 - sum) and `gap2` = ||h - c_a||^2 from the states themselves; NaN for other methods.
    On a specialist's own probes, at the last layer: `flips`, the share of `flipped` (P,) answers,
    and `certified`, the share within `rho` (P,) of `margin_radius`.
    """
    states, owner = np.asarray(states, dtype=np.float64), np.asarray(owner)
    x = distortion_x(states, merged)
    a, gap = np.full(len(models), np.nan), np.full(x.shape[1:], np.nan)
    if weights is not None:
        a = np.array([1 - sum(weights), *weights])
        gap = distortion_x(np.tensordot(a, states, 1), merged)
    rows = []
    for task in dict.fromkeys(owner.tolist()):
        on = owner == task
        for k, model in enumerate(models):
            read = {"model": model, "probe_task": task, "weight": float(a[k])}
            for layer in range(x.shape[-1]):
                mean = {"delta": x[k, on, layer].mean(), "gap2": gap[on, layer].mean()}
                rows.append(read | {"layer": layer} | {name: float(v) for name, v in mean.items()})
            if model == task and flipped is not None and rho is not None:
                near = np.sqrt(x[k, on, -1]) < np.asarray(rho)[on]
                rows[-1] |= {"flips": float(np.mean(np.asarray(flipped)[on]))}
                rows[-1] |= {"certified": float(near.mean())}
    return rows


# --- rate and number of models --------------------------------------------------------------------


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
    start, end = (0.0, float(np.mean(np.log2(len(d2) / same))), 0.0), (v, 0.0, 0.0)
    todo, nodes, gaps = [(start, end)], [start], []
    while todo:
        left, right = todo.pop()  # points (D, R, how far R may lie above the curve)
        drop = left[1] - right[1]
        beta = np.log(2) * drop / (right[0] - left[0])
        chord = left[1] + beta * left[0] / np.log(2)
        point, lower = _at_slope(d2, beta, tol / 4)
        height = point[1] + beta * point[0] / np.log(2)
        gap = min(chord - lower, drop + right[2])  # the curve falls: right of a flat chord's end
        if gap <= tol or chord - height <= tol / 10 or not left[0] < point[0] < right[0]:
            nodes.append(right)
            gaps.append(max(gap, 0.0))
        else:
            point = (*point, height - lower)
            todo += [(point, right), (left, point)]
    distortion, rate, _ = np.array(nodes).T
    return RateCurve(distortion, rate, np.array(gaps))


def _at_slope(d2: Array, beta: float, tol: float) -> tuple[tuple[float, float], float]:
    """The (D, R) that minimises R + beta D / ln 2, and a lower bound on that minimum, in bits.

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
        q, r = q[r > 1e-12], r[r > 1e-12] / r[r > 1e-12].sum()
    log_ratio = -beta * cost - log_z[:, None]  # of w(m|i) to r_m
    w = r * np.exp(log_ratio)
    rate = (w * log_ratio).sum() / n - (w.mean(0) * np.log(w.mean(0) / r)).sum()
    point = (float((w * cost).sum() / n), float(rate / np.log(2)))
    return point, float(-log_z.mean() / np.log(2) - violation)


def _masses(log_kernel: Array, r: Array) -> Array:
    """One constrained Newton step up sum_i log sum_m r_m K[i, m] over the simplex."""
    kernel = np.exp(log_kernel - log_kernel.max(1, keepdims=True))
    score = kernel / (kernel @ r)[:, None] - 2
    # On the simplex |score r| is the quadratic model; the row of ones makes it least-distance.
    full, _ = nnls(np.vstack([score, np.ones(len(r))]), np.append(np.zeros(len(score)), 1.0))
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


def staircase(d2: ArrayLike) -> list[Step]:
    """For K = 1..N: the least worst-task distortion with K merged models, and who shares one.

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


def _radius2(d2: Array, group: list[int]) -> float:
    return minimax(d2[np.ix_(group, group)]).r2 if len(group) > 1 else 0.0


def _members(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def _exact_steps(d2: Array) -> list[Step]:
    n = len(d2)
    radius = [_radius2(d2, _members(mask)) for mask in range(1 << n)]
    worst, choice = radius, [list(range(1 << n))]  # one model: the whole mask is the group
    steps = [Step(1, radius[-1], radius[-1], [_members((1 << n) - 1)])]
    for models in range(2, n + 1):
        new, chosen = list(worst), list(choice[-1])
        for mask in range(1, 1 << n):
            first = mask & -mask  # the group of the first task: no partition is counted twice
            sub = mask
            while sub:
                if sub & first and sub != mask:
                    value = max(radius[sub], worst[mask ^ sub])
                    if value < new[mask]:
                        new[mask], chosen[mask] = value, sub
                sub = (sub - 1) & mask
        worst = new
        choice.append(chosen)
        groups, mask = [], (1 << n) - 1
        for table in reversed(choice):
            if mask:
                groups.append(_members(table[mask]))
                mask ^= table[mask]
        steps.append(Step(models, worst[-1], worst[-1], groups))
    return steps


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
        groups = [list(np.flatnonzero(labels == k)) for k in np.unique(labels)]
        groups, value = _local_search(d2, groups)
        lower = value if models == 1 else float(spread[models]) / 4 if models < n else 0.0
        steps.append(Step(models, value, lower, [[int(i) for i in g] for g in groups]))
    return steps


def _packing(d2: Array) -> Array:
    """Least squared distance among the first k + 1 tasks of a farthest-first walk, for k < N."""
    chosen = [int(d2.max(1).argmax())]
    reach = np.full(len(d2), np.inf)
    for _ in range(len(d2) - 1):
        nearest = d2[chosen].min(0)
        chosen.append(int(nearest.argmax()))
        reach[len(chosen) - 1] = nearest.max()
    return reach


def _local_search(d2: Array, groups: list[list[int]]) -> tuple[list[list[int]], float]:
    """Move single tasks out of the worst group while that lowers the largest radius."""
    radius = [_radius2(d2, g) for g in groups]
    while True:
        worst = int(np.argmax(radius))
        best = (radius[worst], None)
        for i in groups[worst]:
            left = _radius2(d2, [j for j in groups[worst] if j != i])
            for k in range(len(groups)):
                if k != worst:
                    value = max(left, _radius2(d2, groups[k] + [i]))
                    if value < best[0] * (1 - 1e-12):
                        best = (value, (i, k))
        if best[1] is None:
            return groups, radius[worst]
        i, k = best[1]
        groups[worst] = [j for j in groups[worst] if j != i]
        groups[k] = groups[k] + [i]
        radius = [_radius2(d2, g) for g in groups]


# --- from distortion to accuracy ------------------------------------------------------------------


def _margins(states: ArrayLike, readout: ArrayLike, bias: ArrayLike | None):
    """Top class a (P,), margins m_k = z_a - z_k (P, C) and lengths ||w_a - w_k|| (P, C)."""
    h, w = np.asarray(states, dtype=np.float64), np.asarray(readout, dtype=np.float64)
    z = h @ w.T + (0.0 if bias is None else np.asarray(bias, dtype=np.float64))
    top = z.argmax(1)
    square = (w * w).sum(1)
    length2 = square[top][:, None] + square - 2 * w[top] @ w.T
    return top, z.max(1)[:, None] - z, np.sqrt(np.maximum(length2, 0.0))


def margin_radius(states: ArrayLike, readout: ArrayLike, bias: ArrayLike | None = None) -> Array:
    """rho(x) = min_k m_k / ||w_a - w_k||: exact distance from H(x) to where its top class changes.

    `states` (P, d) feed logits z = W h + b with `readout` W (C, d), `bias` b (C,). Any merge with
    ||h(x) - H(x)|| < rho(x) and the same readout predicts the same class.
    """
    top, margin, length = _margins(states, readout, bias)
    ratio = np.divide(margin, length, out=np.where(margin > 0, np.inf, 0.0), where=length > 0)
    np.put_along_axis(ratio, top[:, None], np.inf, axis=1)
    return ratio.min(1)


def kept(
    states: ArrayLike,
    merged: ArrayLike,
    readout: ArrayLike,
    bias: ArrayLike | None = None,
    merged_readout: ArrayLike | None = None,
    merged_bias: ArrayLike | None = None,
) -> NDArray[np.bool_]:
    """Which predictions of the specialist the merge provably keeps; states (P, d), shape (P,).

    m_k + e_k > ||w_a - w_k|| ||h - H|| for all k != a, where e_k is what the merged readout alone
    changes: e_k = <(w'_a - w_a) - (w'_k - w_k), h> + (b'_a - b_a) - (b'_k - b_k). A readout not
    given is the specialist's own (e = 0).
    """
    top, margin, length = _margins(states, readout, bias)
    h = np.asarray(merged, dtype=np.float64)
    shift = np.zeros_like(margin)
    if merged_readout is not None:
        shift = h @ (np.asarray(merged_readout, dtype=np.float64) - np.asarray(readout)).T
    if merged_bias is not None:
        shift = shift + np.asarray(merged_bias) - (0.0 if bias is None else np.asarray(bias))
    shift = np.take_along_axis(shift, top[:, None], 1) - shift
    distance = np.linalg.norm(h - np.asarray(states, dtype=np.float64), axis=1)
    safe = margin + shift > length * distance[:, None]
    np.put_along_axis(safe, top[:, None], True, axis=1)
    return safe.all(1)


def flips_bound(rho: ArrayLike, delta: float) -> float:
    """Upper bound on the share of changed predictions from one task's delta alone, in [0, 1].

    min over t > 0 of P(rho < t) + delta / t^2 (Markov), tried at every t = rho(x).
    """
    rho = np.sort(np.asarray(rho, dtype=np.float64))
    t = rho[(rho > 0) & np.isfinite(rho)]
    below = np.searchsorted(rho, t, side="left") / len(rho)
    return float(min(1.0, np.min(below + delta / t**2, initial=1.0)))


# --- finite probes --------------------------------------------------------------------------------


def bootstrap(
    d2_x: ArrayLike,
    probe_task: ArrayLike,
    statistic: Callable[[Array], float],
    draws: int = 1000,
    seed: int = 0,
) -> Array:
    """`statistic(D2)` on probes resampled within their task, jointly for all models; (draws,).

    For R^2 valid where the minimax weights are unique; for Delta^2 only with a clear farthest
    pair: its plug-in and its resamples are biased upwards at ties. V is unbiased.
    """
    d2_x, rng = np.asarray(d2_x, dtype=np.float64), np.random.default_rng(seed)
    strata = _strata(probe_task)
    return np.array(
        [
            statistic(d2_x[..., np.concatenate([rng.choice(s, len(s)) for s in strata])].mean(-1))
            for _ in range(draws)
        ]
    )


def _strata(probe_task: ArrayLike) -> list[NDArray[np.intp]]:
    probe_task = np.asarray(probe_task)
    return [np.flatnonzero(probe_task == t) for t in np.unique(probe_task)]


def radius_se(d2_x: ArrayLike, probe_task: ArrayLike) -> float:
    """Standard error of R^2 over probes, stratified by task: spread of a' D2_x a / 2 at the
    optimal weights (their own sampling error is second order if they are unique)."""
    d2_x = np.asarray(d2_x, dtype=np.float64)
    a = minimax(d2_x.mean(-1)).weights
    value = np.einsum("i,ijx,j->x", a, d2_x, a) / 2
    return float(
        np.sqrt(sum(len(s) * value[s].var(ddof=1) for s in _strata(probe_task))) / len(value)
    )


def split_half(
    d2_x: ArrayLike, probe_task: ArrayLike, draws: int = 100, seed: int = 0
) -> dict[str, float]:
    """R^2 and Delta^2 with weights and pair chosen on one half of the probes, read on the other.

    Biased downwards where the plug-in is biased upwards: report both. Mean over random halves,
    split within task, both ways round.
    """
    d2_x, rng = np.asarray(d2_x, dtype=np.float64), np.random.default_rng(seed)
    r2, delta2 = [], []
    for _ in range(draws):
        order = [rng.permutation(s) for s in _strata(probe_task)]
        halves = [np.concatenate([s[k::2] for s in order]) for k in (0, 1)]
        means = [d2_x[..., half].mean(-1) for half in halves]
        for choose, read in (means, means[::-1]):
            r2.append(dispersion(read, minimax(choose).weights))
            delta2.append(read.flat[choose.argmax()])
    return {"r2": float(np.mean(r2)), "delta2": float(np.mean(delta2))}
