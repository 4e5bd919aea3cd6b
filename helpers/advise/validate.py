"""Are trials worth anything? Forecasts and choices held to merges that were scored with labels.

A study's own tables are the truth; trials read other prompts of the same tasks. Needs no model.
"""

from collections.abc import Callable, Mapping
from itertools import combinations, product

import numpy as np
import pandas as pd
from scipy.stats import betabinom

from helpers import stats
from helpers.advise.choices import ALPHA, lower_end
from helpers.advise.merges import LEVEL
from helpers.study.losses import COLLAPSE
from helpers.study.tables import Pairs, Study

CELL = ["rule", "tasks", "task"]
EDGE = 1 + COLLAPSE / 100  # retention below which a cell has collapsed


# --- forecasts -----------------------------------------------------------------------------------


def measured(study: Study, rules: list[str]) -> pd.DataFrame:
    """What labels say of each cell of the pairs: rule, tasks, task, loss, nll_loss, tests.

    tests: test examples that the specialist answers rightly, of which a loss is a share.
    """
    losses = study.in_arm("default", 2)
    losses = losses[losses["rule"].isin(rules) & losses["loss"].notna()]
    sizes = (
        study.examples.groupby(["merge", "task"]).size().rename("size").reset_index()
    )
    losses = losses.merge(sizes, on=["merge", "task"], validate="one_to_one")
    losses["tests"] = (losses["size"] * losses["specialist"]).round().astype(int)
    return losses[[*CELL, "loss", "nll_loss", "tests"]]


def on_prompts(trials: pd.DataFrame, count: int) -> pd.DataFrame:
    """One row per cell from its first `count` prompts.

    Columns kept (count), prompts, retention (their ratio), rise (mean), foretold (share that will
    score: each prompt counts by the model's confidence in its own answer, for what it gives without
    confidence is often wrong, and easily lost at no cost), effective (so many prompts of equal
    weight are as good). trials: a row per cell and prompt, as trials.csv.gz has them.
    """
    first = trials[trials["prompt"] < count]
    weight = first["confidence"]
    first = first.assign(weight=weight, square=weight**2, right=weight * first["kept"])
    groups = first.groupby(CELL, sort=False)
    sums = groups[["kept", "weight", "square", "right"]].sum()
    table = pd.DataFrame({"kept": sums["kept"], "prompts": groups.size()})
    table["retention"] = table["kept"] / table["prompts"]
    table["rise"] = groups["rise"].mean()
    table["foretold"] = sums["right"] / sums["weight"]
    table["effective"] = sums["weight"] ** 2 / sums["square"]
    return table.reset_index()


def forecasts(trials: pd.DataFrame, losses: pd.DataFrame, count: int) -> pd.DataFrame:
    """Cells with what trials of `count` prompts foretell and what labels say (`measured`).

    Adds truth (1 + loss, from 0 to 1), the interval low to high of the forecast, covered, and
    whether a collapse is foretold and measured. The interval is the beta-binomial prediction of
    `tests` further examples after the effective prompts (Jeffreys' prior): it knows the noise of
    both samples.
    """
    table = on_prompts(trials, count).merge(losses, on=CELL, validate="one_to_one")
    table["truth"] = (1 + table["loss"] / 100).clip(0, 1)
    kept = table["effective"] * table["foretold"]
    future = betabinom(table["tests"], kept + 0.5, table["effective"] - kept + 0.5)
    table["low"] = future.ppf(0.5 - LEVEL / 2) / table["tests"]
    table["high"] = future.ppf(0.5 + LEVEL / 2) / table["tests"]
    table["covered"] = table["truth"].between(table["low"] - 1e-9, table["high"] + 1e-9)
    table["collapse_foretold"] = table["foretold"] < EDGE
    table["collapse"] = table["truth"] < EDGE
    return table


