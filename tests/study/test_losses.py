"""The loss: its formula, interval, collapse rule, parts, and what stands in losses.csv."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from helpers.study import failures, losses

scores = st.integers(0, 48).map(lambda right: right / 48)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- the formula -------------------------------------------------------------------------------


def test_the_loss_of_known_scores():
    assert losses.merging_loss(0.6, 0.8) == pytest.approx(-25)
    assert losses.merging_loss(0.6, 0.8, chance=0.3) == pytest.approx(-40)
    table = losses.merging_loss([0.0, 0.5, 0.75], [0.5, 0.5, 0.5])
    np.testing.assert_allclose(table, [-100, 0, 50])


@given(scores, scores, scores)
def test_a_loss_is_undefined_exactly_where_the_specialist_has_nothing_to_lose(
    merged, own, chance
):
    loss = losses.merging_loss(merged, own, chance)
    assert np.isnan(loss) == (own <= chance)
    if own > chance and merged == chance:
        assert loss == -100


def test_a_dose_is_read_between_its_neighbours_and_never_outside():
    curve = pd.DataFrame({"dose": [1.0, 0.0, 0.5], "score": [1.0, 0.0, 0.2]})
    assert losses.read_dose(curve, 0.75) == pytest.approx(0.6)
    np.testing.assert_allclose(losses.read_dose(curve, [0.0, 1.0]), [0, 1])
    assert np.isnan(losses.read_dose(curve, 1.01))
    assert losses.dose_loss(curve, 0.75) == pytest.approx(-40)


# --- intervals ---------------------------------------------------------------------------------


def test_the_interval_agrees_with_scipys_paired_bootstrap(rng):
    specialist = (rng.random(80) < 0.85).astype(float)
    merged = specialist * (rng.random(80) < 0.6)
    for chance in (0.0, 0.25):
        ours = losses.interval([(merged, specialist)], [chance], draws=20000)
        theirs = scipy_stats.bootstrap(
            (merged, specialist),
            lambda m, s: ((m.mean() - chance) / (s.mean() - chance) - 1) * 100,  # noqa: B023
            paired=True,
            vectorized=False,
            method="percentile",
            n_resamples=3000,
            rng=rng,
        ).confidence_interval
        assert ours.value == pytest.approx(
            losses.merging_loss(merged.mean(), specialist.mean(), chance)
        )
        np.testing.assert_allclose([ours.low, ours.high], theirs, atol=2)


def test_the_interval_covers_the_true_loss(rng):
    covered = 0
    for seed in range(200):
        specialist = rng.random(60) < 0.8
        merged = specialist & (rng.random(60) < 0.5)  # true loss: -50 %
        found = losses.interval([(merged, specialist)], draws=300, seed=seed)
        covered += found.low <= -50 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_the_mean_loss_of_a_merge_and_an_undefined_one():
    ones, half, none = np.ones(40), np.repeat([0.0, 1.0], 20), np.zeros(40)
    found = losses.interval([(half, ones), (ones, ones)])
    assert found.value == pytest.approx(-25) and found.n == 80
    assert found.high - found.low < 20  # half the width of the one uncertain task
    assert np.isnan(losses.interval([(half, none)])[:3]).all()
    assert np.isnan(losses.interval([(half, ones), (half, none)]).value)
    with pytest.raises(ValueError, match="same examples"):
        losses.interval([(ones, ones[:5])])


def test_the_collapse_rule_needs_size_and_certainty_and_leaves_undefined_undefined():
    found = losses.collapsed([-50, -50, -29, np.nan], [-20, -5, -20, np.nan])
    assert found.tolist() == [True, False, False, pd.NA]


def test_false_alarms_are_rare_unless_little_exceeds_chance(rng):
    good, poor = (rng.random(60) < 0.85), (rng.random(60) < 0.4)
    assert losses.false_alarm_rate(good) <= 0.01
    assert losses.false_alarm_rate(poor) <= 0.1
    assert losses.false_alarm_rate(good, chance=0.75) > losses.false_alarm_rate(good)
    assert losses.false_alarm_rate(np.zeros(20)) == 0


def test_the_false_alarm_rate_is_that_of_independent_equals(rng):
    truth, fired = 0.5, 0
    for seed in range(400):
        merged, own = rng.random((2, 40)) < truth
        found = losses.interval([(merged, own)], draws=400, seed=seed)
        fired += bool(losses.collapsed(found.value, found.high)[0])
    sample = np.repeat([0.0, 1.0], 20)
    assert losses.false_alarm_rate(sample) == pytest.approx(fired / 400, abs=0.04)


# --- how it fails ------------------------------------------------------------------------------


def answers(*rows):
    """Examples from (correct, forced, kind)."""
    frame = pd.DataFrame(rows, columns=["correct", "forced", "kind"])
    return frame.assign(example=[f"e{i}" for i in range(len(frame))])


KINDS = [
    "stops",
    "empty",
    "partner's answer",
    "partner's format",
    "base's answer",
    "other",
]
example = st.tuples(st.booleans(), st.booleans(), st.sampled_from(KINDS)).map(
    lambda row: (float(row[0]), float(row[0] or row[1]), row[2])
)


def test_the_split_of_a_known_loss():
    right = (1.0, 1.0, "right")
    merged = answers(
        right,
        (0.0, 1.0, "empty"),  # right when it is made to go on
        (0.0, 1.0, "partner's format"),  # likewise, whatever it looks like
        (0.0, 0.0, "partner's answer"),
        (0.0, 0.0, "empty"),  # made to go on, it is wrong
    )
    own = answers(right, right, right, right, (0.0, 1.0, "stops"))
    parts = failures.split(merged, own)
    # the specialist's own stop is no loss of the merge: 2 - 1 of 4; the merge's fifth answer is
    values = {part: of.value for part, of in parts.items()}
    assert values == pytest.approx({"stops": -25, "format": -25, "content": -25})
    assert sum(values.values()) == pytest.approx(losses.merging_loss(1 / 5, 4 / 5))
    assert all(of.low <= of.value <= of.high for of in parts.values())


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.tuples(example, example), min_size=1, max_size=12))
def test_the_parts_of_a_loss_add_up_to_it(rows):
    merged, own = (answers(*side) for side in zip(*rows, strict=True))
    parts = failures.split(merged, own, draws=10)
    loss = losses.merging_loss(merged["correct"].mean(), own["correct"].mean())
    total = sum(of.value for of in parts.values())
    assert total == pytest.approx(loss, nan_ok=True)


def test_a_split_refuses_other_examples():
    merged = answers((1.0, 1.0, "right"))
    with pytest.raises(ValueError, match="same examples"):
        failures.split(merged, merged.assign(example="other"))


# --- tables ------------------------------------------------------------------------------------

DOSES = pd.DataFrame(
    {
        "task": ["a"] * 3 + ["b"] * 3,
        "dose": [0.0, 0.5, 1.0] * 2,
        "score": [0.0, 0.4, 0.8, 0.1, 0.1, 0.5],
        "nll": [3.0, 1.0, 0.2, 3.0, 2.0, 1.0],
    }
)
REFERENCES = pd.DataFrame(
    {"task": ["a", "b"], "specialist": [0.8, 0.5], "base": 0.1, "chance": [0.0, 0.3]}
).assign(nll_specialist=[0.2, 1.0], nll_base=3.0)


def cells():
    """One plain merge of a and b, and one by a rule with a control of its own."""
    rows = [
        ("m1", "a", 0.4, 1.2, 0.5, 0.75, np.nan, np.nan),
        ("m1", "b", 0.0, 2.5, 0.5, 0.5, np.nan, np.nan),
        ("m2", "a", 0.2, 1.5, 0.5, 0.75, 0.04, 2.9),
    ]
    names = ["merge", "task", "score", "nll", "dose_ingredient", "dose_own"]
    names += ["control_solo", "nll_solo"]
    return pd.DataFrame(rows, columns=names).assign(invalid=np.nan)


def test_the_parts_of_a_loss_follow_from_its_doses():
    table = losses.loss_table(cells(), REFERENCES, DOSES).set_index(["merge", "task"])
    a, b = table.loc["m1", "a"], table.loc["m1", "b"]
    assert (a.loss, a.dilution, a.overlap, a.interference) == pytest.approx(
        (-50, -50, 25, -25)
    )
    # below chance: more than all is lost
    assert b.chance_corrected == pytest.approx(-250)
    parts = table.dilution + table.overlap + table.interference
    np.testing.assert_allclose(parts, table.loss)
    assert table.floor.tolist() == [False, False, True]
    found = losses.outcomes(table.reset_index(), DOSES)
    np.testing.assert_allclose(found.alone, [-50, -80, -95])
    np.testing.assert_allclose(found.partners, [0, -20, 20])
    np.testing.assert_allclose(found.nll_alone, [-0.8, -1.0, -2.7])
    np.testing.assert_allclose(found.nll_partners, [-0.2, -0.5, 1.4])


def test_intervals_are_joined_and_a_copy_has_those_of_its_twin(rng):
    rows = []
    for merge, task in (
        ("m1", "a"),
        ("m1", "b"),
        ("specialist", "a"),
        ("specialist", "b"),
    ):
        correct = (rng.random(40) < 0.6).astype(float)
        rows += [(merge, task, f"e{i}", value) for i, value in enumerate(correct)]
    examples = pd.DataFrame(rows, columns=["merge", "task", "example", "correct"])
    merges = pd.DataFrame({"merge": ["m1", "m2"], "tasks": [("a", "b")] * 2})
    merges["same_as"] = [None, "m1"]
    of = losses.by_cell(merges, examples)
    table = losses.loss_table(cells(), REFERENCES, DOSES)
    found = losses.with_intervals(table, of, seed=1).set_index(["merge", "task"])
    assert found.loc[("m1", "a"), "loss_low"] == found.loc[("m2", "a"), "loss_low"]
    pair = of["m1", "b"]["correct"], of["specialist", "b"]["correct"]
    span = losses.interval([pair], [0.3], seed=1)
    assert found.loc[("m1", "b"), "corrected_high"] == span.high
    both = losses.merge_losses(merges, of, seed=1)
    assert both.loc[0, "loss"] == both.loc[1, "loss"]
    assert both.loc[0, "loss_low"] < both.loc[0, "loss"] < both.loc[0, "loss_high"]


def test_each_pair_gives_two_directed_cells():
    table = cells().assign(tasks=[("a", "b"), ("a", "b"), ("a", "b", "c")])
    found = losses.directed(table)
    assert found[["victim", "partner"]].values.tolist() == [["a", "b"], ["b", "a"]]
