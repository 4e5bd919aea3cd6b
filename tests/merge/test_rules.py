"""The merge rules against answers worked out by hand, against PEFT, and against algebra."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from helpers import merge as merging
from helpers.merge import blocks, rules, selection, spectral, spherical

BOTH = ["a", "b"]


def rows(*taus, base=None):
    """A model of one tensor."""
    taus = [torch.as_tensor(tau, dtype=torch.float32) for tau in taus]
    return [merging.Row("w", torch.ones(taus[0].shape) if base is None else base, taus)]


def merged(rule, *taus, weights=None, base=None, labels=None, **options):
    labels = labels or [f"m{i}" for i in range(len(taus))]
    delta, _ = merging.merge(rows(*taus, base=base), rule, labels, weights, **options)
    return delta["w"]


def random_taus(n, shape=(40, 30), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


# Known answers -----------------------------------------------------------------------------------


def test_linear_and_task_arithmetic():
    a, b = [1.0, 2.0], [3.0, -4.0]
    assert merged("linear", a, b).tolist() == [2, -1]
    assert merged("linear", a, b, weights=[3, 1]).tolist() == [1.5, 0.5]
    assert merged("task_arithmetic", a, b).tolist() == [4, -2]
    assert merged("task_arithmetic", a, b, weights=[1, -0.5]).tolist() == [-0.5, 4]
    assert merged("task_arithmetic", a, b, scale=0.25).tolist() == [1, -0.5]


@pytest.mark.parametrize(
    ("density", "kept"),
    [
        (0, []),
        (0.01, [1]),  # k = 1 at least
        (0.4, [1, 3]),
        (0.6, [0, 1, 3]),  # entries 0, 2, 5 tie at 2: the lowest index stays
        (0.7, [0, 1, 2, 3]),
        (0.99, [0, 1, 2, 3, 5]),
        (1, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_trimming_keeps_exactly_k_with_ties_by_lowest_index(density, kept):
    tau = torch.tensor([2.0, -5, -2, 3, 1, 2])
    trimmed = selection.trim(tau, selection.magnitude_cut(tau, density))
    assert trimmed.nonzero().flatten().tolist() == kept
    assert torch.equal(trimmed[kept], tau[kept])


def test_trimming_by_blocks_equals_a_stable_descending_sort():
    generator = torch.Generator().manual_seed(0)
    # almost all entries tie
    tau = torch.randint(-4, 5, (70_000, 3), generator=generator).float()
    for density in (0.05, 0.2, 0.5):
        k = int(density * tau.numel())
        assert selection.dense_cut(tau, k) == selection.magnitude_cut(tau, density)
        order = tau.abs().flatten().sort(descending=True, stable=True).indices[:k]
        expected = torch.zeros(tau.numel()).index_put((order,), tau.flatten()[order])
        kept = rules.ties([tau], [1.0], density=density)
        assert torch.equal(kept, expected.view(tau.shape))


@pytest.mark.parametrize(
    "rows_differ",
    [
        lambda n: torch.ones(n),
        # so few rows that the threshold is zero
        lambda n: (torch.arange(n) < 30) * 1.0,
        lambda n: (torch.arange(n) < n // 4) * 1.0,
        lambda n: 10.0 ** (torch.arange(n) % 7),  # with the sampled rows in step
        # all sampled rows are zero
        lambda n: (torch.arange(n) % (n // 128) != 0) * 1.0,
    ],
    ids=["alike", "sparse", "blocks", "periodic", "adversarial"],
)
@pytest.mark.parametrize("density", [0.0001, 0.2, 0.9])
def test_selection_is_exact_whatever_the_sample_says(rows_differ, density):
    n = 128 * 7
    tau = random_taus(1, (n, 80))[0] * rows_differ(n)[:, None]
    k = int(density * tau.numel())
    cut = selection.magnitude_cut(tau, density)
    assert selection.dense_cut(tau, k) == cut  # what a GPU does
    kept = selection.trim(tau, cut)
    largest = tau.abs().flatten().topk(k).values
    assert torch.equal(kept.abs().flatten().topk(k).values, largest)
    assert kept.count_nonzero() == largest.count_nonzero()


def test_ties_at_the_threshold_are_reported():
    tau = torch.tensor([2.0, -5, -2, 3, 1, 2])
    assert selection.magnitude_cut(tau, 0.6).tied == 3
    _, report = merging.merge(rows(tau, tau), "ties", BOTH, density=0.6)
    assert report.tie_mass == pytest.approx(3 / 6)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 2)])
def test_trimming_takes_any_shape(shape):
    tau = torch.full(shape, -2.0)
    trimmed = selection.trim(tau, selection.magnitude_cut(tau, 0.2))
    assert trimmed.shape == shape and trimmed.flatten().tolist() == [-2] + [0] * (
        tau.numel() - 1
    )


def test_election_and_disjoint_mean():
    a = torch.tensor([1.0, 2, -1, 0, 0, -3])
    b = torch.tensor([3.0, -1, -2, 4, 0, 3])
    #       both +, + wins, both -, only b, nobody, sum zero counts as +
    assert rules.disjoint_merge([a, b], [1, 1]).tolist() == [2, 2, -1.5, 4, 0, 3]
    assert rules.disjoint_merge([a, b], [1, 1], "sum").tolist() == [4, 2, -3, 4, 0, 3]
    # weights: elected by 1a + 3b; a member counts with its weight; equal weights cancel in the mean
    assert rules.disjoint_merge([a, b], [1, 3]).tolist() == [2.5, -1, -1.75, 4, 0, 3]
    assert torch.equal(
        rules.disjoint_merge([a, b], [5, 5]), rules.disjoint_merge([a, b], [1, 1])
    )
    # a negative weight votes and counts with its sign: 1a - 1b = -2, 3, 1, -4, 0, -6
    assert rules.disjoint_merge([a, b], [1, -1]).tolist() == [3, 3, -2, 4, 0, -6]


def test_slerp_of_orthogonal_and_close_models():
    zero_base = torch.zeros(2)
    arc = merged("slerp", [1, 0], [0, 2], base=zero_base)
    torch.testing.assert_close(arc, torch.tensor([math.sqrt(0.5), 2 * math.sqrt(0.5)]))
    third = merged("slerp", [1, 0], [0, 1], weights=[2, 1], base=zero_base)
    torch.testing.assert_close(third, torch.tensor([math.cos(math.pi / 6), 0.5]))
    opposite = merged("slerp", [1.0, 2], [-1, -2], base=zero_base)  # |cos| = 1: linear
    assert opposite.tolist() == [0, 0]
    # rounded: a, -a, a
    gram = np.outer([1, -1, 1], [1, -1, 1]) - 1e-15 * (1 - np.eye(3))
    # the mean of two has a square < 0
    coefficients, _ = spherical.spherical(gram, [1.0, 1.0, 1.0])
    assert np.isfinite(coefficients).all()
    ends = [
        merged("slerp", [1, 0], [0, 2], weights=w, base=zero_base).tolist()
        for w in ([1, 0], [0, 1])
    ]
    assert ends == [[1, 0], [0, 2]]
    base = 100 * torch.ones(2)
    _, report = merging.merge(rows([1, 0], [0, 2], base=base), "slerp", BOTH)
    assert report.slerp == {"lerp": 1, "slerp": 0}


def test_slerp_of_three_is_taken_one_after_the_other():
    a, b, c = random_taus(3)
    zero_base = torch.zeros_like(a)
    two = merged("slerp", a, b, base=zero_base)
    three = merged("slerp", two, c, weights=[2, 1], base=zero_base)
    torch.testing.assert_close(merged("slerp", a, b, c, base=zero_base), three)


def test_task_slerp_keeps_the_length_of_equally_long_task_vectors():
    a, b = (tau / tau.norm() for tau in random_taus(2))
    merge = merged("task_slerp", a, b)
    assert merge.norm().item() == pytest.approx(1)
    angle = torch.acos((a * b).sum())
    torch.testing.assert_close(merge, (a + b) / (2 * torch.cos(angle / 2)))


def test_dare_drops_and_rescales():
    tau = torch.arange(1.0, 1001).view(40, 25)
    assert torch.equal(merged("dare", tau, density=1), tau)
    assert not merged("dare", tau, density=0).any()
    merge = merged("dare", tau, density=0.2)
    kept = merge != 0
    torch.testing.assert_close(merge[kept], 5 * tau[kept])
    assert 0.15 < kept.float().mean() < 0.25
    lengths = merged("dare", tau, density=0.2, rescale="l1")
    assert torch.equal(lengths != 0, kept)
    assert lengths.abs().sum().item() == pytest.approx(tau.abs().sum().item(), rel=1e-6)


def test_dare_keeps_the_expectation_over_masks():
    tau = torch.linspace(-1, 1, 12)
    mean = torch.stack(
        [merged("dare", tau, seed=seed, density=0.4) for seed in range(800)]
    ).mean(0)
    spread = tau.abs() * math.sqrt((1 - 0.4) / 0.4 / 800)
    assert ((mean - tau).abs() <= 4.5 * spread).all()


def test_dare_masks_depend_on_seed_method_tensor_and_label_only():
    seeds = [
        selection.stream_seed(*key)
        for key in [
            (0, "dare", "w", "a"),
            (1, "dare", "w", "a"),
            (0, "dare_ties", "w", "a"),
        ]
        + [(0, "dare", "v", "a"), (0, "dare", "w", "b")]
    ]
    assert len(set(seeds)) == 5
    # first 8 bytes of SHA-256 of '[0, "dare", "w", "a"]'
    assert seeds[0] == 10462427046122380743
    a, b = random_taus(2)
    one = merged("dare", a, b, labels=["a", "b"])
    torch.testing.assert_close(one, merged("dare", b, a, labels=["b", "a"]))


def test_dare_masks_do_not_depend_on_the_blocks(monkeypatch):
    tau = random_taus(1, (101, 33))
    whole = rules.dare(tau, [1.0], seeds=[7])
    monkeypatch.setitem(blocks.BLOCK, "cpu", 100)
    assert torch.equal(rules.dare(tau, [1.0], seeds=[7]), whole)


def test_dare_ties_mean_and_sum():
    taus = random_taus(4)
    options = {"labels": list("abcd"), "density": 0.5}
    mean, total = (
        merged("dare_ties", *taus, combine=c, **options) for c in ("mean", "sum")
    )
    assert torch.equal(mean != 0, total != 0) and torch.equal(mean.sign(), total.sign())
    ratio = (total / mean)[mean != 0]
    assert ratio.round().unique().tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(ratio, ratio.round())


@pytest.mark.parametrize("rule", merging.RULES)
def test_zero_task_vectors_give_a_zero_delta(rule):
    zero = torch.zeros(4, 6)
    delta, report = merging.merge(rows(zero, zero), rule, BOTH)
    assert not delta["w"].any()
    assert report.effective_scale == report.rho2 == 0
    beside, told = merging.merge(rows(zero, torch.ones(4, 6)), rule, BOTH)
    assert beside["w"].isfinite().all() and json.dumps(told.as_dict())


@pytest.mark.parametrize("rule", merging.RULES)
def test_every_method_takes_vectors_scalars_and_lazy_tensors(
    rule, tiny_base, tiny_adapters
):
    for shape in [(7,), ()]:
        assert merged(rule, *random_taus(2, shape)).shape == shape
    base = merging.open_base(tiny_base)
    specialists = [merging.open_specialist(path) for path in tiny_adapters[:2]]
    lazy, _ = merging.merge(merging.views(base, specialists), rule, BOTH)
    dense, _ = merging.merge(lambda: merging.stream(base, specialists), rule, BOTH)
    assert lazy.keys() == dense.keys()
    for name, delta in lazy.items():
        torch.testing.assert_close(delta, dense[name])


def weighted(rule, *weights):
    """A merge of as many models as there are weights, the same models in every call."""
    n = len(weights)
    return merged(rule, *random_taus(n), weights=weights, base=torch.zeros(40, 30))


@pytest.mark.parametrize("rule", merging.RULES)
def test_every_method_takes_a_weight_for_each_model(rule):
    """Weights tell models apart; a model of weight zero takes no part; their common factor is the
    merge's where the rule adds up, and cancels where it takes a mean.
    """
    mine = weighted(rule, 0.2, 0.7, 0.1)
    assert not torch.allclose(mine, weighted(rule, 0.7, 0.2, 0.1), rtol=1e-3)
    # whose shares of a rank are by the number of models
    if rule not in ("tsv", "iso_cts"):
        without = weighted(rule, 0.2, 0.7)
        torch.testing.assert_close(weighted(rule, 0.2, 0.7, 0), without)
    mean = merging.RULES[rule].divides or rule in ("ties", "dare_ties")
    factor = 1 if mean else 2
    torch.testing.assert_close(weighted(rule, 0.4, 1.4, 0.2), factor * mine)


# Beyond the five --------------------------------------------------------------------------------


def test_ties_over_the_whole_model_keeps_what_the_authors_keep():
    small, large = torch.tensor([1.0, -2, 3, 4]), torch.tensor([[30.0, 20], [-20, 10]])
    model = [
        merging.Row("small", torch.zeros(4), [small]),
        merging.Row("large", torch.zeros(2, 2), [large]),
    ]
    delta, report = merging.merge(model, "ties", ["a"], density=0.2, scope="model")
    assert not delta["small"].any()  # starved: its magnitudes are all low
    # int(.2 * 8) + 1 = 2, and the tie
    assert delta["large"].tolist() == [[30, 20], [-20, 0]]
    assert report.tie_mass == 2 / 8
    per_tensor, _ = merging.merge(model, "ties", ["a"], density=0.2)
    assert per_tensor["small"].tolist() == [0, 0, 0, 4]


@pytest.mark.parametrize("density", [0, 0.003, 0.2, 0.77, 1])
def test_the_cut_of_a_whole_model_is_exact(density):
    taus = [
        random_taus(2, shape, seed)
        for seed, shape in enumerate([(50, 30), (7,), (20, 11)])
    ]
    model = [
        merging.Row(str(i), torch.zeros(t[0].shape), [t[0], 1e-3 * t[1]])
        for i, t in enumerate(taus)
    ]
    cuts = selection.model_cuts(lambda: (row.taus for row in model), [density] * 2)
    for i, cut in enumerate(cuts):
        flat = torch.cat([row.taus[i].flatten() for row in model])
        kept = selection.trim(flat, cut)
        expected = {0: 0, 1: len(flat)}.get(density, int(density * len(flat)) + 1)
        assert kept.count_nonzero() == expected
        largest = flat.abs().topk(expected).values
        assert torch.equal(kept[kept != 0].abs().sort(descending=True).values, largest)


def test_the_flat_vector_of_a_model_counts_what_no_model_changed():
    """The authors' rule on the whole vector, of which most is zero."""
    taus = random_taus(2, (30, 20))
    flat = [torch.cat([tau.flatten(), torch.zeros(1500)]) for tau in taus]
    cuts = selection.model_cuts(lambda: [taus], [0.2, 0.9], 2100)
    for tau, density, cut in zip(flat, (0.2, 0.9), cuts, strict=True):
        kth = len(tau) - int(len(tau) * density)
        threshold = tau.abs().kthvalue(kth).values
        assert torch.equal(selection.trim(tau, cut), tau * (tau.abs() >= threshold))