def calibration(cells: pd.DataFrame) -> dict[str, float]:
    """How well `forecasts` did: r, error (points), bias (points), coverage, missed, alarms.

    plain_error: of retention itself. r_nll: correlation of the rise of NLL with the NLL loss.
    missed: share of collapses that were not foretold; alarms: share of the other cells where one
    was. merges, safe, false_safe: how many were tried, called safe against collapse, and collapsed
    all the same.
    """
    miss = 100 * (cells["foretold"] - cells["truth"])
    plain_miss = 100 * (cells["retention"] - cells["truth"])
    collapse, foretold = cells["collapse"], cells["collapse_foretold"]
    merges = assurance(cells)
    return {
        "cells": len(cells),
        "r": cells["foretold"].corr(cells["truth"]),
        "r_nll": cells["rise"].corr(cells["nll_loss"]),
        "error": miss.abs().mean(),
        "plain_error": plain_miss.abs().mean(),
        "bias": miss.mean(),
        "coverage": cells["covered"].mean(),
        "collapses": int(collapse.sum()),
        "missed": (~foretold)[collapse].mean(),
        "alarms": foretold[~collapse].mean(),
        "merges": len(merges),
        "safe": int(merges["safe"].sum()),
        "false_safe": int((merges["safe"] & merges["collapse"]).sum()),
    }


def assurance(cells: pd.DataFrame) -> pd.DataFrame:
    """One row per merge: safe (each model's exact lower end is above EDGE), collapse (of any)."""
    least = lower_end(cells["kept"], cells["prompts"], ALPHA)
    table = cells.assign(safe=least > EDGE)
    return table.groupby(["rule", "tasks"]).agg({"safe": "all", "collapse": "any"})


# --- choices -------------------------------------------------------------------------------------
# Each gives the values of a matrix of pairs by (case, option): of losses what an option is worth,
# of a score what it says of the option.


def partners(values: Pairs) -> pd.Series:
    """Whom to merge a task with: a case for each task, an option for each partner."""
    ordered = product(values.tasks, repeat=2)
    return _series(
        {((task,), (task, other)): values.of(task, other) for task, other in ordered}
    )


def pools(values: Pairs, size: int = 4, most: int = 500, seed: int = 0) -> pd.Series:
    """Which pair to merge of a pool of tasks: a case for each pool, `most` drawn if more."""
    cases = list(combinations(values.tasks, min(size, len(values.tasks))))
    if len(cases) > most:
        drawn = np.random.default_rng(seed).choice(len(cases), most, replace=False)
        cases = [cases[i] for i in sorted(drawn)]
    options = ((case, pair) for case in cases for pair in combinations(case, 2))
    return _series({(case, pair): values.of(*pair) for case, pair in options})


def leavers(values: Pairs) -> pd.Series:
    """Who leaves a pair for a newcomer drawn at random: the advice of arXiv:2603.09463.

    A case for each pair, two options (stays, leaves); value: mean of the pairs of the member that
    stays with each outside task.
    """
    options = {}
    for pair in combinations(values.tasks, 2):
        outside = [task for task in values.tasks if task not in pair]
        for stays, leaves in (pair, pair[::-1]):
            with_others = [values.of(stays, other) for other in outside]
            defined = [value for value in with_others if value == value]
            options[pair, (stays, leaves)] = np.mean(defined) if defined else np.nan
    return _series(options)


def _series(options: Mapping[tuple, float]) -> pd.Series:
    index = pd.MultiIndex.from_tuples(options, names=["case", "option"])
    return pd.Series([*options.values()], index, dtype=float)


def choose(
    options: Callable[[Pairs], pd.Series], loss: Pairs, scores: Mapping[str, Pairs]
) -> pd.DataFrame:
    """What each score's choice is worth: a row per criterion and case, gain and regret (points).

    options: `partners`, `pools` or `leavers`. scores: higher says loses less. gain: loss of the
    option taken less the mean over options, random choice; regret: of the best option less the one
    taken. Among ties, the mean.
    """
    outcome = options(loss)
    frames = []
    for name, score in scores.items():
        table = pd.DataFrame({"outcome": outcome, "score": options(score)}).dropna()
        by_case = table.groupby("case", sort=False)
        best = by_case["score"].transform("max")
        chosen = table[table["score"] >= best - 1e-12]
        taken = chosen.groupby("case", sort=False)["outcome"].mean()
        gain = taken - by_case["outcome"].mean()
        regret = by_case["outcome"].max() - taken
        frame = pd.DataFrame({"outcome": taken, "gain": gain, "regret": regret})
        frames.append(frame.reset_index().assign(criterion=name))
    return pd.concat(frames, ignore_index=True)


def over_tasks(
    chosen: pd.DataFrame, column: str, units: Mapping[str, str]
) -> stats.Interval:
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
            mean = over_tasks(group, column, units)
            row |= {
                column: mean.value,
                f"{column}_low": mean.low,
                f"{column}_high": mean.high,
            }
        rows.append(row | {"cases": len(group), "tasks": len(units)})
    return pd.DataFrame(rows)
