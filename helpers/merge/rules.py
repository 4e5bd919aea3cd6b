"""What does each merge rule compute? Formulas on the task vectors of one tensor.

With base theta_0, task vectors tau_i = theta_i - theta_0 and weights w_i, a rule gives the merged
delta of the tensor (the merged model is theta_0 + scale * delta; the papers' lambda is that scale):

    rule(taus, weights, *, options) -> Tensor of the same shape, fp32

Task vectors are dense tensors or `vectors.Lazy` ones. Most rules are stated for a block of rows:
they return a kernel, and `blockwise` makes a rule on whole tensors of it, of which only one block
of each task vector is dense at a time. `density` is the fraction kept, everywhere. Arithmetic is
fp32.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from itertools import islice
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from helpers.merge.vectors import BLOCK, Block, Lazy, Row, row_blocks

Fraction = Annotated[float, (0.0, 1.0)]  # an option's range: part of a rule's contract
Taus = Sequence[Tensor | Lazy]
Kernel = Callable[[list[Tensor], Block], Tensor]  # blocks of the task vectors -> block of the delta


def in_blocks(
    kernel: Kernel, taus: Taus, watch: Callable[[list[Tensor]], object] = lambda blocks: None
) -> Tensor:
    """The dense result of a kernel on all blocks; `watch` sees the blocks of [*taus, result]."""
    shape, result = taus[0].shape, None
    for block in row_blocks(shape, taus[0].device):
        parts = [tau[block.rows] for tau in taus]
        part = kernel(parts, block)
        watch([*parts, part])
        if part.shape == shape:
            return part
        if result is None:
            result = torch.empty(shape, device=part.device)
        result[block.rows] = part
    return result


def blockwise(rule: Callable[..., Kernel]) -> Callable[..., Tensor]:
    """A rule on whole tensors from one that returns a kernel (kept as `.kernel`)."""

    @wraps(rule)
    def whole(taus: Taus, weights: Sequence[float], **options) -> Tensor:
        return in_blocks(rule(taus, weights, **options), taus)

    whole.kernel = rule
    return whole


def with_products(rule: Callable[..., Tensor], taus: Taus, *args, **options):
    """(delta, inner products of [*taus, delta]), in one pass where the rule has a kernel."""
    if not hasattr(rule, "kernel"):
        delta = rule(taus, *args, **options)
        return delta, gram_matrix([*taus, delta])
    total = torch.zeros(len(taus) + 1, len(taus) + 1, dtype=torch.float64, device=taus[0].device)
    kernel = rule.kernel(taus, *args, **options)
    delta = in_blocks(kernel, taus, lambda blocks: total.add_(_products(blocks)))
    return delta, total.cpu().numpy()


def gram_matrix(tensors: Taus) -> np.ndarray:
    """All inner products <x_i, x_j> of tensors of one shape, (n, n): see `_products`."""
    shape, device = tensors[0].shape, tensors[0].device
    blocks = ([t[block.rows] for t in tensors] for block in row_blocks(shape, device))
    return sum(map(_products, blocks)).cpu().numpy()


def _products(blocks: list[Tensor]) -> Tensor:
    """Inner products: over 256 entries in fp32, the sums of these in fp64.

    Within 5e-8 of the product of the norms, in a third of the time of fp64 throughout.
    """
    stacked = torch.stack([block.reshape(-1) for block in blocks])
    whole = stacked.shape[1] // 256 * 256
    chunks, rest = stacked[:, :whole].view(len(blocks), -1, 256).transpose(0, 1), stacked[:, whole:]
    return torch.bmm(chunks, chunks.mT).sum(0, dtype=torch.float64) + rest @ rest.T


# Weighted sums -----------------------------------------------------------------------------------


def _add_up(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i, in order: one sum for all rules, so that equal merges have equal bits."""
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total.add_(block, alpha=weight)
    return total


@blockwise
def task_arithmetic(taus: Taus, weights: Sequence[float]) -> Kernel:
    """delta = sum_i w_i tau_i (Ilharco et al. 2023, eq. 1). Every tensor alike."""
    return lambda blocks, _: _add_up(blocks, weights)


