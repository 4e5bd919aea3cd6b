"""The social-relations model: constructed tables, the round robin's formulas, missing pairs."""

import numpy as np
import pytest
import simulated
from hypothesis import given
from hypothesis import strategies as st

from helpers.stats import dyads


def round_robin(matrix):
    """Victim, partner, relation, covariance, reciprocity: Warner, Kenny & Stoto 1979, by hand."""
    n = len(matrix)
    rows, columns, level = (np.nanmean(matrix, axis=axis) for axis in (1, 0, None))
    own = (n - 1) / (n * (n - 2))
    a = own * ((n - 1) * rows + columns) - (n - 1) / (n - 2) * level
    b = own * ((n - 1) * columns + rows) - (n - 1) / (n - 2) * level
    left = np.nan_to_num(matrix - a[:, None] - b - level)
    upper = np.triu_indices(n, 1)
    free = (n - 1) * (n - 2) / 2
    between = 2 * (((left + left.T)[upper] / 2) ** 2).sum() / (free - 1)
    within = 2 * (((left - left.T)[upper] / 2) ** 2).sum() / free
    relation, reciprocity = (between + within) / 2, (between - within) / 2
    noise = ((n - 1) * relation + reciprocity) / (n * (n - 2))
    victim, partner = (np.sum(x**2) / (n - 1) - noise for x in (a, b))
    together = (relation + (n - 1) * reciprocity) / (n * (n - 2))
    return victim, partner, relation, a @ b / (n - 1) - together, reciprocity


def test_a_full_table_has_the_components_of_the_round_robin():
    _, y = simulated.simulate(simulated.families(9), np.random.default_rng(0))
    found = dyads.components(y)
    victim, partner, relation, covariance, reciprocity = round_robin(y)
    assert found.victim == pytest.approx(victim)
    assert found.partner == pytest.approx(partner)
    assert found.covariance == pytest.approx(covariance)
    assert found.symmetric + found.antisymmetric == pytest.approx(relation)
    assert found.symmetric - found.antisymmetric == pytest.approx(reciprocity)


def test_components_are_unbiased_where_most_pairs_are_missing(monkeypatch):
    monkeypatch.setattr(simulated, "RELATIVES", 1.0)
    monkeypatch.setattr(simulated, "KINSHIP", 0.0)
    rng = np.random.default_rng(0)
    blocks = simulated.families(40)
    studies = [simulated.simulate(blocks, rng, partners=6)[1] for _ in range(150)]
    found = np.array([dyads.components(y) for y in studies])
    *variances, together = simulated.BARE
    true = [*variances, together * np.sqrt(variances[0] * variances[1])]
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - true) < 3.5 * error).all()


@given(st.integers(5, 12), st.integers(0, 10**6))
def test_effects_of_a_sparse_table_without_relations_are_found_exactly(n, seed):
    rng = np.random.default_rng(seed)
    victim, partner = rng.standard_normal((2, n))
    matrix = 3 + victim[:, None] + partner
    # a band: each task meets two to four
    kept = np.abs(np.subtract.outer(range(n), range(n))) <= 2
    found = dyads.decompose(np.where(kept, matrix, np.nan))
    assert np.allclose(found.victim, victim - victim.mean())
    assert np.allclose(found.partner, partner - partner.mean())
    assert found.mean == pytest.approx(3 + victim.mean() + partner.mean())
    merged = kept & ~np.eye(n, dtype=bool)
    assert np.allclose(found.relation[merged], 0, atol=1e-9)
    assert np.isnan(found.relation[~merged]).all()


def test_relations_have_no_task_effects_left():
    _, y = simulated.simulate(simulated.families(12), np.random.default_rng(3))
    again = dyads.decompose(dyads.decompose(y).relation)
    assert np.allclose([again.victim, again.partner], 0)


def test_shares_of_constructed_tables():
    a = np.arange(6.0)
    only_victims = np.tile(a[:, None], 6)
    assert dyads.shares(only_victims)["victim"] == pytest.approx(1)
    opposed = a[:, None] - a
    found = dyads.shares(opposed)
    assert found["victim"] == pytest.approx(found["partner"]) == pytest.approx(0.5)
    assert found["victim_partner"] == pytest.approx(-1)
    upper = np.triu(np.random.default_rng(0).standard_normal((6, 6)), 1)
    assert dyads.shares(upper + upper.T)["antisymmetric"] == pytest.approx(0)


def test_a_pair_with_one_direction_takes_no_part():
    _, y = simulated.simulate(simulated.families(8), np.random.default_rng(1))
    one, both = y.copy(), y.copy()
    one[0, 3] = np.nan
    both[0, 3] = both[3, 0] = np.nan
    assert np.allclose(dyads.components(one), dyads.components(both))


def test_a_task_without_a_pair_has_no_effect():
    y = np.add.outer(np.arange(5.0), np.arange(5.0))
    y[4] = y[:, 4] = np.nan
    found = dyads.decompose(y)
    assert np.isnan([found.victim[4], found.partner[4]]).all()
    assert not np.isnan(found.victim[:4]).any()


def test_unrelated_drops_the_pairs_of_a_family():
    left = dyads.unrelated(np.ones((4, 4)), ["a", "a", "b", "c"])
    assert np.isnan(left[0, 1]) and np.isnan(left[1, 0])
    assert np.nansum(left) == 10


def test_what_is_no_matrix_of_tasks_is_refused():
    with pytest.raises(ValueError, match="square"):
        dyads.decompose(np.ones((3, 4)))


def test_two_tasks_have_no_effects_of_their_own():
    assert np.isnan(dyads.components(np.ones((2, 2)))).all()
    found = dyads.decompose(np.full((4, 4), np.nan))
    assert np.isnan(found.mean) and np.isnan(found.victim).all()
    assert np.isnan(dyads.shares(np.ones((2, 2)))["victim"])
