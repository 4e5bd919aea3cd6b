"""Directed matrices of tasks: what belongs to a victim, to a partner, to the two together.

Cell (i, j) of a matrix is an outcome of task i, the victim, merged with task j, its partner. NaN is
a pair that nobody merged: most of them, where each task met a few drawn partners. The model is the
social-relations model (Warner, Kenny & Stoto 1979): m_ij = mean + victim_i + partner_j +
relation_ij, where a task's two effects may go together, and so may the two directions of a pair.
A pair has both directions or none: where one is NaN the pair takes no part. `blocks` are the
families of the tasks, one label each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Places = tuple[NDArray, NDArray]


class Effects(NamedTuple):
    """Least-squares effects around their mean; a task without a pair has NaN."""

    mean: float
    victim: NDArray  # (n,)
    partner: NDArray  # (n,)
    relation: NDArray  # (n, n)


class Components(NamedTuple):
    """Variances of the social-relations model, in squared units of the outcome.

    symmetric: the two directions of a pair lose together; antisymmetric: one for the other.
    covariance: of a task's effects as victim and as partner. Unbiased: a variance may be below 0.
    """

    victim: float
    partner: float
    symmetric: float
    antisymmetric: float
    covariance: float


class _Fit(NamedTuple):
    """One half of the model: task effects, what is left, its variance, the effects' mean noise."""

    tasks: NDArray
    left: NDArray
    variance: float
    noise: float


# --- matrices -------------------------------------------------------------------------------------


def as_square(matrix: ArrayLike) -> NDArray:
    """A float copy, (n, n), with NaN on the diagonal. Raises ValueError for another shape."""
    out = np.array(matrix, float)
    if out.ndim != 2 or out.shape[0] != out.shape[1]:
        raise ValueError(
            f"a matrix of tasks by tasks is square, this one has shape {out.shape}"
        )
    np.fill_diagonal(out, np.nan)
    return out


def symmetric(matrix: ArrayLike) -> NDArray:
    """Mean of the two directions of each pair, NaN where either is missing."""
    matrix = as_square(matrix)
    return (matrix + matrix.T) / 2


def part(matrix: NDArray, kept: NDArray) -> NDArray:
    """Rows and columns of the tasks at these places."""
    return matrix[np.ix_(kept, kept)]


def same_family(blocks: Sequence) -> NDArray:
    """True for two tasks of one family, (n, n)."""
    labels = np.asarray(blocks)
    return labels[:, None] == labels


def unrelated(matrix: ArrayLike, blocks: Sequence) -> NDArray:
    """The matrix with NaN for the pairs of one family."""
    return np.where(same_family(blocks), np.nan, as_square(matrix))


def places(matrix: ArrayLike) -> Places:
    """Rows and columns, above the diagonal, of the pairs that have both directions."""
    defined = ~np.isnan(symmetric(matrix))
    return np.nonzero(np.triu(defined))


def design(pairs: Places, n: int, sign: int = 1) -> NDArray:
    """(pairs, n): 1 at the first task of each pair, `sign` at the second."""
    first, second = pairs
    out = np.zeros((len(first), n))
    rows = np.arange(len(out))
    out[rows, first] = 1
    out[rows, second] = sign
    return out


# --- effects --------------------------------------------------------------------------------------


def _fit(values: NDArray, pairs: Places, n: int, sign: int) -> _Fit:
    """values = task_i + sign * task_j + left, least squares over the tasks that have a pair.

    Undefined (NaN) below 3 such tasks.
    """
    columns = design(pairs, n, sign)
    used = columns.any(axis=0)
    tasks = np.full(n, np.nan)
    if used.sum() < 3:
        return _Fit(tasks, np.full(len(values), np.nan), np.nan, np.nan)
    columns = columns[:, used]
    sizes, axes = np.linalg.eigh(columns.T @ columns)
    kept = sizes > 1e-9 * sizes[-1]
    axes = axes[:, kept]
    inverse = (axes / sizes[kept]) @ axes.T
    found = inverse @ (columns.T @ values)
    left = values - columns @ found
    free = len(values) - kept.sum()
    variance = left @ left / free if free else np.nan
    tasks[used] = found
    centred = inverse - inverse.mean(axis=0)
    noise = np.trace(centred) / (used.sum() - 1)
    return _Fit(tasks, left, variance, noise)


