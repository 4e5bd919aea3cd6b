"""Does a score choose well? Predictions, swaps and subsets, tried on tables of measured losses.

A score sees a group of tasks before it is merged; higher says that it will merge better. What it is
worth is what its choices are worth: which member to swap out, which subset to keep, which loss to
expect. Whatever a score learns from measured losses, it learns from pairs that share no task with
those it is tried on (leave-task-out). Losses are in % of the specialist's score, negative is loss;
`pairs`, `losses`, `groups` and `doses` are the tables of a study (data/results).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from helpers.states import bound, conflict
from helpers.stats.dyads import Interval
from helpers.store import ROOT
from helpers.study.losses import dose_loss

STUDIES = ROOT / "data" / "results"
# Rules whose result mergekit gives as well, so that the command and the YAML are one merge.
RULES = ("linear", "task_arithmetic", "ties")
LEVEL = 0.9  # of prediction intervals
FEWEST_PAIRS = 3  # that a line is fitted to

Score = Callable[[Sequence[str]], float]  # of a group of tasks; higher: will merge better
Criterion = Callable[[frozenset[str]], Score]  # the score that knows no loss of these tasks


# --- what a pair will lose -----------------------------------------------------------------------


def pair_losses(losses: pd.DataFrame) -> pd.DataFrame:
    """Mean merging loss of the two tasks of each measured pair: task_a, task_b, method, loss (%).

    Undefined losses are left out, and so are rules that only repeat another (`same_as`).
    """
    two = default_arm(losses)
    two = two[two["n"] == 2]
    repeats = two["same_as"].notna() & two["same_as"].ne("")
    repeats = repeats.groupby(two["method"]).transform("all")
    table = (
        two[~repeats]
        .groupby(["group", "method"], sort=False)["loss"]
        .agg(lambda x: x.mean(skipna=False))
    )
    table = table.dropna().reset_index()
    ends = table["group"].str.split("+", expand=True)
    return table.assign(task_a=ends[0], task_b=ends[1]).drop(columns="group")


def default_arm(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of merges at each rule's own scale; all of them if the table has no column arm."""
    return table[table["arm"] == "default"] if "arm" in table else table


