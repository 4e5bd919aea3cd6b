"""How do representations differ? Pooled hidden states, and measures between two models.

A state array is (n_probes, d): one row per probe input, for both models the same inputs in the same
order. The measures are NumPy in float64; only `prompt_states` and `layer_names` see a model. They
differ in what they overlook (rotation, scale, shift: tests/test_hidden.py asserts the whole table),
and MEASURES says of each which way it points and what it needs.

    distances:    0 for equal states, larger is further apart
    similarities: 1 for equal states, smaller is further apart
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, special, stats
from scipy.spatial.distance import pdist
from torch import Tensor, nn

from helpers.states.batch import length_buckets, pad

HOW = ("last", "mean", "first_decoder")


@torch.no_grad()
def prompt_states(
    model: nn.Module, encoded: Sequence[list[int]], how: str = "last", batch_size: int = 20
) -> Tensor:
    """States (prompts, layers, d) of a model at prompts, all layers from one pass, fp32 on the CPU.

    Args:
        model: a decoder, an encoder or an encoder-decoder of transformers, with or without a head.
        encoded: token ids of each prompt; they are batched by length and padded on the right.
        how: as in `pool`. An encoder-decoder reads the prompt with its encoder; its state is that
            of the decoder's start token, "first_decoder", which no other model has.

    Memory: beside the model's own activations prompts * layers * d * 4 bytes.

    Raises:
        ValueError: "first_decoder" for a model that is no encoder-decoder, or the reverse; a prompt
            without tokens.
    """
    two_stacks = model.config.is_encoder_decoder
    if (how == "first_decoder") != two_stacks:
        takes = '"first_decoder"' if two_stacks else '"last" or "mean"'
        raise ValueError(f"{type(model).__name__} has no {how!r} state of a prompt: use {takes}")
    batches, parts = length_buckets([len(ids) for ids in encoded], batch_size), []
    for batch in batches:
        ids, mask = (t.to(model.device) for t in pad([encoded[i] for i in batch], 0))
        last = mask.sum(1) - 1
        if two_stacks:
            start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
            about = {"attention_mask": mask, "decoder_input_ids": start}
            states = model(ids, **about, output_hidden_states=True).decoder_hidden_states
            mask, last = torch.ones_like(start), torch.zeros_like(last)
        else:  # the stack below the head: logits are not wanted
            stack = model.base_model
            states = stack(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        parts.append(pool(states, mask, last, how).cpu())
    order = torch.tensor([i for batch in batches for i in batch])
    return torch.cat(parts)[order.argsort()].contiguous()


def pool(
    hidden_states: tuple[Tensor, ...], mask: Tensor, last: Tensor, how: str = "last"
) -> Tensor:
    """One state per example and layer from the `hidden_states` of a forward pass, in float32.

    Args:
        hidden_states: per layer a (batch, length, d) tensor; of the decoder for an encoder-decoder.
        mask: (batch, length), true at the positions that count: prompt tokens, neither padding nor,
            under teacher forcing, the answer. Padding may be left or right.
        last: (batch,) index of the last prompt token.
        how: "last": the state at `last`; "mean": mean over counted positions (encoders);
            "first_decoder": first counted position (encoder-decoders).

    Returns:
        (batch, layers, d), layers in the order of `layer_names`: batch * layers * d * 4 bytes.

    Raises:
        ValueError: unknown `how`; an example that counts no position; `last` on an uncounted one.
    """
    if how not in HOW:
        raise ValueError(f"unknown pooling {how!r}: choose one of {', '.join(HOW)}")
    mask = mask.bool()
    if not mask.any(dim=1).all():
        raise ValueError("an example has no counted position: give each at least one prompt token")
    if how == "mean":
        # masked_fill, not a product: a NaN at a padded position must not reach the sum.
        count = mask.sum(dim=1, keepdim=True)
        skipped = ~mask[..., None]
        pooled = [h.float().masked_fill(skipped, 0).sum(dim=1) / count for h in hidden_states]
    else:
        rows = torch.arange(len(mask), device=mask.device)
        position = last if how == "last" else mask.int().argmax(dim=1)
        if not mask[rows, position].all():
            raise ValueError("`last` points at an uncounted position: pass the last prompt token")
        pooled = [h[rows, position].float() for h in hidden_states]
    return torch.stack(pooled, dim=1)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model, first to last; of the decoder of an encoder-decoder."""
    modules = model.get_decoder().modules()
    return next(module for module in modules if isinstance(module, nn.ModuleList))