def test_breadcrumbs_masks_both_tails():
    tau = torch.tensor([10.0, -9, 8, -7, 6, 5, 4, 3, 2, 1])
    kept = rules.breadcrumbs([tau], [1.0], density=0.3, outliers=0.2)
    assert kept.tolist() == [0, 0, 8, -7, 6, 0, 0, 0, 0, 0]
    assert torch.equal(rules.breadcrumbs([tau], [1.0], density=1.0, outliers=0.2), tau)
    assert not rules.breadcrumbs([tau], [1.0], density=0.0).any()


def low_rank(n, shape=(20, 12), rank=2, seed=0):
    """Task vectors as factors, and the same dense."""
    generator = torch.Generator().manual_seed(seed)
    lazy = []
    for _ in range(n):
        B, A = (
            torch.randn(s, generator=generator)
            for s in ((shape[0], rank), (rank, shape[1]))
        )
        factors = merging.Factors(0.5, B, A)
        read = lambda rows, out, B=B, A=A: torch.mul(0.5, B[rows] @ A, out=out)  # noqa: E731
        lazy.append(merging.Lazy(torch.Size(shape), "cpu", read, factors))
    return lazy, [tau[...] for tau in lazy]


@pytest.mark.parametrize("rule", [spectral.iso_c, spectral.tsv])
def test_singular_methods_give_the_same_for_factors_and_dense_matrices(rule):
    lazy, dense = low_rank(3)
    weights = [1.0, 0.5, 2.0]
    torch.testing.assert_close(
        rule(lazy, weights), rule(dense, weights), rtol=1e-4, atol=1e-4
    )