def joined(pairs: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """Measures and losses of each pair and rule in one row; a pair may be listed either way."""
    flipped = pairs.rename(columns={"task_a": "task_b", "task_b": "task_a"})
    return pair_losses(losses).merge(pd.concat([pairs, flipped]), on=["task_a", "task_b"])


class Line(NamedTuple):
    """loss = intercept + slope x, and what is known of its misses.

    error: root mean square miss (points of loss) on pairs whose two tasks took no part in the fit;
    nan below 5 tasks. low, high: the range of x it was fitted on.
    """

    slope: float
    intercept: float
    error: float
    tasks: int
    low: float
    high: float


def _ends(table: pd.DataFrame) -> NDArray:
    """The two tasks of each pair as numbers, (pairs, 2)."""
    names = table[["task_a", "task_b"]].to_numpy(str)
    return np.unique(names, return_inverse=True)[1].reshape(names.shape)


def _least_squares(x: NDArray, y: NDArray) -> tuple[float, float]:
    """Slope and intercept; a predictor that does not vary predicts the mean."""
    centred = x - x.mean()
    spread = centred @ centred
    slope = centred @ y / spread if spread > 0 else 0.0
    return float(slope), float(y.mean() - slope * x.mean())


def _unseen(ends: NDArray, x: NDArray, y: NDArray) -> NDArray:
    """Each pair's loss predicted by a line fitted to the pairs that share no task with it."""
    out = np.full(len(x), np.nan)
    for k, (a, b) in enumerate(ends):
        others = ~np.isin(ends, (a, b)).any(1)
        if others.sum() >= FEWEST_PAIRS:
            slope, intercept = _least_squares(x[others], y[others])
            out[k] = intercept + slope * x[k]
    return out


def fit(table: pd.DataFrame, x: str = "hidden_sim") -> Line:
    """The line from column `x` of pairs to their loss (columns task_a, task_b, loss).

    Raises ValueError with fewer than three pairs: a line through two points misses nothing.
    """
    if len(table) < FEWEST_PAIRS:
        raise ValueError(
            f"{len(table)} measured pairs cannot calibrate a prediction: {FEWEST_PAIRS} are needed"
        )
    ends, at, loss = _ends(table), table[x].to_numpy(float), table["loss"].to_numpy(float)
    miss = loss - _unseen(ends, at, loss)
    known = ~np.isnan(miss)
    error = math.sqrt(np.mean(miss[known] ** 2)) if known.any() else math.nan
    return Line(*_least_squares(at, loss), error, len(np.unique(ends)), at.min(), at.max())


def predict(line: Line, x: ArrayLike, level: float = LEVEL) -> pd.DataFrame:
    """Predicted loss (%) at `x`, with a prediction interval for a pair of tasks never seen.

    predicted +- t error, t the quantile of Student's t with tasks - 2 degrees of freedom: pairs
    share tasks, so the tasks are what is counted. Of simulated 90 % intervals 91-99 % cover (14 to
    5 tasks). Cut at -100, below which there is no loss.
    outside: how far x lies beyond the range of the fit, in widths of that range (0: within).
    """
    x = np.asarray(x, float)
    value = line.intercept + line.slope * x
    reach = line.error * distributions.t.ppf(0.5 + level / 2, max(line.tasks - 2, 1))
    beyond = np.maximum(line.low - x, x - line.high).clip(0) / (line.high - line.low or np.inf)
    cut = {"predicted": value, "low": value - reach, "high": value + reach}
    return pd.DataFrame(cut).clip(lower=-100).assign(outside=beyond)


def held_out(table: pd.DataFrame, x: str = "hidden_sim", level: float = LEVEL) -> pd.DataFrame:
    """The table of pairs with predictions by lines, intervals and all, that saw neither task.

    Adds predicted, low, high, outside, covered (nan without an interval: below 7 tasks) and mean,
    the mean loss of the pairs that the line was fitted to. Without hurt tasks the rest looks good,
    so predictions of unrelated losses correlate *negatively* with them: judge by `skill`.
    """
    names, rows = table[["task_a", "task_b"]].to_numpy(str), []
    for k, ends in enumerate(names):
        others = table[~np.isin(names, ends).any(1)]
        enough = len(others) >= FEWEST_PAIRS
        line = fit(others, x) if enough else Line(*[math.nan] * 6)
        told = predict(line, table[x].iloc[[k]], level)
        rows.append(told.assign(mean=others["loss"].mean() if enough else math.nan))
    found = pd.concat(rows).set_axis(table.index)
    covered = table["loss"].between(found["low"], found["high"]).astype(float)
    return table.join(found).assign(covered=covered.where(found["low"].notna()))


def skill(table: pd.DataFrame) -> float:
    """1 - squared misses of the predictions / those of saying the mean, of a table of `held_out`.

    0: the distance adds nothing to knowing what merges cost on average; negative: it misleads.
    """
    misses = [((table["loss"] - table[x]) ** 2).sum() for x in ("predicted", "mean")]
    return float(1 - misses[0] / misses[1]) if table["predicted"].notna().any() else math.nan


# --- what committed studies say ------------------------------------------------------------------


READ_ON = {"hidden_sim_pool": "task inputs", "hidden_sim_plain": "neutral text"}


class Known(NamedTuple):
    """Committed studies: measured pairs with their losses and distances, and larger groups."""

    pairs: pd.DataFrame
    groups: pd.DataFrame
    names: list[str]
    distance: str  # the column of `pairs` that is like the advisor's distances: one of READ_ON


def read_study(folder: Path) -> tuple[pd.DataFrame, ...]:
    """Tables of one study: pairs, losses, doses, groups, and squared distances between the states
    of its models (models x models, mean over all probes)."""
    with np.load(folder / "geometry.npz") as geometry:
        models, distances = geometry["models"].tolist(), geometry["d2x"].mean(-1)
    names = ("pairs", "losses", "doses", "groups")
    tables = (pd.read_csv(folder / f"{name}.csv") for name in names)
    return *tables, pd.DataFrame(distances, models, models)


def known_merges(
    folders: Iterable[Path] | None = None, without: Iterable[str] = (), neutral: bool = False
) -> Known:
    """Measured merges of committed studies, without those of tasks named in `without`.

    A merge of the same specialists by the same rule counts once, however many studies made it. The
    studies read each pair on the probes of its own tasks (hidden_sim), of all tasks
    (hidden_sim_pool) and on neutral text (hidden_sim_plain). The advisor reads all models on one
    set, so it is calibrated on the last where its probes are neutral, else on the pool. Raises
    ValueError if there is no study.
    """
    folders = sorted(STUDIES.glob("*/pairs.csv")) if folders is None else folders
    folders = [file.parent if file.name == "pairs.csv" else file for file in map(Path, folders)]
    if not folders:
        raise ValueError(f"there is no study in {STUDIES}: predictions have nothing to learn from")
    pairs, groups, without = [], [], set(without)
    for folder in folders:
        measured, losses, merged, trained = (
            pd.read_csv(folder / f"{x}.csv") for x in ("pairs", "losses", "groups", "specialists")
        )
        specialist = dict(zip(trained["task"], trained["folder"], strict=True))
        of_two, of_any = joined(measured, losses), default_arm(merged)
        ends = of_two[["task_a", "task_b"]].to_numpy()
        pairs.append(of_two.assign(study=folder.name, models=_models(ends, specialist)))
        names = of_any["group"].str.split("+")
        groups.append(of_any.assign(study=folder.name, models=_models(names, specialist)))
    pairs, groups = pd.concat(pairs, ignore_index=True), pd.concat(groups, ignore_index=True)
    pairs = pairs[~(pairs["task_a"].isin(without) | pairs["task_b"].isin(without))]
    apart = groups["group"].map(lambda name: without.isdisjoint(name.split("+")))
    column = "hidden_sim_pool"
    if neutral and "hidden_sim_plain" in pairs and pairs["hidden_sim_plain"].notna().any():
        column = "hidden_sim_plain"
    pairs = pairs.dropna(subset=[column]).drop_duplicates(["models", "method"])
    groups = groups[apart].drop_duplicates(["models", "method"])
    return Known(pairs, groups, [folder.name for folder in folders], column)


def _models(groups: Iterable[Sequence[str]], specialist: Mapping[str, str]) -> list[str]:
    """One name for each group of tasks, that of its specialists in any order."""
    return ["+".join(sorted(specialist[x] for x in group)) for group in groups]


def expected_losses(pairs: pd.DataFrame, known: Known) -> pd.DataFrame:
    """Predicted loss (%) of every pair under each of RULES that the studies measured.

    Adds method, predicted, low, high (90 % prediction interval; nan from too few tasks) and outside
    to the columns of `pairs`. Empty if the studies have too few pairs for a line.
    """
    parts = []
    for method in RULES:
        measured = known.pairs[known.pairs["method"] == method]
        if len(measured) >= FEWEST_PAIRS:
            found = predict(fit(measured, known.distance), pairs["distance"])
            told = pairs[["task_a", "task_b"]].assign(method=method)
            parts.append(told.join(found.set_axis(pairs.index)))
    columns = ["task_a", "task_b", "method", "predicted", "low", "high", "outside"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def best_rule(groups: pd.DataFrame, n: int) -> str:
    """The rule of RULES with the least mean loss in measured merges of (nearest to) n models.

    `groups`: columns n, method, loss. "linear" where nothing was measured.
    """
    usable = groups[groups["method"].isin(RULES)].dropna(subset=["loss"])
    if usable.empty:
        return "linear"
    nearest = usable[(usable["n"] - n).abs() == (usable["n"] - n).abs().min()]
    return str(nearest.groupby("method")["loss"].mean().idxmax())


def best_subset(labels: Sequence[str], keep: int, score: Callable) -> tuple[str, ...]:
    """The `keep` models of best score, by exhaustive search up to 20,000 subsets.

    Above, models are dropped one by one, each time the one whose leaving scores best. Raises
    ValueError unless 2 <= keep <= models.
    """
    if not 2 <= keep <= len(labels):
        raise ValueError(f"keep between 2 and {len(labels)} of {len(labels)} models, not {keep}")
    if math.comb(len(labels), keep) <= 20_000:
        return max(combinations(labels, keep), key=score)
    left = tuple(labels)
    while len(left) > keep:
        left = max(combinations(left, len(left) - 1), key=score)
    return left


# --- scores of a group ---------------------------------------------------------------------------


def by_pair(pairs: pd.DataFrame, values: ArrayLike, over: Callable) -> Score:
    """The score of a group from the values of the pairs inside it."""
    names = pairs[["task_a", "task_b"]].to_numpy(str)
    of = dict(zip(map(frozenset, names), np.asarray(values, float).tolist(), strict=True))
    return lambda group: over([of[frozenset(pair)] for pair in combinations(group, 2)])


def _by_task(values: Mapping[str, float]) -> Score:
    return lambda group: sum(values[task] for task in group) / len(group)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def worst_predicted(pairs: pd.DataFrame, known: pd.DataFrame, x: str = "hidden_sim") -> Score:
    """The advisor's score: least predicted loss of a pair in the group, by a line from `x`.

    `known`: measured pairs to learn from. Without enough of them the score is nan: no advice.
    """
    if len(known) < FEWEST_PAIRS:
        return lambda group: math.nan
    slope, intercept = _least_squares(known[x].to_numpy(float), known["loss"].to_numpy(float))
    return by_pair(pairs, intercept + slope * pairs[x], min)


def _best_parameter(pairs: pd.DataFrame, known: pd.DataFrame, metrics: Sequence[str]) -> Score:
    """Predicted by whichever parameter metric follows the known losses most closely."""
    if len(known) < FEWEST_PAIRS:
        return lambda group: math.nan
    follows = known[list(metrics)].corrwith(known["loss"]).abs()
    return worst_predicted(pairs, known, follows.idxmax())


def criteria(
    pairs: pd.DataFrame,
    losses: pd.DataFrame,
    doses: pd.DataFrame,
    d2: pd.DataFrame,
    method: str,
    elsewhere: pd.DataFrame | None = None,
) -> dict[str, Criterion]:
    """The scores that compete, by name, for one merge rule.

    MDS: minus the mean HiddenSim distance inside the group (arXiv:2603.09463). radius: minus the
    squared minimax radius of `d2`, squared state distances by task. dilution: the mean loss of the
    members alone at dose 1/n, from their dose curves. base accuracy: mean few-shot score of the
    base. advisor: `worst_predicted`. parameters: the same from the one of conflict.PRIMARY that
    follows the known losses best. random: no preference. The first four learn nothing; their
    direction is that of the claims they stand for. Those that learn may learn from another study,
    too: `elsewhere`, a table of `joined`.
    """
    known = pd.concat([joined(pairs, losses), elsewhere]).query("method == @method")
    curves = dict(list(doses.groupby("task")))
    base = losses.groupby("task")["base"].first()

    def radius(group: Sequence[str]) -> float:
        return -bound.minimax(d2.loc[list(group), list(group)]).r2

    def alone(group: Sequence[str]) -> float:
        return _mean([lost_alone(task, len(group)) for task in group])

    @cache
    def lost_alone(task: str, n: int) -> float:
        return dose_loss(curves[task], 1 / n)

    def without(held: frozenset[str]) -> pd.DataFrame:
        return known[~(known["task_a"].isin(held) | known["task_b"].isin(held))]

    parameters = list(conflict.PRIMARY)
    fixed = {
        "MDS": by_pair(pairs, -pairs["hidden_sim"], _mean),
        "radius": cache(radius),
        "dilution": alone,
        "base accuracy": _by_task(base),
        "random": lambda group: 0.0,
    }
    learned = {
        "advisor": lambda held: worst_predicted(pairs, without(held)),
        "parameters": lambda held: _best_parameter(pairs, without(held), parameters),
    }
    return {name: (lambda held, score=score: score) for name, score in fixed.items()} | learned


# --- swaps and subsets ---------------------------------------------------------------------------


def swaps(groups: pd.DataFrame) -> pd.DataFrame:
    """Every swap of one member that leads from one measured group to another, by rule.

    `groups`: columns group ("a+b"), n, method, loss (%). Where all pairs of the tasks are measured
    the swaps of groups of two are complete: each member against each outside task. Columns method,
    n, group, leaves, enters, swapped (the new group), before, after, change (after - before,
    points: positive is better).
    """
    rows = []
    known = default_arm(groups).dropna(subset=["loss"])
    for (method, n), measured in known.groupby(["method", "n"], sort=False):
        loss = {frozenset(name.split("+")): (name, value) for name, value in
                measured[["group", "loss"]].itertuples(index=False)}  # fmt: skip
        for one, other in combinations(loss, 2):
            if len(one & other) == n - 1:
                for here, there in ((one, other), (other, one)):
                    (leaves,), (enters,) = here - there, there - here
                    told = (method, n, loss[here][0], leaves, enters, loss[there][0])
                    rows.append((*told, loss[here][1], loss[there][1]))
    columns = ["method", "n", "group", "leaves", "enters", "swapped", "before", "after"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(change=table["after"] - table["before"])


POLICIES = ("member", "swap")
TAKEN = ("outcome", "gain", "regret", "hit")  # of the option that a criterion takes


def _taken(score: NDArray, outcome: NDArray, hit: NDArray) -> dict[str, float]:
    """The outcome of the option that scores best (mean over ties), beside the others' outcomes."""
    best = score >= score.max()
    value = outcome[best].mean()
    compared = {"gain": value - outcome.mean(), "regret": outcome.max() - value}
    return {"outcome": value, **compared, "hit": hit[best].mean()}


def swap_test(
    table: pd.DataFrame, scores: Mapping[str, Criterion], hold_newcomers: bool = False
) -> pd.DataFrame:
    """What each criterion's swap does to each group: one row per group, criterion and policy.

    `table`: the swaps of one rule (`swaps`). "member": the criterion says who leaves (the one whose
    leaving gives the best expected score) and the newcomer is drawn at random; "swap": it says who
    leaves and who enters. outcome: change of the group's loss (points), expected over random
    newcomers and ties; gain: outcome less that of a random choice; regret: outcome of the best
    choice less this one; hit: chance that the group gets better. What learns, learns from no pair
    with a member of the group; with `hold_newcomers` from none with a newcomer, either, which is
    right where these are few. A criterion that has too few losses to learn from abstains: no row.
    """
    rows = []
    for group, options in table.groupby("group", sort=False):
        leaves, change = options["leaves"].to_numpy(str), options["change"].to_numpy(float)
        by_member = np.array([leaves == member for member in np.unique(leaves)], float)
        by_member /= by_member.sum(1, keepdims=True)
        new = [tuple(name.split("+")) for name in options["swapped"]]
        held = {*group.split("+"), *(options["enters"] if hold_newcomers else ())}
        for name, criterion in scores.items():
            score = criterion(frozenset(held))
            values = np.array([score(members) for members in new])
            if np.isnan(values).any():
                continue
            for policy, over in zip(POLICIES, (by_member, np.eye(len(new))), strict=True):
                done = _taken(over @ values, over @ change, over @ (change > 0))
                rows.append({"group": group, "criterion": name, "policy": policy, **done})
    return pd.DataFrame(rows, columns=["group", "criterion", "policy", *TAKEN])


def subset_test(
    known: pd.DataFrame,
    scores: Mapping[str, Criterion],
    pool: int = 5,
    keep: int = 3,
    most: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Which `keep` of `pool` tasks each criterion keeps: one row per pool and criterion.

    `known`: columns task_a, task_b, loss of one rule. Every pool of that many tasks whose pairs are
    all measured is tried (`most` of them, drawn at random, if there are more). outcome: the worst
    pair loss (%) inside the subset; gain: outcome less that of a random subset; regret: outcome of
    the best subset, by exhaustive search, less this one; hit: chance that the subset is that best.
    Raises ValueError unless 2 <= keep < pool.
    """
    if not 2 <= keep < pool:
        raise ValueError(f"a subset test keeps 2 or more of a larger pool, not {keep} of {pool}")
    worst = by_pair(known, known["loss"], min)
    measured = {frozenset(pair) for pair in known[["task_a", "task_b"]].to_numpy(str)}
    tasks = sorted(frozenset().union(*measured))
    pools = [
        chosen
        for chosen in combinations(tasks, pool)
        if measured.issuperset(map(frozenset, combinations(chosen, 2)))
    ]
    if len(pools) > most:
        drawn = np.random.default_rng(seed).choice(len(pools), most, replace=False)
        pools = [pools[i] for i in sorted(drawn)]
    rows = []
    for chosen in pools:
        subsets = list(combinations(chosen, keep))
        outcome = np.array([worst(subset) for subset in subsets])
        for name, criterion in scores.items():
            score = criterion(frozenset(chosen))
            values = np.array([score(subset) for subset in subsets])
            if not np.isnan(values).any():
                done = _taken(values, outcome, outcome == outcome.max())
                rows.append({"group": "+".join(chosen), "criterion": name, **done})
    return pd.DataFrame(rows, columns=["group", "criterion", *TAKEN])


def follows(
    groups: pd.DataFrame, scores: Mapping[str, Criterion], relabellings: int = 0, seed: int = 0
) -> pd.DataFrame:
    """Spearman's correlation of each score with the loss of measured groups, by size.

    `groups`: columns group, n, loss of one rule. Columns n, criterion, spearman (1: what scores
    best lost least), p, groups. Groups share tasks, so the tasks are what p permutes: the share of
    their relabellings under which the score follows the losses at least as closely, either way (nan
    without relabellings). Sizes with fewer than three groups, and scores that abstain or do not
    vary, are left out.
    """
    rng, rows = np.random.default_rng(seed), []
    for n, measured in default_arm(groups).dropna(subset=["loss"]).groupby("n"):
        members, loss = [x.split("+") for x in measured["group"]], measured["loss"].to_numpy()
        tasks = sorted(set().union(*members))
        orders = [tasks, *(rng.permutation(tasks).tolist() for _ in range(relabellings))]
        labels = [dict(zip(tasks, order, strict=True)) for order in orders]
        for name, criterion in scores.items() if len(members) > 2 else ():
            own, *others = (_followed(criterion, members, label, loss) for label in labels)
            others = [r for r in others if not math.isnan(r)]
            as_close = sum(abs(r) >= abs(own) - 1e-12 for r in others)
            p = (1 + as_close) / (1 + len(others)) if others else math.nan
            if not math.isnan(own):
                rows.append((n, name, own, p, len(members)))
    return pd.DataFrame(rows, columns=["n", "criterion", "spearman", "p", "groups"])


def _followed(criterion: Criterion, members: list, label: Mapping, loss: NDArray) -> float:
    """Spearman's correlation of a score with losses, each task under the name that it is given."""
    named = [tuple(label[x] for x in group) for group in members]
    values = np.array([criterion(frozenset(group))(group) for group in named])
    if np.isnan(values).any() or np.ptp(values) == 0:
        return math.nan
    # Equal scores, as the radii of groups with the same farthest pair, differ in the last digits,
    # from machine to machine in another order: to nine digits they are ties.
    ties = np.round(values / np.abs(values).max(), 9)
    return float(distributions.spearmanr(ties, loss).statistic)


def over_tasks(
    table: pd.DataFrame, column: str, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of a column over groups, with a percentile interval over tasks; n = tasks.

    Tasks are drawn with replacement, a task m times; a group ("a+b") weighs 1 + f times the sum of
    m - 1 over its members, so groups that share tasks move together. (The product of the m would be
    0 for nearly every large group.) f = (tasks - 1) / (tasks - size): the other members of a task's
    groups are the other tasks, so that its groups differ from the rest by less than it does. A
    group's own noise counts once for each member: wide, of large groups. A single group has none.
    """
    members = [name.split("+") for name in table["group"]]
    tasks, at = np.unique(np.array(members), return_inverse=True)
    values, n = table[column].to_numpy(float), len(tasks)
    if table["group"].nunique() < 2:
        return Interval(float(values.mean()), math.nan, math.nan, n)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    at = at.reshape(len(members), -1)
    shared = (n - 1) / max(n - at.shape[1], 1)
    weight = 1 + shared * (drawn - 1)[:, at].sum(2)
    total = weight.sum(1)
    means = (weight @ values)[total > 0] / total[total > 0]
    means = means.clip(values.min(), values.max())  # weights may be negative, a mean is within
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(values.mean()), float(low), float(high), n)


def summary(table: pd.DataFrame, by: Sequence[str], draws: int = 1000, seed: int = 0):
    """Per `by`: gain and regret with 95 % intervals over tasks; mean outcome, share of hits."""
    rows = []
    for key, rows_of in table.groupby(list(by), sort=False):
        row = dict(zip(by, key, strict=True))
        row |= {"outcome": rows_of["outcome"].mean(), "hit": rows_of["hit"].mean()}
        for column in ("gain", "regret"):
            found = over_tasks(rows_of, column, draws, seed)
            row |= {column: found.value, f"{column}_low": found.low, f"{column}_high": found.high}
        rows.append(row | {"groups": len(rows_of), "tasks": found.n})
    spans = [f"{column}{end}" for column in ("gain", "regret") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*by, "outcome", "hit", *spans, "groups", "tasks"])
