"""Pooling keeps a state whatever the batch; the measures keep what their invariance table says."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.states import measures as hidden

PROMPTS = [[5, 9, 2], [7, 1, 8, 8, 3, 4, 11], [42], [3, 3, 14, 90]]


def pooled(model, prompts, how, side="right", length=9):
    """Pooled states of one padded batch."""
    ids = torch.full((len(prompts), length), 256)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        at = slice(0, len(prompt)) if side == "right" else slice(length - len(prompt), length)
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    ends = [len(p) - 1 if side == "right" else length - 1 for p in prompts]
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            output_hidden_states=True,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        )
    return hidden.pool(out.hidden_states, mask, torch.tensor(ends), how)


@pytest.mark.parametrize("how", ["last", "mean", "first_decoder"])
def test_state_depends_neither_on_batch_nor_on_padding_side(how):
    model = tiny.llama()
    alone = torch.cat([pooled(model, [p], how, length=len(p)) for p in PROMPTS])
    assert alone.shape == (4, 3, 16) and alone.dtype == torch.float32
    for side in ("right", "left"):
        torch.testing.assert_close(pooled(model, PROMPTS, how, side), alone, rtol=1e-4, atol=1e-5)


def bert():
    size = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 100}
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(num_hidden_layers=2, **size)).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=100,
        d_model=8,
        d_ff=16,
        d_kv=4,
        num_layers=1,
        num_decoder_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "make, how", [(tiny.llama, "last"), (tiny.llama, "mean"), (bert, "mean"), (t5, "first_decoder")]
)
def test_prompt_states_are_those_of_each_prompt_read_alone(make, how):
    model = make()
    together = hidden.prompt_states(model, PROMPTS, how, batch_size=3)
    assert together.dtype == torch.float32 and together.is_contiguous()
    for prompt, states in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([prompt])
        extra = {"decoder_input_ids": torch.tensor([[0]])} if how == "first_decoder" else {}
        with torch.no_grad():
            out = model(ids, output_hidden_states=True, **extra)
        layers = out.decoder_hidden_states if extra else out.hidden_states
        expected = [h[0].mean(0) if how == "mean" else h[0, -1] for h in layers]
        assert len(states) == len(hidden.layer_names(model)) == 3
        torch.testing.assert_close(states, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_classification_head_changes_no_state():
    body = bert().base_model
    headed = BertForSequenceClassification(body.config).eval()
    headed.bert.load_state_dict(body.state_dict(), strict=False)
    states = [hidden.prompt_states(model, PROMPTS, "mean") for model in (bert(), headed)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert hidden.layer_names(headed) == ["embeddings", "block 1", "block 2"]


@pytest.mark.parametrize("make, how", [(tiny.llama, "first_decoder"), (t5, "last")])
def test_prompt_states_refuse_a_state_that_the_model_has_not(make, how):
    with pytest.raises(ValueError, match=f"has no '{how}' state"):
        hidden.prompt_states(make(), PROMPTS, how)


def test_pool_by_hand_and_nan_padding_never_counts():
    states = torch.arange(12.0).reshape(1, 4, 3)
    states[0, 3] = torch.nan
    mask, last = torch.tensor([[1, 1, 1, 0]]), torch.tensor([2])
    assert hidden.pool((states,), mask, last, "last").tolist() == [[[6.0, 7.0, 8.0]]]
    assert hidden.pool((states,), mask, last, "mean").tolist() == [[[3.0, 4.0, 5.0]]]
    assert hidden.pool((states,), mask, last, "first_decoder").tolist() == [[[0.0, 1.0, 2.0]]]


def test_pool_promotes_half_precision_before_the_mean():
    states = torch.ones(1, 3, 2, dtype=torch.bfloat16)
    states[0, 0] += 2**-7  # one bfloat16 step: the mean, a third of it, would round away
    mean = hidden.pool((states,), torch.ones(1, 3), torch.tensor([2]), "mean")
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.full((1, 1, 2), 1 + 2**-7 / 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "mask, last, how, message",
    [
        ([[1, 1, 0]], [2], "last", "uncounted position"),
        ([[0, 0, 0]], [0], "mean", "no counted position"),
        ([[1, 1, 1]], [2], "max", "unknown pooling"),
    ],
)
def test_pool_refuses(mask, last, how, message):
    with pytest.raises(ValueError, match=message):
        hidden.pool((torch.zeros(1, 3, 2),), torch.tensor(mask), torch.tensor(last), how)


def test_layer_names_tell_final_norm_from_raw_stream():
    assert hidden.layer_names(tiny.llama()) == ["embeddings", "block 1", "final norm"]
    assert hidden.layer_names(tiny.llama(tie_last_hidden_states=False))[-1] == "block 2"
    assert hidden.layer_names(bert()) == ["embeddings", "block 1", "block 2"]
    assert hidden.layer_names(t5()) == ["embeddings", "block 1", "final norm"]


# --- measures ---------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
A, B, BASE = RNG.normal(size=(3, 24, 10)) + np.linspace(0.5, 1.5, 10)
ORDER = RNG.permutation(len(A))
ROTATION = np.linalg.qr(RNG.normal(size=(10, 10)))[0]
SHIFT = 3 * RNG.normal(size=10)

# Applied to both arrays alike, or to the second alone.
TRANSFORMATIONS = {
    "permuted probes": (lambda x: x[ORDER], True),
    "rotated alike": (lambda x: x @ ROTATION, True),
    "rotated": (lambda x: x @ ROTATION, False),
    "scaled alike": (lambda x: 3 * x, True),
    "scaled": (lambda x: 3 * x, False),
    "shifted alike": (lambda x: x + SHIFT, True),
    "shifted": (lambda x: x + SHIFT, False),
    "duplicated features": (lambda x: np.hstack([x, x]), True),
}
# 1: the value stays; 0: it changes. Columns in the order of TRANSFORMATIONS.
INVARIANCE = {
    #                    probes rot= rot scale= scale shift= shift duplicated
    "hidden_sim":        (1,    1,   0,  1,     1,    0,     0,    1),
    "hidden_sim_norms":  (1,    1,   0,  1,     0,    0,     0,    1),
    "hidden_sim_sqrt_d": (1,    1,   0,  0,     0,    1,     0,    1),
    "hidden_sim_raw":    (1,    1,   0,  0,     0,    1,     0,    0),
    "cka":               (1,    1,   1,  1,     1,    1,     1,    1),
    "procrustes":        (1,    1,   1,  1,     1,    1,     1,    1),
    "rsa":               (1,    1,   1,  1,     1,    1,     1,    1),
    "state_cosine":      (1,    1,   0,  1,     1,    0,     0,    1),
    "change_cosine":     (1,    1,   0,  1,     0,    1,     0,    1),
    "mutual_knn":        (1,    1,   1,  1,     1,    0,     0,    1),
    "logit_kl":          (1,    0,   0,  0,     0,    0,     0,    1),
}  # fmt: skip


def arguments(name, a, b, base):
    return (a, b, base) if hidden.MEASURES[name].needs == "base" else (a, b)


def test_every_measure_has_a_row_of_the_invariance_table():
    assert set(INVARIANCE) == set(hidden.MEASURES)


@pytest.mark.parametrize("name", INVARIANCE)
@pytest.mark.parametrize("column, transformation", list(enumerate(TRANSFORMATIONS)))
def test_invariance(name, column, transformation):
    change, alike = TRANSFORMATIONS[transformation]
    function = hidden.MEASURES[name].function
    before = function(*arguments(name, A, B, BASE))
    first, base = (change(A), change(BASE)) if alike else (A, BASE)
    after = function(*arguments(name, first, change(B), base))
    assert (after == pytest.approx(before, rel=1e-9)) == bool(INVARIANCE[name][column])


@pytest.mark.parametrize("name", hidden.MEASURES)
def test_symmetric_and_at_its_best_for_equal_states(name):
    function, distance, _ = hidden.MEASURES[name]
    value = function(*arguments(name, A, B, BASE))
    assert function(*arguments(name, B, A, BASE)) == pytest.approx(value, rel=1e-12)
    best = function(*arguments(name, A, A, BASE))
    assert best == pytest.approx(0 if distance else 1, abs=1e-7)
    assert value > best if distance else value < best


def test_hidden_sim_by_hand():
    a, b = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[4.0, 3.0], [0.0, 2.0]])
    assert hidden.hidden_sim(a, b) == pytest.approx((np.sqrt(0.08) + np.sqrt(2)) / 2)
    assert hidden.hidden_sim(a, b, "raw") == pytest.approx((np.sqrt(2) + np.sqrt(5)) / 2)
    assert hidden.hidden_sim(a, b, "sqrt_d") == pytest.approx((1 + np.sqrt(2.5)) / 2)
    assert hidden.hidden_sim(a, b, "norms") == pytest.approx((np.sqrt(2) / 10 + np.sqrt(5) / 3) / 2)
    assert hidden.probe_distances(a, b, "raw") == pytest.approx([np.sqrt(2), np.sqrt(5)])


def published_arrays():
    """The fixed arrays that the pinned values of other libraries below were computed on."""
    t = np.arange(12.0)[:, None]
    a = np.sin(t * np.arange(1, 6)) + 0.1 * t
    return a, np.cos(t * np.arange(2, 9) / 3) * np.arange(1, 8)


def test_debiased_cka_equals_a_published_librarys_value():
    # pytorch-cka 1.1.3: hsic(a a', b b') gives (xy, xx, yy), CKA = xy / sqrt(xx yy). The HSICs of
    # repsim 0.1.5 are the same numbers; its CKA with the "song" estimator is not their ratio.
    assert hidden.debiased_cka(*published_arrays()) == pytest.approx(-0.25038335566865, rel=1e-12)


def test_debiased_cka_of_one_state_for_all_probes_is_undefined():
    assert np.isnan(hidden.debiased_cka(np.ones((5, 3)), A[:5]))


def test_debiased_cka_is_the_ratio_of_u_statistics():
    def hsic(k, m):  # the definition: mean of the kernel over all ordered 4-tuples of probes
        quadruples = permutations(range(len(k)), 4)
        return np.mean([k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in quadruples])

    a, b = A[:8], B[:8, :6]
    k, m = a @ a.T, b @ b.T
    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert hidden.debiased_cka(a, b) == pytest.approx(expected, rel=1e-10)


def test_debiased_cka_of_noise_is_centred_on_zero():
    draws = [hidden.debiased_cka(*RNG.normal(size=(2, 10, 50))) for _ in range(200)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(len(draws))


def test_procrustes_equals_a_published_librarys_value():
    # qc-procrustes 1.1.3: sqrt(orthogonal(a, b, translate=True, scale=True).error).
    a, b = published_arrays()
    assert hidden.procrustes(a, b[:, :5]) == pytest.approx(1.0433294601458496, rel=1e-12)


@pytest.mark.parametrize("probes", [24, 6])  # more and fewer probes than dimensions
def test_procrustes_is_the_residual_of_the_best_rotation(probes):
    a, b = A[:probes] - A[:probes].mean(0), B[:probes] - B[:probes].mean(0)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    rotation, _ = orthogonal_procrustes(a, b)
    residual = np.linalg.norm(a @ rotation - b)
    assert hidden.procrustes(A[:probes], B[:probes]) == pytest.approx(residual, rel=1e-10)


def test_rsa_and_knn_by_definition():
    assert hidden.rsa(A, B) == pytest.approx(spearmanr(pdist(A), pdist(B)).statistic)
    angles = [squareform(pdist(x, "cosine")) + 9 * np.eye(len(x)) for x in (A, B)]
    nearest = [[set(row.argsort()[:5]) for row in angle] for angle in angles]
    shared = [len(x & y) / 5 for x, y in zip(*nearest, strict=True)]
    assert hidden.mutual_knn(A, B, k=5) == pytest.approx(np.mean(shared))


def test_logit_kl_of_two_coins():
    coin = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    kl = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    back = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert hidden.logit_kl(*coin) == pytest.approx((kl + back) / 2)


def test_change_cosine_of_an_unchanged_model_has_no_value():
    assert np.isnan(hidden.change_cosine(A, BASE, BASE))
    assert hidden.change_cosine(BASE + A, BASE - 2 * A, BASE) == pytest.approx(-1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hidden.hidden_sim(A, B[:-1]), "same probes"),
        (lambda: hidden.hidden_sim(A, B[:, :-1]), "use CKA"),
        (lambda: hidden.hidden_sim(A, B, "max"), "unknown normalisation"),
        (lambda: hidden.debiased_cka(A[:3], B[:3]), "at least 4"),
        (lambda: hidden.rsa(A[:2], B[:2]), "at least 3"),
        (lambda: hidden.mutual_knn(A, B, k=24), "n_probes"),
    ],
)
def test_measures_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- layers, pairs and groups -----------------------------------------------------------------

LABELS = ["red", "green", "blue"]
PROBE_TASK = np.repeat(LABELS, 12)
STATES = RNG.normal(size=(3, 36, 2, 10)).astype(np.float32)


def test_pair_table_uses_the_probes_of_the_pairs_own_tasks():
    own = hidden.pair_table(STATES, LABELS, PROBE_TASK)
    assert own[["task_a", "task_b"]].to_numpy().tolist() == [
        ["red", "green"],
        ["red", "blue"],
        ["green", "blue"],
    ]
    expected = hidden.hidden_sim(
        STATES[0][[*range(12), *range(24, 36)], -1], STATES[2][[*range(12), *range(24, 36)], -1]
    )
    assert own.hidden_sim[1] == pytest.approx(expected)
    pool = hidden.pair_table(STATES, LABELS, layer=0)
    assert pool.hidden_sim[1] == pytest.approx(hidden.hidden_sim(STATES[0, :, 0], STATES[2, :, 0]))


def test_pair_table_on_the_probes_of_other_tasks():
    other = hidden.pair_table(STATES, LABELS, PROBE_TASK, others=True, measures=["cka"])
    expected = hidden.debiased_cka(STATES[0][24:, -1], STATES[1][24:, -1])
    assert other.cka[0] == pytest.approx(expected)


def test_logit_kls_are_those_of_each_pair_and_probe():
    readout = RNG.normal(size=(7, 10))
    kls = hidden.logit_kls(STATES[:, :, -1], readout, block=5)
    assert kls.shape == (3, 3, 36)
    logits = STATES[:, :, -1].astype(float) @ readout.T
    for i, j in [(0, 1), (1, 2), (2, 2)]:
        each = [
            hidden.logit_kl(a[None], b[None]) for a, b in zip(logits[i], logits[j], strict=True)
        ]
        np.testing.assert_allclose(kls[i, j], each, atol=1e-6)


def test_half_samples_spread_as_means_of_the_probes_do():
    """HiddenSim is a mean over probes: its spread must be s / sqrt(n), within tasks."""
    kls = hidden.logit_kls(STATES[:, :, -1], RNG.normal(size=(7, 10)))
    asked = {"base": STATES.mean(0), "kls": kls, "draws": 2}
    assert set(hidden.MEASURES) < set(hidden.half_samples(STATES, LABELS, PROBE_TASK, **asked))
    halves = hidden.half_samples(
        STATES, LABELS, PROBE_TASK, draws=300, measures=["hidden_sim"], seed=1
    )
    assert halves.groupby(["task_a", "task_b"]).size().eq(300).all()
    apart = hidden.probe_distances(STATES[0, :24, -1], STATES[1, :24, -1]).reshape(2, 12)
    expected = np.sqrt((apart.var(axis=1, ddof=1) / 12).sum()) / 2
    found = halves[(halves.task_a == "red") & (halves.task_b == "green")].hidden_sim.std()
    assert found == pytest.approx(expected, rel=0.15)


def test_a_bootstrap_over_probes_is_as_wide_as_the_theory_says():
    distances = np.random.default_rng(0).normal(3, 1, size=(40, 2, 50))
    low, high = hidden.probe_bootstrap(distances, draws=2000)
    width = 2 * 1.96 * np.sqrt(distances.var(axis=2).sum(axis=1) / 50) / 2
    np.testing.assert_allclose(high - low, width, rtol=0.15)
    assert (abs(distances.mean(axis=(1, 2)) - (low + high) / 2) < width / 10).all()


def test_more_probes_agree_better_with_those_not_drawn():
    """Pairs with means 0 to 5 and noise of 3: one probe blurs their order, 48 restore it."""
    rng, truth = np.random.default_rng(0), np.arange(12) / 2
    distances = truth[:, None, None] + rng.normal(0, 3, size=(12, 2, 100))
    found = hidden.probe_counts(distances, pd.Series(truth), draws=30)
    assert list(found.columns) == ["family", "reading", "x", "agreement", "harm"]
    assert found["x"].max() == 48  # half of the probes at most: the others are what it is held to
    mean = found.groupby("x")[["agreement", "harm"]].mean().loc[[1, 8, 48]]
    assert mean["harm"].is_monotonic_increasing and mean["agreement"].is_monotonic_increasing
    assert mean.loc[1, "harm"] < 0.8 and mean.loc[48, "harm"] > 0.95
    assert (mean["agreement"] <= mean["harm"] + 0.02).all()  # the other side is noisy, too


def test_pair_table_has_the_columns_that_its_inputs_allow():
    optional = {"change_cosine", "logit_kl"}
    assert set(hidden.MEASURES) - set(hidden.pair_table(STATES, LABELS)) == optional
    readout = RNG.normal(size=(7, 10))
    kls = hidden.logit_kls(STATES[:, :, -1], readout, block=5)
    full = hidden.pair_table(STATES, LABELS, base=STATES.mean(0), kls=kls)
    assert set(hidden.MEASURES) < set(full) and full.notna().all(axis=None)
    expected = hidden.logit_kl(STATES[0, :, -1] @ readout.T, STATES[1, :, -1] @ readout.T)
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
        hidden.pair_table(STATES, **{"labels": LABELS} | options)


def test_rank_agreement_is_spearmans_over_what_is_known():
    reference = pd.Series([3.0, 1.0, np.nan, 2.0, 5.0, 2.0])
    readings = pd.DataFrame(
        {
            "turned": -reference,
            "other": [1.0, 2.0, 3.0, np.nan, 4.0, 0.5],
            "constant": 1.0,
            "unknown": np.nan,
        }
    )
    found = hidden.rank_agreement(readings, reference)
    expected = spearmanr([3, 1, 5, 2], [1, 2, 4, 0.5]).statistic
    assert found.to_list() == pytest.approx([-1, expected, np.nan, np.nan], nan_ok=True)
    multi = readings.set_axis(pd.MultiIndex.from_product([["x"], readings.columns]), axis=1)
    assert hidden.rank_agreement(multi, reference)["x", "turned"] == pytest.approx(-1)


def test_layer_curve_is_the_measure_layer_by_layer():
    curve = hidden.layer_curve(hidden.debiased_cka, STATES[0], STATES[1])
    assert curve.tolist() == [hidden.debiased_cka(STATES[0, :, i], STATES[1, :, i]) for i in (0, 1)]


def test_mds_of_a_group_and_of_its_members():
    pairs = pd.DataFrame(
        [("a", "b", 1.0), ("a", "c", 2.0), ("b", "c", 3.0), ("c", "d", 9.0)],
        columns=["task_a", "task_b", "hidden_sim"],
    )
    group = ["a", "b", "c"]
    assert hidden.mds(pairs, group) == 2
    assert hidden.mds(pairs, group, reading="max") == 3
    assert hidden.mds(pairs, group, reading="rms") == pytest.approx(np.sqrt(14 / 3))
    assert hidden.mds(pairs, group, reading="reciprocal") == pytest.approx(36 / 13)
    assert hidden.mds(pairs, group, reading="harmonic") == pytest.approx(18 / 11)
    assert hidden.mds_tasks(pairs, group).to_dict() == {"a": 1.5, "b": 2.0, "c": 2.5}
    with pytest.raises(ValueError, match="4 members have 6 pairs, but 4 are given"):
        hidden.mds(pairs, ["a", "b", "c", "d"])
