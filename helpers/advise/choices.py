"""What to do with each model: proposals judged on prompts that did not choose them.

A quarter of each model's prompts (at most 16) choose, in `search`; its proposals are then fixed
and tried on the other prompts. A merge is called safe if the exact (Clopper-Pearson) lower end of
every model's retention exceeds `keep`.

False assurance. All models of a merge must pass, so a merge that is not safe passes no more often
than its worst model alone, whatever the size of the group (intersection-union test). Each group
has at most two proposals, in a fixed order: the group, then the group without the model that the
search found weakest. Of ALPHA the first spends four fifths and the second one fifth, shared
equally by the groups (Bonferroni). So the chance that anything at all is called safe and is not is
at most ALPHA. Wilson's intervals are shown, but do not decide: their lower end of 95 % lies above a
true retention of .9 in 7.2 % of draws of 25 prompts.
"""

import math
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from helpers.advise.merges import Merge, retention
from helpers.advise.search import Measure, Search

ALPHA = 0.05
FIRST, SECOND = 0.8, 0.2  # shares of ALPHA
MOST = 2000  # prompts: more are not asked for


def split(prompts: int) -> tuple[slice, slice]:
    """Which of a model's prompts choose, and which judge."""
    count = max(4, min(16, prompts // 4))
    return slice(0, count), slice(count, None)


def left_to_judge(prompts: int) -> int:
    """How many of so many prompts judge."""
    return prompts - split(prompts)[0].stop


class Verdict(NamedTuple):
    """A proposal on the prompts that judge.

    verdict: safe, unsafe (the upper end of some model is below keep) or undecided. table: as
    `retention`, with `least`, the exact lower end that decides. more: prompts of each model, beside
    those given, that would settle it at the shares seen; nan where nothing is left to settle.
    """

    merge: Merge
    verdict: str
    table: pd.DataFrame
    more: float


def verdicts(
    groups: Sequence[Merge], search: Search, measure: Measure
) -> list[Verdict]:
    """The verdict on each group; on the group without its weakest model where that alone is safe.

    `measure` reads the prompts that judge, `search` those that chose.
    """
    judged = []
    for group in groups:
        alpha = ALPHA / len(groups)
        verdict = judge(group, measure(group), search.keep, alpha * FIRST)
        smaller = without_weakest(group, search)
        if verdict.verdict != "safe" and smaller is not None:
            second = judge(smaller, measure(smaller), search.keep, alpha * SECOND)
            verdict = second if second.verdict == "safe" else verdict
        judged.append(verdict)
    return judged


def judge(merge: Merge, trial: pd.DataFrame, keep: float, alpha: float) -> Verdict:
    """The verdict from a trial's rows; `alpha` is what may be spent on this merge."""
    table = retention(trial)
    n = table["prompts"].to_numpy()
    count = np.rint(table["kept"] * n).to_numpy()
    table["least"] = lower_end(count, n, alpha)
    if (table["least"] > keep).all():
        return Verdict(merge, "safe", table, math.nan)
    if (upper_end(count, n, alpha) < keep).any():
        return Verdict(merge, "unsafe", table, math.nan)
    needed = prompts_needed(table["kept"].min(), keep, alpha)
    more = max(needed - int(n.min()), 1)
    return Verdict(merge, "undecided", table, float(more))


def lower_end(count, n, alpha: float) -> np.ndarray:
    """Exact lower end: at this share, `count` or more of n would have probability alpha."""
    return proportion_confint(count, n, 2 * alpha, "beta")[0]


def upper_end(count, n, alpha: float) -> np.ndarray:
    """Exact upper end: at this share, `count` or fewer of n would have probability alpha."""
    return proportion_confint(count, n, 2 * alpha, "beta")[1]


def prompts_needed(share: float, keep: float, alpha: float) -> int:
    """The fewest prompts that settle a retention of `share` against `keep`; at most MOST."""
    n = np.arange(4, MOST + 1)
    count = np.floor(share * n + 1e-9)
    above = lower_end(count, n, alpha) > keep
    below = upper_end(count, n, alpha) < keep
    settled = above | below
    return int(n[settled.argmax()]) if settled.any() else MOST


def to_be_sure(keep: float, merges: int = 1) -> tuple[int, int]:
    """Prompts of each model that must judge before a merge can be called safe, and to give for it.

    With fewer the exact lower end stays below `keep` though every answer is kept. merges: how many
    are proposed, which share ALPHA.
    """
    alpha = ALPHA / merges * FIRST
    judging = math.floor(math.log(alpha) / math.log(keep)) + 1
    given = judging
    while left_to_judge(given) < judging:
        given += 1
    return judging, given


def without_weakest(merge: Merge, search: Search) -> Merge | None:
    """The merge without the model that the search found weakest; None for a pair."""
    table = search.look(merge)
    if len(merge.models) < 3 or table.empty:
        return None
    table = table.sort_values(["kept", "rise"], ascending=[True, False])
    weakest = table["model"].iloc[0]
    stay = [model != weakest for model in merge.models]
    models = tuple(compress(merge.models, stay))
    weights = merge.weights and tuple(compress(merge.weights, stay))
    return merge._replace(models=models, weights=weights)


# --- the decision --------------------------------------------------------------------------------


def decide(
    models: Sequence[str], judged: Sequence[Verdict], search: Search
) -> pd.DataFrame:
    """One row per model: decision, merge (its place in `judged`; -1: none), kept, least.

    merge, reweight (with weights other than the rule's own), leave out (others merge without it),
    keep apart (no other does, either), or abstain: an interval spans the threshold, or a spent
    budget left a partner untried.
    """
    some_merge = any(verdict.verdict == "safe" for verdict in judged)
    refused = [verdict.merge for verdict in judged if verdict.verdict == "unsafe"]
    places = {
        model: i for i, verdict in enumerate(judged) for model in verdict.merge.models
    }
    rows = []
    for model in models:
        place = places.get(model, -1)
        verdict = judged[place] if model in places else None
        may_fit = _may_fit(model, models, search, refused)
        row = {
            "model": model,
            "decision": _decision(verdict, some_merge, may_fit),
            "merge": place,
        }
        if verdict is not None:
            row |= (
                verdict.table.set_index("model").loc[model, ["kept", "least"]].to_dict()
            )
        rows.append(row)
    return pd.DataFrame(rows, columns=["model", "decision", "merge", "kept", "least"])


def _decision(verdict: Verdict | None, some_merge: bool, may_fit: bool) -> str:
    if verdict is not None and verdict.verdict == "safe":
        return "merge" if verdict.merge.weights is None else "reweight"
    if may_fit or (verdict is not None and verdict.verdict == "undecided"):
        return "abstain"
    return "leave out" if some_merge else "keep apart"


def _may_fit(
    model: str, models: Sequence[str], search: Search, refused: list[Merge]
) -> bool:
    """Whether some merge but the refused ones may keep this model and its partners.

    The intervals of one that was tried leave room for it, or a spent budget left a partner untried.
    """
    paired = {model}
    for merge, table in search.trials.items():
        partners = len(merge.models) > 1 and model in merge.models
        if partners and merge not in refused and (table["high"] >= search.keep).all():
            return True
        if partners and len(merge.models) == 2:
            paired.update(merge.models)
    return search.spent and paired != set(models)