@blockwise
def linear(taus: Taus, weights: Sequence[float]) -> Kernel:
    """Model averaging: sum_i w_i theta_i / sum_i w_i, so delta = sum_i w_i tau_i / sum_i w_i.

    Equal weights: model soups (Wortsman et al. 2022); the minimax weights of the hidden states
    (`bound.minimax`): "chebyshev". Every tensor alike. ValueError if the weights sum to zero.
    """
    total = math.fsum(weights)
    if total == 0:
        raise ValueError("the weights of linear must not sum to zero")
    return task_arithmetic.kernel(taus, [w / total for w in weights])


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
    angle) b) / sin(angle), the angle between the directions of a and b applied to the raw points;
    (1-t) a + t b where |cos| > 0.9995 (Shoemake 1985; threshold and raw points as mergekit).
    """
    coefficients, total, linear_steps = np.eye(len(weights))[0], weights[0], 0
    for i in range(1, len(weights)):
        total += weights[i]
        t = weights[i] / total if total else 0.0
        square = max(coefficients @ gram @ coefficients, 0.0)  # of opposite points: 0 or below
        length, other = math.sqrt(square), math.sqrt(gram[i, i])
        both = length > 1e-8 and other > 1e-8
        cosine = coefficients @ gram[i] / (length * other) if both else 0.0
        if abs(cosine) > SLERP_THRESHOLD:
            ours, theirs = 1 - t, t
            linear_steps += 1
        else:
            angle = math.acos(cosine)
            ours, theirs = (math.sin(x * angle) / math.sin(angle) for x in (1 - t, t))
        coefficients = ours * coefficients
        coefficients[i] = theirs
    return coefficients, linear_steps


def model_arc(taus: Taus, weights: Sequence[float], base: Tensor | Lazy) -> Arc:
    """The arc between the models theta_0 + tau_i."""
    models = np.hstack([np.ones((len(taus), 1)), np.eye(len(taus))])
    coefficients, lerp = spherical(models @ gram_matrix([base, *taus]) @ models.T, weights)
    steps = len(taus) - 1
    on_base = 0.0 if lerp == steps else float(coefficients.sum()) - 1
    return Arc(on_base, coefficients.tolist(), lerp, steps - lerp)


def task_arc(taus: Taus, weights: Sequence[float]) -> Arc:
    """The arc between the task vectors."""
    coefficients, lerp = spherical(gram_matrix(taus), weights)
    return Arc(0.0, coefficients.tolist(), lerp, len(taus) - 1 - lerp)


@blockwise
def slerp(
    taus: Taus, weights: Sequence[float], *, base: Tensor | Lazy, arc: Arc | None = None
) -> Kernel:
    """Spherical interpolation of the models themselves, tensor by tensor, flattened (`spherical`).

    Two models by definition (t = w_2 / (w_1 + w_2)); more are taken one after the other. Where the
    models are close (|cos| > 0.9995) it is the weighted mean, by the very sum that `linear` takes.
    """
    arc = arc or model_arc(taus, weights, base)
    if arc.on_base == 0:
        return task_arithmetic.kernel(taus, arc.on_taus)
    return lambda blocks, at: _add_up([*blocks, base[at.rows]], [*arc.on_taus, arc.on_base])


@blockwise
def task_slerp(taus: Taus, weights: Sequence[float], *, arc: Arc | None = None) -> Kernel:
    """Spherical interpolation of each tensor's task vectors (mergekit's nuslerp with a base)."""
    return task_arithmetic.kernel(taus, (arc or task_arc(taus, weights)).on_taus)


# Keep a few entries, then elect or add -----------------------------------------------------------


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
    """The cut that keeps exactly k entries, as `magnitude_cut`.

    A GPU takes a tensor whole (`dense_cut`). On a CPU it is streamed: a sample of rows brackets the
    threshold; one pass counts what lies above the bracket and collects what lies inside, for an
    exact selection. Where the sample misled, a wider bracket. Only the block in which the kept ties
    end is read once more.
    """
    numel = tau.shape.numel()
    if k == 0:
        return Cut(math.inf, -1, 0)
    if k == numel:
        return Cut(0.0, -1, 0)  # what is not above zero is zero
    if torch.device(tau.device).type == "cuda":
        return dense_cut(tau[...], k)
    for low, high in _brackets(tau, k):
        above, parts = _between(tau, low, high)
        values = np.concatenate(parts)
        if 0 < k - above <= len(values):
            break
        if k - above > len(values) and low == SMALLEST:
            return Cut(0.0, -1, int(numel - above - len(values)))
    rest = len(values) - (k - above)
    # Magnitudes order as their bits, which are selected twice as fast.
    threshold = np.partition(values.view(np.int32), rest).view(np.float32)[rest]
    tied = np.cumsum([np.count_nonzero(part == threshold) for part in parts])
    quota = k - above - np.count_nonzero(values > threshold)
    last = _place(tau, threshold, quota, tied) if quota < tied[-1] else numel - 1
    return Cut(float(threshold), last, int(tied[-1]))


def dense_cut(tau: Tensor, k: int) -> Cut:
    """The cut that keeps exactly k of a dense tensor's entries, 0 < k < numel: the definition."""
    values = tau.abs().flatten()
    kth = values.topk(k, sorted=False).values.min()  # on a GPU much faster than kthvalue
    told = kth, (values > kth).sum(), (values == kth).sum()
    threshold, above, tied = torch.stack([x.double() for x in told]).tolist()  # one transfer
    if threshold == 0:
        return Cut(0.0, -1, int(tied))
    quota, last = k - int(above), len(values) - 1
    if quota < tied:
        last = int((values == kth).nonzero()[quota - 1, 0])
    return Cut(threshold, last, int(tied))