def test_iso_c_flattens_the_spectrum_of_the_sum_on_its_rank():
    _, dense = low_rank(3)
    flat = spectral.iso_c(dense, [1.0] * 3)
    before, after = (torch.linalg.svdvals(m) for m in (sum(dense), flat))
    torch.testing.assert_close(
        after[:6], before[:6].mean().expand(6), rtol=1e-4, atol=0
    )
    assert after[6:].max() < 1e-4


def test_tsv_keeps_an_equal_share_of_each_rank_and_leaves_orthogonal_models_alone():
    _, dense = low_rank(2)
    assert torch.linalg.matrix_rank(spectral.tsv(dense, [1.0, 1.0]), rtol=1e-4) == 2
    one, two = torch.zeros(8, 8), torch.zeros(8, 8)
    one[0, 0], one[1, 1], two[2, 2], two[3, 3] = 4, 3, 2, 1
    assert spectral.tsv([one, two], [1.0, 1.0]).diagonal().tolist() == [
        4,
        0,
        2,
        0,
        0,
        0,
        0,
        0,
    ]
    torch.testing.assert_close(
        spectral.tsv([dense[0]], [1.0]), dense[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rule", merging.RULES)
def test_matched_merges_have_the_norm_or_the_dose_asked_for(rule):
    a, b = random_taus(2)
    b = b + 0.3 * a
    plain, before = merging.merge(rows(a, b), rule, BOTH)
    for match, asked in [("norm", "effective_scale"), ("dose", "own_mean")]:
        delta, report = merging.merge(rows(a, b), rule, BOTH, match=match, scale=0.5)
        assert report.as_row()[asked] == pytest.approx(0.5)
        factor = 0.5 * before.plan.scale / before.as_row()[asked]
        torch.testing.assert_close(delta["w"], factor * plain["w"])
        _, again = merging.merge(rows(a, b), rule, BOTH, scale=report.plan.scale)
        assert again.own == pytest.approx(report.own)
        assert again.norm == pytest.approx(report.norm)


@pytest.mark.parametrize("match", ["norm", "dose"])
def test_matching_keeps_the_sign_of_the_scale(match):
    a, b = random_taus(2)
    plain, _ = merging.merge(
        rows(a, b), "task_arithmetic", BOTH, match=match, scale=0.5
    )
    turned, report = merging.merge(
        rows(a, b), "task_arithmetic", BOTH, match=match, scale=-0.5
    )
    torch.testing.assert_close(turned["w"], -plain["w"])
    assert report.plan.scale < 0
    with pytest.raises(ValueError, match="cannot be matched"):
        merging.merge(rows(a, -a + 1e-7 * b), "linear", BOTH, match=match)


def test_densities_may_differ_by_model():
    a, b = random_taus(2)
    one = merged("ties", a, torch.zeros_like(b), density=0.1)
    assert torch.equal(merged("ties", a, b, density=[0.1, 0]), one)
    assert torch.equal(merged("dare", a, b, density=[1.0, 0.0]), a / 2)
    with pytest.raises(ValueError, match="3 densities for 2 models"):
        merged("ties", a, b, density=[0.1, 0.2, 0.3])


def test_matching_is_refused_where_nothing_can_be_matched():
    zero = torch.zeros(3)
    with pytest.raises(ValueError, match="cannot be matched"):
        merging.merge(rows(zero, zero), "linear", BOTH, match="norm")
    with pytest.raises(ValueError, match="must be one of norm, dose"):
        # before a row is asked for
        merging.merge(iter([]), "linear", BOTH, match="length")


def test_rounding_to_bf16_loses_part_of_a_small_dose():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 100, generator=generator)
    tau = 0.002 * torch.randn(200, 100, generator=generator)
    delta = merging.dose(rows(tau, base=base), 0, 0.5)
    changes, realised = merging.rounded(
        {"w": base, "v": torch.ones(3)}, rows(tau, base=base), delta
    )
    on_grid = (base.bfloat16().float() + delta["w"]).bfloat16().float()
    torch.testing.assert_close(base + changes["w"], on_grid, rtol=1e-6, atol=1e-8)
    assert changes.keys() == {"w"}  # ones are on the grid already
    assert 0.2 < realised[0] < 0.6
    _, exact = merging.rounded({"w": base}, rows(tau, base=base), delta, torch.float32)
    assert exact == pytest.approx([0.5], rel=1e-3)


def test_inner_products_are_those_of_fp64():
    x = torch.stack(random_taus(3, (301, 257))).pow(3)  # heavy tails
    x[1] = x[0] + 1e-3 * x[1]
    exact = x.flatten(1).double() @ x.flatten(1).double().T
    norms = exact.diagonal().sqrt()
    error = torch.from_numpy(merging.gram_matrix(list(x))) - exact
    assert (error / norms / norms[:, None]).abs().max() < 1e-6
    half = x.bfloat16()  # as gradients of a model in bfloat16
    np.testing.assert_array_equal(
        merging.gram_matrix(list(half)), merging.gram_matrix(list(half.float()))
    )


# Against PEFT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_equal_to_peft_where_the_conventions_agree(n, density):
    taus, ones = random_taus(n), torch.ones(n)
    theirs = merge_utils.ties(taus, ones, density)
    torch.testing.assert_close(
        merged("ties", *taus, density=density), theirs, rtol=2e-7, atol=0
    )
    weights = torch.rand(n, generator=torch.Generator().manual_seed(n))
    theirs = merge_utils.task_arithmetic(taus, weights)
    ours = merged("task_arithmetic", *taus, weights=weights.tolist())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    signs = merge_utils.calculate_majority_sign_mask(torch.stack(taus))
    theirs = merge_utils.disjoint_merge(torch.stack(taus), signs)
    torch.testing.assert_close(
        rules.disjoint_merge(taus, [1.0] * n), theirs, rtol=2e-7, atol=0
    )


# Algebra -----------------------------------------------------------------------------------------

several = st.integers(2, 5)
seeds = st.integers(0, 10_000)
quick = settings(max_examples=25, deadline=None)
DETERMINISTIC = [m for m in merging.RULES if not m.startswith("dare")]


@quick
@given(several, seeds)
def test_linear_is_task_arithmetic_at_one_nth_bit_for_bit(n, seed):
    taus = random_taus(n, seed=seed)
    linear = merged("linear", *taus)
    assert torch.equal(linear, merged("task_arithmetic", *taus, weights=[1 / n] * n))


@quick
@given(several, seeds)
def test_slerp_of_close_models_is_linear(n, seed):
    taus, base = random_taus(n, seed=seed), 1000 * torch.ones(40, 30)
    delta, report = merging.merge(rows(*taus, base=base), "slerp", list(range(n)))
    linear, other = merging.merge(rows(*taus, base=base), "linear", list(range(n)))
    assert report.slerp == {"lerp": n - 1, "slerp": 0}
    assert merging.same(report.sketch, other.sketch)
    torch.testing.assert_close(delta["w"], linear["w"])
    if n == 2:
        assert merging.delta_digest(delta) == merging.delta_digest(linear)


@quick
@given(
    st.sampled_from(sorted(merging.RULES.keys() - {"slerp", "task_slerp"})),
    several,
    seeds,
)
def test_the_order_of_models_does_not_matter(rule, n, seed):
    taus, weights = random_taus(n, seed=seed), [1.0 + i for i in range(n)]
    labels = [f"m{i}" for i in range(n)]
    order = np.random.default_rng(seed).permutation(n)
    ours = merged(rule, *taus, weights=weights, labels=labels)
    theirs = merged(
        rule,
        *[taus[i] for i in order],
        weights=[weights[i] for i in order],
        labels=[labels[i] for i in order],
    )
    atol = 1e-3 if rule == "iso_cts" else 1e-4  # its SVDs, by processor
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=atol)


