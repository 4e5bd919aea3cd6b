"""What did a merge lose, and how sure is that? The one room of the merging loss.

A loss is a percentage of the specialist's score, negative where merging did harm. A cell is one
task in one merge. Intervals are of test examples: those of training are another matter.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

COLLAPSE = -30.0  # a merging loss (%) below this …
CERTAINLY = -10.0  # … whose 95 % interval ends below this is a collapse
FLOOR = -90.0  # a control (%) below this leaves a partner nothing to harm
DRAWS = 2000  # bootstrap resamples of an interval
ALARM_DRAWS = 500  # simulated merges behind a rate of false alarms
NOTHING = 1e-9  # a score above chance by no more than this is rounding
SPECIALIST = "specialist"  # what examples.csv.gz calls the merge of one

Cells = Mapping[tuple[str, str], pd.DataFrame]
"""Examples by (merge, task), as `by_cell` gives them."""


class Interval(NamedTuple):
    """An estimate with its 95 % interval over n resampled test examples."""

    value: float
    low: float
    high: float
    n: int


# --- the formula -------------------------------------------------------------------------------


def merging_loss(
    merged: ArrayLike, specialist: ArrayLike, chance: ArrayLike = 0.0
) -> NDArray:
    """L = (P_merged / P_specialist - 1) * 100 %, arXiv:2603.09463; scores in [0, 1], any shape.

    With `chance`, the loss of what exceeds it. Undefined (nan) where the specialist does not.
    """
    left = np.asarray(merged, float) - chance
    own = np.asarray(specialist, float) - chance
    defined = own > NOTHING
    ratio = left / np.where(defined, own, 1)
    loss = (ratio - 1) * 100
    return np.where(defined, loss, np.nan)[()]


def read_dose(curve: pd.DataFrame, dose: ArrayLike, column: str = "score") -> NDArray:
    """`column` at a dose of the own task vector, linear between the doses that were measured.

    `curve` has a row per dose (0: base, 1: specialist). nan outside the measured range.
    """
    points = curve.sort_values("dose")
    measured = points["dose"], points[column]
    return np.interp(dose, *measured, left=np.nan, right=np.nan)[()]


def dose_loss(curve: pd.DataFrame, dose: ArrayLike) -> NDArray:
    """Merging loss (%) at a share of the own task vector, no partner involved."""
    specialist = read_dose(curve, 1.0)
    return merging_loss(read_dose(curve, dose), specialist)


# --- intervals over test examples --------------------------------------------------------------


@lru_cache(maxsize=8)  # a study asks for thousands of intervals over few sizes
def resamples(
    sizes: tuple[int, ...], draws: int = DRAWS, seed: int = 0
) -> list[NDArray]:
    """How often each example is drawn, (draws, n) for each of the sizes n, independently."""
    rng = np.random.default_rng(seed)
    even = [np.full(n, 1 / n) for n in sizes]
    drawn = [rng.multinomial(len(p), p, size=draws) for p in even]
    return [counts.astype(float) for counts in drawn]


def percent(change: NDArray, own: NDArray) -> NDArray:
    """100 * change / own; nan where own is not positive."""
    return 100 * change / np.where(own > NOTHING, own, np.nan)


def limits(drawn: NDArray) -> NDArray:
    """95 % percentile interval of resampled values, along their first axis."""
    return np.nanquantile(drawn, [0.025, 0.975], axis=0)


def _same_examples(merged: ArrayLike, specialist: ArrayLike) -> tuple[NDArray, NDArray]:
    merged = np.asarray(merged, float)
    specialist = np.asarray(specialist, float)
    if merged.shape != specialist.shape or merged.ndim != 1 or merged.size == 0:
        raise ValueError(
            f"merged and specialist need scores of the same examples, got shapes {merged.shape} "
            f"and {specialist.shape}"
        )
    return merged, specialist


def interval(
    cells: Sequence[tuple[ArrayLike, ArrayLike]],
    chance: Sequence[float] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean merging loss (%) of the tasks of one merge, with its paired bootstrap interval.

    `cells` holds (merged, specialist) per task: scores of the same test examples; `chance` a score
    per task, for the loss of what exceeds it. Examples are resampled within a task, once for both;
    tasks are kept. Undefined (nan) if any task's loss is. No variation is seen where all scores
    agree. Raises ValueError unless both have scores of the same examples, one at least.
    """
    cells = [_same_examples(*cell) for cell in cells]
    sizes = tuple(own.size for _, own in cells)
    chance = chance or np.zeros(len(cells))
    repeats = resamples(sizes, draws, seed)
    losses, drawn = [], []
    for (merged, own), floor, counts in zip(cells, chance, repeats, strict=True):
        losses.append(merging_loss(merged.mean(), own.mean(), floor))
        change = counts @ (merged - own)
        gain = counts @ (own - floor)
        drawn.append(percent(change, gain))
    value = float(np.mean(losses))
    if np.isnan(value):
        return Interval(np.nan, np.nan, np.nan, sum(sizes))
    low, high = limits(np.mean(drawn, axis=0))
    return Interval(value, float(low), float(high), sum(sizes))


