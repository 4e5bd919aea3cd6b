"""Is the judge of trials right? Choices with known worth, intervals that cover what they say."""

import numpy as np
import pandas as pd
import pytest

from helpers.advise import validate
from helpers.study.tables import Pairs

TASKS = tuple("abcde")
RNG = np.random.default_rng(0)


def pairs(values):
    """A symmetric matrix of pairs."""
    values = (values + values.T) / 2
    np.fill_diagonal(values, np.nan)
    return Pairs(values, TASKS, False)


LOSS = pairs(-100 * RNG.random((5, 5)))
CHOICES = [validate.partners, validate.pools, validate.leavers]


@pytest.mark.parametrize("options", CHOICES)
def test_the_truth_regrets_nothing_and_its_contrary_most(options):
    scores = {
        "truth": LOSS,
        "contrary": pairs(-LOSS.values),
        "blind": pairs(np.zeros((5, 5))),
    }
    chosen = (
        validate.choose(options, LOSS, scores)
        .groupby("criterion")[["gain", "regret"]]
        .mean()
    )
    assert chosen.loc["truth", "regret"] == 0 < chosen.loc["truth", "gain"]
    assert chosen.loc["contrary", "gain"] < 0
    # among ties the mean: random choice
    assert chosen.loc["blind", "gain"] == pytest.approx(0)
    both = chosen["gain"] + chosen["regret"]
    assert np.allclose(both, both.iloc[0])  # random choice's regret, whoever chooses


def test_options_are_what_their_names_say():
    partners = validate.partners(LOSS).dropna()
    assert len(partners) == 20 and partners[("a",), ("a", "b")] == LOSS.of("a", "b")
    assert len(validate.pools(LOSS, 4)) == 5 * 6
    assert len(validate.pools(LOSS, 4, most=2)) == 2 * 6
    leavers = validate.leavers(LOSS)
    assert leavers[("a", "b"), ("a", "b")] == pytest.approx(
        np.mean([LOSS.of("a", other) for other in "cde"])
    )


def test_what_was_not_measured_is_no_option():
    values = LOSS.values.copy()
    values[0, 1] = values[1, 0] = np.nan
    table = validate.choose(
        validate.partners, Pairs(values, TASKS, False), {"truth": LOSS}
    )
    assert table["regret"].notna().all() and (table["regret"] >= 0).all()


def cells(n, prompts, tests, shift=0.0, seed=1):
    """Trials and losses of n cells whose true retention the trial meets, or misses by `shift`."""
    rng = np.random.default_rng(seed)
    truth = rng.beta(3, 1, n)
    told = np.clip(truth + shift, 0, 1)
    task = [f"t{i}" for i in range(n)]
    index = np.repeat(np.arange(n), prompts)
    trials = pd.DataFrame({"rule": "linear", "tasks": [(task[i], "x") for i in index]})
    trials["task"] = [task[i] for i in index]
    trials["prompt"] = np.tile(np.arange(prompts), n)
    trials["kept"] = 1.0 * (rng.random(n * prompts) < told[index])
    trials["rise"] = 1 - trials["kept"]
    trials["confidence"] = 0.8
    losses = trials[validate.CELL].drop_duplicates().reset_index(drop=True)
    losses["loss"] = 100 * (rng.binomial(tests, truth) / tests - 1)
    losses["nll_loss"], losses["tests"] = losses["loss"], tests
    return trials, losses


def test_intervals_cover_what_they_say_and_see_a_trial_that_is_off():
    honest = validate.calibration(validate.forecasts(*cells(1500, 32, 40), 32))
    assert 0.88 <= honest["coverage"] <= 0.97  # discrete: at least 90 %
    assert abs(honest["bias"]) < 2 and honest["r"] > 0.85
    off = validate.calibration(validate.forecasts(*cells(1500, 32, 40, shift=-0.3), 32))
    assert off["coverage"] < 0.7 and off["bias"] < -20


def test_fewer_prompts_are_the_first_ones_and_err_more():
    trials, losses = cells(800, 32, 40)
    few, many = (
        validate.calibration(validate.forecasts(trials, losses, n)) for n in (8, 32)
    )
    assert few["error"] > many["error"] and few["r"] < many["r"]
    assert (validate.on_prompts(trials, 8)["prompts"] == 8).all()


def test_what_a_model_answers_without_confidence_counts_little():
    """A model that is wrong where it is unsure, and a merge that changes only these answers."""
    sure = np.arange(32) < 24
    trials = pd.DataFrame({"rule": "linear", "tasks": [("a", "b")] * 32, "task": "a"})
    trials["prompt"], trials["rise"] = range(32), 0.0
    trials["kept"], trials["confidence"] = 1.0 * sure, np.where(sure, 0.95, 0.1)
    cell = validate.on_prompts(trials, 32).iloc[0]
    assert cell["retention"] == 0.75 and cell["foretold"] > 0.95
    assert 24 < cell["effective"] < 32
    equal = validate.on_prompts(trials.assign(confidence=0.5), 32).iloc[0]
    assert equal["foretold"] == equal["retention"] and equal["effective"] == 32


def test_a_merge_is_safe_only_if_all_its_models_are():
    table = pd.DataFrame(
        {"rule": "linear", "tasks": [("a", "b")] * 2 + [("a", "c")] * 2}
    )
    table["kept"], table["prompts"] = [32, 32, 32, 20], 32
    table["collapse"] = [False, True, False, False]
    merges = validate.assurance(table)
    assert merges["safe"].tolist() == [True, False]
    assert merges["collapse"].tolist() == [True, False]  # the first is assured falsely