@quick
@given(seeds)
def test_slerp_at_one_half_is_symmetric(seed):
    a, b = random_taus(2, seed=seed)
    for rule in ("slerp", "task_slerp"):
        torch.testing.assert_close(merged(rule, a, b), merged(rule, b, a))


@quick
@given(st.sampled_from(DETERMINISTIC), seeds, st.sampled_from([0.5, 2.0, -4.0]))
def test_merges_scale_with_the_task_vectors(rule, seed, factor):
    a, b = random_taus(2, seed=seed)
    base = torch.zeros_like(a)
    ours = merged(rule, factor * a, factor * b, base=base)
    theirs = factor * merged(rule, a, b, base=base)
    spectral = rule in ("tsv", "iso_cts")  # their SVDs differ by processor
    rounding = {"rtol": 1e-4, "atol": 1e-4} if spectral else {}
    torch.testing.assert_close(ours, theirs, **rounding)


@quick
@given(st.sampled_from(["linear", "slerp", "task_slerp", "ties"]), several, seeds)
def test_merging_copies_gives_the_model_back(rule, n, seed):
    tau = random_taus(1, seed=seed)[0]
    options = {"density": 1.0} if rule == "ties" else {}
    torch.testing.assert_close(merged(rule, *[tau] * n, **options), tau)


