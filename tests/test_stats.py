"""Statistics: known answers from scipy and statsmodels, and what simulation says of each test."""

from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats as scipy_stats
from statsmodels.stats.anova import anova_lm

from helpers.stats import old as stats

TASKS = list("abcdefgh")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def symmetric(rng, n: int = 6) -> np.ndarray:
    upper = np.triu(rng.standard_normal((n, n)), 1)
    return upper + upper.T


def pair_losses(rng, n: int = 5, method: float = 0.0, pair: float = 0.0) -> pd.DataFrame:
    methods = {"linear": -method, "ties": 0.0, "dare": method}
    rows = []
    for a, b in combinations(TASKS[:n], 2):
        shared = pair * rng.standard_normal()
        rows += [(a, b, m, e + shared + rng.standard_normal()) for m, e in methods.items()]
    return pd.DataFrame(rows, columns=["task_a", "task_b", "method", "loss"])


# --- one merge ---------------------------------------------------------------------------------


def test_loss_interval_agrees_with_scipys_paired_bootstrap(rng):
    specialist = (rng.random(80) < 0.85).astype(float)
    merged = specialist * (rng.random(80) < 0.6)
    ours = stats.loss_interval([(merged, specialist)], draws=20000)
    theirs = scipy_stats.bootstrap(
        (merged, specialist), lambda m, s: (m.mean() / s.mean() - 1) * 100, paired=True,
        vectorized=False, method="percentile", n_resamples=3000, rng=rng,
    ).confidence_interval  # fmt: skip
    assert ours.value == pytest.approx((merged.mean() / specialist.mean() - 1) * 100)
    assert ours.n == 80
    np.testing.assert_allclose([ours.low, ours.high], theirs, atol=1.5)


def test_loss_interval_covers_the_true_loss(rng):
    covered = 0
    for seed in range(200):
        specialist = rng.random(60) < 0.8
        merged = specialist & (rng.random(60) < 0.5)  # true loss: -50 %
        found = stats.loss_interval([(merged, specialist)], draws=300, seed=seed)
        covered += found.low <= -50 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_the_mean_loss_of_a_group_and_an_undefined_one(rng):
    ones, half, none = np.ones(40), np.repeat([0.0, 1.0], 20), np.zeros(40)
    found = stats.loss_interval([(half, ones), (ones, ones)])
    assert found.value == pytest.approx(-25) and found.n == 80
    assert found.high - found.low < 20  # half the width of the one uncertain task
    assert np.isnan(stats.loss_interval([(half, none)])[:3]).all()
    assert np.isnan(stats.loss_interval([(half, ones), (half, none)]).value)
    with pytest.raises(ValueError, match="same examples"):
        stats.loss_interval([(ones, ones[:5])])


def test_the_collapse_rule_needs_size_and_certainty_and_leaves_undefined_undefined():
    found = stats.collapsed([-50, -50, -29, np.nan], [-20, -5, -20, np.nan])
    assert found.tolist() == [True, False, False, pd.NA]


def test_a_specialist_against_itself_hardly_ever_collapses(rng):
    good, poor = (rng.random(60) < 0.85), (rng.random(60) < 0.4)
    assert stats.false_collapse_rate(good, repeats=100) <= 0.01
    assert stats.false_collapse_rate(poor, repeats=100) <= 0.06


# --- matrices ----------------------------------------------------------------------------------


def test_square_is_symmetric_and_refuses_a_pair_listed_twice():
    pairs = pd.DataFrame({"task_a": ["a", "a", "b"], "task_b": ["b", "c", "c"], "x": [1.0, 2, 3]})
    table = stats.square(pairs, "x")
    assert list(table.index) == list(table.columns) == ["a", "b", "c"]
    np.testing.assert_array_equal(table, [[np.nan, 1, 2], [1, np.nan, 3], [2, 3, np.nan]])
    with pytest.raises(ValueError, match="twice"):
        stats.square(pd.concat([pairs, pairs.iloc[:1]]), "x")


def test_pair_specific_is_the_residual_of_own_and_partner_effects(rng):
    matrix = rng.standard_normal((6, 6))
    matrix[1, 2] = np.nan
    rows, columns = np.nonzero(~np.eye(6, dtype=bool) & ~np.isnan(matrix))
    frame = pd.DataFrame({"own": rows, "partner": columns, "y": matrix[rows, columns]})
    residual = smf.ols("y ~ C(own) + C(partner)", frame).fit().resid
    ours = stats.pair_specific(matrix)
    np.testing.assert_allclose(ours[rows, columns], residual, atol=1e-12)
    assert np.isnan(ours[1, 2]) and np.isnan(ours[0, 0])
    additive = np.add.outer(np.arange(6.0), np.arange(6.0) ** 2)
    np.testing.assert_allclose(np.nan_to_num(stats.pair_specific(additive)), 0, atol=1e-12)


