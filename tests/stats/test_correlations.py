"""Correlations with a victim's, a partner's and a pair's effects: known answers, level, faults."""

import numpy as np
import pytest
import simulated
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from helpers.stats import correlations
from helpers.stats.effects import Interval

FAMILIES = simulated.families(14)


def studies(draws, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [simulated.simulate(FAMILIES, rng, **options) for _ in range(draws)]


def test_as_victim_and_as_partner_are_told_apart():
    rng = np.random.default_rng(0)
    far, noise = rng.standard_normal((2, 10))
    x = np.add.outer(far, far)
    y = far[:, None] - far + 0.5 * noise[:, None]
    victim, partner = (
        correlations.correlation(x, y, role, range(10))
        for role in ("victim", "partner")
    )
    assert victim.value == pytest.approx(
        stats.pearsonr(far, far + 0.5 * noise).statistic
    )
    assert partner.value == pytest.approx(-1)
    both = (y + y.T) / 2  # what the mean of a pair would have said
    cancelled = correlations.correlation(x, both, "victim", range(10))
    assert cancelled.value == pytest.approx(stats.pearsonr(far, noise).statistic)
    of_vector = correlations.correlation(far, y, "victim", range(10))
    assert of_vector == pytest.approx(victim)


def test_a_task_interval_is_the_jackknife_of_fishers_z():
    x, y = studies(1)[0]
    a, b = correlations.of_tasks(x, y, "victim")
    z = [np.arctanh(np.corrcoef(np.delete([a, b], i, axis=1))[0, 1]) for i in range(14)]
    whole = np.arctanh(np.corrcoef(a, b)[0, 1])
    reach = stats.t.ppf(0.975, 13) * np.sqrt(13 / 14 * np.sum((z - np.mean(z)) ** 2))
    found = correlations.correlation(x, y, "victim", range(14))
    ends = np.tanh([whole, whole - reach, whole + reach])
    assert found[:3] == pytest.approx(ends)


def test_a_pair_correlation_is_that_of_least_squares_residuals():
    x, y = studies(1, partners=6)[0]
    upper = np.nonzero(np.triu(~np.isnan(y)))
    incidence = np.eye(14)[upper[0]] + np.eye(14)[upper[1]]
    left = [
        m[upper] - incidence @ np.linalg.lstsq(incidence, m[upper])[0]
        for m in (x, (y + y.T) / 2)
    ]
    found = correlations.correlation(x, y, "pair", range(14))
    assert found.value == pytest.approx(np.corrcoef(left)[0, 1])


def test_clustered_variance_counts_what_two_units_share_once():
    pairs = np.array([0, 0, 1]), np.array([1, 2, 2])
    score = np.array([1.0, 2.0, 4.0])
    by_task = 3**2 + 5**2 + 6**2 - (1 + 4 + 16)
    assert correlations._clustered(score, pairs, range(3)) == by_task
    # tasks 0 and 1 are relatives: their pair lies within a family
    by_family = (1 + 2 + 4) ** 2 + 6**2 - 6**2
    assert correlations._clustered(score, pairs, [0, 0, 1]) == by_family


def test_equivalence_by_hand():
    z, error = 0.1, 0.08
    reach = stats.t.ppf(0.975, 13) * error
    found = Interval(*np.tanh([z, z - reach, z + reach]), 14)
    lower = stats.t.sf((z + np.arctanh(0.3)) / error, 13)
    upper = stats.t.cdf((z - np.arctanh(0.3)) / error, 13)
    assert correlations.equivalence(found) == pytest.approx(max(lower, upper))


@given(st.lists(st.sampled_from("abcde"), min_size=3, max_size=9), st.integers(0, 99))
def test_orders_keep_families_together(blocks, seed):
    labels = np.array(blocks)
    moved = correlations.orders(tuple(blocks), 20, seed)
    assert (moved[0] == np.arange(len(blocks))).all()
    assert (np.sort(moved, axis=1) == moved[0]).all()
    related = labels[:, None] == labels
    for order in moved:
        assert (related[np.ix_(order, order)] == related).all()


def test_permutation_p_of_task_effects_is_that_of_scipy():
    a, b = np.random.default_rng(0).standard_normal((2, 6))
    b += a

    def studentised(order):
        products = (a - a.mean())[order.astype(int)] * (b - b.mean())
        return abs(products.sum()) / np.sqrt((products**2).sum())

    exact = stats.permutation_test(
        (np.arange(6.0),),
        studentised,
        permutation_type="pairings",
        alternative="greater",
    )
    y = b[:, None] + np.zeros(6)
    found = correlations.p_value(a, y, "victim", 4999)
    assert found == pytest.approx(exact.pvalue, abs=0.02)


def test_a_metric_of_single_tasks_has_nothing_pair_specific():
    _, y = studies(1)[0]
    x = np.add.outer(np.arange(14.0), np.arange(14.0))
    assert np.isnan(correlations.correlation(x, y, "pair", range(14)).value)
    assert np.isnan(correlations.p_value(x, y, "pair", 99))


def test_three_tasks_leave_nothing_to_the_pair():
    x, y = simulated.simulate([0, 1, 2], np.random.default_rng(0))
    assert np.isnan(correlations.correlation(x, y, "pair", range(3)).value)
    assert np.isnan(correlations.p_value(x, y, "pair", 99))


def test_a_metric_measured_on_the_merged_pairs_alone_is_tested_too():
    blocks, rng = simulated.families(30), np.random.default_rng(0)
    x, y = simulated.simulate(blocks, rng, partners=6, pair=0.8)
    sparse = np.where(np.isnan(y), np.nan, x)
    assert correlations.p_value(sparse, y, "pair", 199) < 0.05
    units = range(30)
    assert correlations.correlation(sparse, y, "pair", units) == pytest.approx(
        correlations.correlation(x, y, "pair", units)
    )


def test_the_level_holds_among_relatives_and_pairs_as_units_are_caught():
    """One planted fault: the textbook p over pairs, which takes 91 pairs for 91 observations."""
    ours, textbook = [], []
    for x, y in studies(200):
        ours.append(correlations.p_value(x, y, "pair", 99, 0, FAMILIES) < 0.05)
        left = correlations.of_pairs(x, y)[:2]
        textbook.append(stats.pearsonr(*left).pvalue < 0.05)
    assert 0.02 <= np.mean(ours) <= 0.09
    assert np.mean(textbook) > 0.15


def test_intervals_cover_among_relatives_and_in_sparse_designs():
    held = []
    for x, y in studies(150, partners=6, pair=0.5):
        found = correlations.correlation(x, y, "pair", FAMILIES)
        held.append(found.low <= 0.5 <= found.high)
    assert 0.9 <= np.mean(held) <= 0.99