# The report --------------------------------------------------------------------------------------


def test_the_report_by_hand():
    a, b = [3.0, 0, 0], [0, 4.0, 0]
    _, report = merging.merge(rows(a, b), "task_arithmetic", BOTH, [1, 0.5])
    assert report.norms == [3, 4]
    assert report.norm == pytest.approx(math.sqrt(9 + 4))
    assert report.effective_scale == pytest.approx(math.sqrt(13) / 3.5)
    assert report.cos_sum == pytest.approx((9 + 8) / (math.sqrt(13) * 5))
    assert report.kept == pytest.approx(2 / 3)
    assert report.ingredient == [1, 0.5]
    assert report.own == pytest.approx([1, 0.5])  # orthogonal: no overlap
    assert report.rho2 == pytest.approx(1)


def test_own_dose_adds_the_partners_overlap():
    a, b = [1.0, 0], [1.0, 1.0]
    _, report = merging.merge(rows(a, b), "linear", BOTH)
    assert report.ingredient == [0.5, 0.5]
    assert report.own == pytest.approx([1, 0.75])


@pytest.mark.parametrize("rule", merging.RULES)
def test_report_totals_are_those_of_the_flattened_model(rule):
    taus = [random_taus(2, seed=1), random_taus(2, (20,), seed=2)]
    model = [
        merging.Row(n, torch.zeros(t[0].shape), t)
        for n, t in zip("vw", taus, strict=True)
    ]
    delta, report = merging.merge(model, rule, BOTH, scale=0.7)
    flat = torch.cat([delta["v"].flatten(), delta["w"].flatten()]).double()
    a, b = (
        torch.cat([taus[0][i].flatten(), taus[1][i].flatten()]).double() for i in (0, 1)
    )
    assert report.norm == pytest.approx(flat.norm().item())
    assert report.own == pytest.approx([(flat @ t / (t @ t)).item() for t in (a, b)])
    basis = torch.stack([a, b], 1)
    inside = basis @ torch.linalg.lstsq(basis, flat[:, None]).solution
    if rule not in ("linear", "task_arithmetic"):
        assert report.rho2 == pytest.approx(
            (inside.norm() ** 2 / flat.norm() ** 2).item()
        )
    assert json.loads(json.dumps(report.as_dict()))["own"] == report.own


