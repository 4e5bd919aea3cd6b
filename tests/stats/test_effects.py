"""Jackknife intervals, contrasts, shares: textbook cases and known answers."""

import numpy as np
import pytest
import simulated
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from helpers.stats import dyads, effects


@pytest.fixture
def values():
    return np.random.default_rng(0).standard_normal(12)


def test_the_jackknife_of_a_mean_is_the_t_interval(values):
    found = effects.jackknife(lambda kept: values[kept].mean(), range(12))
    textbook = stats.ttest_1samp(values, 0)
    ends = textbook.confidence_interval()
    assert found[:3] == pytest.approx([values.mean(), ends.low, ends.high])
    assert found.p == pytest.approx(textbook.pvalue)


def test_families_of_one_size_are_the_units_of_the_t_interval(values):
    blocks = np.repeat(list("abcd"), 3)
    found = effects.jackknife(lambda kept: values[kept].mean(), blocks)
    textbook = stats.ttest_1samp(values.reshape(4, 3).mean(axis=1), 0)
    assert found.n == 4
    assert found.p == pytest.approx(textbook.pvalue)


def test_unequal_families_have_the_formula_of_busing():
    values = np.array([1.0, 2.0, 4.0, 8.0])
    blocks = ["a", "a", "b", "c"]
    _, spread = effects.variance(lambda kept: values[kept].mean(), blocks)
    mean, size = 3.75, np.array([2, 4, 4])
    without = np.array([6, 11 / 3, 7 / 3])
    centre = 3 * mean - ((1 - 1 / size) * without).sum()
    pseudo = size * mean - (size - 1) * without
    assert spread == pytest.approx(np.mean((pseudo - centre) ** 2 / (size - 1)))


def test_a_mean_of_cells_rests_on_tasks_not_on_cells(values):
    matrix = np.add.outer(values, values)
    textbook = stats.ttest_1samp(2 * values, 0).confidence_interval()
    found = effects.mean(matrix, range(12))
    assert found.value == pytest.approx(2 * values.mean())
    assert [found.low, found.high] == pytest.approx([textbook.low, textbook.high])


def test_an_interval_prints_its_brackets_only_where_it_has_them():
    assert f"{effects.Interval(0.314, -0.2, 0.8, n=5):.2f}" == "0.31 [-0.20, 0.80]"
    assert f"{effects.Interval(0.314, np.nan, np.nan, n=1):.0%}" == "31%"


def test_two_families_are_too_few_for_an_interval(values):
    found = effects.mean(np.add.outer(values, values), ["a"] * 6 + ["b"] * 6)
    assert found.value == pytest.approx(2 * values.mean())
    assert np.isnan(found.low) and np.isnan(found.p)


def test_a_contrast_of_rules_is_the_paired_t_test_over_tasks():
    tasks = np.random.default_rng(1).standard_normal((3, 10)) + [[0], [0.2], [1]]
    matrices = {
        name: np.add.outer(t, t) / 2 for name, t in zip("abc", tasks, strict=True)
    }
    found = effects.contrasts(matrices, range(10))
    pairs = [(0, 1), (0, 2), (1, 2)]
    textbook = [stats.ttest_rel(tasks[i], tasks[j]).pvalue for i, j in pairs]
    assert found["p"].tolist() == pytest.approx(textbook)
    assert found["p_holm"].tolist() == pytest.approx(effects.holm(textbook).tolist())


def test_contrasts_use_the_cells_that_all_rules_have():
    first = np.add.outer(np.arange(5.0), np.arange(5.0))
    second = first + 2
    second[0, 1] = second[1, 0] = np.nan
    first[2, 3] = first[3, 2] = 1000
    second[2, 3] = second[3, 2] = np.nan
    found = effects.contrasts({"a": first, "b": second}, range(5))
    assert found.loc[0, ["first", "second"]].tolist() == ["a", "b"]
    assert found.loc[0, "value"] == pytest.approx(-2)


def test_holm_in_a_textbook_case():
    # Holm 1979: .01, .04, .03, .005 of four
    found = effects.holm([0.01, 0.04, 0.03, np.nan, 0.005])
    assert found == pytest.approx([0.03, 0.06, 0.06, np.nan, 0.02], nan_ok=True)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_that_of_statsmodels(p):
    assert effects.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_an_interval_is_clipped_at_what_the_quantity_can_be():
    found = effects.Interval(0.2, -0.1, 1.4, 9, 0.3).clipped(0, 1)
    assert found[:4] == (0.2, 0, 1, 9)
    assert np.isnan(found.p)


def test_shares_of_rules_in_constructed_stacks():
    tasks = np.add.outer(np.arange(6.0), np.zeros(6))
    same = effects.stacked({"a": tasks, "b": tasks})
    assert effects.rule_shares(same)["victim"] == pytest.approx(1)
    apart = effects.stacked({"a": np.zeros((6, 6)), "b": np.ones((6, 6))})
    assert effects.rule_shares(apart)["rule"] == pytest.approx(1)
    rng = np.random.default_rng(0)
    noise = effects.stacked({name: rng.standard_normal((20, 20)) for name in "abcde"})
    found = effects.rule_shares(noise)
    assert found["rest"] > 0.9
    assert sum(found.values()) == pytest.approx(1)


def test_an_interval_of_a_share_stays_within_0_and_1():
    _, y = simulated.simulate(simulated.families(14), np.random.default_rng(2))
    found = effects.share(dyads.shares, y, "victim", range(14))
    assert 0 <= found.low <= found.value <= found.high <= 1
    stack = effects.stacked({"a": y, "b": y + 1})
    found = effects.share(effects.rule_shares, stack, "rule", range(14))
    assert 0 <= found.low <= found.value <= found.high <= 1