# --- mantel ------------------------------------------------------------------------------------


def test_mantel_equals_an_enumeration_of_all_orders(rng):
    x, y = symmetric(rng, 5), symmetric(rng, 5)
    upper = np.triu_indices(5, 1)
    seen = scipy_stats.pearsonr(x[upper], y[upper]).statistic
    orders = [np.array(order) for order in permutations(range(5))]
    null = [scipy_stats.pearsonr(x[np.ix_(o, o)][upper], y[upper]).statistic for o in orders]
    found = stats.mantel(x, y)
    assert found.value == pytest.approx(seen, abs=1e-12)
    assert found.p == pytest.approx(np.mean(np.abs(null) >= abs(seen) - 1e-12), abs=1e-12)
    assert (found.n_tasks, found.n_cells, found.permutations) == (5, 20, 119)
    drawn = stats.mantel(x, y, permutations=100)
    assert drawn.permutations == 100 and drawn.p == pytest.approx(found.p, abs=0.15)


def test_mantel_spearman_and_directed_outcomes(rng):
    x, y = symmetric(rng), rng.standard_normal((6, 6))
    upper, every = np.triu_indices(6, 1), ~np.eye(6, dtype=bool)
    both = y + y.T
    assert stats.correlation(x, both, kind="spearman") == pytest.approx(
        scipy_stats.spearmanr(x[upper], both[upper]).statistic
    )
    assert stats.correlation(x, y) == pytest.approx(np.corrcoef(x[every], y[every])[0, 1])
    y[0, 1] = np.nan
    every[0, 1] = False
    assert stats.correlation(x, y) == pytest.approx(np.corrcoef(x[every], y[every])[0, 1])


def test_partial_and_pair_specific_correlations_are_correlations_of_residuals(rng):
    x, y, z = (symmetric(rng) for _ in range(3))
    upper = np.triu_indices(6, 1)
    cells = pd.DataFrame({"x": x[upper], "y": y[upper], "z": z[upper]})
    left = [smf.ols(f"{name} ~ z", cells).fit().resid for name in "xy"]
    assert stats.mantel(x, y, [z]).value == pytest.approx(np.corrcoef(*left)[0, 1])
    own = [stats.pair_specific(m)[upper] for m in (x, y)]
    assert stats.mantel(x, y, specific=True).value == pytest.approx(np.corrcoef(*own)[0, 1])


def test_mantel_has_no_answer_where_nothing_varies_and_refuses_what_it_cannot_read(rng):
    x, additive = symmetric(rng), np.add.outer(np.arange(6.0), np.arange(6.0))
    assert np.isnan(stats.mantel(x, additive, specific=True)[:2]).all()
    assert np.isnan(stats.mantel(x, np.full((6, 6), 3.0))[:2]).all()
    hole = x.copy()
    hole[0, 1] = np.nan
    frames = [pd.DataFrame(x, list(order), list(order)) for order in ("abcdef", "bacdef")]
    for arguments, message in [
        ((hole, x), "undefined cells"),
        ((x, x[:5, :5]), "square"),
        (frames, "another order"),
        ((x[:2, :2], x[:2, :2]), "3 tasks"),
    ]:
        with pytest.raises(ValueError, match=message):
            stats.mantel(*arguments)
    with pytest.raises(ValueError, match="spearman"):
        stats.mantel(x, x, kind="kendall")


def test_with_shared_tasks_the_naive_p_is_wrong_and_the_task_permutation_right():
    rates = stats.rejection_rates(12, draws=300, permutations=99, seed=3, task_share=0.8)
    assert rates["naive"] > 0.15
    assert 0.02 <= rates["mantel"] <= 0.085
    assert 0.02 <= rates["specific"] <= 0.085


def test_power_grows_with_the_number_of_tasks():
    curve = stats.power_curve([5, 8, 12], draws=60, permutations=99, r_task=0.7, r_pair=0.7)
    assert list(curve.index) == [5, 8, 12]
    assert curve["mantel"].is_monotonic_increasing and curve["mantel"].iloc[-1] > 0.9


