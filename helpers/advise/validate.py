"""Are trials worth anything? Forecasts and choices held to merges that were scored with labels.

A study's own tables are the truth; trials read other prompts of the same tasks. Needs no model.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import betabinom

from helpers import stats
from helpers.study.tables import Pairs

COLLAPSE = -30.0  # % of the specialist's score
CELL = ["rule", "tasks", "task"]


# --- forecasts -----------------------------------------------------------------------------------


def on_prompts(trials: pd.DataFrame, count: int) -> pd.DataFrame:
    """One row per cell from its first `count` prompts: kept (count), prompts, rise.

    trials: a row per cell and prompt, as trials.csv.gz has them.
    """
    first = trials[trials["prompt"] < count]
    groups = first.groupby(CELL, sort=False)
    table = groups.agg(kept=("kept", "sum"), prompts=("kept", "size"), rise=("rise", "mean"))
    return table.reset_index()


def forecasts(
    trials: pd.DataFrame,
    losses: pd.DataFrame,
    tests: int,
    count: int,
    level: float = 0.9,
) -> pd.DataFrame:
    """Cells with what trials of `count` prompts foretell and what labels say.

    losses: columns rule, tasks, task, loss (%) and nll_loss. Adds foretold and measured retention
    (shares; measured is 1 + loss, at most 1), its interval low to high, covered, and whether a
    collapse is foretold and measured. The interval is the beta-binomial prediction of `tests`
    further examples after kept of prompts (Jeffreys' prior): it knows both samples' noise.
    """
    table = on_prompts(trials, count).merge(losses, on=CELL, validate="one_to_one")
    table = table.dropna(subset=["loss"])
    n = table["prompts"]
    table["foretold"] = table["kept"] / n
    table["measured"] = (1 + table["loss"] / 100).clip(0, 1)
    shape = tests, table["kept"] + 0.5, n - table["kept"] + 0.5
    table["low"] = betabinom.ppf(0.5 - level / 2, *shape) / tests
    table["high"] = betabinom.ppf(0.5 + level / 2, *shape) / tests
    table["covered"] = table["measured"].between(table["low"] - 1e-9, table["high"] + 1e-9)
    edge = 1 + COLLAPSE / 100
    table["collapse_foretold"] = table["foretold"] < edge
    table["collapse"] = table["measured"] < edge
    return table


def calibration(cells: pd.DataFrame) -> dict[str, float]:
    """How well `forecasts` did: r, error (points), bias (points), coverage, missed, alarms.

    r_nll: correlation of the rise of NLL with the NLL loss. missed: share of collapses that were
    not foretold; alarms: share of the other cells where one was.
    """
    miss = 100 * (cells["foretold"] - cells["measured"])
    collapse, foretold = cells["collapse"], cells["collapse_foretold"]
    return {
        "cells": len(cells),
        "r": cells["foretold"].corr(cells["measured"]),
        "r_nll": cells["rise"].corr(cells["nll_loss"]),
        "error": miss.abs().mean(),
        "bias": miss.mean(),
        "coverage": cells["covered"].mean(),
        "collapses": int(collapse.sum()),
        "missed": (~foretold)[collapse].mean(),
        "alarms": foretold[~collapse].mean(),
    }


# --- choices -------------------------------------------------------------------------------------


def partner_options(outcome: Pairs) -> pd.DataFrame:
    """Whom to merge a task with: a case for each task, an option for each partner.

    outcome: loss of a pair, symmetric. Columns case, option (a tuple of tasks), outcome.
    """
    rows = []
    for task in outcome.tasks:
        for partner in outcome.tasks:
            rows.append({"case": (task,), "option": (task, partner)})
    return _with_outcome(rows, outcome)


def pair_options(outcome: Pairs, pool: int = 4, most: int = 500, seed: int = 0) -> pd.DataFrame:
    """Which pair to merge of a pool of tasks: a case for each pool, `most` drawn if there are more.

    Columns as in `partner_options`.
    """
    pools = list(combinations(outcome.tasks, min(pool, len(outcome.tasks))))
    if len(pools) > most:
        drawn = np.random.default_rng(seed).choice(len(pools), most, replace=False)
        pools = [pools[i] for i in sorted(drawn)]
    rows = []
    for case in pools:
        rows += [{"case": case, "option": pair} for pair in combinations(case, 2)]
    return _with_outcome(rows, outcome)


def leaver_options(outcome: Pairs) -> pd.DataFrame:
    """Who leaves a pair for a newcomer drawn at random: the advice of arXiv:2603.09463.

    A case for each pair, two options (stays, leaves); outcome: mean loss of the pairs of the member
    that stays with each outside task. outcome: symmetric.
    """
    rows = []
    for pair in combinations(outcome.tasks, 2):
        for stays, leaves in (pair, pair[::-1]):
            others = [task for task in outcome.tasks if task not in pair]
            losses = [outcome.of(stays, other) for other in others]
            row = {"case": pair, "option": (stays, leaves), "outcome": np.nanmean(losses)}
            rows.append(row)
    return pd.DataFrame(rows)


def _with_outcome(rows: Sequence[dict], outcome: Pairs) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    table["outcome"] = [outcome.of(*option) for option in table["option"]]
    return table.dropna(subset=["outcome"])


def pair_score(score: Pairs, options: pd.DataFrame) -> list[float]:
    """A score of pairs (higher: will lose less) for each option of two tasks."""
    return [score.of(*option) for option in options["option"]]


def leaver_score(score: Pairs, options: pd.DataFrame) -> list[float]:
    """For `leaver_options`: mean score of the member that stays with the tasks outside."""
    scores = []
    for (stays, _), case in zip(options["option"], options["case"], strict=True):
        others = [task for task in score.tasks if task not in case]
        scores.append(np.nanmean([score.of(stays, other) for other in others]))
    return scores


def choose(options: pd.DataFrame, scores: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """What each score's choice is worth: a row per case and criterion, gain and regret (points).

    gain: loss of the option taken less the mean over options, random choice; regret: of the best
    option less the one taken. Among ties, the mean.
    """
    rows = []
    for name, values in scores.items():
        table = options.assign(score=np.asarray(values, float)).dropna(subset=["score"])
        for case, group in table.groupby("case", sort=False):
            best = group["score"] >= group["score"].max() - 1e-12
            taken = group.loc[best, "outcome"].mean()
            row = {"case": case, "criterion": name, "outcome": taken}
            row["gain"] = taken - group["outcome"].mean()
            row["regret"] = group["outcome"].max() - taken
            rows.append(row)
    return pd.DataFrame(rows)


def over_tasks(chosen: pd.DataFrame, column: str, units: Mapping[str, str]) -> stats.Interval:
    """Mean of a column over cases, with a 95 % jackknife interval over tasks or families.

    units: what is left out together, by task. Without a task go all cases that name it: cases that
    share tasks are no independent ones.
    """
    tasks = list(units)
    values = chosen[column].to_numpy(float)

    def mean(kept: np.ndarray) -> float:
        names = {tasks[i] for i in kept}
        inside = [names.issuperset(case) for case in chosen["case"]]
        return values[inside].mean()

    return stats.jackknife(mean, list(units.values()))


def summary(chosen: pd.DataFrame, units: Mapping[str, str]) -> pd.DataFrame:
    """One row per criterion: gain and regret with intervals (`over_tasks`), cases, tasks."""
    rows = []
    for criterion, group in chosen.groupby("criterion", sort=False):
        row = {"criterion": criterion}
        for column in ("gain", "regret"):
            found = over_tasks(group, column, units)
            row |= {column: found.value, f"{column}_low": found.low, f"{column}_high": found.high}
        rows.append(row | {"cases": len(group), "tasks": len(units)})
    return pd.DataFrame(rows)
