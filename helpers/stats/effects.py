"""Means, contrasts and shares, with intervals over tasks or over their families.

Pairs share tasks, so what is left out is a task or a whole family, never a pair. Intervals are
95 %. `units` labels each task by what is left out together: its own name, or its family.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from helpers.stats.dyads import as_shares, as_square, components, mean_of, part

Statistic = Callable[[NDArray], float]  # of the places of the tasks that are kept


class Interval(NamedTuple):
    """An estimate, its 95 % interval over n units, and the two-sided p of the value 0."""

    value: float
    low: float
    high: float
    n: int
    p: float = np.nan

    def __format__(self, digits: str) -> str:
        """f"{found:.2f}": value [low, high], or the value alone where no interval is known."""
        value, low, high = (format(number, digits) for number in self[:3])
        return value if np.isnan(self.low) else f"{value} [{low}, {high}]"

    def clipped(self, least: float = -np.inf, most: float = np.inf) -> "Interval":
        """With ends no quantity of this kind can pass; so near one the p of 0 says nothing."""
        low, high = np.clip([self.low, self.high], least, most)
        return self._replace(low=float(low), high=float(high), p=np.nan)


# --- leaving out ----------------------------------------------------------------------------------


def leave_out(units: Sequence) -> dict[object, NDArray]:
    """For each unit the places of the tasks that are left without it."""
    labels = np.asarray(units)
    names = dict.fromkeys(labels.tolist())
    return {name: np.flatnonzero(labels != name) for name in names}


def variance(statistic: Statistic, units: Sequence) -> tuple[float, float]:
    """A statistic of all tasks and its jackknife variance.

    Units of unequal size are weighted as by Busing, Meijer & van der Leeden (1999).
    """
    n = len(units)
    kept = leave_out(units).values()
    whole = statistic(np.arange(n))
    without = np.array([statistic(places) for places in kept])
    left_out = np.array([n - len(places) for places in kept])
    size = n / left_out
    pseudo = size * whole - (size - 1) * without
    centre = (pseudo / size).sum()
    deviation = (pseudo - centre) / np.sqrt(size - 1)
    return whole, (deviation**2).mean()


def interval(value: float, error: float, n: int, fisher: bool = False) -> Interval:
    """value ± t(n - 1) standard errors; fisher: both are on Fisher's z of a correlation."""
    back = np.tanh if fisher else np.positive
    if not error > 0:
        return Interval(float(back(value)), np.nan, np.nan, n)
    reach = stats.t.ppf(0.975, n - 1) * error
    p = 2 * stats.t.sf(abs(value) / error, n - 1)
    ends = [value, value - reach, value + reach]
    return Interval(*map(float, back(ends)), n, float(p))


def jackknife(statistic: Statistic, units: Sequence, fisher: bool = False) -> Interval:
    """Delete-one interval of a number; fisher: of a correlation.

    Undefined below 3 units, and where the statistic is undefined without one of them.
    """
    g = len(set(units))
    if g < 3:
        value = statistic(np.arange(len(units)))
        return Interval(float(value), np.nan, np.nan, g)
    turn = np.arctanh if fisher else np.positive
    with np.errstate(all="ignore"):
        whole, spread = variance(lambda kept: turn(statistic(kept)), units)
        return interval(whole, np.sqrt(spread), g, fisher)


def mean(matrix: ArrayLike, units: Sequence) -> Interval:
    """Mean of the cells of a matrix of tasks."""
    matrix = as_square(matrix)
    return jackknife(lambda kept: mean_of(part(matrix, kept)), units)


def share(
    of: Callable[[NDArray], Mapping[str, float]],
    matrix: NDArray,
    name: str,
    units: Sequence,
) -> Interval:
    """One entry of `dyads.shares` (of a matrix) or of `rule_shares` (of a stack), cut at 0 and 1;
    the correlation victim_partner on Fisher's z.
    """
    fisher = name == "victim_partner"

    def statistic(kept: NDArray) -> float:
        rows = matrix[..., kept, :]
        value = of(rows[..., kept])[name]
        return np.clip(value, -0.999, 0.999) if fisher else value

    found = jackknife(statistic, units, fisher)
    if fisher:
        return found
    return found.clipped(0, 1)


def holm(p: ArrayLike) -> NDArray:
    """Holm's corrected p over those that are defined.

    statsmodels' multipletests says the same, but collects all garbage of the process at each call:
    four fifths of the time of notebook 05.
    """
    p = np.asarray(p, float)
    order = np.argsort(p)  # undefined ones last
    among = np.isfinite(p).sum() - np.arange(len(p))
    raised = np.maximum.accumulate(p[order] * among)
    out = np.empty_like(p)
    out[order] = np.minimum(raised, 1)
    return out


# --- rules ----------------------------------------------------------------------------------------


def stacked(matrices: Mapping[str, ArrayLike]) -> NDArray:
    """(rules, n, n), NaN in all rules where it is in one."""
    stack = np.stack([as_square(matrix) for matrix in matrices.values()])
    missing = np.isnan(stack).any(axis=0)
    return np.where(missing, np.nan, stack)


def contrasts(matrices: Mapping[str, ArrayLike], units: Sequence) -> pd.DataFrame:
    """Difference of the mean outcome of every two rules, over the cells that all have.

    Columns first, second, value (first - second), low, high, n, p, p_holm.
    """
    stack = stacked(matrices)
    rows = []
    for (i, first), (j, second) in combinations(enumerate(matrices), 2):
        found = mean(stack[i] - stack[j], units)
        rows.append({"first": first, "second": second} | found._asdict())
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"]))


def rule_shares(stack: NDArray) -> dict[str, float]:
    """Shares of the cells' variance under several rules: rule, victim, partner, relation, rest.

    stack: as `stacked` gives it. rest: what neither the rule nor the cell explains.
    """
    values = stack[:, ~np.isnan(stack[0])]
    rules, cells = values.shape
    if min(rules, cells) < 2:
        return dict.fromkeys(("rule", "victim", "partner", "relation", "rest"), np.nan)
    of_rule = values.mean(axis=1)
    of_cell = values.mean(axis=0)
    left = values - of_rule[:, None] - of_cell + of_cell.mean()
    rest = (left**2).sum() / ((rules - 1) * (cells - 1))
    whole = components(stack.mean(axis=0))
    relation = whole.symmetric + whole.antisymmetric
    return as_shares(
        {
            "rule": of_rule.var(ddof=1) - rest / cells,
            "victim": whole.victim,
            "partner": whole.partner,
            "relation": relation - rest / rules,
            "rest": rest,
        }
    )
