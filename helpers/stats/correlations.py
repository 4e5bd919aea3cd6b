"""Does a predictor go with an outcome: with what a task loses, with what it does to partners, or
with what a pair loses beyond its two tasks?

x is a symmetric matrix of tasks or one value for each task, y a directed matrix (`dyads`). Three
estimands: "victim" and "partner" correlate the task effects of x with those of y, "pair" what both
matrices have left without task effects. Each has an interval over `units` and a permutation test.

Tests exchange the labels of x's tasks: of all, or (`blocks`) only inside a family and between whole
families of one size. Statistics are studentised, so that a test is one of no correlation and holds
where some pairs vary more than others, as relatives do (DiCiccio & Romano 2017).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from helpers.stats.dyads import (
    Places,
    decompose,
    design,
    pair_effects,
    part,
    places,
    symmetric,
)
from helpers.stats.effects import Interval, interval, jackknife

MARGIN = 0.3  # a correlation within ± this is none that matters
ESTIMANDS = ("victim", "partner", "pair")


def pearson(a: NDArray, b: NDArray) -> float:
    """r over the places where both are defined; NaN below 3 or where one does not vary."""
    defined = ~np.isnan(a + b)
    a, b = a[defined], b[defined]
    if len(a) < 3 or min(np.ptp(a), np.ptp(b)) <= 1e-12:  # nothing but rounding is left
        return np.nan
    r = np.corrcoef(a, b)[0, 1]
    return float(np.clip(r, -1, 1))


def of_tasks(x: ArrayLike, y: ArrayLike, role: str) -> tuple[NDArray, NDArray]:
    """Task effects of x and those of y as "victim" or "partner", (n,) each.

    In a sparse design a little of a pair-specific correlation gets in, where x lacks the same pairs
    as y; both effects are noisy, which draws r towards 0.
    """
    x = np.asarray(x, float)
    own = x if x.ndim == 1 else pair_effects(x)[0]
    return own, getattr(decompose(y), role)


def of_pairs(x: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray, Places]:
    """What the pairs that both have are left with, without task effects; and these pairs.

    A symmetric x can follow no more of y than the mean of both directions.
    """
    x, y = symmetric(x), symmetric(y)
    missing = np.isnan(x + y)
    x = np.where(missing, np.nan, x)
    y = np.where(missing, np.nan, y)
    pairs = places(y)
    if len(pairs[0]) - len(np.unique(pairs)) <= 2:
        nothing = np.full(len(pairs[0]), np.nan)
        return nothing, nothing, pairs
    return pair_effects(x)[1][pairs], pair_effects(y)[1][pairs], pairs


# --- intervals ------------------------------------------------------------------------------------


def correlation(x: ArrayLike, y: ArrayLike, estimand: str, units: Sequence) -> Interval:
    """r with its interval on Fisher's z, t(g - 1) for g units.

    Task effects: jackknife. Pairs: a jackknife would count each pair's own noise twice, so the
    variance is that of the pairs' influences, clustered by unit.
    """
    if estimand == "pair":
        return _pair_interval(x, y, units)
    a, b = of_tasks(x, y, estimand)
    return jackknife(lambda kept: pearson(a[kept], b[kept]), units, fisher=True)


def _pair_interval(x: ArrayLike, y: ArrayLike, units: Sequence) -> Interval:
    a, b, pairs = of_pairs(x, y)
    r = pearson(a, b)
    g = len(set(units))
    if np.isnan(r) or g < 3 or abs(r) > 1 - 1e-9:
        return Interval(r, np.nan, np.nan, g)
    a = a / a.std()
    b = b / b.std()
    influence = a * b - r / 2 * (a**2 + b**2)
    free = len(a) - len(np.unique(pairs))
    variance = _clustered(influence, pairs, units) / (len(a) * free)
    return interval(np.arctanh(r), np.sqrt(variance) / (1 - r**2), g, fisher=True)


def _clustered(score: NDArray, pairs: Places, units: Sequence) -> float:
    """Variance of a sum of scores of pairs that share units.

    Squared sums over each unit, less those over what two units share, which both have counted
    (Aronow, Samii & Assenova 2015); at least the latter.
    """
    labels = np.unique(units, return_inverse=True)[1]
    g = labels.max() + 1
    ends = np.sort([labels[pairs[0]], labels[pairs[1]]], axis=0)
    table = np.zeros((g, g))
    np.add.at(table, tuple(ends), score)
    within = np.diag(table)
    shared = np.triu(table, 1)
    whole = within + shared.sum(axis=0) + shared.sum(axis=1)
    twice = (shared**2).sum()
    return max((whole**2).sum() - twice, twice + (within**2).sum())


def equivalence(found: Interval, margin: float = MARGIN) -> float:
    """p of two one-sided tests (TOST) against |rho| >= margin, from an interval of r.

    Small: no correlation that matters. The margin is fixed before looking.
    """
    low, high, z, edge = np.arctanh([found.low, found.high, found.value, margin])
    error = (high - low) / 2 / stats.t.ppf(0.975, found.n - 1)
    return float(stats.t.sf((edge - abs(z)) / error, found.n - 1))


# --- permutation tests ----------------------------------------------------------------------------


@lru_cache(maxsize=4)  # a study tests many metrics under the same orders
def orders(blocks: tuple, permutations: int, seed: int) -> NDArray:
    """Orders of the tasks, (permutations + 1, n), first the one in place.

    `blocks`: the family of each task. Families of one size change places, and so do the tasks
    within each.
    """
    rng = np.random.default_rng(seed)
    labels = np.array(blocks)
    n = len(labels)
    by_size: dict[int, list[NDArray]] = {}
    for label in np.unique(labels):
        family = np.flatnonzero(labels == label)
        by_size.setdefault(len(family), []).append(family)
    out = np.tile(np.arange(n), (permutations + 1, 1))
    for families in by_size.values():
        table = np.array(families)
        for order in out[1:]:
            moved = rng.permutation(table)
            order[table] = rng.permuted(moved, axis=1)
    return out


def p_value(
    x: ArrayLike,
    y: ArrayLike,
    estimand: str,
    permutations: int = 9999,
    seed: int = 0,
    blocks: Sequence | None = None,
) -> float:
    """Two-sided p of no correlation, +1 in both counts; NaN where r is undefined.

    Where x lacks pairs outside those of y, tasks' labels cannot be exchanged: then what x has left
    of the pairs is exchanged between them, whatever their families.
    """
    labels = np.zeros(len(x)) if blocks is None else np.asarray(blocks)
    if estimand == "pair":
        moved, outcome = _moved_pairs(x, y, labels, permutations, seed)
    else:
        effects = of_tasks(x, y, estimand)
        moved, outcome = _moved_tasks(*effects, labels, permutations, seed)
    if np.isnan(pearson(moved[0], outcome)):
        return np.nan
    products = moved * outcome
    size = np.sqrt((products**2).sum(axis=1))
    statistic = np.abs(products.sum(axis=1)) / np.where(size > 0, size, np.inf)
    return float(np.mean(statistic >= statistic[0] * (1 - 1e-9)))


def _moved_tasks(
    a: NDArray, b: NDArray, blocks: NDArray, permutations: int, seed: int
) -> tuple[NDArray, NDArray]:
    """Centred task effects of x under every order, (orders, tasks), and those of y."""
    defined = ~np.isnan(a + b)
    a, b = a[defined], b[defined]
    order = orders(tuple(blocks[defined]), permutations, seed)
    return (a - a.mean())[order], b - b.mean()


def _moved_pairs(
    x: ArrayLike, y: ArrayLike, blocks: NDArray, permutations: int, seed: int
) -> tuple[NDArray, NDArray]:
    """What x has left of the pairs under every order, (orders, pairs), and what y has left."""
    left, outcome, pairs = of_pairs(x, y)
    used = np.unique(pairs)
    first, second = np.searchsorted(used, pairs)
    among = part(symmetric(x), used)
    gaps = np.isnan(among).sum() > len(used)
    if gaps or np.isnan(outcome).any():
        one_family = (0,) * len(left)
        moved = left[orders(one_family, permutations, seed)]
    else:
        order = orders(tuple(blocks[used]), permutations, seed)
        moved = among[order[:, first], order[:, second]]
    columns = design((first, second), len(used))
    fitted = moved @ np.linalg.pinv(columns).T
    return moved - fitted @ columns.T, outcome