def test_leave_one_out_finds_the_one_task_that_makes_the_correlation(rng):
    x, y = symmetric(rng, 8) * 0.1, symmetric(rng, 8) * 0.1
    for matrix in (x, y):
        matrix[0, 1:] += 5
        matrix[1:, 0] += 5
    left = stats.leave_one_out(x, y)
    assert stats.correlation(x, y) > 0.95
    assert np.argmin(left) == 0 and abs(left[0]) < 0.5 and left[1:].min() > 0.9


@pytest.mark.parametrize("specific", [False, True])
def test_intervals_over_tasks_err_on_the_wide_side(rng, specific):
    covered, fisher = [], []
    for _ in range(80):
        x, y = stats.simulate_pairs(8, rng, r_task=0.5, r_pair=0.5)
        found = stats.jackknife_interval(x, y, specific=specific)
        covered.append(found.low <= 0.5 <= found.high)
        narrow = stats.specific_interval(x, y)
        fisher.append(narrow.low <= 0.5 <= narrow.high)
    assert np.mean(covered) >= 0.93
    if specific:  # the narrower interval is for pair-specific correlations only
        assert 0.86 <= np.mean(fisher) <= 1
    few = symmetric(rng, 4), symmetric(rng, 4)
    assert np.isnan([stats.jackknife_interval(*few).low, stats.specific_interval(*few).low]).all()
    with pytest.raises(ValueError, match="5 or more"):
        stats.specific_se(4)


def test_out_of_task_prediction_rewards_only_what_carries_over(rng):
    x = symmetric(rng, 8)
    assert stats.predict_left_out(x, 3 - 2 * x) == pytest.approx(1)
    assert stats.predict_left_out(x, symmetric(rng, 8)) < 0.2
    assert np.isnan(stats.predict_left_out(x[:3, :3], x[:3, :3]))


def test_task_bootstrap_draws_tasks_not_pairs(rng):
    x, y = symmetric(rng, 8), symmetric(rng, 8)
    every = ~np.eye(8, dtype=bool)
    found = stats.task_bootstrap([x, y], lambda a, b: np.corrcoef(a, b)[0, 1], draws=200)
    assert found.value == pytest.approx(np.corrcoef(x[every], y[every])[0, 1])
    assert found.low < found.value < found.high and found.n == 8


# --- comparing, and equivalence ----------------------------------------------------------------


def test_the_stronger_of_two_metrics_is_told_from_a_weak_one(rng):
    y = symmetric(rng, 12)
    found = stats.stronger(-y + 0.2 * symmetric(rng, 12), symmetric(rng, 12), y, draws=300)
    assert 0.5 < found.low < found.value <= 1
    twins = stats.stronger(y, -y, y, draws=50)
    assert twins.value == pytest.approx(0) and twins.low == pytest.approx(0)


def test_steigers_z_is_standard_normal_under_its_null_and_odd_in_its_arguments(rng):
    covariance = [[1, 0.6, 0.4], [0.6, 1, 0.4], [0.4, 0.4, 1]]  # a, b, y
    z = []
    for _ in range(600):
        r = np.corrcoef(rng.multivariate_normal(np.zeros(3), covariance, size=80).T)
        z.append(stats.steiger(r[0, 2], r[1, 2], r[0, 1], 80)[0])
    assert abs(np.mean(z)) < 0.12 and 0.92 < np.std(z) < 1.08
    there, back = stats.steiger(0.5, 0.2, 0.3, 103), stats.steiger(0.2, 0.5, 0.3, 103)
    assert there[0] == -back[0] and there[1] == back[1]
    # two unrelated predictors that correlate with y by next to nothing: independent z's
    assert stats.steiger(0.01, -0.01, 0, 53)[0] == pytest.approx(0.02 * np.sqrt(50 / 2), rel=1e-3)


def test_equivalence_is_shown_by_data_not_by_their_lack():
    assert stats.equivalent(0.0, 0.05) < 1e-6
    assert stats.equivalent(0.0, 0.5) > 0.2
    assert stats.equivalent(0.3, 0.1) == pytest.approx(0.5)
    assert stats.equivalent(-0.1, 0.1) == pytest.approx(
        scipy_stats.norm.sf((np.arctanh(0.3) - np.arctanh(0.1)) / 0.1)
    )


def test_auroc_counts_ordered_pairs_and_ties_by_half():
    assert stats.auroc([3, 2, 1, 2], [True, True, False, False]) == pytest.approx(3.5 / 4)
    assert np.isnan(stats.auroc([1, 2], [True, True]))


