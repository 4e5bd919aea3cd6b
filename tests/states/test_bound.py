"""The eight checks of the bound (notebook 04) on random, extremal and degenerate inputs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers.states import bound


def distances(states):
    return bound.squared_distances(states).mean(-1)


def random_states(seed, n=5, probes=7, width=4):
    return np.random.default_rng(seed).standard_normal((n, probes, width))


def simplex(n):
    return 1.0 - np.eye(n)


# Small integers make duplicates, collinear and cospherical points common.
lattice = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-2, 2).map(float))
)


# 1. radius and weights ------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(lattice)
def test_radius_is_certified_and_is_the_distance_to_the_centre(states):
    d2 = distances(states)
    ball = bound.minimax(d2)
    assert ball.gap <= 1e-8 * ball.r2
    assert ball.weights.min() >= 0 and np.isclose(ball.weights.sum(), 1)
    centre = np.tensordot(ball.weights, states, 1)
    reached = bound.distortion_x(states, centre).mean(-1)
    assert reached.max() == pytest.approx(ball.r2, rel=1e-8, abs=1e-12)
    np.testing.assert_allclose(bound.to_centre(d2, ball.weights), reached, atol=1e-9)
    # active tasks lie on the sphere
    assert np.allclose(reached[ball.weights > 1e-9], ball.r2)


def test_radius_of_one_two_and_equal_points():
    assert bound.minimax([[0.0]]) == (0.0, [1.0], 0.0)
    two = bound.minimax([[0, 9], [9, 0]])
    assert two.r2 == 9 / 4 and list(two.weights) == [0.5, 0.5]
    same = bound.minimax(np.zeros((3, 3)))
    assert same.r2 == 0 and np.allclose(same.weights, 1 / 3)


def test_weights_of_least_norm_where_they_are_not_unique():
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]])[:, None]
    np.testing.assert_allclose(bound.minimax(distances(square)).weights, 0.25)
    # three duplicates share the weight of one
    ends = np.array([0, 0, 0, 1.0])[:, None, None]
    np.testing.assert_allclose(
        bound.minimax(distances(ends)).weights, [1 / 6] * 3 + [1 / 2]
    )


def test_collinear_and_inner_tasks_get_no_weight():
    line = np.array([0, 1, 5, 10.0])[:, None, None]
    ball = bound.minimax(distances(line))
    assert ball.r2 == pytest.approx(25) and np.allclose(ball.weights, [0.5, 0, 0, 0.5])


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_radius_scales_and_survives_float32_records(scale):
    d2 = distances(random_states(0, n=12, probes=2, width=2)) * scale
    ball, rounded = bound.minimax(d2), bound.minimax(d2.astype(np.float32))
    assert ball.gap <= 1e-8 * ball.r2
    assert rounded.r2 == pytest.approx(ball.r2, rel=1e-5)


def test_nearly_flat_records_are_certified():
    for seed in range(70):  # float32 leaves axes of length 1e-8, some of them imaginary
        d2 = distances(random_states(seed, n=14, probes=1, width=2))
        ball = bound.minimax(d2.astype(np.float32))
        assert ball.gap <= 1e-8 * ball.r2


@pytest.mark.parametrize(
    ("d2", "message"),
    [
        (np.zeros((2, 3)), "square matrix"),
        ([[0, -1], [-1, 0]], ">= 0"),
        ([[0, 1], [2, 0]], "symmetric"),
        ([[0, np.nan], [np.nan, 0]], "finite"),
        # 1 + 1 < 3: not even a metric
        ([[0, 1, 9], [1, 0, 1], [9, 1, 0]], "no points"),
    ],
)
def test_what_is_no_distance_matrix_is_refused(d2, message):
    with pytest.raises(ValueError, match=message):
        bound.minimax(d2)


def test_classical_scaling_gives_back_flat_points():
    points = np.random.default_rng(0).standard_normal((5, 2))
    d2 = distances(points[:, None])
    found, share = bound.coordinates(d2)
    assert share == pytest.approx(1)
    np.testing.assert_allclose(distances(found[:, None]), d2, atol=1e-12)
    # two of four equal axes
    assert bound.coordinates(simplex(5))[1] == pytest.approx(1 / 2)
    alone, share = bound.coordinates([[0.0]])
    assert alone.tolist() == [[0, 0]] and share == 1


# 2. the order of the bounds ------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(lattice)
def test_order_of_the_bounds(states):
    b = bound.bounds(bound.squared_distances(states), width=states.shape[-1])
    order = [
        max(b["quarter"], b["dispersion"]),
        b["r2"],
        b["mean_pointwise_r2"],
        b["jung_width"],
    ]
    assert np.all(np.diff(order) >= -1e-9 * (1 + order[-1]))
    assert b["r2"] <= b["jung_tasks"] + 1e-9


@pytest.mark.parametrize("n", [2, 3, 8])
def test_regular_simplex_is_extremal(n):
    b = bound.bounds(simplex(n)[..., None], width=100)
    for name in ("dispersion", "r2", "jung_tasks", "jung_width"):
        assert b[name] == pytest.approx((n - 1) / (2 * n)), name


def test_width_form_needs_the_distances_of_each_probe():
    states = np.eye(3)[:, :, None]  # d = 1, H_i(x_k) = [i = k]
    b = bound.bounds(bound.squared_distances(states), width=1)
    wrong = distances(states).max() * 1 / (2 * (1 + 1))
    assert (
        b["r2"] == pytest.approx(2 / 9)
        and wrong == pytest.approx(1 / 6)
        and b["r2"] > wrong
    )
    assert b["mean_pointwise_r2"] == pytest.approx(1 / 4)
    triangle = distances(states)[..., None]  # same D2, constant in x
    assert bound.radii(triangle).mean() == pytest.approx(2 / 9)


# 3. and 4. measured merges --------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 3))
def test_no_function_lies_below_the_radius(seed, noise):
    states = random_states(seed)
    d2, ball = distances(states), bound.minimax(distances(states))
    centre = np.tensordot(ball.weights, states, 1)
    merged = centre + noise * random_states(seed + 1, n=1)[0]
    delta = bound.distortion_x(states, merged).mean(-1)
    off = np.mean(((merged - centre) ** 2).sum(-1))
    assert delta.max() >= ball.r2 + off - 1e-9
    assert delta.max() >= d2.max() / 4
    assert bound.offset2(d2, ball.weights, delta) == pytest.approx(off, abs=1e-9)
    assert bound.with_merge(d2, delta).shape == (6, 6)


def test_a_corrupted_distortion_is_caught():
    states = random_states(3)
    d2, ball = distances(states), bound.minimax(distances(states))
    delta = bound.distortion_x(states, states.mean(0)).mean(-1)
    assert bound.with_merge(d2, delta)[-1, 0] == delta[0]
    delta[delta.argmax()] *= 0.6  # as if one task had been read on other probes
    with pytest.raises(ValueError, match="one set of probes"):
        bound.with_merge(d2, delta)
    with pytest.raises(ValueError, match="same probes"):
        bound.offset2(d2, ball.weights, delta * 0.5)
    with pytest.raises(ValueError, match="sum to 1"):
        bound.offset2(d2, ball.weights * 2, delta)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), arrays(np.float64, 5, elements=st.floats(-2, 2)))
def test_triangle_bound_and_gap_for_every_affine_merge(seed, raw):
    weights = raw + (1 - raw.sum()) / 5  # any sign, sum 1
    states = random_states(seed)
    d2 = distances(states)
    target = np.tensordot(weights, states, 1)
    merged = np.tanh(target)  # a network that is not linear in its weights
    delta = bound.distortion_x(states, merged).mean(-1)
    g2 = bound.offset2(d2, weights, delta)
    assert g2 == pytest.approx(np.mean(((merged - target) ** 2).sum(-1)), abs=1e-8)
    reach = bound.to_centre(d2, weights).max()
    assert np.sqrt(delta.max()) <= np.sqrt(reach) + np.sqrt(g2) + 1e-9


def test_readings_of_a_merge_agree_with_the_identities():
    rng = np.random.default_rng(0)
    # base and two specialists, ten probes, two layers
    states = rng.standard_normal((3, 10, 2, 4))
    owner = np.repeat(["red", "blue"], [4, 6])
    merged = np.tanh(states[1] + states[2])
    flipped, rho = rng.random(10) < 0.5, rng.uniform(0, 4, 10)
    rows = bound.readings(
        ["base", "red", "blue"], states, merged, owner, [0.7, 0.9], flipped, rho
    )
    assert len(rows) == 3 * 2 * 2
    share = {"red": 0.4, "blue": 0.6}
    for layer in (0, 1):
        at = [r for r in rows if r["layer"] == layer]
        delta = [
            sum(share[r["probe_task"]] * r["delta"] for r in at if r["model"] == model)
            for model in ("base", "red", "blue")
        ]
        direct = sum(
            share[r["probe_task"]] * r["gap2"] for r in at if r["model"] == "base"
        )
        d2 = bound.squared_distances(states[:, :, layer]).mean(-1)
        assert at[0]["weight"] == pytest.approx(-0.6)
        assert bound.offset2(d2, [-0.6, 0.7, 0.9], delta) == pytest.approx(direct)
    (own,) = [r for r in rows if "flips" in r and r["model"] == "blue"]
    assert own["layer"] == 1 and own["flips"] == flipped[4:].mean()
    distance = np.linalg.norm(states[2, 4:, 1] - merged[4:, 1], axis=1)
    assert own["certified"] == (distance < rho[4:]).mean()
    plain = bound.readings(["base", "red", "blue"], states, merged, owner)
    assert all(np.isnan(r["gap2"]) and "flips" not in r for r in plain)


# 7. accuracy ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.1, 0.5, 2.0]), st.booleans())
def test_certificate_never_promises_a_flipped_prediction(seed, noise, readout_merged):
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((200, 6))
    merged = states + noise * rng.standard_normal((200, 6))
    w, b = rng.standard_normal((5, 6)), rng.standard_normal(5)
    w2 = w + 0.1 * rng.standard_normal(w.shape) if readout_merged else w
    b2 = b + 0.1 * rng.standard_normal(5) if readout_merged else b
    flipped = (states @ w.T + b).argmax(1) != (merged @ w2.T + b2).argmax(1)
    sure = bound.kept(states, merged, w, b, w2, b2)
    assert not (flipped & sure).any()
    if not readout_merged:
        distance = np.linalg.norm(merged - states, axis=1)
        rho = bound.margin_radius(states, w, b)
        np.testing.assert_array_equal(sure, distance < rho)
        assert flipped.mean() <= (distance >= rho).mean()
        assert (distance >= rho).mean() <= bound.flips_bound(
            rho, np.mean(distance**2)
        ) + 1e-12


def test_margin_radius_is_the_distance_to_the_boundary():
    w, b = np.array([[1.0, 0], [0, 1], [0, 1]]), np.array([0.0, 0, -5])
    rho = bound.margin_radius([[3.0, 1.0], [1.0, 1.0]], w, b)
    np.testing.assert_allclose(rho, [2 / np.sqrt(2), 0])
    twins = bound.margin_radius([[3.0, 1.0]], [[1.0, 0], [1, 0]], [1.0, 0])
    assert np.isinf(twins[0])  # parallel classes: no shift of the state swaps them


def test_the_certificate_is_not_vacuous():
    rng = np.random.default_rng(0)
    states = 5 * rng.standard_normal((200, 6))
    w = rng.standard_normal((5, 6))
    assert bound.kept(states, states + 1e-3, w).mean() > 0.9
    assert bound.flips_bound(bound.margin_radius(states, w), 1e-6) < 0.1
    assert bound.flips_bound(bound.margin_radius(states, w), 1e6) == 1


# 8. where the claim holds and where it fails ------------------------------------------------------


def test_linear_network_attains_the_radius():
    rng = np.random.default_rng(0)
    theta, x = rng.standard_normal((4, 3, 5)), rng.standard_normal((5, 30))
    states = np.swapaxes(theta @ x, 1, 2)
    d2 = distances(states)
    ball = bound.minimax(d2)
    merged = (np.tensordot(ball.weights, theta, 1) @ x).T
    delta = bound.distortion_x(states, merged).mean(-1)
    assert delta.max() == pytest.approx(ball.r2)
    assert bound.offset2(d2, ball.weights, delta) == pytest.approx(0, abs=1e-9)


def test_relu_pair_has_zero_loss_on_the_segment_and_breaks_the_upper_bound():
    x = np.array([1.0, -1.0])

    def hidden(w):
        return np.maximum([w * x, x, -x], 0).T

    assert all(
        np.array_equal(hidden(w) @ [0, 1, -1], np.sign(x))
        for w in np.linspace(-2, 2, 9)
    )
    states = np.stack([hidden(2.0), hidden(-2.0)])
    d2 = distances(states)
    worst = [
        bound.distortion_x(states, hidden(w)).mean(-1).max()
        for w in np.linspace(-2, 2, 401)
    ]
    # above Delta^2 d / (2 (d + 1)) for every d
    assert min(worst) == pytest.approx(d2.max() / 2)
    assert np.argmin(worst) == 200
    delta = bound.distortion_x(states, hidden(0.0)).mean(-1)
    assert bound.offset2(d2, [0.5, 0.5], delta) == pytest.approx(d2.max() / 4)


# finite probes --------------------------------------------------------------------------------


def test_bootstrap_and_standard_error_agree():
    d2_x = bound.squared_distances(random_states(5, n=4, probes=120, width=3))
    probe_task = np.repeat([0, 1, 2], 40)
    draws = [bound.minimax(d2).r2 for d2 in bound.resampled(d2_x, probe_task, 300)]
    assert np.std(draws) == pytest.approx(bound.radius_se(d2_x, probe_task), rel=0.25)
    again = [bound.minimax(d2).r2 for d2 in bound.resampled(d2_x, probe_task, 300)]
    np.testing.assert_array_equal(draws, again)


def test_bootstrap_resamples_within_tasks_only():
    d2_x = np.zeros((2, 2, 6))
    # constant within a task: nothing can vary
    d2_x[0, 1] = d2_x[1, 0] = [1, 1, 1, 5, 5, 5]
    draws = [d2[0, 1] for d2 in bound.resampled(d2_x, [0, 0, 0, 1, 1, 1], 20)]
    np.testing.assert_allclose(draws, 3)


def test_plug_in_and_split_half_bracket_the_population():
    # Equal distances in the population, Delta^2 = 2 d = 4: the plug-in is too high, the
    # cross-fitted estimate too low, V right (n = 100 draws; standard errors are about .02).
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(100):
        d2_x = bound.squared_distances(rng.standard_normal((8, 24, 2)))
        ((chosen, read),) = bound.halves(d2_x, np.zeros(24), 1, seed=rng)
        split = bound.dispersion(read, bound.minimax(chosen).weights)
        d2 = d2_x.mean(-1)
        estimates.append((split, bound.dispersion(d2), bound.minimax(d2).r2, d2.max()))
    split_r2, v, r2, delta2 = np.mean(estimates, axis=0)
    assert split_r2 < 4 * 7 / 16 - 0.1 and r2 > 4 * 7 / 16 + 0.1 and delta2 > 4 + 1
    assert v == pytest.approx(4 * 7 / 16, abs=0.06)
