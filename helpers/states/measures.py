"""Distances between the states of two models: what each looks at, and what it overlooks.

A state array is (n_probes, d): one row per probe, for both models the same probes in the same
order. All measures are NumPy in float64. They differ in what they overlook (rotation, scale, shift:
tests/states/test_measures.py asserts the whole table).

    distances:    0 for equal states, larger is further apart
    similarities: 1 for equal states, smaller is further apart
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, special, stats
from scipy.spatial.distance import pdist


def _pair(
    a: ArrayLike, b: ArrayLike, same_width: bool = True
) -> tuple[NDArray, NDArray]:
    a = np.asarray(a, dtype=np.float64)
    b = np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) == 0:
        raise ValueError(
            f"two arrays (n_probes, d) over the same probes are needed, got {a.shape} and {b.shape}"
        )
    if same_width and a.shape != b.shape:
        raise ValueError(
            f"states of {a.shape[1]} and {b.shape[1]} dimensions have no coordinatewise distance: "
            "use CKA, Procrustes, RSA or mutual k-NN"
        )
    return a, b


def _unit(a: NDArray) -> NDArray:
    """Rows of unit length; a zero row has no direction and becomes NaN."""
    with np.errstate(invalid="ignore"):
        return a / np.linalg.norm(a, axis=1, keepdims=True)


def probe_distances(a: ArrayLike, b: ArrayLike, normalise: str = "unit") -> NDArray:
    """L2 distance between two models' states on each probe, (n_probes,).

    normalise: "unit": |a/|a| - b/|b|| in [0, 2]; "norms": |a - b| / (|a| + |b|) in [0, 1];
    "sqrt_d": |a - b| / sqrt(d), the root mean square over features; "raw": |a - b|.
    """
    a, b = _pair(a, b)
    if normalise == "unit":
        return np.linalg.norm(_unit(a) - _unit(b), axis=1)
    distance = np.linalg.norm(a - b, axis=1)
    if normalise == "norms":
        return distance / (np.linalg.norm(a, axis=1) + np.linalg.norm(b, axis=1))
    if normalise == "sqrt_d":
        return distance / np.sqrt(a.shape[1])
    if normalise == "raw":
        return distance
    raise ValueError(
        f"unknown normalisation {normalise!r}: choose unit, norms, sqrt_d or raw"
    )


def hidden_sim(a: ArrayLike, b: ArrayLike, normalise: str = "unit") -> float:
    """Hidden distance (HiddenSim of arXiv:2603.09463): mean of `probe_distances`.

    The paper gives it in words only; "unit" is this study's primary reading, the other
    normalisations of `probe_distances` belong to its sensitivity family.
    """
    return float(probe_distances(a, b, normalise).mean())


def cosine(a: ArrayLike, b: ArrayLike) -> float:
    """Mean over probes of the cosine between the two states, in [-1, 1]."""
    a, b = _pair(a, b)
    return float((_unit(a) * _unit(b)).sum(axis=1).mean())


def change_cosine(a: ArrayLike, b: ArrayLike, base: ArrayLike) -> float:
    """Mean over probes of the cosine between the changes a - base and b - base, in [-1, 1].

    NaN where a state did not change at all (the embeddings under LoRA): no change, no direction.
    """
    a, b = _pair(a, b)
    base = np.asarray(base, dtype=np.float64)
    return cosine(a - base, b - base)


def _u_centred_gram(a: NDArray) -> NDArray:
    """Linear Gram matrix, U-centred (Szekely and Rizzo 2014): off-diagonal rows sum to zero."""
    n = len(a)
    a = a - a.mean(axis=0)  # changes nothing but the rounding
    gram = a @ a.T
    np.fill_diagonal(gram, 0)
    rows = gram.sum(axis=1)
    gram -= (rows[:, None] + rows) / (n - 2)
    gram += rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram, 0)
    return gram


def debiased_cka(a: ArrayLike, b: ArrayLike) -> float:
    """Debiased linear CKA, HSIC_u(a, b) / sqrt(HSIC_u(a, a) HSIC_u(b, b)), at most 1.

    HSIC_u is the unbiased estimate (Song et al. 2012); it is an inner product of U-centred Gram
    matrices, so the ratio is their cosine. About 0 for unrelated states at any n and d, where plain
    CKA (Kornblith et al. 2019) grows with d / n. Needs at least four probes; nan if a model has one
    state for all of them (the embedding of a last token that all prompts share).
    """
    a, b = _pair(a, b, same_width=False)
    if len(a) < 4:
        raise ValueError(f"debiased CKA needs at least 4 probes, got {len(a)}")
    gram_a, gram_b = _u_centred_gram(a), _u_centred_gram(b)
    norms = linalg.norm(gram_a) * linalg.norm(gram_b)
    return float((gram_a * gram_b).sum() / norms) if norms > 0 else np.nan


def procrustes(a: ArrayLike, b: ArrayLike) -> float:
    """Orthogonal Procrustes distance of the centred arrays at unit norm, in [0, sqrt(2)].

    min over orthogonal Q of |A Q - B|_F = sqrt(2 - 2 |A'B|_*), nuclear norm (Williams et al. 2021;
    Ding et al. 2021 report its square). Below about 1e-8 it is rounding.
    """
    a, b = _pair(a, b, same_width=False)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    if len(a) < min(a.shape[1], b.shape[1]):
        # A' = Q R: A'B has the singular values of the small matrix R_a R_b'.
        a = linalg.qr(a.T, mode="r")[0][: len(a)].T
        b = linalg.qr(b.T, mode="r")[0][: len(b)].T
    nuclear = linalg.svdvals(a.T @ b).sum()
    # at A = B rounding leaves 1 + 1e-16
    return float(np.sqrt(max(0.0, 2 - 2 * nuclear)))


def rsa(a: ArrayLike, b: ArrayLike) -> float:
    """Representational similarity: Spearman correlation of the two probe distance matrices.

    Euclidean distances between the states of all probe pairs (Kriegeskorte et al. 2008 leave the
    dissimilarity open), in [-1, 1]. Needs at least three probes.
    """
    a, b = _pair(a, b, same_width=False)
    if len(a) < 3:
        raise ValueError(f"RSA needs at least 3 probes, got {len(a)}")
    return float(stats.spearmanr(pdist(a), pdist(b)).statistic)


def mutual_knn(a: ArrayLike, b: ArrayLike) -> float:
    """Mean share of the k nearest probes, by cosine, that both models agree on, in [0, 1].

    Huh et al. 2024, arXiv:2405.07987. Chance level k / (n_probes - 1); ties go to the lower index.
    k is 10, or half of the probes if these are fewer than 20.
    """
    a, b = _pair(a, b, same_width=False)
    n = len(a)
    k = min(10, n // 2)
    if k < 1:
        raise ValueError(f"mutual k-NN needs at least 2 probes, got {n}")
    shared = _nearest(a, k) & _nearest(b, k)
    return float(shared.sum() / (n * k))


def _nearest(states: NDArray, k: int) -> NDArray:
    """(n, n) booleans: is column j among the k nearest of row i?"""
    unit = _unit(states)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    member = np.zeros(similarity.shape, dtype=bool)
    np.put_along_axis(member, nearest, True, axis=1)
    return member


def logit_kl(a: ArrayLike, b: ArrayLike) -> float:
    """Mean over probes of the symmetric KL divergence (KL(p|q) + KL(q|p)) / 2, in nats."""
    a, b = _pair(a, b)
    log_p, log_q = special.log_softmax(a, axis=1), special.log_softmax(b, axis=1)
    divergence = (np.exp(log_p) - np.exp(log_q)) * (log_p - log_q)
    return float(divergence.sum(axis=1).mean() / 2)


def logit_kls(
    states: NDArray,
    logits: Callable[[NDArray], NDArray],
    block: int = 8,
) -> NDArray:
    """`logit_kl` of every two models on every single probe: (models, models, n_probes), nats.

    Args:
        states: (models, n_probes, d), the states that feed the readout (final-normed).
        logits: (n, d) states to (n, vocabulary), by a head that is the same for all models (true of
            adapters that leave the embeddings alone).
        block: probes at a time; memory models * block * vocabulary * 16 bytes.

    (KL(p|q) + KL(q|p)) / 2 = (p - q)(log p - log q) / 2 needs only the products of every p with
    every log q, so a model's logits are computed once for all its pairs.
    """
    models, probes, _ = states.shape
    out = np.empty((models, models, probes))
    for start in range(0, probes, block):
        part = slice(start, start + block)
        some = states[:, part]
        read = np.float64(logits(some.reshape(-1, some.shape[-1])))
        read = read.reshape(*some.shape[:2], -1)
        # (probes, models, vocabulary)
        log_p = special.log_softmax(read, axis=-1).swapaxes(0, 1)
        products = np.exp(log_p) @ log_p.swapaxes(1, 2)
        own = np.diagonal(products, axis1=1, axis2=2)
        both = own[:, :, None] + own[:, None]
        crossed = products + products.swapaxes(1, 2)
        out[:, :, part] = np.moveaxis(both - crossed, 0, -1) / 2
    return out


class Measure(NamedTuple):
    """A measure as data: its meaning, the function of two arrays, direction and what it is given.

    harmful: True: a distance, larger is further apart; False: a similarity. needs: "states";
    "base": the states of the base too; "logits": logits in place of states.
    """

    meaning: str
    function: Callable[..., float]
    harmful: bool
    needs: str = "states"


# The first is the study's primary one; the others are its sensitivity family and its rivals.
MEASURES = {
    "hidden_sim": Measure("mean |a/|a| - b/|b||", hidden_sim, True),
    "hidden_sim_norms": Measure(
        "mean |a - b| / (|a| + |b|)", partial(hidden_sim, normalise="norms"), True
    ),
    "hidden_sim_sqrt_d": Measure(
        "mean |a - b| / sqrt(d)", partial(hidden_sim, normalise="sqrt_d"), True
    ),
    "hidden_sim_raw": Measure(
        "mean |a - b|", partial(hidden_sim, normalise="raw"), True
    ),
    "cka": Measure("linear CKA, debiased", debiased_cka, False),
    "procrustes": Measure("distance after the best rotation", procrustes, True),
    "rsa": Measure("rank correlation of probe distances", rsa, False),
    "state_cosine": Measure("mean cosine of a and b", cosine, False),
    "change_cosine": Measure(
        "mean cosine of a - base and b - base", change_cosine, False, "base"
    ),
    "mutual_knn": Measure("share of nearest probes in common", mutual_knn, False),
    "logit_kl": Measure("symmetric KL of next tokens (nats)", logit_kl, True, "logits"),
}