def test_pooled_correlations_equal_the_formulas_by_hand():
    r, se = np.array([0.5, 0.1, 0.4]), np.array([0.1, 0.12, 0.2])
    found = stats.pool_correlations(r, se)
    z = np.arctanh(r)
    weight = 1 / (se**2 + found["tau2"])
    mean = np.sum(weight * z) / weight.sum()
    q = np.sum(weight * (z - mean) ** 2) / 2  # Paule and Mandel's tau2 makes this 1
    reach = scipy_stats.t.ppf(0.975, 2) * np.sqrt(q / weight.sum())
    assert found["tau2"] > 0 and q == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(
        [found["r"], found["low"], found["high"]], np.tanh([mean, mean - reach, mean + reach])
    )
    alike = stats.pool_correlations([0.2, 0.2001], [0.3, 0.3])
    assert np.arctanh(alike["high"]) - np.arctanh(0.2) > 1.96 * 0.3 / np.sqrt(2)
    with pytest.raises(ValueError, match="two studies"):
        stats.pool_correlations([0.1], [0.1])


# --- pair and method ---------------------------------------------------------------------------


def test_partial_omega2_from_sums_of_squares_and_its_interval_from_noncentral_f():
    f, df, df_error, n = 7.5, 3, 42, 60
    ms_error = 2.0
    effect = f * ms_error * df
    found = stats.partial_omega2(f, df, df_error, n)
    by_sums = (effect - df * ms_error) / (effect + (n - df) * ms_error)
    assert found.value == pytest.approx(by_sums)
    for limit, mass in ((found.low, 0.975), (found.high, 0.025)):
        nc = limit * n / (1 - limit)
        assert scipy_stats.ncf.cdf(f, df, df_error, nc) == pytest.approx(mass, abs=1e-6)
    assert stats.partial_omega2(0.4, df, df_error, n)[:2] == (0, 0)


def test_block_model_is_statsmodels_anova_with_permutations_of_the_same_f(rng):
    losses = pair_losses(rng, method=1.5, pair=2)
    found = stats.block_model(losses, permutations=199)
    fit = smf.ols("loss ~ C(pair) + C(method)", losses.assign(pair=losses.task_a + losses.task_b))
    anova = anova_lm(fit.fit(), typ=2)
    np.testing.assert_allclose(found["F"], anova["F"].iloc[:2])
    table = losses.pivot(index=["task_a", "task_b"], columns="method", values="loss").to_numpy()
    np.testing.assert_allclose(stats._block_f(table[None])[:, 0], found["F"])
    assert (found["p_permutation"] < 0.05).all() and (found["omega2_low"] > 0).all()
    assert found.loc["pair", ["df", "df_error", "n"]].tolist() == [9, 18, 30]


def test_block_model_rarely_fires_without_an_effect(rng):
    found = [
        stats.block_model(pair_losses(rng, 4), permutations=59, seed=seed)["p_permutation"]
        for seed in range(100)
    ]
    fired = (pd.concat(found, axis=1) < 0.05).mean(axis=1)
    assert (fired <= 0.12).all()


def test_block_model_refuses_an_undefined_loss(rng):
    losses = pair_losses(rng)
    losses.loc[3, "loss"] = np.nan
    with pytest.raises(ValueError, match="defined loss"):
        stats.block_model(losses)


def test_mixed_model_finds_the_components_that_were_put_in(rng):
    found = []
    for _ in range(6):
        own, partner = 20 * rng.standard_normal(8), 10 * rng.standard_normal(8)
        cells = [
            (TASKS[i], TASKS[j], m, own[i] + partner[j] + effect + 5 * rng.standard_normal())
            for i, j in permutations(range(8), 2)
            for m, effect in (("linear", -8), ("ties", 0), ("dare", 8))
        ]
        cells = pd.DataFrame(cells, columns=["own", "partner", "method", "loss"])
        found.append(stats.mixed_model(cells)["variance"] / [own.var(ddof=1), partner.var(ddof=1),
                                                             25, 64])  # fmt: skip
    order = ["own", "partner", "residual", "method"]
    assert list(found[0].index) == order
    np.testing.assert_allclose(pd.concat(found, axis=1).mean(axis=1)[order], 1, atol=0.15)