def test_a_dose_of_a_single_model_and_the_rule_alone():
    a, b = random_taus(2)
    assert torch.equal(merging.dose(rows(a, b), 1, 0.25)["w"], 0.25 * b)
    nothing = merging.zero(a.shape)
    alone, report = merging.merge([merging.Row("w", a, [a, nothing])], "ties", BOTH)
    assert torch.equal(alone["w"], merged("ties", a))
    assert report.own[1] is None and report.norms[1] == 0
    half, _ = merging.merge([merging.Row("w", a, [nothing, b])], "linear", BOTH)
    assert torch.equal(half["w"], 0.5 * b)


def test_sketches_and_digests_tell_merges_apart():
    taus = random_taus(2, (300, 100))
    deltas, sketches = {}, {}
    for name, scale in [("one", 1.0), ("same", 1 + 1e-8), ("other", 1 + 1e-4)]:
        deltas[name], report = merging.merge(rows(*taus), "linear", BOTH, scale=scale)
        sketches[name] = report.sketch
    assert merging.same(sketches["one"], sketches["same"])
    assert not merging.same(sketches["one"], sketches["other"])
    assert merging.delta_digest(deltas["one"]) != merging.delta_digest(deltas["other"])
    renamed = {"v": deltas["one"]["w"]}
    assert merging.delta_digest(deltas["one"]) != merging.delta_digest(renamed)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "n", "weights", "options", "message"),
    [
        ("median", 2, None, {}, "unknown rule 'median'"),
        ("slerp", 1, None, {}, "at least 2 models"),
        ("ties", 2, None, {"densty": 0.1}, "no option 'densty'"),
        ("ties", 2, None, {"density": 1.5}, "number from 0 to 1"),
        ("ties", 2, None, {"density": True}, "number from 0 to 1"),
        ("dare", 2, None, {"rescale": "l2"}, "one of"),
        ("linear", 2, [1], {}, "1 weights for 2 models"),
        ("linear", 2, [1, -1], {}, "sum to zero"),
        ("linear", 2, [1, math.nan], {}, "finite"),
        ("slerp", 2, [2, -1], {}, "must not be negative"),
        ("task_slerp", 2, [0, 0], {}, "sum to zero"),
        ("iso_c", 2, None, {"density": 0.5}, "it has none"),
    ],
)
def test_what_the_contract_forbids_is_refused(rule, n, weights, options, message):
    with pytest.raises(ValueError, match=message):
        merging.check_rule(rule, n, weights, options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rule", merging.RULES)
def test_nan_and_infinity_are_refused_by_name(rule, bad):
    fine, broken = random_taus(2)
    broken[3, 4] = bad
    with pytest.raises(ValueError, match="w: b holds NaN or infinite"):
        merging.merge(rows(fine, broken), rule, BOTH)


def test_calls_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="w: 1 models for 2 labels"):
        merging.merge(rows([1.0]), "linear", BOTH)
    with pytest.raises(ValueError, match="not an iterator"):
        merging.merge(iter(rows([1.0], [2.0])), "linear", BOTH)
    with pytest.raises(ValueError, match="different labels"):
        merging.merge(rows([1.0], [2.0]), "linear", ["a", "a"])
