"""Which merges look promising? A budgeted search over trials, on the prompts that may choose.

First all models at once, then pairs under LA, then rules, scales and weights for the promising
ones, then groups grown greedily. Each group is read by a trial of its own: pairs do not add up.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from helpers.advise.merges import Merge, alone, retention

VARIANTS = (
    ("linear", 1.0),
    ("task_arithmetic", 1.0),
    ("task_arithmetic", 0.7),
    ("ties", 1.0),
)
HEAVIER = 1.5  # factor on the weight of a model that fails by its dose
TRIES = 2  # of other weights
PATIENCE = 3  # newcomers in a row that may fail before a group stops growing
SLACK = 1e-9  # of rounding

# a trial's rows: model, prompt, kept, rise, dose
Measure = Callable[[Merge], pd.DataFrame]


class Search:
    """Trials by merge, each made once, until the budget (seconds) is spent.

    keep: the retention that every model of a merge must have.
    """

    def __init__(self, measure: Measure, keep: float, budget: float = math.inf):
        self.measure, self.keep, self.budget = measure, keep, budget
        self.trials: dict[Merge, pd.DataFrame] = {}
        self.started = time.monotonic()
        self.spent = False

    def look(self, merge: Merge) -> pd.DataFrame:
        """`retention` of each model of a merge; empty once the budget is spent."""
        if merge in self.trials:
            return self.trials[merge]
        if time.monotonic() - self.started > self.budget:
            self.spent = True
            return pd.DataFrame()
        self.trials[merge] = retention(self.measure(merge))
        return self.trials[merge]

    def failing(self, merge: Merge) -> list[str]:
        """Models that miss more prompts than `keep` allows, rounded up."""
        table = self.look(merge)
        if table.empty:
            return list(merge.models)
        missed = (1 - table["kept"]) * table["prompts"]
        allowed = (1 - self.keep) * table["prompts"]
        fails = missed > np.ceil(allowed - SLACK) + SLACK
        return list(table.loc[fails, "model"])

    def score(self, merge: Merge) -> tuple[float, float]:
        """Higher is better: the least retention; among equals, the least rise of NLL."""
        table = self.look(merge)
        if table.empty:
            return -1.0, -math.inf
        return table["kept"].min(), -table["rise"].max()

    def cause(self, merge: Merge, model: str) -> str:
        """Why a model fails in a merge.

        "dose" if it fails alone at the dose that it has there, "partner" if not, "" if the budget
        is spent.
        """
        table = self.look(merge)
        if table.empty:
            return ""
        dose = table.set_index("model").loc[model, "dose"]
        solo = alone(model, round(float(dose), 1))
        if self.look(solo).empty:
            return ""
        return "dose" if self.failing(solo) else "partner"


def propose(models: Sequence[str], search: Search) -> list[Merge]:
    """Disjoint groups that keep every model, each by its best rule, scale and weights."""
    whole = best_variant(tuple(models), search)
    if not search.failing(whole):
        return [whole]
    pairs = in_rounds(models)
    for pair in pairs:
        search.look(Merge(pair))
    groups, left = [], list(models)
    while (group := _best_pair(left, pairs, search)) is not None:
        group = _grown(group, left, search)
        groups.append(group)
        left = [model for model in left if model not in group.models]
    return groups


def in_rounds(models: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs, so ordered that a budget that ends early leaves each model as many partners."""
    n = len(models)

    def turn(places: tuple[int, int]) -> tuple[int, int]:
        distance = places[1] - places[0]
        return min(distance, n - distance), places[0]

    order = sorted(combinations(range(n), 2), key=turn)
    return [(models[i], models[j]) for i, j in order]


def _best_pair(
    left: Sequence[str], pairs: Sequence[tuple[str, str]], search: Search
) -> Merge | None:
    """The best of the pairs that keep both models; None if none does.

    Other rules than LA are tried on as many promising pairs as there are models.
    """
    inside = [pair for pair in pairs if set(pair) <= set(left)]
    inside.sort(key=lambda pair: search.score(Merge(pair)), reverse=True)
    merges = [best_variant(pair, search) for pair in inside[: len(left)]]
    keeping = [merge for merge in merges if not search.failing(merge)]
    return max(keeping, key=search.score, default=None)


def _grown(group: Merge, left: Sequence[str], search: Search) -> Merge:
    """The group with newcomers, the most promising first, as long as every model is kept."""
    failures = 0
    while failures < PATIENCE:
        newcomers = [model for model in left if model not in group.models]
        newcomers.sort(key=lambda model: _least(model, group, search), reverse=True)
        if failures >= len(newcomers):
            break
        members = {*group.models, newcomers[failures]}
        in_order = tuple(model for model in left if model in members)
        wider = best_variant(in_order, search)
        if search.failing(wider):
            failures += 1
        else:
            group, failures = wider, 0
    return group


def _least(model: str, group: Merge, search: Search) -> tuple[float, float]:
    """The worst score of a model's pairs with the members of a group."""
    scores = []
    for member in group.models:
        pair = Merge((model, member))
        turned = Merge((member, model))
        scores.append(search.score(pair if pair in search.trials else turned))
    return min(scores)


def best_variant(models: tuple[str, ...], search: Search) -> Merge:
    """The models by the rule and scale that keep most; by other weights if none keeps all."""
    variants = [Merge(models, rule, None, scale) for rule, scale in VARIANTS]
    best = max(variants, key=search.score)
    for _ in range(TRIES):
        if not search.failing(best):
            break
        heavier = reweighted(best, search)
        if heavier is None or search.score(heavier) <= search.score(best):
            break
        best = heavier
    return best


def reweighted(merge: Merge, search: Search) -> Merge | None:
    """More weight for models that fail by their dose; None where a partner is what harms."""
    failing = search.failing(merge)
    starved = {model for model in failing if search.cause(merge, model) == "dose"}
    if not starved or len(starved) == len(merge.models):
        return None
    old = merge.weights or (1.0,) * len(merge.models)
    factors = [HEAVIER if model in starved else 1.0 for model in merge.models]
    new = tuple(round(weight * by, 3) for weight, by in zip(old, factors, strict=True))
    return merge._replace(weights=new)