def test_the_mixed_model_ends_at_the_top_wherever_its_rows_stand(rng):
    """With no partner effect it lies on the boundary, where a gradient search stops short."""
    for _ in range(3):
        own = 20 * rng.standard_normal(8)
        cells = [
            (TASKS[i], TASKS[j], m, own[i] + effect + 5 * rng.standard_normal())
            for i, j in permutations(range(8), 2)
            for m, effect in (("linear", -8), ("ties", 0))
        ]
        cells = pd.DataFrame(cells, columns=["own", "partner", "method", "loss"])
        once = stats.mixed_model(cells)["share"]
        mixed = cells.sample(frac=1, random_state=1).assign(loss=lambda c: 1000 * c["loss"])
        pd.testing.assert_series_equal(once, stats.mixed_model(mixed)["share"], atol=5e-4)


def test_where_one_search_leaves_the_numbers_another_one_ends():
    """Losses on which Powell's search comes to nan; with no partner effect REML is an ANOVA's."""
    rng = np.random.default_rng(111)
    own, partner = rng.normal(0, 16, 8), rng.normal(0, 2, 8)
    cells = [
        (TASKS[i], TASKS[j], m, own[i] + partner[j] + rng.normal(0, 10))
        for i, j in permutations(range(8), 2)
        for m in ("linear", "ties")
    ]
    cells = pd.DataFrame(cells, columns=["own", "partner", "method", "loss"])
    found = stats.mixed_model(cells)["variance"]
    by_own, by_method = (cells.groupby(x)["loss"].transform("mean") for x in ("own", "method"))
    left = cells["loss"] - by_own - by_method + cells["loss"].mean()
    residual = (left**2).sum() / (len(cells) - 8 - 1)
    between = (by_own - cells["loss"].mean()).pow(2).sum() / 7
    expected = [(between - residual) / 14, 0, residual]
    np.testing.assert_allclose(
        found[["own", "partner", "residual"]], expected, rtol=1e-3, atol=1e-3
    )


# --- what a test can see -----------------------------------------------------------------------


def test_task_share_is_recovered_and_sets_the_number_of_tasks_needed(rng):
    shares = [stats.task_share(stats.simulate_pairs(10, rng, 0.6)[0]) for _ in range(150)]
    assert np.mean(shares) == pytest.approx(0.6, abs=0.08)
    assert stats.task_share(np.add.outer(np.arange(6.0), np.arange(6.0))) == pytest.approx(1)
    few, many = (stats.tasks_needed(share, draws=300) for share in (0.2, 0.8))
    assert 9 <= few <= 13 and 24 <= many <= 34
    with pytest.raises(ValueError, match="4 tasks"):
        stats.task_share(np.zeros((3, 3)))


# --- two estimands, and the same formula in two rooms ------------------------------------------


def test_mantel_gives_the_correlation_of_scikit_bios_documented_example():
    x = np.array([[0, 1, 2], [1, 0, 3], [2, 3, 0]])
    y = np.array([[0, 2, 7], [2, 0, 6], [7, 6, 0]])
    assert stats.mantel(x, y).value == pytest.approx(0.7559289, abs=1e-7)


def test_between_is_the_correlation_of_task_means_with_scipys_permutation_p(rng):
    x, y = symmetric(rng, 5), symmetric(rng, 5)
    means = [m.sum(axis=1) / 4 for m in (x, y)]
    exact = scipy_stats.pearsonr(*means, method=scipy_stats.PermutationMethod(n_resamples=np.inf))
    found = stats.between(x, y)
    assert found.value == pytest.approx(exact.statistic)
    assert found.p == pytest.approx(exact.pvalue, abs=0.03)  # scipy doubles the smaller tail
    assert (found.n_tasks, found.permutations) == (5, 119)
    y[0, 1] = np.nan
    assert stats.task_means(y)[0] == pytest.approx(np.nanmean(y[0, 2:]))
    assert np.isnan(stats.between(x, np.ones((5, 5))).value)


def test_a_raw_correlation_is_made_of_the_two_estimands(rng):
    """Related task effects and unrelated residuals: `between` sees them, `specific` does not."""
    task, noise = rng.standard_normal(30), 0.3 * symmetric(rng, 30)
    x = np.add.outer(task, task) + noise
    y = -np.add.outer(task, task) + 0.3 * symmetric(rng, 30)
    assert stats.between(x, y, 99).value < -0.95
    assert abs(stats.correlation(x, y, specific=True)) < 0.2


def test_every_permutation_test_keeps_its_level_where_tasks_are_shared():
    rates = stats.rejection_rates(8, draws=300, permutations=99, seed=5, task_share=0.8)
    assert rates["naive"] > 0.15
    for name in ("mantel", "between", "specific"):
        assert 0.02 <= rates[name] <= 0.09, name


