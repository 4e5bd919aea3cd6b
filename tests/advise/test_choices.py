"""Is what is called safe safe? Exact ends, the stated rate by simulation, decisions."""

import numpy as np
import pandas as pd
import pytest

from helpers.advise import choices
from helpers.advise.merges import Merge
from helpers.advise.search import Search, in_rounds, propose

DRAWS = 60  # of a study


class World:
    """Merges with true retentions: a trial draws them, each merge and part anew."""

    def __init__(self, truth, seed=0, judging=48):
        self.truth, self.rng, self.judging = truth, np.random.default_rng(seed), judging
        self.calls = []

    def measure(self, merge, prompts=16):
        self.calls.append(merge)
        truth = self.truth(merge)
        kept = (
            self.rng.random((len(truth), prompts))
            < np.array([*truth.values()])[:, None]
        )
        frame = pd.DataFrame(
            {"model": np.repeat([*truth], prompts), "kept": 1.0 * kept.ravel()}
        )
        return frame.assign(rise=1 - frame["kept"], dose=1 / len(merge.models))

    def judge(self, merge):
        return self.measure(merge, self.judging)

    def advise(self, models, keep=0.9):
        search = Search(self.measure, keep)
        judged = choices.verdicts(propose(models, search), search, self.judge)
        return judged, choices.decide(models, judged, search)


def always(share):
    return lambda merge: dict.fromkeys(merge.models, share)


def test_exact_ends_are_known_ones():
    assert choices.lower_end(29, 29, 0.05) == pytest.approx(0.05 ** (1 / 29))
    assert choices.upper_end(0, 10, 0.05) == pytest.approx(1 - 0.05 ** (1 / 10))
    assert choices.lower_end(0, 5, 0.05) == 0 and choices.upper_end(5, 5, 0.05) == 1
    assert choices.prompts_needed(1.0, 0.9, 0.05) == 29
    assert choices.prompts_needed(0.0, 0.9, 0.05) == 4


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.9, 0.95])
@pytest.mark.parametrize("merges", [1, 2, 7])
def test_with_one_prompt_fewer_nothing_can_be_called_safe(keep, merges):
    judging, given = choices.to_be_sure(keep, merges)
    alpha = choices.FIRST * choices.ALPHA / merges
    assert choices.lower_end(judging, judging, alpha) > keep
    assert choices.lower_end(judging - 1, judging - 1, alpha) <= keep
    left = [len(range(n)[choices.split(n)[1]]) for n in (given - 1, given)]
    assert left[0] < judging <= left[1]


def one_below(merge):
    """Every merge keeps a little too little of one model: whatever is called safe is not."""
    return {model: 0.899 if model == merge.models[0] else 1.0 for model in merge.models}


def test_false_assurance_is_below_the_stated_rate():
    """At 31 prompts, where the exact test comes closest to its level."""
    wrong = 0
    for seed in range(DRAWS):
        judged, _ = World(one_below, seed, judging=31).advise(list("abc"))
        wrong += any(verdict.verdict == "safe" for verdict in judged)
    assert wrong / DRAWS <= choices.ALPHA + 2 * np.sqrt(0.05 * 0.95 / DRAWS)


def test_prompts_that_choose_must_not_judge(monkeypatch):
    """The planted fault: the best of many looks, judged by those looks, assures falsely."""
    wrong = 0
    for seed in range(DRAWS):
        search = Search(World(one_below, seed, judging=31).judge, 0.9)
        groups = propose(list("abc"), search)
        seen = {
            merge: table for merge, table in search.trials.items() if merge in groups
        }
        least = [
            choices.lower_end(np.rint(31 * table["kept"]), 31, 0.05).min()
            for table in seen.values()
        ]
        wrong += any(end > 0.9 for end in least)
    assert wrong / DRAWS > 2 * choices.ALPHA


def test_what_all_keep_is_merged_and_what_none_keeps_stays_apart():
    judged, table = World(always(1.0)).advise(list("abc"))
    assert [verdict.verdict for verdict in judged] == ["safe"]
    assert set(table["decision"]) == {"merge"}
    assert table["least"].min() > 0.9
    judged, table = World(always(0.1)).advise(list("abc"))
    assert judged == [] and set(table["decision"]) == {"keep apart"}


