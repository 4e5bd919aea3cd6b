"""findings: what do a study's tables say? Outcomes, metrics, associations, effects and verdicts.

From the tables that notebooks 02 to 04 leave (data/results/README.md describes them) to those of
notebook 05. The tests themselves are in `stats`, which knows no column. Every outcome is negative
where merging did harm. One rule for what a table lacks: without `arm` it is of the default arm, and
an outcome or metric that it does not hold is undefined and takes no part.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from helpers.stats import dyads as stats

# The metrics declared before any result: hidden-state distance and the paper's four of conflict.
PRIMARY = ("hidden_sim", "sign_change", "magnitude_change", "conflict_magnitude", "cosine")
ESTIMANDS = {"between": False, "specific": True}  # between tasks; pair-specific
# Arm of matched scales -> the rule that has this scale by default, and so is part of the arm.
REFERENCE = {"norm": "linear", "dose": "linear", "sum": "task_arithmetic"}
MARGIN = 0.3  # |r| below it is no correlation that matters
SMALL = 0.06  # partial omega squared below it is no effect that matters (Cohen's medium: .06)
POINTS = 5.0  # a mean loss smaller than this (percentage points) is none that matters

# outcome of a cell -> unit and meaning
OUTCOMES = {
    "loss": ("%", "merging loss"),
    "alone": ("%", "its part that needs no partner: solo where it was run, else dilution"),
    "partners": ("%", "the rest, the partners' doing"),
    "dilution": ("%", "loss at the dose that the method gives the task vector"),
    "overlap": ("%", "what the partners' overlap with the task vector adds to that"),
    "interference": ("%", "loss that is left when the dose is accounted for"),
    "nll_loss": ("nats", "answer NLL per token, specialist minus merge: a loss without a floor"),
    "nll_alone": ("nats", "its part that needs no partner"),
    "nll_partners": ("nats", "the rest, the partners' doing"),
    "format_loss": ("%", "part of the loss through answers that are none of the options"),
    "knowledge_loss": ("%", "part of the loss through wrong options"),
}
TESTED = tuple(OUTCOMES)[:9]  # those that every kind of task has


# --- tables ------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of a study by name; those that it does not have are left out.

    The linear average is as long as the norm-matched merges of its group by definition, so it is
    listed in that arm as well; likewise in the others (REFERENCE).
    """
    names = ("losses", "merges", "groups", "doses", "pairs", "bound")
    files = {name: folder / f"{name}.csv" for name in names}
    tables = {name: pd.read_csv(path) for name, path in files.items() if path.exists()}
    tables["examples"] = pd.read_csv(folder / "examples.csv.gz", dtype={"example": str})
    for name in ("losses", "merges", "groups"):
        tables[name] = _with_references(tables[name])
    return tables


