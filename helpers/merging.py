"""How are specialists combined? Merge rules on task vectors, and a report of what each merge did.

With base theta_0, task vectors tau_i = theta_i - theta_0, n specialists and weights w_i, a rule is
a function of one tensor's task vectors that returns the merged delta of that tensor (the merged
model is theta_0 + scale * delta):

    f(taus, weights, *, options) -> Tensor of the same shape, fp32

The task vectors are dense tensors or `vectors.Lazy` ones, of which only blocks of rows are ever
dense. `density` is the fraction kept, everywhere; the global factor lambda of the papers is
`merge`'s `scale`. Arithmetic is fp32; norms and inner products are accumulated in fp64.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from helpers.vectors import Lazy, Row, row_blocks, zero

Fraction = Annotated[float, (0.0, 1.0)]
Taus = Sequence[Tensor | Lazy]
Rows = Sequence[Row] | Callable[[], Iterable[Row]]

# Blocks of rows ----------------------------------------------------------------------------------


def blockwise(kernel: Callable[[list[Tensor], int], Tensor], taus: Taus) -> Tensor:
    """The dense result of `kernel(blocks, offset)`, called on one block of rows at a time."""
    shape, result = taus[0].shape, None
    for rows, offset in row_blocks(shape, taus[0].device):
        part = kernel([tau[rows] for tau in taus], offset)
        if rows is ...:
            return part
        if result is None:
            result = torch.empty(shape, device=part.device)
        result[rows] = part
    return result


def gram_matrix(tensors: Taus) -> np.ndarray:
    """All inner products <x_i, x_j> of tensors of one shape, (n, n) in fp64."""
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for rows, _ in row_blocks(tensors[0].shape, tensors[0].device):
        block = torch.stack([tensor[rows].reshape(-1) for tensor in tensors]).double()
        total += (block @ block.T).cpu()
    return total.numpy()


def weighted_sum(taus: Taus, weights: Sequence[float]) -> Tensor:
    """sum_i w_i tau_i, added in order."""
    return blockwise(lambda blocks, _: _add_up(blocks, weights), taus)


def _add_up(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total.add_(block, alpha=weight)
    return total


# Along the sum of task vectors -------------------------------------------------------------------


def linear(taus: Taus, weights: Sequence[float]) -> Tensor:
    """Model averaging: sum_i w_i theta_i / sum_i w_i, so delta = sum_i w_i tau_i / sum_i w_i.

    Equal weights: model soups (Wortsman et al. 2022). Every tensor alike. ValueError if sum w_i =
    0.
    """
    total = math.fsum(weights)
    if total == 0:
        raise ValueError("the weights of linear must not sum to zero")
    return weighted_sum(taus, [w / total for w in weights])


def task_arithmetic(taus: Taus, weights: Sequence[float]) -> Tensor:
    """delta = sum_i w_i tau_i (Ilharco et al. 2023, eq. 1). Every tensor alike."""
    return weighted_sum(taus, weights)


SLERP_THRESHOLD = 0.9995  # mergekit's: above this |cosine| the interpolation is linear


class Arc(NamedTuple):
    """Where an interpolation ends, on_base * theta_0 + sum_i on_taus[i] * tau_i, and its steps."""

    on_base: float
    on_taus: list[float]
    lerp: int
    slerp: int


def spherical(gram: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, int]:
    """Coefficients of the iterated spherical interpolation of n points; number of linear steps.

    gram: (n, n) inner products of the points. Point i is reached from the interpolation of those
    before it at t = w_i / (w_1 + .. + w_i). One step from a to b: (sin((1-t) angle) a + sin(t
    angle) b) / sin(angle) with the angle between the directions of a and b applied to the raw
    points; (1-t) a + t b where |cos| > 0.9995 (Shoemake 1985; threshold and raw points as
    mergekit).
    """
    coefficients, total, linear_steps = np.eye(len(weights))[0], weights[0], 0
    for i in range(1, len(weights)):
        total += weights[i]
        t = weights[i] / total if total else 0.0
        length, other = np.sqrt(coefficients @ gram @ coefficients), np.sqrt(gram[i, i])
        dot = coefficients @ gram[i]
        cosine = dot / (length * other) if length > 1e-8 and other > 1e-8 else 0.0
        if abs(cosine) > SLERP_THRESHOLD:
            ours, theirs = 1 - t, t
            linear_steps += 1
        else:
            angle = math.acos(cosine)
            ours, theirs = (
                math.sin((1 - t) * angle) / math.sin(angle),
                math.sin(t * angle) / math.sin(angle),
            )
        coefficients = ours * coefficients
        coefficients[i] = theirs
    return coefficients, linear_steps


def _slerp_arc(taus: Taus, weights: Sequence[float], base: Tensor | Lazy) -> Arc:
    models = np.hstack([np.ones((len(taus), 1)), np.eye(len(taus))])  # theta_i = theta_0 + tau_i
    gram = models @ gram_matrix([base, *taus]) @ models.T
    coefficients, lerp = spherical(gram, weights)
    steps = len(taus) - 1
    on_base = 0.0 if lerp == steps else float(coefficients.sum()) - 1
    return Arc(on_base, coefficients.tolist(), lerp, steps - lerp)


def slerp(
    taus: Taus, weights: Sequence[float], *, base: Tensor | Lazy, arc: Arc | None = None
) -> Tensor:
    """Spherical interpolation of the models themselves, tensor by tensor, flattened (`spherical`).

    Two models by definition (t = w_2 / (w_1 + w_2)); more are taken one after the other. Where the
    models are close (|cos| > 0.9995) it is the weighted mean, computed by the very function that
    `linear` uses.
    """
    arc = arc or _slerp_arc(taus, weights, base)
    if arc.on_base == 0:
        return weighted_sum(taus, arc.on_taus)
    return weighted_sum([*taus, base], [*arc.on_taus, arc.on_base])


def _task_slerp_arc(taus: Taus, weights: Sequence[float]) -> Arc:
    coefficients, lerp = spherical(gram_matrix(taus), weights)
    return Arc(0.0, coefficients.tolist(), lerp, len(taus) - 1 - lerp)


def task_slerp(taus: Taus, weights: Sequence[float], *, arc: Arc | None = None) -> Tensor:
    """Spherical interpolation of each tensor's task vectors (mergekit's nuslerp with a base)."""
    return weighted_sum(taus, (arc or _task_slerp_arc(taus, weights)).on_taus)


# Sparsify, then elect or add ---------------------------------------------------------------------


class Cut(NamedTuple):
    """What is kept: magnitudes above the threshold, those equal to it up to flat index `last`."""

    threshold: float
    last: int
    tied: int  # entries whose magnitude is the threshold


def magnitude_cut(tau: Tensor | Lazy, density: float) -> Cut:
    """The cut that keeps exactly k = max(1, int(density * numel)) entries; none at density 0.

    Largest magnitudes first, ties by lowest flat index: the k first of a stable descending sort.
    """
    return cut_at(tau, max(1, int(density * tau.shape.numel())) if density > 0 else 0)


def cut_at(tau: Tensor | Lazy, k: int) -> Cut:
    """The cut that keeps exactly k entries (`magnitude_cut`)."""
    numel = tau.shape.numel()
    if k == 0:
        return Cut(math.inf, -1, 0)
    if k == numel:
        return Cut(0.0, -1, 0)  # what is not above zero is zero
    magnitudes = _magnitudes(tau)
    magnitudes.partition(numel - k)  # introselect in place: 1 ns an entry, where a sort takes 70
    threshold = magnitudes[numel - k]
    tied = int(np.count_nonzero(magnitudes == threshold))
    quota = k - np.count_nonzero(magnitudes[numel - k :] > threshold)
    del magnitudes
    if tied == quota:
        return Cut(float(threshold), numel - 1, tied)
    last = np.flatnonzero(_magnitudes(tau) == threshold)[quota - 1]
    return Cut(float(threshold), int(last), tied)


def model_cuts(rows: Callable[[], Iterable[Row]], n: int, density: float) -> list[Cut]:
    """One cut for each of n models over all its tensors together, by the rule of the TIES authors:
    everything from the (d - int(density * d))-th smallest of the d magnitudes upwards, ties
    included.

    Exact in two passes that hold no more than one block: the magnitudes are counted by their upper
    16 bits, then those in the bin of the threshold are collected.
    """

    def blocks(row: Row) -> Iterable[tuple[int, np.ndarray]]:
        for i, tau in enumerate(row.taus):
            for part, _ in row_blocks(tau.shape, tau.device):
                yield i, tau[part].abs().reshape(-1).cpu().numpy()

    counts, total = np.zeros((n, 1 << 15), dtype=np.int64), 0
    for row in rows():
        total += row.base.shape.numel()
        for i, block in blocks(row):
            counts[i] += np.bincount(block.view(np.uint32) >> 16, minlength=1 << 15)
    kth = total - int(density * total)
    if density == 0 or kth == 0:
        return [Cut(math.inf if density == 0 else 0.0, -1, 0)] * n
    bins = [int(np.searchsorted(c.cumsum(), kth)) for c in counts]
    found: list[list[np.ndarray]] = [[] for _ in range(n)]
    for row in rows():
        for i, block in blocks(row):
            found[i].append(block[block.view(np.uint32) >> 16 == bins[i]])
    cuts = []
    for parts, count, bin in zip(found, counts, bins, strict=True):
        values = np.sort(np.concatenate(parts))
        threshold = values[kth - count[:bin].sum() - 1]
        cuts.append(Cut(float(threshold), total, int(np.count_nonzero(values == threshold))))
    return cuts


def _magnitudes(tau: Tensor | Lazy) -> np.ndarray:
    flat = torch.empty(tau.shape.numel())
    for rows, offset in row_blocks(tau.shape, tau.device):
        block = tau[rows].reshape(-1)
        flat[offset : offset + block.numel()] = (
            block.abs_() if isinstance(tau, Lazy) else block.abs()
        )
    return flat.numpy()


def trim(tau: Tensor, cut: Cut, offset: int = 0) -> Tensor:
    """A block of tau that starts at flat index `offset`, its entries below the cut set to zero."""
    flat, ties_end = tau.reshape(-1), max(0, cut.last + 1 - offset)
    at_threshold = float(np.nextafter(np.float32(cut.threshold), np.float32(0)))
    if ties_end >= len(flat):
        return hardshrink(tau, at_threshold)  # hardshrink keeps what is strictly above
    kept = hardshrink(flat, cut.threshold)
    kept[:ties_end] = hardshrink(flat[:ties_end], at_threshold)
    return kept.view(tau.shape)


def disjoint_merge(
    kept: Sequence[Tensor], weights: Sequence[float], combine: str = "mean"
) -> Tensor:
    """Elect a sign per entry, then merge the members that agree with it (TIES, steps 2 and 3).

    Elected is the sign of sum_i w_i t_i (zero counts as +). Members are the i whose w_i t_i is not
    zero and has that sign: their sum, divided by the sum of their w_i for "mean" (where that is
    zero: by 1).
    """
    # Truth values are floats throughout: torch's boolean masks cost ten times the arithmetic.
    weighted = [t * w for t, w in zip(kept, weights, strict=True)]
    elected = sum(weighted)
    sign = torch.ge(elected, 0, out=elected).mul_(2).sub_(1)
    total, weight_sum = torch.zeros_like(sign), torch.zeros_like(sign)
    for member, weight in zip(weighted, weights, strict=True):
        agreeing = member.mul_(sign).clamp_(min=0)
        total += agreeing
        weight_sum.add_(agreeing.sign_(), alpha=weight)
    if combine == "mean":
        total /= weight_sum.add_(torch.eq(weight_sum, 0, out=torch.empty_like(weight_sum)))
    return total.mul_(sign)


def ties(
    taus: Taus,
    weights: Sequence[float],
    *,
    density: Fraction = 0.2,
    scope: Literal["tensor", "model"] = "tensor",
    combine: Literal["mean", "sum"] = "mean",
    cuts: Sequence[Cut] | None = None,
) -> Tensor:
    """TIES (Yadav et al. 2023, alg. 1): trim each task vector, elect signs, average who agrees.

    Trimming keeps the k = max(1, int(density * numel)) largest magnitudes of each tensor, as
    mergekit and PEFT do; with `scope="model"` the authors' one threshold over the whole model,
    which `merge` finds in a pass of its own and gives as `cuts`. Every tensor alike.
    """
    cuts = cuts or [magnitude_cut(tau, density) for tau in taus]

    def kernel(blocks: list[Tensor], offset: int) -> Tensor:
        trimmed = [trim(block, cut, offset) for block, cut in zip(blocks, cuts, strict=True)]
        return disjoint_merge(trimmed, weights, combine)

    return blockwise(kernel, taus)


def stream_seed(seed: int, method: str, tensor: str, label: str) -> int:
    """Seed of one model's random stream in one tensor: independent of order, shards and device."""
    return int.from_bytes(
        hashlib.sha256(json.dumps([seed, method, tensor, label]).encode()).digest()[:8]
    )


