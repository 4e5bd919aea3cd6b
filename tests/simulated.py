"""What can so many tasks tell? Studies simulated with relatives and missing pairs.

Variance components as fourteen tasks had them, with bare or instructed prompts, or as the declared
study turned out to have them; relatives' pairs spread three times as far as others, so that few of
them carry half of what is left without task effects.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from helpers.stats.correlations import ESTIMANDS, correlation, equivalence, p_value
from helpers.stats.dyads import same_family, shares, unrelated
from helpers.stats.effects import Interval, contrasts, mean, share

# tasks in each family, again and again
SIZES = (3, 3, 2, 2, 2, 1, 1)
SIZES_DECLARED = (3,) * 3 + (2,) * 9 + (1,) * 21  # those of data/results/tasks96
KINSHIP = 0.3  # correlation of the task effects of relatives
RELATIVES = 3.0  # how much farther relatives' pairs spread


class Components(NamedTuple):
    """Variances of an outcome, and the correlation of a task's effects as victim and as partner."""

    victim: float
    partner: float
    symmetric: float
    antisymmetric: float
    together: float


# The last two: NLL loss of unrelated pairs in data/results/tasks14_instructed and tasks96.
BARE = Components(0.31, 0.25, 0.27, 0.16, -0.8)
INSTRUCTED = Components(0.86, 0.03, 0.05, 0.05, -0.28)
DECLARED = Components(0.36, 0.07, 0.25, 0.32, -0.03)
COMPONENTS = {"bare": BARE, "instructed": INSTRUCTED, "tasks96": DECLARED}