def _halves(matrix: ArrayLike) -> tuple[_Fit, _Fit, Places]:
    """Fits of each pair's mean and of half its difference, and the pairs."""
    matrix = as_square(matrix)
    pairs = places(matrix)
    n = len(matrix)
    first = matrix[pairs]
    second = matrix.T[pairs]
    mean = _fit((first + second) / 2, pairs, n, 1)
    tilt = _fit((first - second) / 2, pairs, n, -1)
    return mean, tilt, pairs


def mean_of(values: NDArray) -> float:
    """Mean of what is defined; NaN where nothing is."""
    defined = values[~np.isnan(values)]
    return defined.mean() if len(defined) else np.nan


def decompose(matrix: ArrayLike) -> Effects:
    """Victim, partner and relation effects of a directed matrix, pairs missing or not; undefined
    below 3 tasks that have a pair.

    A pair's mean is a sum of what its tasks have in both roles, half its difference one of what
    they have in one role against the other; the two are fitted apart.
    """
    mean, tilt, pairs = _halves(matrix)
    level = mean_of(mean.tasks)
    both = mean.tasks - level
    either = tilt.tasks - mean_of(tilt.tasks)
    relation = np.full(np.shape(matrix), np.nan)
    relation[pairs] = mean.left + tilt.left
    relation.T[pairs] = mean.left - tilt.left
    return Effects(2 * level, both + either, both - either, relation)


def pair_effects(matrix: ArrayLike) -> tuple[NDArray, NDArray]:
    """Of each pair's mean = level + task_i + task_j + pair_ij: task (n,), pair (n, n)."""
    matrix = symmetric(matrix)
    pairs = places(matrix)
    found = _fit(matrix[pairs], pairs, len(matrix), 1)
    left = np.full(matrix.shape, np.nan)
    left[pairs] = found.left
    left.T[pairs] = found.left
    return found.tasks - mean_of(found.tasks), left


# --- variances ------------------------------------------------------------------------------------


def components(matrix: ArrayLike) -> Components:
    """Variance components by moments (Henderson's method 3), whatever pairs are missing.

    The pairs' variances come from what least squares leaves, those of tasks from the fitted
    effects less the noise that the pairs put there; of a full round robin this is the analysis of
    variance. Moments and not REML: unbiased in sparse designs too, no normality, no search that may
    end at a boundary, and quick enough to leave out every task in turn.
    """
    mean, tilt, _ = _halves(matrix)
    used = ~np.isnan(mean.tasks)
    if not used.any():
        return Components(*[np.nan] * 5)
    seen = np.cov(mean.tasks[used], tilt.tasks[used])
    both = seen[0, 0] - mean.noise * mean.variance
    either = seen[1, 1] - tilt.noise * tilt.variance
    lean = 2 * seen[0, 1]
    return Components(
        victim=both + either + lean,
        partner=both + either - lean,
        symmetric=mean.variance,
        antisymmetric=tilt.variance,
        covariance=both - either,
    )


def as_shares(variances: dict[str, float]) -> dict[str, float]:
    """Each variance as a share of their sum; those below 0 count as 0."""
    above = {name: np.fmax(value, 0.0) for name, value in variances.items()}
    undefined = np.isnan(list(variances.values())).any()
    total = np.nan if undefined else sum(above.values()) or np.nan
    return {name: value / total for name, value in above.items()}


def shares(matrix: ArrayLike) -> dict[str, float]:
    """Shares of the cells' variance: victim, partner, symmetric, antisymmetric, and relation, the
    sum of the latter two.

    victim_partner is the correlation of a task's two effects, cut at -1 and 1, NaN where one of
    them has no variance.
    """
    variances = components(matrix)._asdict()
    covariance = variances.pop("covariance")
    out = as_shares(variances)
    out["relation"] = out["symmetric"] + out["antisymmetric"]
    victim, partner = variances["victim"], variances["partner"]
    if not min(victim, partner) > 0:
        return out | {"victim_partner": np.nan}
    r = covariance / np.sqrt(victim * partner)
    return out | {"victim_partner": float(np.clip(r, -1, 1))}
