"""Squared distances between models: what the bounds are made of. Pure NumPy.

N specialists give states H_i(x) in R^d on P shared probes x. D2[i, j] = E_x ||H_i - H_j||^2, the
mean over probes. For real weights a of sum 1, c_a = sum_i a_i H_i, and any function h of x:

    (A)  ||H_i - c_a||^2 = (D2 a)_i - a' D2 a / 2
    (B)  sum_i a_i delta_i(h) = a' D2 a / 2 + ||h - c_a||^2,   delta_i(h) = E_x ||H_i - h||^2

Distances are squared and un-normalised, in the units of the states.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def squared_distances(states: ArrayLike) -> Array:
    """D2_x[i, j, x] = ||H_i(x) - H_j(x)||^2 from states (N, P, d), in float64; shape (N, N, P).

    Its mean over x is D2. Further axes between probes and width (layers) are kept. Differences are
    taken before squaring: the Gram form would lose the digits of near neighbours. Raises
    ValueError if `states` has fewer than three axes.
    """
    states = np.asarray(states)
    if states.ndim < 3:
        raise ValueError(
            f"states must be (models, probes, .., width), not {states.shape}"
        )
    d2_x = np.zeros((len(states), *states.shape[:-1]))
    for i in range(len(states)):
        for j in range(i):
            d2_x[i, j] = d2_x[j, i] = distortion_x(states[i], states[j])
    return d2_x


def distortion_x(states: ArrayLike, merged: ArrayLike) -> Array:
    """||H_i(x) - h(x)||^2 of states (N, P, d) and a merge's states (P, d); shape (N, P).

    The mean over the last axis is delta_i(h). Other axes before the width broadcast.
    """
    states = np.asarray(states, dtype=np.float64)
    diff = states - np.asarray(merged, dtype=np.float64)
    return np.einsum("...d,...d->...", diff, diff)


def to_centre(d2: ArrayLike, weights: ArrayLike) -> Array:
    """Squared distance of every H_i to c_a by identity (A); weights of sum 1, any sign."""
    a = np.asarray(weights)
    row = np.asarray(d2) @ a
    return row - a @ row / 2


def dispersion(d2: ArrayLike, weights: ArrayLike | None = None) -> float:
    """a' D2 a / 2 = sum_i a_i ||H_i - c_a||^2; uniform weights (default) give V."""
    d2 = np.asarray(d2)
    a = np.full(len(d2), 1 / len(d2)) if weights is None else np.asarray(weights)
    return float(a @ d2 @ a / 2)


def gram(d2: ArrayLike) -> Array:
    """G[i, j] = <H_i - c, H_j - c>, the Gram matrix seen from the mean c."""
    d2 = np.asarray(d2, dtype=np.float64)
    row = d2.mean(axis=1)
    return (row[:, None] + row - d2 - row.mean()) / 2


def coordinates(d2: ArrayLike) -> tuple[Array, float]:
    """Classical scaling: points (N, 2) about their mean, and the share of the spread they hold.

    Leading eigenvectors of the Gram matrix, scaled (Torgerson, Psychometrika 17:401, 1952).
    """
    values, vectors = np.linalg.eigh(gram(d2))
    values = np.maximum(values[::-1], 0)
    axes = vectors[:, ::-1] * np.sqrt(values)
    points = np.zeros((len(values), 2))
    points[:, : len(values)] = axes[:, :2]
    share = values[:2].sum() / values.sum() if values.any() else 1.0
    return points, float(share)


def checked(d2: ArrayLike) -> Array:
    """`d2` in float64, or ValueError if no points in any space have these squared distances.

    Tolerances admit float32 records: 1e-6 of the largest distance, projected away.
    """
    d2 = np.asarray(d2, dtype=np.float64)
    if d2.ndim != 2 or d2.shape[0] != d2.shape[1] or not d2.size:
        raise ValueError(
            f"squared distances must be a square matrix, not of shape {d2.shape}"
        )
    largest = np.abs(d2).max()
    slack = 1e-6 * largest
    if (
        not np.isfinite(d2).all()
        or np.abs(np.diag(d2)).max() > slack
        or d2.min() < -slack
    ):
        raise ValueError(
            "squared distances must be finite and >= 0, with a zero diagonal"
        )
    if np.abs(d2 - d2.T).max() > slack:
        raise ValueError("squared distances must be symmetric")
    values, vectors = np.linalg.eigh(gram(d2))
    if values[0] < -slack * len(d2):
        raise ValueError(
            f"no points have these squared distances (Gram eigenvalue {values[0]:.3g}): average "
            "the squared distances over one set of probes, the same for every pair"
        )
    if values[0] < -1e-12 * largest:  # the rounding of float32: take the nearest points
        points = vectors * np.sqrt(np.maximum(values, 0))
        d2 = squared_distances(points[:, None]).mean(-1)
    return d2


# --- finite probes --------------------------------------------------------------------------------


def _strata(probe_task: ArrayLike) -> list[NDArray[np.intp]]:
    probe_task = np.asarray(probe_task)
    return [np.flatnonzero(probe_task == task) for task in np.unique(probe_task)]


def resampled(
    d2_x: ArrayLike, probe_task: ArrayLike, draws: int = 1000, seed: int = 0
) -> Iterator[Array]:
    """D2 on probes drawn anew within their task, jointly for all models: `draws` matrices (N, N).

    Intervals for R^2 from these are valid where the minimax weights are unique; for Delta^2 only
    with a clear farthest pair: its plug-in and its resamples are biased upwards at ties. V is
    unbiased.
    """
    d2_x = np.asarray(d2_x, dtype=np.float64)
    rng = np.random.default_rng(seed)
    strata = _strata(probe_task)
    for _ in range(draws):
        drawn = np.concatenate([rng.choice(probes, len(probes)) for probes in strata])
        yield d2_x[..., drawn].mean(-1)


def halves(
    d2_x: ArrayLike, probe_task: ArrayLike, draws: int = 100, seed: int = 0
) -> Iterator[tuple[Array, Array]]:
    """D2 on one half of every task's probes and on the other: `draws` random pairs of matrices.

    What is chosen on one half (weights, a pair) and read on the other is biased downwards where the
    plug-in is biased upwards: report both.
    """
    d2_x = np.asarray(d2_x, dtype=np.float64)
    rng = np.random.default_rng(seed)
    strata = _strata(probe_task)
    for _ in range(draws):
        order = [rng.permutation(probes) for probes in strata]
        first, second = (
            np.concatenate([probes[k::2] for probes in order]) for k in (0, 1)
        )
        yield d2_x[..., first].mean(-1), d2_x[..., second].mean(-1)