def test_fisher_intervals_cover_and_equivalence_is_rarely_a_false_alarm():
    at_zero, at_margin = (stats.coverage(14, r, draws=300, seed=2) for r in (0.0, 0.3))
    for found in (at_zero, at_margin):
        assert 0.91 <= found["between"] <= 0.98 and 0.91 <= found["specific"] <= 0.98
    assert at_margin["equivalence"] <= 0.08  # nominal .05
    assert at_zero["equivalence"] > 0.6
    r, se = 0.4, 1 / np.sqrt(20 - 3)
    theirs = scipy_stats.pearsonr(*_correlated(r, 20)).confidence_interval()
    np.testing.assert_allclose(stats.fisher_interval(r, se, 20)[1:3], theirs)


def _correlated(r: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors whose sample correlation is r exactly."""
    a, b = np.linalg.qr(np.random.default_rng(0).standard_normal((n, 3)) - 0)[0][:, :2].T
    a, b = a - a.mean(), b - b.mean()
    b = b - (b @ a) / (a @ a) * a
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return a, r * a + np.sqrt(1 - r**2) * b


@pytest.mark.parametrize("specific", [False, True])
def test_head_to_head_keeps_its_level_and_sees_a_difference(rng, specific):
    fired = 0
    for _ in range(300):
        y = symmetric(rng, 14)
        a, b = y + 2 * symmetric(rng, 14), -y + 2 * symmetric(rng, 14)  # signs do not matter
        fired += stats.head_to_head(a, b, y, specific)["p"] < 0.05
    assert 0.015 <= fired / 300 <= 0.09
    found = stats.head_to_head(y + 0.2 * symmetric(rng, 14), symmetric(rng, 14), y, specific)
    assert found["a"] > 0.9 and found["p"] < 0.01
    few = (symmetric(rng, 4) for _ in range(3))
    assert np.isnan(stats.head_to_head(*few, specific)["p"])


def test_the_tasks_asked_for_have_the_power_promised():
    n = stats.tasks_to_show(0.5)
    assert n == 10
    power = stats.rejection_rates(n, draws=120, permutations=99, r_task=0.5, r_pair=0.5)
    assert 0.68 <= power["specific"] <= 0.92
    assert stats.tasks_to_show(0.5, specific=False) == 30
    n = stats.tasks_to_exclude(0.3)
    assert 0.7 <= stats.coverage(n, 0.0, draws=150)["equivalence"] <= 0.92


def test_crossed_effects_are_found_and_their_tests_keep_their_level(rng):
    def cells(own: float, partner: float, method: float, n: int = 6) -> pd.DataFrame:
        tasks, partners = own * rng.standard_normal(n), partner * rng.standard_normal(n)
        pair = symmetric(rng, n)  # both tasks of a merge suffer together
        rows = [
            (TASKS[i], TASKS[j], m, tasks[i] + partners[j] + pair[i, j] + e + rng.standard_normal())
            for i, j in permutations(range(n), 2)
            for m, e in (("linear", -method), ("ties", method))
        ]
        return pd.DataFrame(rows, columns=["own", "partner", "method", "loss"])

    found = stats.crossed_model(cells(6, 0, 2), permutations=199)
    assert found.loc[["task", "side", "method"], "p"].max() < 0.02
    inside = found.dropna(subset="low")
    assert list(inside.index) == ["own", "partner", "residual", "method"]
    assert ((inside["low"] <= inside["share"]) & (inside["share"] <= inside["high"])).all()
    assert found["share"].sum() == pytest.approx(1)
    null = []
    for _ in range(300):
        noise = symmetric(rng, 6) + 0.5 * rng.standard_normal((6, 6))
        null.append(stats._task_tests(noise, 99, rng))
    assert (np.mean(np.array(null) < 0.05, axis=0) <= 0.085).all()
    with pytest.raises(ValueError, match="every cell"):
        stats.crossed_model(cells(1, 1, 1).drop(index=0))


def test_a_metric_that_one_task_alone_sets_apart_predicts_the_mean_without_it():
    x = np.zeros((4, 4))
    x[0, 1:] = x[1:, 0] = 1.0
    y = np.array([[0, 3, 1, 2], [3, 0, 4, 5], [1, 4, 0, 6], [2, 5, 6, 0]], float)
    assert np.isfinite(stats.predict_left_out(x, y))