def layer_names(model: nn.Module) -> list[str]:
    """Names of the entries of `hidden_states`, the final-normed state told apart from raw ones.

    Llama-type decoders return the embeddings, the raw residual stream after each block but the
    last, and then the *final-normed* state of the last; norms jump there, so a curve over layers
    must not join the two. BERT-type encoders have no final norm. Which of the two a model does is
    read off a forward pass of one token: is the last entry the output of the last block, or not?
    """
    stack, blocks = model.get_decoder(), blocks_of(model)
    seen = []
    handle = blocks[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        states = stack(input_ids=token, output_hidden_states=True).hidden_states
    handle.remove()
    raw = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
    final = f"block {len(blocks)}" if torch.equal(raw, states[-1]) else "final norm"
    return ["embeddings", *(f"block {i}" for i in range(1, len(blocks))), final]


# --- two state arrays -----------------------------------------------------------------------


def _pair(a: ArrayLike, b: ArrayLike, same_width: bool = True) -> tuple[NDArray, NDArray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
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
    """L2 distance between two models' states on each probe, (n_probes,); its mean is HiddenSim.

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
    raise ValueError(f"unknown normalisation {normalise!r}: choose unit, norms, sqrt_d or raw")


def hidden_sim(a: ArrayLike, b: ArrayLike, normalise: str = "unit") -> float:
    """HiddenSim, as a distance: mean over probes of the normalised L2 distance (arXiv:2603.09463).

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
    base = np.asarray(base, dtype=np.float64)
    return cosine(np.asarray(a, dtype=np.float64) - base, np.asarray(b, dtype=np.float64) - base)


def _u_centred_gram(a: NDArray) -> NDArray:
    """Linear Gram matrix, U-centred (Szekely and Rizzo 2014): off-diagonal rows sum to zero."""
    n = len(a)
    a = a - a.mean(axis=0)  # changes nothing but the rounding
    gram = a @ a.T
    np.fill_diagonal(gram, 0)
    rows = gram.sum(axis=1)
    gram -= (rows[:, None] + rows) / (n - 2) - rows.sum() / ((n - 1) * (n - 2))
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
    return float(np.sqrt(max(0.0, 2 - 2 * nuclear)))  # at A = B rounding leaves 1 + 1e-16


def rsa(a: ArrayLike, b: ArrayLike) -> float:
    """Representational similarity: Spearman correlation of the two probe distance matrices.

    Euclidean distances between the states of all probe pairs (Kriegeskorte et al. 2008 leave the
    dissimilarity open), in [-1, 1]. Needs at least three probes.
    """
    a, b = _pair(a, b, same_width=False)
    if len(a) < 3:
        raise ValueError(f"RSA needs at least 3 probes, got {len(a)}")
    return float(stats.spearmanr(pdist(a), pdist(b)).statistic)


def mutual_knn(a: ArrayLike, b: ArrayLike, k: int | None = None) -> float:
    """Mean share of the k nearest probes, by cosine, that both models agree on, in [0, 1].

    Huh et al. 2024, arXiv:2405.07987. Chance level k / (n_probes - 1); ties go to the lower index.
    By default k is 10, or half of the probes if these are fewer than 20.
    """
    a, b = _pair(a, b, same_width=False)
    n = len(a)
    k = min(10, n // 2) if k is None else k
    if not 1 <= k < n:
        raise ValueError(f"mutual k-NN needs 1 <= k < n_probes, got k = {k} and {n} probes")

    def neighbours(states: NDArray) -> NDArray:
        unit = _unit(states)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -np.inf)
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        member = np.zeros((n, n), dtype=bool)
        np.put_along_axis(member, nearest, True, axis=1)
        return member

    return float((neighbours(a) & neighbours(b)).sum() / (n * k))


def logit_kl(a: ArrayLike, b: ArrayLike) -> float:
    """Mean over probes of the symmetric KL divergence (KL(p|q) + KL(q|p)) / 2, in nats."""
    a, b = _pair(a, b)
    log_p, log_q = special.log_softmax(a, axis=1), special.log_softmax(b, axis=1)
    return float(((np.exp(log_p) - np.exp(log_q)) * (log_p - log_q)).sum(axis=1).mean() / 2)


def logit_kls(states: NDArray, readout: NDArray, block: int = 8) -> NDArray:
    """`logit_kl` of every two models on every single probe: (models, models, n_probes), nats.

    Args:
        states: (models, n_probes, d), the states that feed the readout (final-normed).
        readout: (vocabulary, d), the output layer, the same for all models (true of adapters that
            leave the embeddings alone).
        block: probes at a time; memory models * block * vocabulary * 16 bytes.

    (KL(p|q) + KL(q|p)) / 2 = (p - q)(log p - log q) / 2 needs only the products of every p with
    every log q, so a model's logits are computed once for all its pairs.
    """
    out = np.empty((len(states), len(states), states.shape[1]))
    for start in range(0, states.shape[1], block):
        logits = np.asarray(states[:, start : start + block] @ readout.T, dtype=np.float64)
        log_p = special.log_softmax(logits, axis=-1).swapaxes(0, 1)  # (probes, models, vocabulary)
        products = np.exp(log_p) @ log_p.swapaxes(1, 2)
        own = np.diagonal(products, axis1=1, axis2=2)
        both = own[:, :, None] + own[:, None] - products - products.swapaxes(1, 2)
        out[:, :, start : start + block] = np.moveaxis(both, 0, -1) / 2
    return out


class Measure(NamedTuple):
    """A measure as data: the function of two arrays, its direction and what the arrays are."""

    function: Callable[..., float]
    distance: bool  # True: larger is further apart; False: a similarity
    needs: str = "states"  # or "base": states of the base too; "logits": logits, not states


# The first is the study's primary one; the rest is its sensitivity family and its rivals.
MEASURES = {
    "hidden_sim": Measure(hidden_sim, True),
    "hidden_sim_norms": Measure(partial(hidden_sim, normalise="norms"), True),
    "hidden_sim_sqrt_d": Measure(partial(hidden_sim, normalise="sqrt_d"), True),
    "hidden_sim_raw": Measure(partial(hidden_sim, normalise="raw"), True),
    "cka": Measure(debiased_cka, False),
    "procrustes": Measure(procrustes, True),
    "rsa": Measure(rsa, False),
    "state_cosine": Measure(cosine, False),
    "change_cosine": Measure(change_cosine, False, "base"),
    "mutual_knn": Measure(mutual_knn, False),
    "logit_kl": Measure(logit_kl, True, "logits"),
}


# --- layers, pairs and groups ---------------------------------------------------------------


def layer_curve(function: Callable[..., float], *states: NDArray) -> NDArray:
    """A measure at every layer, (layers,): `states` are (n_probes, layers, d), one per argument."""
    layers = states[0].shape[1]
    return np.array([function(*(s[:, layer] for s in states)) for layer in range(layers)])


def pair_table(
    states: NDArray,
    labels: Sequence[str],
    probe_task: ArrayLike | None = None,
    base: NDArray | None = None,
    kls: NDArray | None = None,
    layer: int = -1,
    measures: Sequence[str] = tuple(MEASURES),
    others: bool = False,
) -> pd.DataFrame:
    """All measures of all pairs of models: columns task_a, task_b and one per measure.

    Args:
        states: (models, n_probes, layers, d); `labels` their tasks.
        probe_task: the task that each probe belongs to: a pair is then judged on the probes of its
            own two tasks (the primary reading). None: on all probes.
        base: (n_probes, layers, d) states of the base; without it `change_cosine` is left out.
        kls: from `logit_kls`, for the last layer; without it `logit_kl` is left out.
        layer: which layer.
        others: judge each pair on the probes of all tasks but its own two.

    Raises:
        ValueError: as many labels as models; a pair without probes; an unknown measure.
    """
    if len(states) != len(labels):
        raise ValueError(f"{len(labels)} labels for the states of {len(states)} models")
    unknown = set(measures) - set(MEASURES)
    if unknown:
        raise ValueError(f"unknown measures {sorted(unknown)}: choose from {list(MEASURES)}")
    lonely = set() if probe_task is None else set(labels) - set(probe_task)
    if lonely:
        raise ValueError(f"no probe belongs to {sorted(lonely)}")
    if others and len(set(() if probe_task is None else probe_task)) < 3:
        raise ValueError("probes of other tasks need `probe_task` and three tasks or more")
    given = {"states": True, "base": base is not None, "logits": kls is not None}
    chosen = [name for name in measures if given[MEASURES[name].needs]]

    rows = []
    for (i, task_a), (j, task_b) in combinations(enumerate(labels), 2):
        probes = slice(None)
        if probe_task is not None:
            probes = np.isin(probe_task, (task_a, task_b), invert=others)
        a, b = states[i, probes, layer], states[j, probes, layer]
        values = {}
        for name in chosen:
            function, _, needs = MEASURES[name]
            if needs == "logits":
                values[name] = kls[i, j, probes].mean()
            else:
                values[name] = function(a, b, *([base[probes, layer]] if needs == "base" else []))
        rows.append({"task_a": task_a, "task_b": task_b, **values})
    return pd.DataFrame(rows)


def half_samples(
    states: NDArray,
    labels: Sequence[str],
    probe_task: ArrayLike,
    base: NDArray | None = None,
    kls: NDArray | None = None,
    draws: int = 100,
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """`pair_table` on random halves of every task's probes, `draws` times: a column draw more.

    The delete-half jackknife (Shao and Wu 1989): a half drawn without replacement varies around the
    full sample as that does around the truth (for a mean: 1 / (n/2) - 1 / n = 1 / n). A bootstrap
    would repeat probes, which RSA, CKA and nearest neighbours would take for agreement.
    """
    rng, probe_task = np.random.default_rng(seed), np.asarray(probe_task)
    tables = []
    for draw in range(draws):
        of_task = [rng.permutation(np.flatnonzero(probe_task == task)) for task in labels]
        at = np.concatenate([probes[: len(probes) // 2] for probes in of_task])
        table = pair_table(
            states[:, at],
            labels,
            probe_task[at],
            None if base is None else base[at],
            None if kls is None else kls[:, :, at],
            **options,
        )
        tables.append(table.assign(draw=draw))
    return pd.concat(tables, ignore_index=True)


def rank_agreement(readings: pd.DataFrame, reference: pd.Series) -> pd.Series:
    """Spearman correlation of every column of `readings` with `reference`, over the same rows.

    A row counts where both are known. nan for what does not vary: it orders nothing.
    """
    out = {}
    for name, column in readings.items():
        known = (column.notna() & reference.notna()).to_numpy()
        ranks = [stats.rankdata(x.to_numpy(float)[known]) for x in (column, reference)]
        a, b = (rank - rank.mean() if len(rank) else rank for rank in ranks)
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        out[name] = a @ b / norms if norms > 0 else np.nan
    return pd.Series(out)


def probe_bootstrap(
    distances: ArrayLike, draws: int = 1000, seed: int = 0
) -> tuple[NDArray, NDArray]:
    """95 % interval of the mean of every pair's `distances` (pairs, tasks, probes), over probes.

    A draw takes the same probes of a task for all pairs' first tasks, and for all second ones.
    """
    distances, rng = np.asarray(distances), np.random.default_rng(seed)
    at = rng.integers(distances.shape[2], size=(draws, *distances.shape[1:]))
    drawn = np.take_along_axis(distances[:, None], at[None], axis=3).mean(axis=(2, 3))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    return low, high


# Numbers of probes at which `probe_counts` reads; five is the paper's.
COUNTS = (1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 100, 150, 200)


def probe_counts(
    distances: ArrayLike,
    harm: pd.Series,
    reading: str = "hidden_sim",
    draws: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """How few probes would do? `distances` (pairs, tasks, probes) on k of them, `draws` times.

    k runs through COUNTS up to half of the probes. Columns family ("probes"), reading, x (k),
    agreement: Spearman correlation over pairs of their mean distance with that on the probes not
    drawn; harm: with `harm` (one value a pair).
    """
    distances, rng, out = np.asarray(distances), np.random.default_rng(seed), []
    for k in [k for k in COUNTS if k <= distances.shape[2] // 2] * draws:
        parts = np.split(rng.permutation(distances.shape[2]), [k])
        inside, unseen = (pd.Series(distances[:, :, at].mean(axis=(1, 2))) for at in parts)
        marks = {"agreement": unseen, "harm": harm}
        found = {name: inside.corr(mark, "spearman") for name, mark in marks.items()}
        out.append({"family": "probes", "reading": reading, "x": k} | found)
    return pd.DataFrame(out)


# Readings of the Merging Difficulty Score: several pair distances in one number. The paper calls it
# reciprocal and leaves the formula open; the first is primary here.
MDS_READINGS = {
    "mean": np.mean,
    "max": np.max,  # the diameter
    "rms": lambda d: np.sqrt(np.mean(np.square(d))),  # the bound's mean squared distance
    "reciprocal": lambda d: 1 / np.mean(1 / (1 + d)),  # of the mean similarity 1 / (1 + d)
    "harmonic": lambda d: 1 / np.mean(1 / d),  # ruled by the closest pair
}


def _among(pairs: pd.DataFrame, members: Sequence[str]) -> pd.DataFrame:
    inside = pairs[pairs.task_a.isin(members) & pairs.task_b.isin(members)]
    needed = len(members) * (len(members) - 1) // 2
    if needed == 0 or len(inside) != needed:
        raise ValueError(f"{len(members)} members have {needed} pairs, but {len(inside)} are given")
    return inside


def mds(
    pairs: pd.DataFrame,
    members: Sequence[str],
    column: str = "hidden_sim",
    reading: str = "mean",
) -> float:
    """Merging Difficulty Score of a group: all distances among its members in one number.

    `pairs` has columns task_a, task_b and `column`, a distance; `reading` is one of MDS_READINGS.
    High means hard to merge (arXiv:2603.09463). ValueError unless every pair is there once.
    """
    return float(MDS_READINGS[reading](_among(pairs, members)[column].to_numpy()))


def mds_tasks(
    pairs: pd.DataFrame,
    members: Sequence[str],
    column: str = "hidden_sim",
    reading: str = "mean",
) -> pd.Series:
    """Merging Difficulty Score of each member: its distances to the others in one number."""
    inside = _among(pairs, members)
    mine = {task: (inside.task_a == task) | (inside.task_b == task) for task in members}
    scores = {t: MDS_READINGS[reading](inside.loc[m, column].to_numpy()) for t, m in mine.items()}
    return pd.Series(scores, name=f"mds_{reading}")