def test_one_model_that_spoils_every_merge_is_left_out():
    def truth(merge):
        alone = len(merge.models) == 1
        return dict.fromkeys(
            merge.models, 1.0 if alone or "x" not in merge.models else 0.2
        )

    judged, table = World(truth).advise(list("abxc"))
    assert table.set_index("model")["decision"].to_dict() == {
        "a": "merge", "b": "merge", "x": "leave out", "c": "merge",
    }  # fmt: skip
    assert judged[0].merge.models == ("a", "b", "c")


def test_two_kinds_become_two_models():
    def truth(merge):
        kinds = {model.isupper() for model in merge.models}
        return dict.fromkeys(merge.models, 1.0 if len(kinds) == 1 else 0.3)

    judged, table = World(truth).advise(list("aAbB"))
    assert {verdict.merge.models for verdict in judged} == {("a", "b"), ("A", "B")}
    assert set(table["decision"]) == {"merge"}


def test_a_starved_model_gets_more_weight_and_a_harmed_one_does_not():
    def truth(merge):
        weights = merge.weights or (1.0,) * len(merge.models)
        enough = dict(zip(merge.models, weights, strict=True)).get("s", 1.0) >= 1.5
        return {model: 1.0 if model != "s" or enough else 0.2 for model in merge.models}

    judged, table = World(truth).advise(["a", "s"])
    assert judged[0].merge.weights == (1.0, 1.5)
    assert set(table["decision"]) == {"reweight"}

    def harmed(merge):
        return {
            m: 0.2 if m == "s" and len(merge.models) > 1 else 1.0 for m in merge.models
        }

    world = World(harmed)
    search = Search(world.measure, 0.9)
    assert propose(["a", "s"], search) == []
    assert search.cause(Merge(("a", "s")), "s") == "partner"
    assert all(merge.weights is None for merge in world.calls if len(merge.models) == 2)


def test_it_abstains_where_the_interval_spans_and_says_how_many_prompts_settle_it():
    judged, table = World(always(0.95), 3).advise(["a", "b"])
    assert judged[0].verdict == "undecided" and set(table["decision"]) == {"abstain"}
    assert 0 < judged[0].more < choices.MOST


def test_a_spent_budget_keeps_no_model_apart_whose_pairs_were_not_tried():
    search = Search(World(always(0.1)).measure, 0.9)
    for models in ("abc", "ab"):
        search.look(Merge(tuple(models)))
    search.budget = -1
    assert propose(list("abc"), search) == [] and search.spent
    assert set(choices.decide(list("abc"), [], search)["decision"]) == {"abstain"}
    search.budget = np.inf
    for models in ("ac", "bc"):
        search.look(Merge(tuple(models)))
    assert set(choices.decide(list("abc"), [], search)["decision"]) == {"keep apart"}


def test_a_merge_that_was_judged_too_poor_closes_no_other():
    search = Search(World(always(1.0)).measure, 0.9)
    for models in ("ab", "ac", "bc"):
        search.look(Merge(tuple(models)))
    table = World(always(0.1)).judge(Merge(("a", "b")))
    poor = choices.judge(Merge(("a", "b")), table, 0.9, 0.05)
    assert poor.verdict == "unsafe"
    decided = choices.decide(list("abc"), [poor], search)  # a and c, b and c are open
    assert set(decided["decision"]) == {"abstain"}
    for merge in (Merge(("a", "c")), Merge(("b", "c"))):
        del search.trials[merge]
    decided = choices.decide(list("ab"), [poor], search)
    assert set(decided["decision"]) == {"keep apart"}


def test_a_budget_ends_the_search_and_leaves_every_model_as_many_partners():
    world = World(always(0.5))
    search = Search(world.measure, 0.9, budget=-1)
    assert propose(list("abc"), search) == [] and world.calls == [] and search.spent
    first = in_rounds(list("abcdef"))[:6]
    assert all(sum(model in pair for pair in first) == 2 for model in "abcdef")
    assert len(set(in_rounds(list("abcdef")))) == 15