def families(n: int, sizes: Sequence[int] = SIZES) -> NDArray:
    """Family labels of n tasks, families of these sizes again and again."""
    sizes = tuple(sizes) * -(-n // sum(sizes))
    return np.repeat(np.arange(len(sizes)), sizes)[:n]


def drawn_pairs(
    blocks: Sequence, partners: int | None, rng: np.random.Generator
) -> NDArray:
    """Pairs of a study, (n, n) bool: all, or about `partners` unrelated ones for each task."""
    related = same_family(blocks)
    n = len(related)
    if partners is None:
        return ~np.eye(n, dtype=bool)
    out = np.zeros((n, n), bool)
    for task in rng.permutation(n):
        met = out.sum(axis=1)
        free = np.flatnonzero(~related[task] & ~out[task])
        order = rng.permutation(free)
        fewest = order[np.argsort(met[order], kind="stable")]
        chosen = fewest[: max(partners - met[task], 0)]
        out[task, chosen] = True
        out[chosen, task] = True
    return out


def _of_pairs(n: int, rng: np.random.Generator, sign: int = 1) -> NDArray:
    """A standard normal value for each pair, (n, n); the other direction has `sign` times it."""
    upper = np.triu(rng.standard_normal((n, n)), 1)
    return upper + sign * upper.T


def simulate(
    blocks: Sequence,
    rng: np.random.Generator,
    partners: int | None = None,
    of: Components = BARE,
    **truth: float,
) -> tuple[NDArray, NDArray]:
    """A metric, complete and symmetric, and a directed outcome of the pairs drawn, (n, n) each.

    `truth`: the true correlation by estimand (victim, partner, pair), 0 where not given.
    """
    victim, partner, pair = (truth.get(name, 0.0) for name in ESTIMANDS)
    n = len(blocks)
    labels = np.unique(blocks, return_inverse=True)[1]
    shared = rng.standard_normal((n, 3))[labels]
    own = rng.standard_normal((n, 3))
    independent = np.sqrt(KINSHIP) * shared + np.sqrt(1 - KINSHIP) * own
    together = np.array(
        [[1, victim, partner], [victim, 1, of.together], [partner, of.together, 1]]
    )
    metric, hurt, harm = np.linalg.cholesky(together) @ independent.T
    spread = np.where(same_family(blocks), RELATIVES, 1.0)
    left = _of_pairs(n, rng)
    clash = pair * left + np.sqrt(1 - pair**2) * _of_pairs(n, rng)
    x = metric[:, None] / 2 + metric / 2 + np.sqrt(0.5) * spread * left
    y = np.sqrt(of.victim) * hurt[:, None] + np.sqrt(of.partner) * harm
    y += np.sqrt(of.symmetric) * spread * clash
    y += np.sqrt(of.antisymmetric) * spread * _of_pairs(n, rng, -1)
    merged = drawn_pairs(blocks, partners, rng)
    return x, np.where(merged, y, np.nan)


# --- what the tests do ----------------------------------------------------------------------------


def _held(found: Interval, truth: float) -> dict[str, float]:
    """Whether an interval holds the truth, and whether it excludes 0."""
    if np.isnan(found.low):
        return {}
    covered = found.low <= truth <= found.high
    rejected = not found.low <= 0 <= found.high
    return {"covered": covered, "rejected": rejected}


def of_correlations(
    blocks: Sequence,
    rng: np.random.Generator,
    partners: int | None,
    r: float,
    permutations: int,
    of: Components = BARE,
) -> list[dict]:
    """One study in which each estimand in turn has the correlation r: a row per test."""
    rows = []
    for estimand in ESTIMANDS:
        x, y = simulate(blocks, rng, partners, of, **{estimand: r})
        for unit, units, within in _units(blocks):
            found = correlation(x, y, estimand, units)
            row = {"test": estimand, "unit": unit, "truth": r}
            rows.append(row | {"way": "interval"} | _held(found, r))
            rows[-1]["equivalent"] = equivalence(found) < 0.05
            seed = int(rng.integers(2**31))
            p = p_value(x, y, estimand, permutations, seed, within)
            rows.append(row | {"way": "permutation", "rejected": p < 0.05})
    return rows


def _units(blocks: Sequence) -> list[tuple[str, Sequence, Sequence | None]]:
    """Name of the unit, its labels, the blocks of a permutation."""
    return [("task", range(len(blocks)), None), ("family", blocks, blocks)]


def of_means(
    blocks: Sequence,
    rng: np.random.Generator,
    partners: int | None,
    of: Components = BARE,
) -> list[dict]:
    """One study of three rules that differ in each task but not on average: a row per test."""
    y = simulate(blocks, rng, partners, of)[1]
    missing = np.where(np.isnan(y), np.nan, 0.0)
    rules = {name: y + simulate(blocks, rng, of=of)[1] / 2 + missing for name in "abc"}
    rows = []
    for unit, units, _ in _units(blocks):
        row = {"unit": unit, "way": "interval", "truth": 0.0}
        differences = contrasts(rules, units)
        first = Interval(*differences.loc[0, ["value", "low", "high", "n"]])
        rows.append(row | {"test": "mean"} | _held(mean(y, units), 0.0))
        rows.append(row | {"test": "contrast"} | _held(first, 0.0))
        found = share(shares, y, "victim_partner", units)
        row = row | {"test": "victim_partner", "truth": of.together}
        rows.append(row | _held(found, of.together))
        rows += _of_shares(unrelated(y, blocks), units, row, of)
    return rows


def _of_shares(y: NDArray, units: Sequence, row: dict, of: Components) -> list[dict]:
    """Whether the intervals of the shares of unrelated pairs hold them."""
    relation = of.symmetric + of.antisymmetric
    total = of.victim + of.partner + relation
    truths = {"victim": of.victim, "partner": of.partner, "relation": relation}
    rows = []
    for name, variance in truths.items():
        truth = round(variance / total, 3)
        found = share(shares, y, name, units)
        row = row | {"test": f"share of {name}", "truth": truth}
        rows.append(row | _held(found, truth))
    return rows


def rates(study: Callable[[], list[dict]], draws: int) -> pd.DataFrame:
    """Shares over simulated studies; a row per test, way, unit and truth.

    Columns covered (95 % interval holds the truth), rejected (level where the truth is 0, power
    elsewhere), equivalent (false alarms where |truth| is .3 or more).
    """
    rows = pd.DataFrame([row for _ in range(draws) for row in study()])
    keys = ["test", "way", "unit", "truth"]
    columns = ["covered", "rejected", "equivalent"]
    rows[columns] = rows[columns].astype(float)
    return rows.groupby(keys, sort=False)[columns].mean().reset_index()
