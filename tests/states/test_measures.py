"""The measures keep what their invariance table says, and equal their definitions."""

from itertools import permutations

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr

from helpers.states import measures

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
    return (a, b, base) if measures.MEASURES[name].needs == "base" else (a, b)


def test_every_measure_has_a_row_of_the_invariance_table():
    assert set(INVARIANCE) == set(measures.MEASURES)


@pytest.mark.parametrize("name", INVARIANCE)
@pytest.mark.parametrize("column, transformation", list(enumerate(TRANSFORMATIONS)))
def test_invariance(name, column, transformation):
    change, alike = TRANSFORMATIONS[transformation]
    function = measures.MEASURES[name].function
    before = function(*arguments(name, A, B, BASE))
    first, base = (change(A), change(BASE)) if alike else (A, BASE)
    after = function(*arguments(name, first, change(B), base))
    assert (after == pytest.approx(before, rel=1e-9)) == bool(INVARIANCE[name][column])


@pytest.mark.parametrize("name", measures.MEASURES)
def test_symmetric_and_at_its_best_for_equal_states(name):
    function, distance = (
        measures.MEASURES[name].function,
        measures.MEASURES[name].harmful,
    )
    value = function(*arguments(name, A, B, BASE))
    assert function(*arguments(name, B, A, BASE)) == pytest.approx(value, rel=1e-12)
    best = function(*arguments(name, A, A, BASE))
    assert best == pytest.approx(0 if distance else 1, abs=1e-7)
    assert value > best if distance else value < best


def test_hidden_sim_by_hand():
    a, b = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[4.0, 3.0], [0.0, 2.0]])
    assert measures.hidden_sim(a, b) == pytest.approx((np.sqrt(0.08) + np.sqrt(2)) / 2)
    assert measures.hidden_sim(a, b, "raw") == pytest.approx(
        (np.sqrt(2) + np.sqrt(5)) / 2
    )
    assert measures.hidden_sim(a, b, "sqrt_d") == pytest.approx((1 + np.sqrt(2.5)) / 2)
    assert measures.hidden_sim(a, b, "norms") == pytest.approx(
        (np.sqrt(2) / 10 + np.sqrt(5) / 3) / 2
    )
    assert measures.probe_distances(a, b, "raw") == pytest.approx(
        [np.sqrt(2), np.sqrt(5)]
    )


def published_arrays():
    """The fixed arrays that the pinned values of other libraries below were computed on."""
    t = np.arange(12.0)[:, None]
    a = np.sin(t * np.arange(1, 6)) + 0.1 * t
    return a, np.cos(t * np.arange(2, 9) / 3) * np.arange(1, 8)


def test_debiased_cka_equals_a_published_librarys_value():
    # pytorch-cka 1.1.3: hsic(a a', b b') gives (xy, xx, yy), CKA = xy / sqrt(xx yy). The HSICs of
    # repsim 0.1.5 are the same numbers; its CKA with the "song" estimator is not their ratio.
    assert measures.debiased_cka(*published_arrays()) == pytest.approx(
        -0.25038335566865, rel=1e-12
    )


def test_debiased_cka_of_one_state_for_all_probes_is_undefined():
    assert np.isnan(measures.debiased_cka(np.ones((5, 3)), A[:5]))


def test_debiased_cka_is_the_ratio_of_u_statistics():
    # the definition: mean of the kernel over all ordered 4-tuples of probes
    def hsic(k, m):
        quadruples = permutations(range(len(k)), 4)
        return np.mean(
            [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in quadruples]
        )

    a, b = A[:8], B[:8, :6]
    k, m = a @ a.T, b @ b.T
    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert measures.debiased_cka(a, b) == pytest.approx(expected, rel=1e-10)


def test_debiased_cka_of_noise_is_centred_on_zero():
    draws = [measures.debiased_cka(*RNG.normal(size=(2, 10, 50))) for _ in range(200)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(len(draws))


def test_procrustes_equals_a_published_librarys_value():
    # qc-procrustes 1.1.3: sqrt(orthogonal(a, b, translate=True, scale=True).error).
    a, b = published_arrays()
    assert measures.procrustes(a, b[:, :5]) == pytest.approx(
        1.0433294601458496, rel=1e-12
    )


@pytest.mark.parametrize("probes", [24, 6])  # more and fewer probes than dimensions
def test_procrustes_is_the_residual_of_the_best_rotation(probes):
    a, b = A[:probes] - A[:probes].mean(0), B[:probes] - B[:probes].mean(0)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    rotation, _ = orthogonal_procrustes(a, b)
    residual = np.linalg.norm(a @ rotation - b)
    assert measures.procrustes(A[:probes], B[:probes]) == pytest.approx(
        residual, rel=1e-10
    )


def test_rsa_and_knn_by_definition():
    assert measures.rsa(A, B) == pytest.approx(spearmanr(pdist(A), pdist(B)).statistic)
    angles = [squareform(pdist(x, "cosine")) + 9 * np.eye(len(x)) for x in (A, B)]
    nearest = [[set(row.argsort()[:10]) for row in angle] for angle in angles]
    shared = [len(x & y) / 10 for x, y in zip(*nearest, strict=True)]
    assert measures.mutual_knn(A, B) == pytest.approx(np.mean(shared))


def test_logit_kl_of_two_coins():
    coin = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    kl = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    back = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert measures.logit_kl(*coin) == pytest.approx((kl + back) / 2)


def test_change_cosine_of_an_unchanged_model_has_no_value():
    assert np.isnan(measures.change_cosine(A, BASE, BASE))
    assert measures.change_cosine(BASE + A, BASE - 2 * A, BASE) == pytest.approx(-1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: measures.hidden_sim(A, B[:-1]), "same probes"),
        (lambda: measures.hidden_sim(A, B[:, :-1]), "use CKA"),
        (lambda: measures.hidden_sim(A, B, "max"), "unknown normalisation"),
        (lambda: measures.debiased_cka(A[:3], B[:3]), "at least 4"),
        (lambda: measures.rsa(A[:2], B[:2]), "at least 3"),
        (lambda: measures.mutual_knn(A[:1], B[:1]), "at least 2"),
    ],
)
def test_measures_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_logit_kls_are_those_of_each_pair_and_probe():
    states = RNG.normal(size=(3, 36, 10)).astype(np.float32)
    readout = RNG.normal(size=(7, 10))
    kls = measures.logit_kls(states, lambda x: x @ readout.T, block=5)
    assert kls.shape == (3, 3, 36)
    logits = states.astype(float) @ readout.T
    for i, j in [(0, 1), (1, 2), (2, 2)]:
        each = [
            measures.logit_kl(a[None], b[None])
            for a, b in zip(logits[i], logits[j], strict=True)
        ]
        np.testing.assert_allclose(kls[i, j], each, atol=1e-6)
