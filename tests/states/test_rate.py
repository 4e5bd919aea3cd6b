"""R(D) and K(D): references in closed form, certificates, partitions that keep their promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from test_bound import distances, lattice, random_states, simplex

from helpers.states import bound, rate


def h2(p):
    return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


def test_rate_of_two_tasks():
    curve = rate.rate_distortion(simplex(2))
    d = np.array([0.1868, 0.0657, 0.0071])
    expected = 1 - h2((1 - np.sqrt(1 - 4 * d)) / 2)
    np.testing.assert_allclose(rate.rate_at(curve, d), expected, atol=1e-3)
    np.testing.assert_allclose(expected, [0.191, 0.631, 0.939], atol=1e-3)


@pytest.mark.parametrize("n", [3, 8])
def test_rate_of_a_regular_simplex(n):
    curve = rate.rate_distortion(simplex(n))
    p = np.linspace(1 - 1 / n, 0.999, 20)
    d = (1 - p**2 - (1 - p) ** 2 / (n - 1)) / 2
    curved = np.log2(n) - h2(p) - (1 - p) * np.log2(n - 1)
    np.testing.assert_allclose(rate.rate_at(curve, d), curved, atol=1e-3)
    d0, r0, v = (
        (2 * n - 3) / (2 * n * (n - 1)),
        (1 - 2 / n) * np.log2(n - 1),
        (n - 1) / (2 * n),
    )
    assert d[0] == pytest.approx(d0) and curved[0] == pytest.approx(r0)
    assert rate.rate_at(curve, (d0 + v) / 2) == pytest.approx(r0 / 2, abs=1e-3)


@pytest.mark.parametrize(
    "kind", ["random", "clustered", "collinear", "duplicates", "spread"]
)
def test_rate_curve_is_certified_convex_and_below_the_number_of_models(kind):
    rng = np.random.default_rng(0)
    states = {
        "random": random_states(0, n=6),
        "clustered": np.repeat(random_states(1, n=3), 2, 0)
        + 0.1 * random_states(2, n=6),
        "collinear": rng.standard_normal((6, 1, 1)),
        "duplicates": np.repeat(random_states(3, n=3), 2, 0),
        "spread": np.exp(2 * np.arange(5.0))[:, None, None],
    }[kind]
    d2 = distances(states)
    curve = rate.rate_distortion(d2)
    assert curve.gap.max() < 1e-3
    assert (
        curve.distortion[-1] == pytest.approx(bound.dispersion(d2))
        and curve.rate[-1] == 0
    )
    classes = 3 if kind == "duplicates" else len(d2)
    assert curve.distortion[0] == 0 and curve.rate[0] == pytest.approx(np.log2(classes))
    assert np.all(np.diff(np.diff(curve.rate) / np.diff(curve.distortion)) > -1e-6)
    for step in rate.staircase(d2):
        assert rate.rate_at(curve, step.distortion) <= np.log2(step.models) + 1e-3
    # Not a step: half the dispersion already costs less than naming the specialist.
    assert 0 < rate.rate_at(curve, bound.dispersion(d2) / 2) < np.log2(classes)


def test_rate_of_equal_specialists_is_zero():
    assert rate.rate_distortion(np.zeros((3, 3))).rate.max() == 0


# --- number of models -------------------------------------------------------------------------


def test_staircase_of_a_regular_simplex():
    steps = rate.staircase(simplex(8))
    just_below = 1 - 1e-9
    for d, k in [(0.1, 8), (1 / 4, 4), (1 / 3, 3), (3 / 8, 2), (7 / 16, 1)]:
        assert rate.models_needed(steps, d * (1 + 1e-9)) == (k, k)
    assert rate.models_needed(steps, just_below / 4) == (8, 8)


@settings(max_examples=15, deadline=None)
@given(lattice)
def test_staircase_partitions_keep_their_promise(states):
    d2 = distances(states)
    exact, heuristic = rate.staircase(d2), rate.heuristic_steps(d2)
    assert rate.models_needed(exact, bound.minimax(d2).r2 * (1 + 1e-9)) == (1, 1)
    for step, rough in zip(exact, heuristic, strict=True):
        for s in (step, rough):
            assert (
                sorted(sum(s.groups, [])) == list(range(len(d2)))
                and len(s.groups) <= s.models
            )
            worst = max(bound.minimax(d2[np.ix_(g, g)]).r2 for g in s.groups)
            assert worst == pytest.approx(s.distortion, abs=1e-12)
        assert step.lower == step.distortion
        assert rough.lower - 1e-9 <= step.distortion <= rough.distortion + 1e-9
    least = d2[~np.eye(len(d2), dtype=bool)].min(initial=np.inf)
    if 0 < least < np.inf:
        assert rate.models_needed(exact, least / 4 * (1 - 1e-9)) == (len(d2), len(d2))


def test_many_tasks_are_bracketed():
    d2 = distances(random_states(0, n=rate.EXACT_TASKS + 2))
    steps = rate.staircase(d2)
    assert steps[0].lower == steps[0].distortion and steps[-1].distortion == 0
    assert all(s.lower <= s.distortion for s in steps)
    lower, upper = rate.models_needed(steps, bound.minimax(d2).r2 / 2)
    assert 1 < lower <= upper <= len(d2)