def _with_references(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its `arm`, and in each matched arm the rule that it is matched to."""
    if "arm" not in table:
        return table.assign(arm="default")
    parts = [table]
    for arm, rule in REFERENCE.items():
        there, default = table[table["arm"] == arm], table[table["arm"] == "default"]
        if rule not in set(there["method"]):
            same = (default["method"] == rule) & default["group"].isin(there["group"])
            parts.append(default[same].assign(arm=arm))
    return pd.concat(parts, ignore_index=True)


def outcomes(losses: pd.DataFrame, doses: pd.DataFrame, examples: pd.DataFrame) -> pd.DataFrame:
    """`losses` with every column of OUTCOMES: one row per merge and task, as it has.

    The NLL's part that needs no partner is read off the dose curve like the score's; a rule that
    drops entries needs the NLL of its solo run (`nll_solo`). format_loss counts what the share of
    invalid answers gained on the specialist's; undefined for tasks without options.
    """
    out = losses.copy()
    out["alone"] = out["solo"].fillna(out["dilution"])
    out["partners"] = out["loss"] - out["alone"]
    curves = {task: curve.sort_values("dose") for task, curve in doses.groupby("task")}
    diluted = [
        np.interp(dose, curves[task]["dose"], curves[task]["nll"], left=np.nan, right=np.nan)
        for task, dose in zip(out["task"], out["dose_ingredient"], strict=True)
    ]
    solo = out.get("nll_solo", np.nan)
    out["nll_loss"] = out["nll_specialist"] - out["nll"]
    out["nll_alone"] = out["nll_specialist"] - np.where(out["solo"].isna(), diluted, solo)
    out["nll_partners"] = out["nll_loss"] - out["nll_alone"]
    own = examples[examples["merge"] == "specialist:" + examples["task"]]
    gained = out["invalid"] - out["task"].map(own.groupby("task")["invalid"].mean())
    out["format_loss"] = -100 * gained / out["specialist"]
    out["knowledge_loss"] = out["loss"] - out["format_loss"]
    return out


def directed(losses: pd.DataFrame) -> pd.DataFrame:
    """The cells of merges of two: task i (`task`) in the company of task j (`partner`)."""
    cells = losses[losses["n"] == 2].copy()
    ends = cells["group"].str.split("+", expand=True)
    cells["partner"] = np.where(ends[0] == cells["task"], ends[1], ends[0])
    return cells


def scales(table: pd.DataFrame) -> list[str]:
    """The arms of a table that are scales of whole rules: the default and the matched ones."""
    return [arm for arm in dict.fromkeys(table["arm"]) if arm == "default" or arm in REFERENCE]


def distinct(losses: pd.DataFrame, arm: str = "default", n: int = 2) -> list[str]:
    """The methods of an arm that are not, in every merge of n, another one's model."""
    mine = losses[(losses["arm"] == arm) & (losses["n"] == n)]
    twin = mine["same_as"].notna() & (mine["same_as"] != "")
    every = twin.groupby(mine["method"], sort=False).all()
    return list(every.index[~every])


def matrix(
    cells: pd.DataFrame, column: str, methods: Sequence[str], arm: str = "default"
) -> pd.DataFrame:
    """Tasks by partners: `column` of the cells, its mean over the methods.

    A cell is undefined where it is under any of the methods. Tasks come in the cells' order.
    """
    mine = cells[(cells["arm"] == arm) & cells["method"].isin(methods)]
    values = mine.assign(value=mine[column].astype(float))
    mean = values.groupby(["task", "partner"])["value"].agg(lambda v: v.mean(skipna=False))
    tasks = list(dict.fromkeys(cells["task"]))
    return mean.unstack().reindex(index=tasks, columns=tasks)


def metrics(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Every pair metric as a symmetric table over tasks.

    The numeric columns of pairs.csv, and of bound.csv the mean over the methods (as bound_…). What
    belongs to one task of the pair (…_a, …_b) becomes its mean, ends of intervals (…_low, …_high)
    are none, and a metric that is constant or undefined somewhere is left out.
    """
    pairs = tables["pairs"].set_index(["task_a", "task_b"]).select_dtypes("number")
    if "bound" in tables:
        two = tables["bound"][tables["bound"]["n"] == 2]
        mean = two.drop(columns="n").groupby("group").mean(numeric_only=True)
        ends = pd.MultiIndex.from_tuples([tuple(group.split("+")) for group in mean.index])
        pairs = pairs.join(mean.set_axis(ends.set_names(pairs.index.names)).add_prefix("bound_"))
    for name in [name[:-2] for name in pairs if name.endswith("_a") and f"{name[:-2]}_b" in pairs]:
        pairs[name] = pairs[[f"{name}_a", f"{name}_b"]].mean(axis=1)
        pairs = pairs.drop(columns=[f"{name}_a", f"{name}_b"])
    kept = [
        name
        for name, values in pairs.items()
        if not name.endswith(("_low", "_high")) and values.notna().all() and values.nunique() > 1
    ]
    tasks = list(dict.fromkeys(tables["losses"]["task"]))
    table = pairs.reset_index()
    return {name: stats.square(table, name, tasks) for name in kept}


# --- how much is lost --------------------------------------------------------------------------


def summary(losses: pd.DataFrame, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Means by arm, group size, method and outcome, beside the shares of floor and collapsed cells.

    Columns arm, n, method, outcome, value, low, high, cells, groups. Cells on the floor, where a
    partner can do no more harm, are counted (`floor`) and left out of the parts of the loss, not of
    the loss itself. For merges of two the interval is 95 % over tasks (`stats.task_bootstrap`).
    """
    rows = []
    shares = losses.astype({"floor": float}).assign(collapsed=losses["collapsed"].astype(float))
    whole = ("floor", "collapsed", "loss", "nll_loss")
    for (arm, n), of_size in shares.groupby(["arm", "n"], sort=False):
        cells = directed(shares) if n == 2 else None
        for method in distinct(losses, arm, n):
            mine = of_size[of_size["method"] == method]
            for outcome in ("floor", "collapsed", *OUTCOMES):
                used = mine if outcome in whole else mine[mine["floor"] == 0]
                known = used.dropna(subset=outcome)
                row = {"arm": arm, "n": n, "method": method, "outcome": outcome}
                row |= {"value": known[outcome].mean(), "cells": len(known)}
                row |= {"groups": known["group"].nunique()}
                if n == 2 and len(known):
                    table = matrix(cells.loc[used.index], outcome, [method], arm)
                    span = stats.task_bootstrap([table], np.mean, draws, seed)
                    row |= {"low": span.low, "high": span.high}
                rows.append(row)
    order = ["arm", "n", "method", "outcome", "value", "low", "high", "cells", "groups"]
    return pd.DataFrame(rows).reindex(columns=order)


def versions(cells: pd.DataFrame, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Pairs merged in another version of a rule that is no scale (another draw, a coarse grid),
    beside its default.

    One row per arm and method: pairs; dose, dose_there: mean own-direction dose in the default and
    in the version; loss, loss_there: mean merging loss (%); difference: loss_there - loss with its
    95 % interval over tasks (low, high); spread: standard deviation of one pair's loss between the
    two (of the differences, over root two); r: their correlation over pairs.
    """
    rows = []
    for arm in [arm for arm in dict.fromkeys(cells["arm"]) if arm not in scales(cells)]:
        for method in dict.fromkeys(cells.loc[cells["arm"] == arm, "method"]):
            loss, there = (matrix(cells, "loss", [method], of) for of in ("default", arm))
            doses = (matrix(cells, "dose_own", [method], of) for of in ("default", arm))
            span = stats.task_bootstrap([loss, there], _mean_difference, draws, seed)
            upper = np.triu_indices(len(loss), 1)
            a, b = (((m + m.T) / 2).to_numpy()[upper] for m in (loss, there))
            a, b = (values[~np.isnan(a + b)] for values in (a, b))
            row = {"arm": arm, "method": method, "pairs": len(a)}
            row |= dict(zip(("dose", "dose_there"), (np.nanmean(m) for m in doses), strict=True))
            row |= {"loss": a.mean(), "loss_there": b.mean(), "difference": span.value}
            row |= {"low": span.low, "high": span.high}
            row |= {"spread": (b - a).std(ddof=1) / math.sqrt(2), "r": np.corrcoef(a, b)[0, 1]}
            rows.append(row)
    columns = ["arm", "method", "pairs", "dose", "dose_there", "loss", "loss_there"]
    columns += ["difference", "low", "high", "spread", "r"]
    return pd.DataFrame(rows, columns=columns)


def _mean_difference(before: np.ndarray, after: np.ndarray) -> float:
    return float((after - before).mean())


# --- what the loss depends on ------------------------------------------------------------------


def effects(
    cells: pd.DataFrame, outcome: str, arm: str, permutations: int, seed: int = 0
) -> pd.DataFrame:
    """Pair and method effects on an outcome in one arm, and its variance components.

    Rows pair and method: `stats.block_model` of the pairs' means; own, partner, residual, task,
    side (and method's share): `stats.crossed_model` of the cells, from 5 tasks on. A task with an
    undefined cell takes no part; n_tasks counts the others. No rows if fewer than 3 are left or if
    the arm has one distinct method.
    """
    methods = distinct(cells, arm)
    mine = cells[(cells["arm"] == arm) & cells["method"].isin(methods)]
    defined = mine[outcome].notna().groupby(mine["task"], sort=False).all()
    tasks = list(defined.index[defined])
    if len(tasks) < 3 or len(methods) < 2:
        return pd.DataFrame()
    mine = mine[mine["task"].isin(tasks) & mine["partner"].isin(tasks)]
    mine = mine.rename(columns={"task": "own"}).assign(loss=mine[outcome])
    mine = mine[["group", "own", "partner", "method", "loss"]]
    pairs = mine.groupby(["group", "method"], sort=False)["loss"].mean().reset_index()
    pairs[["task_a", "task_b"]] = pairs["group"].str.split("+", expand=True)
    found = stats.block_model(pairs, permutations, seed)
    found = found.rename(columns={"p_permutation": "p"})
    if len(tasks) >= 5:
        parts = stats.crossed_model(mine, permutations, seed).drop(columns="variance")
        parts = parts.rename(columns={"low": "share_low", "high": "share_high"})
        found = found.combine_first(parts)
    found = found.rename_axis("effect").reset_index()
    return found.assign(outcome=outcome, arm=arm, n_tasks=len(tasks))


# --- what predicts it --------------------------------------------------------------------------


def association(
    x: pd.DataFrame, y: pd.DataFrame, permutations: int, seed: int = 0
) -> dict[str, float]:
    """Everything told of one metric (symmetric) and one outcome (directed), tables over tasks.

    If m_ij = t_i + t_j + e_ij, a raw r over pairs mixes two correlations, the declared estimands:
    `between` tasks (of t: means over a task's pairs, n = tasks) and pair-`specific` (of e: what is
    left of the directed cells without own-task and partner effects; a symmetric metric can follow
    only the mean of both directions, so r and interval are of that mean). Both with 95 % interval
    and task-permutation p. as_victim, as_partner: `between` for the task's own loss and for the
    loss of those it is merged with. Then what the paper reports, `raw`, with its textbook and its
    task-permutation p, jackknife interval, rank correlation, extremes when one task is left out,
    and the out-of-task R^2 of a line.
    """
    n, both = len(x), (y + y.T) / 2
    draw = {"permutations": permutations, "seed": seed}
    means, means_span = stats.between(x, both, **draw), stats.between_interval(x, both)
    pair, pair_span = stats.mantel(x, y, specific=True, **draw), stats.specific_interval(x, y)
    raw, raw_span = stats.mantel(x, both, **draw), stats.jackknife_interval(x, both)
    ranks = stats.mantel(x, both, kind="spearman", **draw)
    left = stats.leave_one_out(x, both) if n > 3 else np.array([math.nan])
    upper = np.triu_indices(n, 1)
    textbook = scipy_stats.pearsonr(x.to_numpy()[upper], both.to_numpy()[upper])
    known = n >= 5 and not math.isnan(pair_span.value)
    se = stats.specific_se(n) if known else math.nan
    return {
        "between": means.value,
        "between_low": means_span.low,
        "between_high": means_span.high,
        "between_p": means.p,
        "as_victim": stats.between(x, y, 0).value,
        "as_partner": stats.between(x, y.T, 0).value,
        "specific": pair_span.value,
        "specific_low": pair_span.low,
        "specific_high": pair_span.high,
        "specific_p": pair.p,
        "equivalence_p": stats.equivalent(pair_span.value, se, MARGIN) if known else math.nan,
        "raw": raw.value,
        "raw_low": raw_span.low,
        "raw_high": raw_span.high,
        "raw_p": raw.p,
        "textbook_p": float(textbook.pvalue),
        "spearman": ranks.value,
        "spearman_p": ranks.p,
        "without_one_low": float(np.fmin.reduce(left)),
        "without_one_high": float(np.fmax.reduce(left)),
        "left_out_r2": stats.predict_left_out(x, both),
        "n_tasks": n,
        "n_pairs": n * (n - 1) // 2,
    }


def associations(
    cells: pd.DataFrame, known: dict[str, pd.DataFrame], permutations: int, seed: int = 0
) -> pd.DataFrame:
    """`association` of the metrics in `known` with the losses; columns family, metric, outcome, …

    Families: `declared`, the primary metrics against the loss, mean over the distinct methods, for
    both estimands: p_holm is Holm's over these tests and no other. `method`: the same under each
    method. `outcome`: against every part of the loss and of the NLL, at every scale. `exploratory`:
    all other metrics against loss, partners and nll_loss. auroc: the chance that a collapsed cell
    has the larger value of the metric than one that has not (collapsed: under half of the methods
    or more). A task with an undefined cell takes no part in an outcome.
    """
    methods, arms = distinct(cells), scales(cells)
    primary = [name for name in PRIMARY if name in known]
    others = [name for name in known if name not in PRIMARY]
    plan = [("declared", primary, "loss", methods, "default")]
    plan += [("method", primary, "loss", [method], "default") for method in methods]
    plan += [
        ("outcome", primary, outcome, distinct(cells, arm), arm)
        for arm in arms
        for outcome in TESTED
        if (arm, outcome) != ("default", "loss")
    ]
    plan += [
        ("exploratory", others, outcome, methods, "default")
        for outcome in ("loss", "partners", "nll_loss")
    ]
    rows = []
    for family, names, outcome, under, arm in plan:
        y = _whole(matrix(cells, outcome, under, arm))
        if len(y) < 3:
            continue
        fell = matrix(cells, "collapsed", under, arm).loc[y.index, y.columns].to_numpy()
        off = ~np.eye(len(y), dtype=bool)
        for name in names:
            x = known[name].loc[y.index, y.columns]
            row = {"family": family, "metric": name, "outcome": outcome, "arm": arm}
            row |= {"method": under[0] if family == "method" else "mean"}
            row |= association(x, y, permutations, seed)
            rows.append(row | {"auroc": stats.auroc(x.to_numpy()[off], fell[off] >= 0.5)})
    if not rows:
        raise ValueError("no 3 tasks have a defined loss in all their pairs: nothing to correlate")
    out = pd.DataFrame(rows)
    for estimand in ESTIMANDS:
        out[f"{estimand}_p_holm"] = np.nan
    declared = out["family"] == "declared"
    columns = [f"{estimand}_p" for estimand in ESTIMANDS]
    corrected = multipletests(out.loc[declared, columns].to_numpy().ravel(), method="holm")[1]
    out.loc[declared, [f"{c}_holm" for c in columns]] = corrected.reshape(-1, 2)
    return out


def explored(related: pd.DataFrame) -> pd.DataFrame:
    """The tests of the undeclared metrics against the loss, Holm's correction over all of them.

    `related` as `associations` gives it. A row per metric and estimand that has a p (a metric of
    single tasks has nothing pair-specific): metric, estimand, r, low, high, p, p_holm; least p
    first.
    """
    mine = (related["family"] == "exploratory") & (related["outcome"] == "loss")
    out = []
    for estimand in ESTIMANDS:
        names = {estimand: "r", f"{estimand}_low": "low", f"{estimand}_high": "high"}
        names |= {"metric": "metric", f"{estimand}_p": "p"}
        table = related.loc[mine, [*names]].rename(columns=names)
        out.append(table.assign(estimand=estimand))
    tested = pd.concat(out).dropna(subset="p").sort_values("p", kind="stable")
    tested["p_holm"] = multipletests(tested["p"], method="holm")[1] if len(tested) else []
    return tested[["metric", "estimand", "r", "low", "high", "p", "p_holm"]].reset_index(drop=True)


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """The tasks none of whose own cells is undefined."""
    off = table.mask(np.eye(len(table), dtype=bool), 0)
    kept = off.index[off.notna().all(axis=1)]
    return table.loc[kept, kept]


def rivals(cells: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """What a metric must beat, as symmetric tables of the pair's mean.

    What the pair loses without partners (mean over the distinct methods), few-shot score of the
    base, gain of the specialist over it, norm of the task vectors and distance to the base in
    hidden states where pairs.csv has them. All but the last belong to single tasks: the
    pair-specific estimand has taken them out already.
    """
    tasks = list(dict.fromkeys(cells["task"]))
    own = cells.groupby("task")[["base", "specialist"]].first().loc[tasks]
    of_task = {"base ability": own["base"], "gain": own["specialist"] - own["base"]}
    alone = matrix(cells, "alone", distinct(cells))
    found = {"lost without partners": (alone + alone.T) / 2}
    for name, values in of_task.items():
        mean = np.add.outer(values.to_numpy(), values.to_numpy()) / 2
        found[name] = pd.DataFrame(mean, tasks, tasks)
    known = metrics(tables)
    names = {"norm": "norm of the task vectors", "base_distance": "distance to the base"}
    return found | {words: known[name] for name, words in names.items() if name in known}


def partial(
    x: pd.DataFrame, y: pd.DataFrame, given: dict[str, pd.DataFrame], permutations: int, seed: int
) -> pd.DataFrame:
    """Raw r of metric and outcome given each rival, and given all; columns rival, r, given, p.

    r is the rival's own correlation with the outcome, `given` the metric's when the rival is taken
    out of both, p its task-permutation p. Tasks where the outcome or a rival is undefined take no
    part. All rivals at once need at least as many tasks as rivals and two more.
    """
    both = _whole((y + y.T) / 2)
    for rival in given.values():
        both = both.loc[(kept := _whole(rival.loc[both.index, both.index]).index), kept]
    at = both.index
    squares = {name: rival.loc[at, at].to_numpy() for name, rival in given.items()}
    varying = {
        name: np.nan_to_num(square)
        for name, square in squares.items()
        if np.ptp(square[~np.eye(len(at), dtype=bool)]) > 0
    }
    sets = {name: [square] for name, square in varying.items()}
    if len(at) >= len(varying) + 2:
        sets["all of them"] = list(varying.values())
    rows = []
    for name, taken in sets.items():
        test = stats.mantel(x.loc[at, at], both, taken, permutations=permutations, seed=seed)
        r = stats.correlation(taken[0], both) if len(taken) == 1 else math.nan
        rows.append({"rival": name, "r": r, "given": test.value, "p": test.p, "n_tasks": len(at)})
    return pd.DataFrame(rows)


def contests(x: dict[str, pd.DataFrame], y: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """Hidden distance against each other primary metric: which goes with the outcome more closely?

    One row per rival metric and estimand: |r| of hidden_sim and of the rival, Steiger's z and p,
    p_holm over the rows of an estimand; and, over pairs (`raw`), the difference of the two |r| with
    its interval over tasks (`stats.stronger`).
    """
    rows, kept = [], _whole(y).index
    x, y = {name: table.loc[kept, kept] for name, table in x.items()}, y.loc[kept, kept]
    hidden, others = x["hidden_sim"], [name for name in PRIMARY[1:] if name in x]
    for estimand, specific in ESTIMANDS.items():
        of = [stats.head_to_head(hidden, x[name], y, specific) for name in others]
        p = [row["p"] for row in of]
        holm = multipletests(p, method="holm")[1] if not np.isnan(p).any() else [math.nan] * len(p)
        for name, row, corrected in zip(others, of, holm, strict=True):
            row = {"estimand": estimand, "rival": name, "hidden": row["a"], "other": row["b"]} | row
            rows.append({k: row[k] for k in ("estimand", "rival", "hidden", "other", "z", "p")})
            rows[-1]["p_holm"] = corrected
    for name in others:
        ahead = stats.stronger(hidden, x[name], (y + y.T) / 2, draws, seed)
        row = {"estimand": "raw", "rival": name, "difference": ahead.value}
        rows.append(row | {"low": ahead.low, "high": ahead.high})
    return pd.DataFrame(rows)


# --- trained again -----------------------------------------------------------------------------


# The correlations of two runs, and what estimates their 95 % intervals over tasks.
INTERVALS = {
    "raw": stats.jackknife_interval,
    "between": stats.between_interval,
    "specific": stats.specific_interval,
}
REPEATED = ["first", "second", "what", "method", "tasks", "mean", "mean_there", "spread"]
REPEATED += [f"{name}{end}" for name in INTERVALS for end in ("", "_low", "_high")]


def other_seeds(folder: Path) -> dict[str, dict[str, pd.DataFrame]]:
    """The same study from other training seeds: the folders beside `folder` that have its name and
    _seed…, each as `read` gives it."""
    found = sorted(folder.parent.glob(f"{folder.name}_seed*/losses.csv"))
    return {file.parent.name: read(file.parent) for file in found}


def repeated(runs: Mapping[str, dict[str, pd.DataFrame]]) -> pd.DataFrame:
    """Does a study repeat itself when its specialists are trained from another seed?

    Runs by name, as `read` gives them. Of every two, over the pairs of tasks that both have: one
    row per distinct method for the loss of the pair, one for its mean over the methods that both
    have, and one per primary metric if both were measured. Columns as in REPEATED: first, second
    (the runs), what, method, tasks, mean and mean_there (over pairs, in the first and in the
    second), spread: standard deviation of a pair's value between training runs (of the differences,
    over root two; their mean left out), and the correlation of the two runs, `raw` and by estimand,
    with 95 % intervals over tasks. No other measure can go with the loss more closely than the
    square root of this on average.
    """
    cells = {name: directed(tables["losses"]) for name, tables in runs.items()}
    known = {name: metrics(tables) for name, tables in runs.items() if "pairs" in tables}
    rows = []
    for two in combinations(runs, 2):
        tasks, others = (dict.fromkeys(cells[name]["task"]) for name in two)
        tasks = [task for task in tasks if task in others]
        methods, also = (distinct(cells[name]) for name in two)
        methods = [method for method in methods if method in also]
        of_loss = {"mean": methods} | {method: [method] for method in methods}
        values = {
            ("loss", label): [matrix(cells[name], "loss", used) for name in two]
            for label, used in of_loss.items()
        }
        for metric in PRIMARY:
            if all(metric in known.get(name, {}) for name in two):
                values[metric, ""] = [known[name][metric] for name in two]
        for (what, method), tables in values.items():
            both = [(m + m.T).loc[tasks, tasks] / 2 for m in tables]
            a, b = (m.to_numpy()[np.triu_indices(len(tasks), 1)] for m in both)
            row = [*two, what, method, len(tasks), a.mean(), b.mean()]
            row.append((b - a).std(ddof=1) / math.sqrt(2))
            for interval in INTERVALS.values():
                r = interval(*both)
                row += [r.value, r.low, r.high]
            rows.append(row)
    return pd.DataFrame(rows, columns=REPEATED)


# --- verdicts ----------------------------------------------------------------------------------

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "cannot be told at this n"


def verdict(shown: bool, refuted: bool) -> str:
    """The words of the plan; what is neither shown nor refuted is open."""
    return HOLDS if shown else FAILS if refuted else OPEN


def tasks_for_no_effect(methods: int) -> int:
    """Fewest tasks at which an effect of the method that is not there (F = 1) would be shown to be
    smaller than SMALL: the upper end of its partial omega squared, one loss per pair and method."""
    n = 3
    while True:
        pairs = n * (n - 1) // 2
        span = stats.partial_omega2(1, methods - 1, (pairs - 1) * (methods - 1), pairs * methods)
        if span.high < SMALL:
            return n
        n += 1


def tasks_for_raw(x: pd.DataFrame, y: pd.DataFrame, seed: int = 0) -> int:
    """`stats.tasks_needed` at the geometric mean of the two tables' `stats.task_share`."""
    shares = [stats.task_share(table) for table in (x, y)]
    return stats.tasks_needed(math.sqrt(math.prod(shares)), MARGIN, seed=seed)


def verdicts(
    groups: pd.DataFrame, told: pd.DataFrame, found: pd.DataFrame, related: pd.DataFrame,
    contest: pd.DataFrame,
) -> pd.DataFrame:  # fmt: skip
    """The claims by the plan's criteria, from groups.csv and the tables of `summary`, `effects`,
    `associations` and `contests`.

    Columns claim, paper, here, verdict, n (that could tell, for an open one), overturned_by.
    """
    rows = [*_rq1(groups, told), *_rq2(found), *_rq3(related, contest)]
    table = pd.DataFrame(rows, columns=["claim", "paper", "here", "verdict", "n", "overturned_by"])
    table["n"] = table["n"].where(table["verdict"] == OPEN, "")
    return table


def _rq1(groups: pd.DataFrame, told: pd.DataFrame) -> Iterable[tuple]:
    two = groups[groups["n"] == 2]
    for arm in scales(two):
        mine = two[two["arm"] == arm].groupby("method", sort=False)
        fell = mine["collapsed"].agg(lambda c: c.eq(True).sum())
        spared = mine["low"].min() > stats.COLLAPSE
        told_of = "some combinations, every technique" if arm == "default" else "not tested"
        yield (
            f"collapse under every method{_at(arm)}",
            told_of,
            f"{fell.min()} to {fell.max()} of {mine.size().max()} pairs",
            verdict((fell > 0).all(), spared.any()),
            "more test examples",
            "a method under which the 95 % interval of every pair ends above -30 %, or a rate of "
            "false collapses near the rate seen",
        )
    for arm in scales(told):
        rest = told[(told["arm"] == arm) & (told["n"] == 2) & (told["outcome"] == "partners")]
        if rest["high"].notna().any():
            yield (
                f"partners do harm beyond what needs none{_at(arm)}",
                "not told apart",
                f"mean {rest['value'].min():.0f} to {rest['value'].max():.0f} %, "
                f"intervals from {rest['low'].min():.0f} to {rest['high'].max():.0f} %",
                verdict((rest["high"] < 0).all(), (rest["low"] > -POINTS).any()),
                "more tasks",
                "controls run at each merge's own doses that lose as much as the merge",
            )


def _rq2(found: pd.DataFrame) -> Iterable[tuple]:
    rows = found.set_index(["arm", "outcome", "effect"])
    for arm in dict.fromkeys(found["arm"]):
        for outcome, what in (
            ("loss", "pair matters"),
            ("partners", "pair matters to harm done by partners"),
        ):
            if (arm, outcome, "pair") in rows.index:
                row = rows.loc[arm, outcome, "pair"]
                yield (
                    f"the {what}{_at(arm)}",
                    "p < .05" if (arm, outcome) == ("default", "loss") else "not tested",
                    _effect(row),
                    verdict(row["p"] < 0.05, row["p"] >= 0.05 and row["omega2_high"] < SMALL),
                    "more tasks",
                    "the effect vanishing with other seeds, or where the tasks' own fragility is "
                    "taken out",
                )
        if (arm, "loss", "method") in rows.index:
            row = rows.loc[arm, "loss", "method"]
            small = row["p"] >= 0.05 and row["omega2_high"] < SMALL
            yield (
                f"the method does not matter{_at(arm)}",
                "p > .05" if arm == "default" else "not tested",
                _effect(row),
                verdict(small, row["p"] < 0.05),
                f"{tasks_for_no_effect(int(row['df']) + 1)} tasks",
                "a recipe of another direction or scale whose mean loss differs",
            )


def _rq3(related: pd.DataFrame, contest: pd.DataFrame) -> Iterable[tuple]:
    declared = related[related["family"] == "declared"].set_index("metric")
    paper = {"between": "p < .01 over raw pairs (DARE: p = .145)", "specific": "not told apart"}
    words = {
        "between": "far-off tasks lose or harm more",
        "specific": "the pair that lies farther loses more",
    }
    tests = len(declared) * len(ESTIMANDS)
    for estimand, specific in ESTIMANDS.items():
        row = declared.loc["hidden_sim"]
        r, p = row[estimand], row[f"{estimand}_p_holm"]
        none = specific and row["equivalence_p"] < 0.05
        yield (
            f"hidden distance predicts loss: {words[estimand]}",
            paper[estimand],
            f"r = {r:.2f} [{row[f'{estimand}_low']:.2f}, {row[f'{estimand}_high']:.2f}], "
            f"Holm {_p(p)}",
            verdict(p < 0.05 and r < 0, none or (p < 0.05 and r > 0)),
            f"{stats.tasks_to_show(0.5, specific, 0.05 / tests)} tasks, were r = .5",
            "one task that carries it alone, or nothing left of it once the part of the loss that "
            "needs no partner is taken out",
        )
    rest = declared.drop("hidden_sim")
    seen = rest[[f"{estimand}_p_holm" for estimand in ESTIMANDS]].min(axis=None)
    yield (
        "parameter conflict does not predict loss (pair-specific |r| < .3)",
        "all four p > .05",
        f"|r| up to {rest['specific'].abs().max():.2f}, equivalence "
        f"{_p(*rest['equivalence_p'])}, least Holm {_p(seen)}",
        verdict((rest["equivalence_p"] < 0.05).all() and not seen < 0.05, seen < 0.05),
        f"{stats.tasks_to_exclude(MARGIN)} tasks, were r = 0",
        "one of the four metrics with p < .05 after Holm, in either estimand",
    )
    of = contest[contest["estimand"] == "specific"]
    ahead = of["hidden"] > of["other"]
    sure = of["p_holm"] < 0.05
    yield (
        "hidden distance predicts better than parameter conflict (pair-specific)",
        "one significant, the others not",
        f"|r| {of['hidden'].max():.2f} against up to {of['other'].max():.2f}, "
        f"Steiger, Holm {_p(*of['p_holm'])}",
        verdict((ahead & sure).all(), (~ahead & sure).any()),
        f"{stats.tasks_for(math.atanh(0.5) / math.sqrt(2), 2.8, True)} tasks, were r .5 and 0",
        "a parameter metric whose |r| is as large on other tasks or seeds",
    )


def _at(arm: str) -> str:
    return "" if arm == "default" else f", {arm}-matched"


def _p(*values: float) -> str:
    """A p-value in words ("p = .012", "p < .001"), or the least and the largest of several."""
    least, most = (
        f"{p:.3f}".lstrip("0") if p >= 0.0005 else "0" for p in (min(values), max(values))
    )
    if any(map(math.isnan, values)):
        return "p undefined"
    if len(values) > 1:
        return f"p {least} to {most}".replace(" 0", " < .001")
    return "p < .001" if least == "0" else f"p = {least}"


def _effect(row: pd.Series) -> str:
    return (
        f"{_p(row['p'])}, partial omega2 = {row['omega2']:.2f} "
        f"[{row['omega2_low']:.2f}, {row['omega2_high']:.2f}]"
    )


def record(
    told: pd.DataFrame, found: pd.DataFrame, related: pd.DataFrame, single: list[tuple]
) -> list[dict]:
    """The named results of notebook 05 (`records.write_record`) from its tables.

    Means and shares by method and group size, partial omega squared of the loss, declared
    correlations; `single` adds (name, value, unit, n) as they are.
    """
    rows = [dict(zip(("name", "value", "unit", "n"), row, strict=True)) for row in single]
    told = told[told["outcome"].isin(["floor", "collapsed", "loss", "alone", "partners"])]
    for row in told.to_dict("records"):
        share = row["outcome"] in ("floor", "collapsed")
        name = f"{row['outcome']}, {row['method']}, {row['n']} models{_at(row['arm'])}"
        rows.append(
            {"name": name, "value": row["value"], "unit": "share of cells" if share else "%"}
            | {"n": row["cells"], "low": row["low"], "high": row["high"]}
            | {"interval": "95 %, bootstrap over tasks" if row["n"] == 2 else None}
        )
    for row in found[found["outcome"] == "loss"].dropna(subset="omega2").to_dict("records"):
        name = f"partial omega squared of the {row['effect']}{_at(row['arm'])}"
        ends = {"low": row["omega2_low"], "high": row["omega2_high"]}
        rows.append(
            {"name": name, "value": row["omega2"], "unit": "share", "n": int(row["n"])}
            | ends
            | {"interval": "95 %, noncentral F"}
        )
        rows.append({"name": f"p of the {row['effect']}{_at(row['arm'])}", "value": row["p"]})
        rows[-1] |= {"unit": "p, permutation", "n": row["n_tasks"]}
    for row in related[related["family"] == "declared"].to_dict("records"):
        for estimand in ESTIMANDS:
            ends = {end: row[f"{estimand}_{end}"] for end in ("low", "high")}
            name = f"r of {row['metric']} and loss, {estimand}"
            rows.append({"name": name, "value": row[estimand], "unit": "r", "n": row["n_tasks"]})
            rows[-1] |= ends | {"interval": "95 %, Fisher's z"}
    return [
        {field: None if value is None or value != value else value for field, value in row.items()}
        for row in rows
    ]


# --- beside the paper, and across studies ------------------------------------------------------


def beside_paper(groups: pd.DataFrame, related: pd.DataFrame) -> pd.DataFrame:
    """The four numbers that the paper reports and ours; columns what, paper, here, right test.

    `here` repeats the paper's own computation (raw pairs, textbook p), `right test` what a
    permutation of tasks makes of it.
    """
    most = groups[(groups["arm"] == "default") & (groups["n"] == groups["n"].max())]
    size = int(groups["n"].max())
    raw = related[related["family"] == "method"].set_index(["metric", "method"])
    hidden, rest = raw.loc["hidden_sim"], raw.drop("hidden_sim", level="metric")
    others = hidden.drop("dare", errors="ignore")
    rows = [
        (
            "groups of 8 that lose more than 30 %",
            "two thirds of 25 (LoRA)",
            f"{(most['loss'] < stats.COLLAPSE).mean():.0%} of {len(most)} merges of {size}",
            f"{most['collapsed'].eq(True).mean():.0%} collapse for certain",
        ),
        (
            "hidden distance, every method but DARE",
            "p < .01",
            _p(*others["textbook_p"]),
            _p(*others["raw_p"]),
        ),
        (
            "parameter conflict, four metrics",
            "all p > .05",
            _p(*rest["textbook_p"]),
            _p(*rest["raw_p"]),
        ),
    ]
    if "dare" in hidden.index:
        dare = hidden.loc["dare"]
        row = "hidden distance, DARE", "p = .145", _p(dare["textbook_p"])
        rows.insert(2, (*row, _p(dare["raw_p"])))
    return pd.DataFrame(rows, columns=["what", "paper", "here", "right test"]).set_index("what")


def apart(tasks: dict[str, set[str]]) -> list[str]:
    """Studies without a pair of tasks in common: from the largest down, each that shares at most
    one task with each of those taken."""
    taken: list[str] = []
    for study in sorted(tasks, key=lambda name: (-len(tasks[name]), name)):
        if all(len(tasks[study] & tasks[other]) < 2 for other in taken):
            taken.append(study)
    return taken


def agreement(studies: dict[str, pd.DataFrame], tasks: dict[str, set[str]]) -> pd.DataFrame:
    """The declared correlations of each study and, from two studies `apart` on, pooled.

    `studies`: profile -> its statistics.csv; `tasks`: profile -> its tasks. One row per estimand,
    metric and study: r, low, high, n_tasks; and one `pooled` over the studies of 5 tasks or more
    that share no pair of tasks (`stats.pool_correlations`), with i2. Shared pairs would count one
    observation twice. Studies on one base are still no independent replications: the pooled
    interval tells how far they agree, not what another base would give.
    """
    independent = apart(tasks)
    rows = []
    declared = [
        table[table["family"] == "declared"].assign(study=name) for name, table in studies.items()
    ]
    every = pd.concat(declared)
    for estimand, specific in ESTIMANDS.items():
        ends = {estimand: "r", f"{estimand}_low": "low", f"{estimand}_high": "high"}
        for metric, of in every.groupby("metric", sort=False):
            one = of[["study", "n_tasks", *ends]].rename(columns=ends)
            one = one.assign(estimand=estimand, metric=metric)
            rows += one.to_dict("records")
            kept = one[(one["n_tasks"] >= 5) & one["r"].notna() & one["study"].isin(independent)]
            if len(kept) >= 2:
                n = kept["n_tasks"]
                se = [stats.specific_se(k) if specific else 1 / math.sqrt(k - 3) for k in n]
                pooled = stats.pool_correlations(kept["r"], se)
                row = {name: pooled[name] for name in ("r", "low", "high", "i2")}
                row |= {"estimand": estimand, "metric": metric, "study": "pooled"}
                rows.append(row | {"n_tasks": int(n.sum())})
    order = ["estimand", "metric", "study", "n_tasks", "r", "low", "high", "i2"]
    return pd.DataFrame(rows).reindex(columns=order)
