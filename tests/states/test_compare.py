"""Tables of all pairs: whose probes count, random halves, the score of a group."""

import numpy as np
import pytest

from helpers.states import compare, measures

RNG = np.random.default_rng(0)
LABELS = ["red", "green", "blue"]
PROBE_TASK = np.repeat(LABELS, 12)
STATES = RNG.normal(size=(3, 36, 2, 10)).astype(np.float32)


def test_pair_table_uses_the_probes_of_the_pairs_own_tasks():
    own = compare.pair_table(STATES, LABELS, PROBE_TASK)
    assert own[["task_a", "task_b"]].to_numpy().tolist() == [
        ["red", "green"],
        ["red", "blue"],
        ["green", "blue"],
    ]
    expected = measures.hidden_sim(
        STATES[0][[*range(12), *range(24, 36)], -1],
        STATES[2][[*range(12), *range(24, 36)], -1],
    )
    assert own.hidden_sim[1] == pytest.approx(expected)
    pool = compare.pair_table(STATES, LABELS, layer=0)
    assert pool.hidden_sim[1] == pytest.approx(
        measures.hidden_sim(STATES[0, :, 0], STATES[2, :, 0])
    )


def test_pair_table_on_the_probes_of_other_tasks():
    other = compare.pair_table(
        STATES, LABELS, PROBE_TASK, others=True, measures=["cka"]
    )
    expected = measures.debiased_cka(STATES[0][24:, -1], STATES[1][24:, -1])
    assert other.cka[0] == pytest.approx(expected)


def test_half_samples_spread_as_means_of_the_probes_do():
    """HiddenSim is a mean over probes: its spread must be s / sqrt(n), within tasks."""
    kls = measures.logit_kls(STATES[:, :, -1], lambda x: x[:, :7])
    asked = {"base": STATES.mean(0), "kls": kls, "draws": 2}
    assert set(measures.MEASURES) < set(
        compare.half_samples(STATES, LABELS, PROBE_TASK, **asked)
    )
    halves = compare.half_samples(
        STATES, LABELS, PROBE_TASK, draws=300, measures=["hidden_sim"], seed=1
    )
    assert halves.groupby(["task_a", "task_b"]).size().eq(300).all()
    apart = measures.probe_distances(STATES[0, :24, -1], STATES[1, :24, -1]).reshape(
        2, 12
    )
    expected = np.sqrt((apart.var(axis=1, ddof=1) / 12).sum()) / 2
    found = halves[
        (halves.task_a == "red") & (halves.task_b == "green")
    ].hidden_sim.std()
    assert found == pytest.approx(expected, rel=0.15)


def test_pair_table_has_the_columns_that_its_inputs_allow():
    optional = {"change_cosine", "logit_kl"}
    assert set(measures.MEASURES) - set(compare.pair_table(STATES, LABELS)) == optional
    readout = RNG.normal(size=(7, 10))
    kls = measures.logit_kls(STATES[:, :, -1], lambda x: x @ readout.T, block=5)
    full = compare.pair_table(STATES, LABELS, base=STATES.mean(0), kls=kls)
    assert set(measures.MEASURES) < set(full) and full.notna().all(axis=None)
    expected = measures.logit_kl(
        STATES[0, :, -1] @ readout.T, STATES[1, :, -1] @ readout.T
    )
    assert full.logit_kl[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": LABELS[:2]}, "2 labels for the states of 3"),
        ({"measures": ["cka", "vibe"]}, "vibe"),
        ({"probe_task": ["red"] * 36}, "no probe belongs"),
        ({"others": True}, "three tasks or more"),
    ],
)
def test_pair_table_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        compare.pair_table(STATES, **{"labels": LABELS} | options)


def test_mds_of_a_group():
    assert compare.mds([1.0, 2.0, 3.0]) == 2
    with pytest.raises(ValueError, match="every pair"):
        compare.mds([1.0, np.nan])
