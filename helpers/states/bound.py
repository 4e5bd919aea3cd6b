"""What can no merge avoid? The radius of the specialists, the gap of a merge, and a certificate.

Any merge, by whatever rule, is a function h of x; its distortion for task i is delta_i(h) and the
worst task's is delta_max. The least delta_max of all is R^2, the squared radius of the smallest
ball around the specialists' states, and R^2 follows from their distances D2 alone (see geometry).
Starting point: Theorem 1 of Cao et al., arXiv:2603.09463; notebook 04a derives what holds of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from helpers.states.geometry import (  # noqa: F401  notebooks find all of them here
    Array,
    _strata,
    checked,
    coordinates,
    dispersion,
    distortion_x,
    halves,
    resampled,
    squared_distances,
    to_centre,
)


class Ball(NamedTuple):
    """Least L2 ball around the specialists: r2 <= R^2 <= r2 + gap, centre sum_i weights_i H_i."""

    r2: float
    weights: Array
    gap: float


# --- the radius -----------------------------------------------------------------------------------


def minimax(d2: ArrayLike) -> Ball:
    """Least squared radius R^2 = max over the simplex of a' D2 a / 2, and its weights.

    R^2 is the least delta_max of any merge, attained by c_a. On the simplex a' D2 a is concave, so
    SLSQP's local maximum is the global one; it is polished by the linear equations that the models
    on the sphere satisfy. Any a certifies itself: gap = max_i (D2 a)_i - a' D2 a. The centre is
    unique; the weights are if the models are affinely independent. Used as merge weights they are
    the "chebyshev" rule.
    """
    d2 = checked(d2)
    scale = d2.max()
    uniform = np.full(len(d2), 1 / len(d2))
    if scale == 0:  # one point, or all the same: every weighting is optimal
        return Ball(0.0, uniform, 0.0)
    unit = d2 / scale
    rough = _ascend(unit)
    reach = to_centre(unit, rough)
    on_sphere = np.flatnonzero(reach > reach.max() - 1e-6)
    support = np.flatnonzero(rough > 1e-6)
    polished = [_circumcentre(unit, members) for members in (on_sphere, support)]
    candidates = [uniform, *polished, rough]
    gaps = [_gap(unit, a) for a in candidates]
    best = next(k for k, gap in enumerate(gaps) if gap <= max(min(gaps), 1e-12))
    weights = candidates[best]
    return Ball(
        float(scale * dispersion(unit, weights)), weights, float(scale * gaps[best])
    )


def _gap(d2: Array, a: Array) -> float:
    if a.min() < 0:
        return np.inf
    row = d2 @ a
    return float(max(row.max() - a @ row, 0.0))


def _ascend(d2: Array) -> Array:
    """Weights that maximise a' D2 a / 2 on the simplex, to about 1e-8."""
    n = len(d2)
    result = minimize(
        lambda a: -a @ d2 @ a / 2,
        np.full(n, 1 / n),
        jac=lambda a: -d2 @ a,
        bounds=[(0, 1)] * n,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    a = np.maximum(result.x, 0)
    return a / a.sum()


def _circumcentre(d2: Array, members: NDArray[np.intp]) -> Array:
    """Weights of sum 1 on `members` with (D2 a)_i equal on all of them; those of least norm."""
    k = len(members)
    ones = np.ones((k, 1))
    system = np.block([[d2[np.ix_(members, members)], -ones], [ones.T, 0.0]])
    target = np.append(np.zeros(k), 1.0)
    solution = np.linalg.lstsq(system, target, rcond=1e-10)[0][:k]
    a = np.zeros(len(d2))
    a[members] = np.where(np.abs(solution) < 1e-12, 0, solution)
    return a / a.sum()


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


def radius_se(d2_x: ArrayLike, probe_task: ArrayLike) -> float:
    """Standard error of R^2 over probes, stratified by task: spread of a' D2_x a / 2 at the
    optimal weights (their own sampling error is second order if they are unique)."""
    d2_x = np.asarray(d2_x, dtype=np.float64)
    a = minimax(d2_x.mean(-1)).weights
    value = np.einsum("i,ijx,j->x", a, d2_x, a) / 2
    variance = sum(
        len(probes) * value[probes].var(ddof=1) for probes in _strata(probe_task)
    )
    return float(np.sqrt(variance) / len(value))


# --- a measured merge ----------------------------------------------------------------------------


def offset2(d2: ArrayLike, weights: ArrayLike, delta: ArrayLike) -> float:
    """||h - c_a||^2 of a measured merge by identity (B); for h at sum a_i theta_i, the squared
    linearity gap g(a)^2.

    Task arithmetic: give the base as a point of its own with weight 1 - sum lambda. Raises
    ValueError if it is negative beyond rounding, which no function h of these probes can make.
    """
    d2 = checked(d2)
    a = np.asarray(weights)
    delta = np.asarray(delta, dtype=np.float64)
    if abs(a.sum() - 1) > 1e-6:
        raise ValueError(
            f"weights must sum to 1 (the base is a point too), not {a.sum():.6g}"
        )
    offset = float(a @ delta) - dispersion(d2, a)
    if offset < -1e-6 * np.abs(a).sum() ** 2 * max(d2.max(), delta.max()):
        raise ValueError(
            f"||h - c||^2 would be {offset:.3g}: these distortions and distances cannot come from "
            "the same probes"
        )
    return max(offset, 0.0)


def with_merge(d2: ArrayLike, delta: ArrayLike) -> Array:
    """`d2` with the merge as one more point at squared distances delta_i; refused like `checked`.

    The sharpest test of measured records: the whole converse follows if this is Euclidean.
    """
    column = np.asarray(delta, dtype=np.float64)[:, None]
    return checked(np.block([[np.asarray(d2), column], [column.T, np.zeros((1, 1))]]))


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
    (the base 1 - sum) and `gap2` = ||h - c_a||^2 from the states themselves; NaN for other rules.
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
        own = owner == task
        gap2 = gap[own].mean(axis=0)
        for k, model in enumerate(models):
            row = {"model": model, "probe_task": task, "weight": float(a[k])}
            for layer, delta in enumerate(x[k, own].mean(axis=0).tolist()):
                rows.append(
                    row | {"layer": layer, "delta": delta, "gap2": float(gap2[layer])}
                )
            if model == task and flipped is not None and rho is not None:
                near = np.sqrt(x[k, own, -1]) < np.asarray(rho)[own]
                rows[-1]["flips"] = float(np.mean(np.asarray(flipped)[own]))
                rows[-1]["certified"] = float(near.mean())
    return rows


# --- from distortion to accuracy ------------------------------------------------------------------


def _margins(states: ArrayLike, readout: ArrayLike, bias: ArrayLike | None):
    """Top class a (P,), margins m_k = z_a - z_k (P, C) and lengths ||w_a - w_k|| (P, C)."""
    h, w = np.asarray(states, dtype=np.float64), np.asarray(readout, dtype=np.float64)
    z = h @ w.T + (0.0 if bias is None else np.asarray(bias, dtype=np.float64))
    top = z.argmax(1)
    square = (w * w).sum(1)
    length2 = square[top][:, None] + square - 2 * w[top] @ w.T
    return top, z.max(1)[:, None] - z, np.sqrt(np.maximum(length2, 0.0))


def margin_radius(
    states: ArrayLike, readout: ArrayLike, bias: ArrayLike | None = None
) -> Array:
    """rho(x) = min_k m_k / ||w_a - w_k||: exact distance from H(x) to where its top class changes.

    `states` (P, d) feed logits z = W h + b with `readout` W (C, d), `bias` b (C,). Any merge with
    ||h(x) - H(x)|| < rho(x) and the same readout predicts the same class.
    """
    top, margin, length = _margins(states, readout, bias)
    ratio = np.divide(
        margin, length, out=np.where(margin > 0, np.inf, 0.0), where=length > 0
    )
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
        shift = (
            h @ (np.asarray(merged_readout, dtype=np.float64) - np.asarray(readout)).T
        )
    if merged_bias is not None:
        shift = (
            shift
            + np.asarray(merged_bias)
            - (0.0 if bias is None else np.asarray(bias))
        )
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