def collapsed(loss: ArrayLike, high: ArrayLike) -> pd.arrays.BooleanArray:
    """The collapse rule: loss < -30 % and the upper end of its 95 % interval < -10 %.

    The same rule serves the loss of what exceeds chance. Undefined (NA) where the loss is.
    """
    loss = np.atleast_1d(np.asarray(loss, float))
    high = np.atleast_1d(np.asarray(high, float))
    fell = (loss < COLLAPSE) & (high < CERTAINLY)
    return pd.arrays.BooleanArray(fell, mask=np.isnan(loss))


def false_alarm_rate(specialist: ArrayLike, chance: float = 0.0) -> float:
    """How often the collapse rule fires on a merge that is as good as its specialist.

    Both are drawn with replacement from the specialist's scores, independently. Answers of a real
    merge and its specialist go together, which makes their loss less noisy: an upper figure. What
    a count of collapsed cells holds of false alarms is at most the sum of their tasks' rates.
    """
    scores = np.asarray(specialist, float)
    rng = np.random.default_rng(0)
    merged, own = rng.choice(scores, (2, scores.size, ALARM_DRAWS))
    loss = merging_loss(merged.mean(0), own.mean(0), chance)
    (counts,) = resamples((scores.size,), 400)
    drawn = percent(counts @ (merged - own), counts @ (own - chance))
    drawn[:, np.isnan(loss)] = 0  # undefined, so no alarm
    high = limits(drawn)[1]
    return float(collapsed(loss, high).fillna(False).mean())


# --- tables ------------------------------------------------------------------------------------


def by_cell(merges: pd.DataFrame, examples: pd.DataFrame) -> Cells:
    """{(merge, task): its examples}; a merge that equals an earlier one has the examples of that.

    The specialists' are at (SPECIALIST, task).
    """
    cells = dict(list(examples.groupby(["merge", "task"], sort=False)))
    for copy in merges.dropna(subset="same_as").itertuples():
        for task in copy.tasks:
            cells[copy.merge, task] = cells[copy.same_as, task]
    return cells


def read_doses(
    doses: pd.DataFrame, tasks: pd.Series, at: pd.Series, column: str = "score"
) -> NDArray:
    """`read_dose` of each row: the curve of its task, at its dose."""
    curves = dict(list(doses.groupby("task")))
    rows = zip(tasks, at, strict=True)
    return np.array([read_dose(curves[task], dose, column) for task, dose in rows])