def _place(tau: Tensor | Lazy, threshold: np.float32, quota: int, tied: np.ndarray) -> int:
    """Flat index of the quota-th entry at the threshold; `tied` of them end with each block."""
    i = int(np.searchsorted(tied, quota))
    rows, offset = next(islice(row_blocks(tau.shape, tau.device), i, None))
    places = np.flatnonzero(tau[rows].abs().cpu().numpy() == threshold)
    return offset + int(places[quota - (tied[i - 1] if i else 0) - 1])


SMALLEST = np.nextafter(np.float32(0), np.float32(1))


def _brackets(tau: Tensor | Lazy, k: int) -> Iterator[tuple[np.float32, np.float32]]:
    """Guesses, the last one certain, of an interval that holds the k-th largest magnitude.

    The first is as wide as the sampled rows differ: five standard errors of the threshold's rank.
    """
    if tau.shape.numel() > BLOCK["cpu"]:
        rows = tau[:: max(1, tau.shape[0] // 128)].abs().cpu().numpy()
        sample, rank = np.sort(rows, axis=None), 1 - k / tau.shape.numel()
        above = rows.reshape(len(rows), -1) > sample[min(int(rank * len(sample)), len(sample) - 1)]
        error = above.mean(axis=1).std() / math.sqrt(len(rows))
        for margin in (0.001 + 5 * error, 0.1 + 5 * error):
            low, high = (int((rank + side) * len(sample)) for side in (-margin, margin))
            yield (
                max(sample[low], SMALLEST) if low >= 0 else SMALLEST,
                sample[high] if high < len(sample) else np.float32(np.inf),
            )
    yield SMALLEST, np.float32(np.inf)


def _between(tau: Tensor | Lazy, low: np.float32, high: np.float32) -> tuple[int, list[np.ndarray]]:
    """How many magnitudes exceed `high`; those in [low, high], by block."""
    above, parts = 0, []
    for rows, _ in row_blocks(tau.shape, tau.device):
        magnitudes = tau[rows].abs().reshape(-1).cpu().numpy()
        over = magnitudes > high
        inside = (magnitudes >= low) ^ over
        above += np.count_nonzero(over)
        if low == high:  # 16-bit models differ by few distinct values
            parts.append(np.full(np.count_nonzero(inside), low))
        else:
            parts.append(magnitudes[np.flatnonzero(inside)])  # faster than by the mask
    return above, parts


def model_cuts(rows: Callable[[], Iterable[Row]], n: int, density: float) -> list[Cut]:
    """One cut for each of n models over all its tensors together, by the rule of the TIES authors:
    everything from the (d - int(density * d))-th smallest of the d magnitudes upwards, ties
    included.

    Exact in two passes that hold no more than one block: the magnitudes are counted by their upper
    16 bits, then those in the bin of the threshold are collected.
    """
    counts, d = np.zeros((n, 1 << 15), dtype=np.int64), 0
    for i, bits in _magnitude_bits(rows()):
        counts[i] += np.bincount(bits >> 16, minlength=1 << 15)
        d += len(bits) if i == 0 else 0
    kth = d - int(density * d)
    if density == 0 or kth == 0:
        return [Cut(math.inf if density == 0 else 0.0, -1, 0)] * n
    bins = [int(np.searchsorted(count.cumsum(), kth)) for count in counts]
    found: list[list[np.ndarray]] = [[] for _ in range(n)]
    for i, bits in _magnitude_bits(rows()):
        found[i].append(bits[bits >> 16 == bins[i]])
    cuts = []
    for i, parts in enumerate(found):
        values = np.sort(np.concatenate(parts)).view(np.float32)  # fp32 sort as their bits do
        threshold = values[kth - counts[i, : bins[i]].sum() - 1]
        cuts.append(Cut(float(threshold), d, int(np.count_nonzero(values == threshold))))
    return cuts


def _magnitude_bits(rows: Iterable[Row]) -> Iterator[tuple[int, np.ndarray]]:
    """(model, bits of the magnitudes) of one block at a time."""
    for row in rows:
        for i, tau in enumerate(row.taus):
            for part, _ in row_blocks(tau.shape, tau.device):
                yield i, tau[part].abs().reshape(-1).cpu().numpy().view(np.uint32)


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
    weighted = [t if w == 1 else t * w for t, w in zip(kept, weights, strict=True)]
    elected = sum(weighted)
    sign = torch.ge(elected, 0, out=elected).mul_(2).sub_(1)
    total, weight_sum = torch.zeros_like(sign), torch.zeros_like(sign)
    for member, weight in zip(weighted, weights, strict=True):
        agreeing = torch.mul(member, sign).clamp_(min=0)
        total += agreeing
        weight_sum.add_(agreeing.sign_(), alpha=weight)
    if combine == "mean":
        total /= weight_sum.add_(torch.eq(weight_sum, 0, out=torch.empty_like(weight_sum)))
    return total.mul_(sign)


@blockwise
def ties(
    taus: Taus,
    weights: Sequence[float],
    *,
    density: Fraction = 0.2,
    scope: Literal["tensor", "model"] = "tensor",
    combine: Literal["mean", "sum"] = "mean",
    cuts: Sequence[Cut] | None = None,
) -> Kernel:
    """TIES (Yadav et al. 2023, alg. 1): trim each task vector, elect signs, average who agrees.

    Trimming keeps the k = max(1, int(density * numel)) largest magnitudes of each tensor, as
    mergekit and PEFT do; with `scope="model"` the authors' one threshold over the whole model
    (`model_cuts`), given as `cuts`. Every tensor alike.
    """
    cuts = cuts or [magnitude_cut(tau, density) for tau in taus]

    def kernel(blocks: list[Tensor], at: Block) -> Tensor:
        trimmed = [trim(block, cut, at.offset) for block, cut in zip(blocks, cuts, strict=True)]
        return disjoint_merge(trimmed, weights, combine)

    return kernel


@blockwise
def breadcrumbs(
    taus: Taus, weights: Sequence[float], *, density: Fraction = 0.2, outliers: Fraction = 0.01
) -> Kernel:
    """Model breadcrumbs (Davari & Belilovsky 2023): sum_i w_i t_i with both tails masked.

    Of each tensor's magnitudes the int(outliers * numel) largest are dropped (fewer where `density`
    would not be reached), the next `density` kept, the rest dropped. Every tensor alike.
    """
    cuts = []
    for tau in taus:
        numel = tau.shape.numel()
        kept = max(1, int(density * numel)) if density > 0 else 0
        top = min(int(outliers * numel), numel - kept)
        cuts.append((cut_at(tau, top + kept), cut_at(tau, top)))

    def kernel(blocks: list[Tensor], at: Block) -> Tensor:
        middles = [
            trim(block, wide, at.offset) - trim(block, narrow, at.offset)
            for block, (wide, narrow) in zip(blocks, cuts, strict=True)
        ]
        return _add_up(middles, weights)

    return kernel


def stream_seed(seed: int, method: str, tensor: str, label: str) -> int:
    """Seed of one model's random stream in one tensor: independent of order, shards and device."""
    text = json.dumps([seed, method, tensor, label])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def drop(block: Tensor, bits: np.random.PCG64, density: float) -> Tensor:
    """The block, each entry kept with probability `density` by the next bits of the stream."""
    # Raw bits: the one output that numpy promises never to change. Two 32-bit numbers a draw.
    draws = bits.random_raw((block.numel() + 1) // 2).view(np.uint32)[: block.numel()]
    keep = torch.from_numpy((draws < density * 2**32).view(np.uint8)).to(block)
    return block * keep.view(block.shape)


def drop_factor(tau: Tensor | Lazy, seed: int, density: float, rescale: str) -> float:
    """What the kept entries are multiplied by: 1 / density, which keeps the mean ("inverse"), or
    the factor that keeps the tensor's L1 norm ("l1", mergekit; 1 where a norm is below 1e-7).
    """
    if rescale == "inverse":
        return 1 / density if density > 0 else 0.0
    bits, before, after = np.random.PCG64(seed), 0.0, 0.0
    for rows, _ in row_blocks(tau.shape, tau.device):
        block = tau[rows].abs()
        before += float(block.sum())
        after += float(drop(block, bits, density).sum())
    return before / after if min(before, after) >= 1e-7 else 1.0


def _dropped(taus: Taus, seeds: Sequence[int], density: float, rescale: str):
    """A function of blocks, taken in order, that drops entries and rescales the rest."""
    streams = [np.random.PCG64(seed) for seed in seeds]
    factors = [drop_factor(t, seed, density, rescale) for t, seed in zip(taus, seeds, strict=True)]
    return lambda blocks: [
        drop(block, bits, density).mul_(factor)
        for block, bits, factor in zip(blocks, streams, factors, strict=True)
    ]


@blockwise
def dare(
    taus: Taus,
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: Fraction = 0.2,
    rescale: Literal["inverse", "l1"] = "inverse",
) -> Kernel:
    """DARE (Yu et al. 2024): drop entries at random, rescale the rest, then sum_i w_i tau_i.

    seeds: one per model (`stream_seed`). Every tensor alike.
    """
    dropped = _dropped(taus, seeds, density, rescale)
    return lambda blocks, _: _add_up(dropped(blocks), weights)


@blockwise
def dare_ties(
    taus: Taus,
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: Fraction = 0.2,
    rescale: Literal["inverse", "l1"] = "inverse",
    combine: Literal["mean", "sum"] = "mean",
) -> Kernel:
    """DARE's drop in place of TIES' trim, then sign election as in TIES. Every tensor alike.

    PEFT takes the mean of the agreeing members; mergekit their sum and rescale="l1".
    """
    dropped = _dropped(taus, seeds, density, rescale)
    return lambda blocks, _: disjoint_merge(dropped(blocks), weights, combine)


# Singular values ---------------------------------------------------------------------------------


def singular_triplets(taus: Taus, weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), s (r,), V (in, r) of sum_i w_i tau_i on its numerical rank r: s > 1e-5 s_1.

    Low-rank task vectors are never made dense: thin QR of the joint factors, then a small SVD, both
    on the CPU, which is done with matrices this narrow before a GPU has begun.
    """
    factors = [getattr(tau, "factors", None) for tau in taus]
    if None in factors:
        left, values, right = torch.linalg.svd(task_arithmetic(taus, weights), full_matrices=False)
        right = right.T
    else:
        both = [(f.B.double().cpu(), f.A.double().cpu()) for f in factors]
        scaled = [B * (w * f.scaling) for (B, _), f, w in zip(both, factors, weights, strict=True)]
        q_out, r_out = torch.linalg.qr(torch.cat(scaled, dim=1))
        q_in, r_in = torch.linalg.qr(torch.cat([A for _, A in both]).T)
        left, values, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
        left, right = q_out @ left, q_in @ right.T
    rank = int((values > 1e-5 * values[0]).sum())
    return left[:, :rank], values[:rank], right[:, :rank]


def _plain_mean(taus: Taus, weights: Sequence[float]) -> Tensor:
    return task_arithmetic(taus, [w / len(taus) for w in weights])


def iso_c(taus: Taus, weights: Sequence[float]) -> Tensor:
    """Iso-C (Marczak et al. 2025): sum_i w_i tau_i with all its singular values set to their mean.

    On the numerical rank only: the paper's full spectrum would put most of a low-rank sum's energy
    into noise directions. Matrices, embeddings included; of other tensors the plain mean.
    """
    if len(taus[0].shape) != 2:
        return _plain_mean(taus, weights)
    left, values, right = singular_triplets(taus, weights)
    level = values.mean() if len(values) else 0.0
    return _product(left, right, taus[0].device).mul_(level).float()


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
    return _product(_decorrelated(lefts) * values, _decorrelated(rights), taus[0].device).float()


def _product(left: Tensor, right: Tensor, device: str | torch.device) -> Tensor:
    return left.to(device) @ right.to(device).T


def _decorrelated(columns: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    return left @ right


# From data ---------------------------------------------------------------------------------------


def regmean(
    taus: Taus, weights: Sequence[float], *, grams: Sequence[Tensor] | None, shrink: Fraction = 0.9
) -> Tensor:
    """RegMean (Jin et al. 2023, eq. 2): the layer that best fits all models' outputs on their data.

    delta = (sum_i w_i tau_i G_i) (sum_i w_i G_i)^-1 with G_i = X_i'X_i / rows (in, in), the Gram
    matrix of the inputs X_i of model i's layer, its off-diagonal entries multiplied by `shrink`.
    Layers without Gram matrices (embeddings, norms, biases): the weighted mean, as `linear`.
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