def drop(block: Tensor, bits: np.random.PCG64, density: float) -> Tensor:
    """The block, each entry kept with probability `density` by the next bits of the stream."""
    # Raw bits: the one output that numpy promises never to change. Two 32-bit numbers a draw.
    draws = bits.random_raw((block.numel() + 1) // 2).view(np.uint32)[: block.numel()]
    keep = torch.from_numpy((draws < density * 2**32).view(np.uint8)).to(block)
    return block * keep.view(block.shape)


def drop_factor(tau: Tensor | Lazy, seed: int, density: float, rescale: str) -> float:
    """What the kept entries are multiplied by: 1 / density, which keeps the mean ("inverse"),
    or the factor that keeps the tensor's L1 norm ("l1", mergekit; 1 where a norm is below 1e-7).
    """
    if rescale == "inverse":
        return 1 / density if density > 0 else 0.0
    bits, before, after = np.random.PCG64(seed), 0.0, 0.0
    for rows, _ in row_blocks(tau.shape, tau.device):
        block = tau[rows]
        before += float(block.abs().sum(dtype=torch.float64))
        after += float(drop(block, bits, density).abs().sum(dtype=torch.float64))
    return before / after if min(before, after) >= 1e-7 else 1.0


def _after_drop(taus: Taus, seeds: Sequence[int], density: float, rescale: str, kernel) -> Tensor:
    """kernel(blocks) on the task vectors after dropping and rescaling."""
    bits = [np.random.PCG64(seed) for seed in seeds]
    factors = [drop_factor(t, seed, density, rescale) for t, seed in zip(taus, seeds, strict=True)]

    def dropped(blocks: list[Tensor], _: int) -> Tensor:
        kept = [drop(block, b, density) for block, b in zip(blocks, bits, strict=True)]
        return kernel([block.mul_(factor) for block, factor in zip(kept, factors, strict=True)])

    return blockwise(dropped, taus)


def dare(
    taus: Taus,
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: Fraction = 0.2,
    rescale: Literal["inverse", "l1"] = "inverse",
) -> Tensor:
    """DARE (Yu et al. 2024): drop entries at random, rescale the rest, then sum_i w_i tau_i.

    seeds: one per model (`stream_seed`). Every tensor alike.
    """
    return _after_drop(taus, seeds, density, rescale, lambda kept: _add_up(kept, weights))


def dare_ties(
    taus: Taus,
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: Fraction = 0.2,
    rescale: Literal["inverse", "l1"] = "inverse",
    combine: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """DARE's drop in place of TIES' trim, then sign election as in TIES. Every tensor alike.

    PEFT takes the mean of the agreeing members; mergekit their sum and rescale="l1".
    """
    return _after_drop(
        taus, seeds, density, rescale, lambda kept: disjoint_merge(kept, weights, combine)
    )


def breadcrumbs(
    taus: Taus, weights: Sequence[float], *, density: Fraction = 0.2, outliers: Fraction = 0.01
) -> Tensor:
    """Model breadcrumbs (Davari & Belilovsky 2023): sum_i w_i t_i with both tails masked.

    Of each tensor's magnitudes the int(outliers * numel) largest are dropped (fewer if `density`
    would not be reached otherwise), the next `density` kept, the rest dropped. Every tensor alike.
    """
    cuts = []
    for tau in taus:
        numel = tau.shape.numel()
        kept = max(1, int(density * numel)) if density > 0 else 0
        top = min(int(outliers * numel), numel - kept)
        cuts.append((cut_at(tau, top + kept), cut_at(tau, top)))

    def kernel(blocks: list[Tensor], offset: int) -> Tensor:
        middles = [
            trim(block, wide, offset) - trim(block, narrow, offset)
            for block, (wide, narrow) in zip(blocks, cuts, strict=True)
        ]
        return _add_up(middles, weights)

    return blockwise(kernel, taus)


# Singular values ---------------------------------------------------------------------------------


def singular_triplets(taus: Taus, weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), s (r,), V (in, r) of sum_i w_i tau_i on its numerical rank r: s > 1e-5 s_1.

    Low-rank task vectors are never made dense: thin QR of the joint factors, then a small SVD.
    """
    factors = [getattr(tau, "factors", None) for tau in taus]
    if None in factors:
        left, values, right = torch.linalg.svd(weighted_sum(taus, weights), full_matrices=False)
        right = right.T
    else:
        scaled = [f.B.double() * (w * f.scaling) for f, w in zip(factors, weights, strict=True)]
        q_out, r_out = torch.linalg.qr(torch.cat(scaled, dim=1))
        q_in, r_in = torch.linalg.qr(torch.cat([f.A.double() for f in factors]).T)
        left, values, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
        left, right = q_out @ left, q_in @ right.T
    rank = int((values > 1e-5 * values[0]).sum())
    return left[:, :rank], values[:rank], right[:, :rank]


def _plain_mean(taus: Taus, weights: Sequence[float]) -> Tensor:
    return weighted_sum(taus, [w / len(taus) for w in weights])


def iso_c(taus: Taus, weights: Sequence[float]) -> Tensor:
    """Iso-C (Marczak et al. 2025): sum_i w_i tau_i with all its singular values set to their mean.

    On the numerical rank only: the paper's full spectrum would put most of a low-rank sum's energy
    into noise directions. Matrices, embeddings included; of other tensors the plain mean.
    """
    if len(taus[0].shape) != 2:
        return _plain_mean(taus, weights)
    left, values, right = singular_triplets(taus, weights)
    level = values.mean() if len(values) else 0.0
    return (left @ right.T).mul_(level).float()


def tsv(taus: Taus, weights: Sequence[float]) -> Tensor:
    """Task singular vectors, TSV-M (Gargiulo et al. 2025): keep rank(tau_i) / n triplets of each
    w_i tau_i (at least one), decorrelate the kept left and right vectors across models, recompose.

    Decorrelated is the nearest orthonormal set, P Q' of the SVD P D Q'. Ranks are numerical.
    Matrices, embeddings included; of other tensors the plain mean.
    """
    if len(taus[0].shape) != 2:
        return _plain_mean(taus, weights)
    kept = []
    for tau, weight in zip(taus, weights, strict=True):
        left, values, right = singular_triplets([tau], [weight])
        rank = max(1, len(values) // len(taus))
        kept.append((left[:, :rank], values[:rank], right[:, :rank]))
    lefts, values, rights = (torch.cat(parts, dim=-1) for parts in zip(*kept, strict=True))
    return ((_decorrelated(lefts) * values) @ _decorrelated(rights).T).float()


def _decorrelated(columns: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    return left @ right


# From data ---------------------------------------------------------------------------------------


def regmean(
    taus: Taus, weights: Sequence[float], *, grams: Sequence[Tensor] | None, shrink: Fraction = 0.9
) -> Tensor:
    """RegMean (Jin et al. 2023, eq. 2): the layer that best fits all models' outputs on their data.

    delta = (sum_i w_i tau_i G_i) (sum_i w_i G_i)^-1 with G_i = X_i'X_i (in, in), the Gram matrix of
    the inputs of model i's layer, its off-diagonal entries multiplied by `shrink`. Layers without
    Gram matrices (embeddings, norms, biases): the weighted mean, as `linear`.
    """
    if grams is None:
        return linear(taus, weights)
    total = moved = 0.0
    for tau, weight, gram in zip(taus, weights, grams, strict=True):
        gram = gram.to(tau.device, torch.float64)
        gram = weight * (shrink * gram + (1 - shrink) * gram.diagonal().diag())
        total = total + gram
        moved = moved + tau[...].double() @ gram
    # A ridge below fp32 resolution: inputs that are always zero say nothing of their weights.
    total.diagonal().add_(1e-9 * total.diagonal().mean())
    return torch.linalg.solve(total, moved.T).T.float().contiguous()


# Contracts ---------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A merge with every choice resolved."""

    method: str
    labels: list[str]
    weights: list[float]
    seed: int
    scale: float
    options: dict[str, Any]
    cuts: list[Cut] | None = None  # of the whole model, for ties with scope="model"
    grams: Mapping[str, Sequence[Tensor]] | None = None  # by tensor name, for regmean


State = Callable[[Row, Plan], tuple[dict[str, Any], dict[str, Any]]]


class Method(NamedTuple):
    """A merge rule and its contract. Options, ranges and defaults are in the rule's annotations."""

    rule: Callable[..., Tensor]
    fewest: int = 1  # models
    weight: Callable[[int], float] = lambda n: 1.0  # default weight of each of n models
    coefficients: Callable[[Sequence[float]], list[float]] | None = None  # of a plain weighted sum
    state: State = lambda row, plan: ({}, {})  # (arguments of the rule, notes) for one tensor
    memory: int = 4  # bytes held at the peak per entry of a tensor: the fp32 delta and scratch


def _ties_state(row: Row, plan: Plan):
    if plan.cuts is None:
        cuts = [magnitude_cut(tau, plan.options["density"]) for tau in row.taus]
        return {"cuts": cuts}, {"tied": sum(cut.tied for cut in cuts)}
    tied = sum(
        int((tau[part].abs() == cut.threshold).sum())
        for tau, cut in zip(row.taus, plan.cuts, strict=True)
        for part, _ in row_blocks(tau.shape, tau.device)
    )
    return {"cuts": plan.cuts}, {"tied": tied}


def _dare_state(row: Row, plan: Plan):
    return {
        "seeds": [stream_seed(plan.seed, plan.method, row.name, label) for label in plan.labels]
    }, {}


def _slerp_state(row: Row, plan: Plan):
    arc = _slerp_arc(row.taus, plan.weights, row.base)
    return {"base": row.base, "arc": arc}, {"lerp": arc.lerp, "slerp": arc.slerp}


def _task_slerp_state(row: Row, plan: Plan):
    arc = _task_slerp_arc(row.taus, plan.weights)
    return {"arc": arc}, {"lerp": arc.lerp, "slerp": arc.slerp}


def _regmean_state(row: Row, plan: Plan):
    return {"grams": plan.grams.get(row.name)}, {}


METHODS = {
    "linear": Method(linear, coefficients=lambda w: [x / math.fsum(w) for x in w]),
    "task_arithmetic": Method(task_arithmetic, coefficients=list),
    "slerp": Method(slerp, fewest=2, state=_slerp_state),
    "task_slerp": Method(task_slerp, fewest=2, state=_task_slerp_state),
    "ties": Method(ties, state=_ties_state, memory=5),
    "dare": Method(dare, weight=lambda n: 1 / n, state=_dare_state),
    "dare_ties": Method(dare_ties, state=_dare_state),
    "breadcrumbs": Method(breadcrumbs, memory=5),
    "iso_c": Method(iso_c, memory=20),
    "tsv": Method(tsv, memory=28),
    "regmean": Method(regmean, state=_regmean_state),
}


def options_of(method: str) -> dict[str, inspect.Parameter]:
    """The options of a method that a caller may set, from its rule's annotations."""
    parameters = inspect.signature(METHODS[method].rule).parameters
    return {
        name: p
        for name, p in parameters.items()
        if get_origin(p.annotation) in (Annotated, Literal)
    }


def check_method(
    method: str, n_models: int, weights: Sequence[float] | None, options: Mapping[str, Any]
) -> tuple[list[float], dict[str, Any]]:
    """Weights and options, defaults filled in; ValueError for a wrong one, before any reading."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    contract, known = METHODS[method], options_of(method)
    if n_models < contract.fewest:
        raise ValueError(f"{method} needs at least {contract.fewest} models, not {n_models}")
    for name in options.keys() - known.keys():
        raise ValueError(f"{method} has no option {name!r}: it has {', '.join(known) or 'none'}")
    for name, value in options.items():
        _check_option(method, name, value, known[name].annotation)
    weights = (
        [contract.weight(n_models)] * n_models if weights is None else [float(w) for w in weights]
    )
    if len(weights) != n_models:
        raise ValueError(f"{method} got {len(weights)} weights for {n_models} models")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, not {weights}")
    if "slerp" in method and min(weights) < 0:
        raise ValueError(f"{method} interpolates: its weights must not be negative, not {weights}")
    if method == "linear" and math.fsum(weights) == 0:
        raise ValueError("the weights of linear must not sum to zero")
    return weights, {name: p.default for name, p in known.items()} | dict(options)


def _check_option(method: str, name: str, value: Any, annotation: Any) -> None:
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise ValueError(
                f"{name} of {method} must be one of {get_args(annotation)}, not {value!r}"
            )
        return
    low, high = get_args(annotation)[1]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(
            f"{name} of {method} must be a number from {low:g} to {high:g}, not {value!r}"
        )


# The report --------------------------------------------------------------------------------------

SKETCH = 251  # prime, so that no row length lines up with it


@dataclass(frozen=True)
class Report:
    """What a merge did. `per_tensor`: each tensor's size, inner products and the rule's notes.

    Over all merged tensors, with G_ij = <tau_i, tau_j>, b_i = <delta, tau_i>: effective_scale
    ||delta|| / mean_i ||tau_i||; cos_sum the cosine of delta and sum_i tau_i; kept the fraction of
    delta's entries that are not zero; tie_mass the mean fraction of a task vector's entries whose
    magnitude equals its TIES threshold; slerp how many steps were linear and spherical. ingredient
    a_i: the coefficient that the rule gives tau_i, or for rules that are no weighted sum pinv(G) b;
    rho2 = a'Ga / ||delta||^2, the share of delta in the span of the task vectors. own c_i = b_i /
    G_ii: how far the merge goes along tau_i, whoever moved it there (None if tau_i = 0).
    """

    method: str
    labels: list[str]
    weights: list[float]
    seed: int
    scale: float
    options: dict[str, Any]
    per_tensor: list[dict[str, Any]]
    sketch: list[float]

    def _sum(self, key: str) -> Any:
        return (
            np.sum([t[key] for t in self.per_tensor if key in t], axis=0)
            if self.per_tensor
            else 0.0
        )

    @property
    def gram(self) -> np.ndarray:
        n = len(self.labels)
        return np.reshape(self._sum("gram"), (n, n)) if self.per_tensor else np.zeros((n, n))

    @property
    def dots(self) -> np.ndarray:
        return self._sum("dots") if self.per_tensor else np.zeros(len(self.labels))

    @property
    def norms(self) -> list[float]:
        return np.sqrt(self.gram.diagonal()).tolist()

    @property
    def norm(self) -> float:
        return float(np.sqrt(self._sum("norm2")))

    @property
    def effective_scale(self) -> float:
        return _ratio(self.norm, float(np.mean(self.norms)))

    @property
    def cos_sum(self) -> float:
        return _ratio(float(self.dots.sum()), self.norm * float(np.sqrt(max(self.gram.sum(), 0))))

    @property
    def kept(self) -> float:
        return _ratio(float(self._sum("nonzero")), float(self._sum("numel")))

    @property
    def tie_mass(self) -> float | None:
        if not any("tied" in t for t in self.per_tensor):
            return None
        return _ratio(float(self._sum("tied")), len(self.labels) * float(self._sum("numel")))

    @property
    def slerp(self) -> dict[str, int]:
        return {key: int(self._sum(key)) for key in ("lerp", "slerp")}

    @property
    def ingredient(self) -> list[float]:
        coefficients = METHODS[self.method].coefficients
        if coefficients:
            return [self.scale * c for c in coefficients(self.weights)]
        return (np.linalg.pinv(self.gram, rcond=1e-10, hermitian=True) @ self.dots).tolist()

    @property
    def own(self) -> list[float | None]:
        return _own_doses(self.dots, self.gram.diagonal())

    @property
    def rho2(self) -> float:
        a = np.array(self.ingredient)
        return _ratio(float(a @ self.gram @ a), self.norm**2)

    def scaled(self, factor: float) -> "Report":
        """The report of the same merge times a factor."""
        powers = {"dots": 1, "norm2": 2}
        tensors = [
            t | {key: (np.array(t[key]) * factor**power).tolist() for key, power in powers.items()}
            for t in self.per_tensor
        ]
        sketch = [factor * x for x in self.sketch]
        return replace(self, scale=self.scale * factor, per_tensor=tensors, sketch=sketch)

    def as_row(self) -> dict[str, Any]:
        """The totals, flat: one row of a table of merges."""
        own = [c for c in self.own if c is not None]
        return {
            "method": self.method,
            "scale": self.scale,
            "norm": self.norm,
            "effective_scale": self.effective_scale,
            "cos_sum": self.cos_sum,
            "kept": self.kept,
            "tie_mass": self.tie_mass,
            **{f"{key}_steps": count for key, count in self.slerp.items()},
            "ingredient_mean": float(np.mean(self.ingredient)),
            "own_mean": float(np.mean(own)) if own else None,
            "rho2": self.rho2,
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        totals = {"ingredient": self.ingredient, "own": self.own, "norms": self.norms}
        return asdict(self) | self.as_row() | totals


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def _own_doses(dots: np.ndarray, squares: np.ndarray) -> list[float | None]:
    return [float(b / g) if g > 0 else None for b, g in zip(dots, squares, strict=True)]


def measure(row: Row, delta: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """The numbers of one tensor that every total of the report is made of."""
    products = gram_matrix([*row.taus, delta])
    if not np.isfinite(products).all():
        culprit = next(
            (x for x, p in zip(labels, products.diagonal(), strict=False) if not np.isfinite(p)), ""
        )
        raise ValueError(f"{row.name}: {culprit or 'the merge'} holds NaN or infinite values")
    return {
        "name": row.name,
        "numel": delta.numel(),
        "gram": products[:-1, :-1].tolist(),
        "dots": products[-1, :-1].tolist(),
        "norm2": float(products[-1, -1]),
        "nonzero": int(np.count_nonzero(delta.cpu().numpy())),  # torch's takes six times as long
    }


def _sketch(delta: Tensor) -> np.ndarray:
    """A linear summary of one tensor, about as long as it: entries summed by index modulo 251."""
    whole = delta.numel() // SKETCH * SKETCH
    flat = delta.reshape(-1)
    folded = flat[:whole].view(-1, SKETCH).sum(0).double()
    folded[: delta.numel() - whole] += flat[whole:]
    return folded.cpu().numpy()


def same(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether merges with these sketches are one merge: relative difference below 1e-6."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return bool(np.linalg.norm(a - b) <= 1e-6 * max(np.linalg.norm(a), np.linalg.norm(b)))


def delta_digest(delta: Mapping[str, Tensor]) -> str:
    """SHA-256 of a merged delta: names, shapes and bytes of its tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(delta):
        tensor = delta[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# The merge ---------------------------------------------------------------------------------------


def plan(
    method: str,
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    scale: float = 1.0,
    grams: Mapping[str, Sequence[Tensor]] | None = None,
    **options: Any,
) -> Plan:
    """A merge with every choice resolved and checked (`check_method`), before anything is read."""
    if len(set(labels)) != len(labels):
        raise ValueError(f"models must have different labels, not {list(labels)}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    weights, options = check_method(method, len(labels), weights, options)
    if (grams is None) == (method == "regmean"):
        raise ValueError("regmean, and no other method, needs the Gram matrices of its layers")
    return Plan(method, list(labels), weights, seed, float(scale), options, grams=grams)


def merge_tensors(rows: Rows, chosen: Plan) -> Iterator[tuple[Row, Tensor, dict[str, Any]]]:
    """(row, merged delta times the plan's scale, record for the report) of one tensor at a time."""
    passes = rows if callable(rows) else lambda: rows
    if chosen.options.get("scope") == "model":
        cuts = model_cuts(passes, len(chosen.labels), chosen.options["density"])
        chosen = chosen._replace(cuts=cuts)
    for position, row in enumerate(passes()):
        yield _merge_tensor(row, chosen, position)  # no name here holds on to a tensor given away


def _merge_tensor(row: Row, chosen: Plan, position: int) -> tuple[Row, Tensor, dict[str, Any]]:
    contract = METHODS[chosen.method]
    arguments, notes = contract.state(row, chosen)
    delta = contract.rule(row.taus, chosen.weights, **(chosen.options | arguments))
    if chosen.scale != 1:
        delta.mul_(chosen.scale)
    sketch = np.roll(_sketch(delta), position)
    return row, delta, measure(row, delta, chosen.labels) | notes | {"sketch": sketch}


def summary(chosen: Plan, records: Iterable[dict[str, Any]]) -> Report:
    """The report of a merge from the records of its tensors."""
    records = list(records)
    sketch = np.sum([record.pop("sketch") for record in records] or [np.zeros(SKETCH)], axis=0)
    fields = {name: getattr(chosen, name) for name in Plan._fields if name not in ("cuts", "grams")}
    return Report(**fields, per_tensor=records, sketch=sketch.tolist())


def merge(
    rows: Rows,
    method: str,
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    scale: float = 1.0,
    match: Literal["norm", "dose"] | None = None,
    grams: Mapping[str, Sequence[Tensor]] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Report]:
    """The merged delta by tensor name (fp32; the merged model is base + delta) and the report.

    rows: a list of rows (`vectors.views`), or a function that gives them anew, as some rules need
    more than one pass. labels: one per model, in the rows' order. match: one factor for the whole
    model that makes ||delta|| = scale * mean_i ||tau_i|| ("norm") or mean_i c_i = scale ("dose").
    grams: for regmean. Raises ValueError for a choice that the method's contract does not allow and
    for NaN or infinite values.
    """
    chosen = plan(method, labels, weights, seed, scale, grams, **options)
    delta, records = {}, []
    for row, change, record in merge_tensors(rows, chosen):
        delta[row.name] = change
        records.append(record)
    report = summary(chosen, records)
    if match is not None:
        factor = match_factor(report, match)
        report = report.scaled(factor)
        for change in delta.values():
            change.mul_(factor)
    return delta, report


def matched(rows: Rows, chosen: Plan, match: str) -> Plan:
    """The plan at the scale that `match` asks for (`merge`), from a pass that keeps no delta."""
    records = map(itemgetter(2), merge_tensors(rows, chosen))
    return chosen._replace(scale=chosen.scale * match_factor(summary(chosen, records), match))


def match_factor(report: Report, match: str) -> float:
    """The factor that brings a merge to `match` (`merge`); ValueError if there is none."""
    if match not in ("norm", "dose"):
        raise ValueError(f"match must be 'norm' or 'dose', not {match!r}")
    now = report.effective_scale if match == "norm" else report.as_row()["own_mean"]
    if not now or now < 0:
        raise ValueError(f"{report.method} cannot be matched by {match}: its {match} is {now}")
    return report.scale / now


def solo(rows: Rows, method: str, i: int, labels: Sequence[str], *args: Any, **kwargs: Any):
    """`merge` with the partners' task vectors at zero: what the rule alone does to model i."""

    def alone() -> Iterable[Row]:
        for name, base, taus in rows() if callable(rows) else rows:
            others = [zero(tau.shape, tau.device) for tau in taus]
            yield Row(name, base, [*others[:i], taus[i], *others[i + 1 :]])

    return merge(alone, method, labels, *args, **kwargs)


def dose(rows: Rows, i: int, a: float) -> dict[str, Tensor]:
    """The delta a * tau_i: model i alone at dose a."""
    passes = rows() if callable(rows) else rows
    return {row.name: weighted_sum([row.taus[i]], [a]) for row in passes}


def rounded(
    base: Mapping[str, Tensor],
    rows: Rows,
    delta: Mapping[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, Tensor], list[float]]:
    """What is left of a merge on a coarse grid: base on the grid, result rounded to it again.

    Returns the change from the fp32 base to that result, by name (tensors that stay are left out),
    and the dose realised for each model, <result - base on the grid, tau_i> / ||tau_i||^2, to set
    beside `Report.own`.
    """
    changes, grids = {}, {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            continue
        full = tensor.detach().float()
        grid = full.to(dtype).float()
        result = (grid + delta[name]).to(dtype).float() if name in delta else grid
        if not torch.equal(result, full):
            changes[name] = result - full
        if name in delta:
            grids[name] = result - grid
    passes = rows() if callable(rows) else rows
    products = sum(gram_matrix([*row.taus, grids[row.name]]) for row in passes)
    return changes, _own_doses(products[-1, :-1], products.diagonal()[:-1])
