"""Simulated studies have the correlations, families and pairs that were asked for."""

import numpy as np
import pytest
import simulated

from helpers.stats import correlations, dyads


def test_families_have_the_sizes_of_the_fourteen_tasks():
    assert np.bincount(simulated.families(14)).tolist() == list(simulated.SIZES)
    assert len(simulated.families(96)) == 96


@pytest.mark.parametrize(("n", "partners"), [(48, 8), (20, 4)])
def test_a_sparse_design_gives_each_task_its_partners_and_no_relatives(n, partners):
    blocks = simulated.families(n)
    pairs = simulated.drawn_pairs(blocks, partners, np.random.default_rng(0))
    assert (pairs == pairs.T).all()
    assert not (pairs & dyads.same_family(blocks)).any()
    met = pairs.sum(axis=1)
    assert met.min() >= partners and met.max() <= partners + 2


@pytest.mark.parametrize("estimand", correlations.ESTIMANDS)
def test_the_true_correlation_is_the_one_asked_for(estimand, monkeypatch):
    monkeypatch.setattr(simulated, "RELATIVES", 1.0)
    rng = np.random.default_rng(1)
    x, y = simulated.simulate(simulated.families(160), rng, 20, **{estimand: 0.5})
    r = {
        name: correlations.correlation(x, y, name, [0] * 160).value
        for name in correlations.ESTIMANDS
    }
    assert r.pop(estimand) == pytest.approx(0.5, abs=0.15)
    assert max(map(abs, r.values())) < 0.25


def test_power_grows_with_the_tasks():
    rng = np.random.default_rng(0)

    def rejected(n, partners):
        blocks = simulated.families(n)
        about = blocks, rng, partners, 0.5, 99
        table = simulated.rates(lambda: simulated.of_correlations(*about), 8)
        rows = table[(table["test"] == "victim") & (table["way"] == "interval")]
        return rows["rejected"].mean()

    assert rejected(60, 6) > rejected(14, None)