def loss_table(
    scores: pd.DataFrame, references: pd.DataFrame, doses: pd.DataFrame
) -> pd.DataFrame:
    """Losses of cells, their controls, and the parts of their loss, as in losses.csv.

    `scores` has a row per cell: merge, task, score, nll, invalid, dose_ingredient, dose_own,
    control_solo, nll_solo (nan for a weighted sum, whose doses say what it loses alone);
    `references` a row per task: specialist, base, chance, nll_specialist, nll_base; `doses` the
    dose curves. With L(d) the loss at dose d of the own task vector, a the ingredient and c the
    own-direction dose: dilution = L(a); overlap = L(c) - L(a); interference = loss - L(c). solo is
    the loss of the same rule with partners that changed nothing. floor: a control is below -90 %.
    """
    out = scores.merge(references, on="task", how="left", validate="many_to_one")
    for dose in ("ingredient", "own"):
        out[f"control_{dose}"] = read_doses(doses, out.task, out[f"dose_{dose}"])
    own = out.specialist
    reached = merging_loss(out.control_own, own)
    out["loss"] = merging_loss(out.score, own)
    out["chance_corrected"] = merging_loss(out.score, own, out.chance)
    out["solo"] = merging_loss(out.control_solo, own)
    out["dilution"] = merging_loss(out.control_ingredient, own)
    out["overlap"] = reached - out.dilution
    out["interference"] = out.loss - reached
    control = out.solo.fillna(np.fmin(out.dilution, reached))
    return out.assign(floor=control < FLOOR)


def with_intervals(losses: pd.DataFrame, cells: Cells, seed: int = 0) -> pd.DataFrame:
    """`losses` with intervals and collapses, as they are and of what exceeds chance.

    Adds loss_low, loss_high, collapsed; corrected_low, corrected_high, collapsed_corrected.
    """
    rows = []
    for row in losses.itertuples():
        merged = cells[row.merge, row.task]["correct"]
        own = cells[SPECIALIST, row.task]["correct"]
        plain = interval([(merged, own)], seed=seed)
        above = interval([(merged, own)], [row.chance], seed=seed)
        rows.append(plain[1:3] + above[1:3])
    names = ["loss_low", "loss_high", "corrected_low", "corrected_high"]
    ends = pd.DataFrame(rows, losses.index, names)
    return losses.join(ends).assign(
        collapsed=collapsed(losses.loss, ends.loss_high),
        collapsed_corrected=collapsed(losses.chance_corrected, ends.corrected_high),
    )


def merge_losses(merges: pd.DataFrame, cells: Cells, seed: int = 0) -> pd.DataFrame:
    """`merges` with the mean loss of their tasks: loss, loss_low, loss_high, collapsed."""
    rows = []
    for row in merges.itertuples():
        keys = [((row.merge, task), (SPECIALIST, task)) for task in row.tasks]
        pairs = [[cells[key]["correct"] for key in two] for two in keys]
        rows.append(interval(pairs, seed=seed)[:3])
    names = ["loss", "loss_low", "loss_high"]
    found = pd.DataFrame(rows, merges.index, names)
    fell = collapsed(found.loss, found.loss_high)
    return merges.join(found).assign(collapsed=fell)


def outcomes(losses: pd.DataFrame, doses: pd.DataFrame) -> pd.DataFrame:
    """`losses` with what needs no partner and what the partners did, of the score and of the NLL.

    alone (%): solo where it was run, else dilution; partners: loss - alone, and of the loss of what
    exceeds chance: partners_corrected. nll_loss (nats per token): specialist minus merge, a loss
    without a floor; nll_alone, nll_partners: likewise.
    """
    out = losses.copy()
    out["alone"] = out.solo.fillna(out.dilution)
    out["partners"] = out.loss - out.alone
    above = out.specialist - out.chance
    out["partners_corrected"] = out.partners * out.specialist / above.where(above > 0)
    diluted = read_doses(doses, out.task, out.dose_ingredient, "nll")
    alone = out.nll_solo.where(out.solo.notna(), diluted)
    out["nll_loss"] = out.nll_specialist - out.nll
    out["nll_alone"] = out.nll_specialist - alone
    out["nll_partners"] = out.nll_loss - out.nll_alone
    return out


def directed(losses: pd.DataFrame) -> pd.DataFrame:
    """The cells of merges of two, as victim (the task scored) and partner (the other one).

    Ambiguous cells are left out: the two tasks want other answers to prompts that both have.
    """
    cells = losses[losses.tasks.map(len) == 2].rename(columns={"task": "victim"})
    if "ambiguous" in cells:  # older studies do not say
        cells = cells[~cells.ambiguous.astype(bool)]
    rows = zip(cells.victim, cells.tasks, strict=True)
    partners = [b if victim == a else a for victim, (a, b) in rows]
    place = cells.columns.get_loc("victim") + 1
    cells.insert(place, "partner", partners)
    return cells
