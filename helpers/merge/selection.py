"""Which entries of a task vector are kept? The exact k-th magnitude, streamed, and random drops.

A full sort takes 67-92 ns an entry, introselect on what a sample brackets 1-2: TIES' whole cost.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from helpers.merge.blocks import BLOCK, Lazy, Taus, row_blocks, stacked

SMALLEST = np.nextafter(np.float32(0), np.float32(1))
INFINITE = np.float32(np.inf)


class Cut(NamedTuple):
    """What is kept: magnitudes above the threshold, those equal to it up to flat index `last`."""

    threshold: float
    last: int
    tied: int  # entries whose magnitude is the threshold


def trim(tau: Tensor, cut: Cut, offset: int = 0) -> Tensor:
    """A block of tau that starts at flat index `offset`, its entries below the cut set to zero."""
    flat = tau.reshape(-1)
    ties_end = max(0, cut.last + 1 - offset)
    at_threshold = float(np.nextafter(np.float32(cut.threshold), np.float32(0)))
    if ties_end >= len(flat):
        return hardshrink(tau, at_threshold)  # hardshrink keeps what is strictly above
    kept = hardshrink(flat, cut.threshold)
    kept[:ties_end] = hardshrink(flat[:ties_end], at_threshold)
    return kept.view(tau.shape)


# One tensor --------------------------------------------------------------------------------------


def magnitude_cut(tau: Tensor | Lazy, density: float) -> Cut:
    """The cut that keeps exactly k = max(1, int(density * numel)) entries; none at density 0.

    Largest magnitudes first, ties by lowest flat index: the k first of a stable descending sort.
    """
    return cut_at(tau, share(density, tau.shape.numel()))


def share(density: float, numel: int) -> int:
    """How many of `numel` entries a density keeps: one at least, none at density 0."""
    return max(1, int(density * numel)) if density > 0 else 0


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
        collected = sum(map(len, parts))
        if 0 < k - above <= collected:
            return _cut_inside(tau, k - above, parts)
        if k - above > collected and low == SMALLEST:
            return Cut(0.0, -1, int(numel - above - collected))
    raise AssertionError("the last bracket holds every magnitude")


def _cut_inside(tau: Tensor | Lazy, k: int, parts: list[np.ndarray]) -> Cut:
    """The cut whose threshold is the k-th largest of the collected magnitudes, by block."""
    values = np.concatenate(parts)
    rest = len(values) - k
    # Magnitudes order as their bits, which are selected twice as fast.
    threshold = np.partition(values.view(np.int32), rest).view(np.float32)[rest]
    counts = [np.count_nonzero(part == threshold) for part in parts]
    tied = np.cumsum(counts)  # up to the end of each block
    quota = k - np.count_nonzero(values > threshold)
    last = tau.shape.numel() - 1
    if quota < tied[-1]:
        last = _place(tau, threshold, quota, tied)
    return Cut(float(threshold), last, int(tied[-1]))


def dense_cut(tau: Tensor, k: int) -> Cut:
    """The cut that keeps exactly k of a dense tensor's entries, 0 < k < numel: the definition."""
    values = tau.abs().flatten()
    # on a GPU much faster than kthvalue
    kept = values.topk(k, sorted=False).values
    kth = kept.min()
    counts = [(values > kth).sum(), (values == kth).sum()]
    numbers = [number.double() for number in (kth, *counts)]
    threshold, above, tied = torch.stack(numbers).tolist()  # one transfer
    if threshold == 0:
        return Cut(0.0, -1, int(tied))
    quota = k - int(above)
    last = len(values) - 1
    if quota < tied:
        last = int((values == kth).nonzero()[quota - 1, 0])
    return Cut(threshold, last, int(tied))


def _place(
    tau: Tensor | Lazy, threshold: np.float32, quota: int, tied: np.ndarray
) -> int:
    """Flat index of the quota-th entry at the threshold; `tied` of them end with each block."""
    i = int(np.searchsorted(tied, quota))
    before = tied[i - 1] if i else 0
    at = next(islice(row_blocks(tau.shape, tau.device), i, None))
    magnitudes = tau[at.rows].abs().cpu().numpy()
    places = np.flatnonzero(magnitudes == threshold)
    return at.offset + int(places[quota - before - 1])


def _brackets(tau: Tensor | Lazy, k: int) -> Iterator[tuple[np.float32, np.float32]]:
    """Guesses, the last one certain, of an interval that holds the k-th largest magnitude.

    The first is as wide as the sampled rows differ: five standard errors of the threshold's rank.
    """
    if tau.shape.numel() > BLOCK["cpu"]:
        step = max(1, tau.shape[0] // 32)
        rows = tau[::step].abs().cpu().numpy()
        n = rows.size
        magnitude = _order(rows)
        rank = 1 - k / tau.shape.numel()
        guess = magnitude(min(int(rank * n), n - 1))
        above = rows.reshape(len(rows), -1) > guess
        error = above.mean(axis=1).std() / math.sqrt(len(rows))
        for slack in (0.001, 0.1):
            margin = slack + 5 * error
            low = int((rank - margin) * n)
            high = int((rank + margin) * n)
            yield (
                max(magnitude(low), SMALLEST) if low >= 0 else SMALLEST,
                magnitude(high) if high < n else INFINITE,
            )
    yield SMALLEST, INFINITE


def _order(magnitudes: np.ndarray) -> Callable[[int], np.float32]:
    """A function that gives the magnitude at a place of the ascending order.

    It is found by its upper 16 bits, then by its lower: by radix, ten times as fast.
    """
    bits = magnitudes.view(np.uint32)
    uppers = (bits >> 16).astype(np.uint16)
    ordered = np.sort(uppers, axis=None, kind="stable")

    def magnitude(place: int) -> np.float32:
        upper = ordered[place]
        alike = bits[uppers == upper].astype(np.uint16)
        lowers = np.sort(alike, kind="stable")
        lower = lowers[place - np.searchsorted(ordered, upper)]
        return np.uint32(int(upper) << 16 | int(lower)).view(np.float32)

    return magnitude


def _between(
    tau: Tensor | Lazy, low: np.float32, high: np.float32
) -> tuple[int, list[np.ndarray]]:
    """How many magnitudes exceed `high`; those in [low, high], by block."""
    above = 0
    parts = []
    for _, (block,) in stacked([tau]):
        magnitudes = block.abs_().cpu().numpy()
        over = magnitudes > high
        inside = (magnitudes >= low) ^ over
        above += np.count_nonzero(over)
        if low == high:  # 16-bit models differ by few distinct values
            part = np.full(np.count_nonzero(inside), low)
        else:
            part = magnitudes[np.flatnonzero(inside)]  # faster than by the mask
        parts.append(part)
    return above, parts


# The whole model ---------------------------------------------------------------------------------


def model_cuts(
    rows: Callable[[], Iterable[Taus]],
    densities: Sequence[float],
    entries: int | None = None,
) -> list[Cut]:
    """One cut for each of n models over all its tensors together, by the rule of the TIES authors:
    everything from the (d - int(density * d))-th smallest of the d magnitudes upwards, ties
    included.

    rows: gives the n task vectors of one tensor after the other, anew each time. entries: d, where
    the rows leave out tensors that no model changed. Exact in two passes that hold no more than one
    block: the magnitudes are counted by their upper 16 bits, then those in the bin of the threshold
    are collected.
    """
    n = len(densities)
    counts = np.zeros((n, 1 << 15), dtype=np.int64)
    for i, bits in _magnitude_bits(rows()):
        counts[i] += np.bincount(bits >> 16, minlength=1 << 15)
    d = max(int(counts[0].sum()), entries or 0)
    left_out = d - counts.sum(axis=1)
    # among the entries that the rows have
    ranks = [d - int(density * d) for density in densities] - left_out
    bins = [-1] * n
    for i, rank in enumerate(ranks):
        if rank > 0:
            bins[i] = int(np.searchsorted(counts[i].cumsum(), rank))
    collected: list[list[np.ndarray]] = [[] for _ in range(n)]
    for i, bits in _magnitude_bits(rows()):
        collected[i].append(bits[bits >> 16 == bins[i]])
    cuts = []
    for i, parts in enumerate(collected):
        if densities[i] == 0:
            cuts.append(Cut(math.inf, -1, 0))
        elif ranks[i] <= 0:  # what is not above zero is zero
            cuts.append(Cut(0.0, -1, 0))
        else:
            below = counts[i, : bins[i]].sum()
            cut = _whole_cut(np.concatenate(parts), ranks[i] - below, d)
            cuts.append(cut)
    return cuts


def _whole_cut(bits: np.ndarray, rank: int, d: int) -> Cut:
    values = np.sort(bits).view(np.float32)  # fp32 sort as their bits do
    threshold = values[rank - 1]
    return Cut(float(threshold), d, int(np.count_nonzero(values == threshold)))


def _magnitude_bits(rows: Iterable[Taus]) -> Iterator[tuple[int, np.ndarray]]:
    """(model, bits of the magnitudes) of one block at a time."""
    for taus in rows:
        for i, tau in enumerate(taus):
            for _, (block,) in stacked([tau]):
                magnitudes = block.abs_().cpu().numpy()
                yield i, magnitudes.view(np.uint32)


# At random ---------------------------------------------------------------------------------------


def stream_seed(seed: int, rule: str, tensor: str, label: str) -> int:
    """Seed of one model's random stream in one tensor: independent of order, shards and device."""
    text = json.dumps([seed, rule, tensor, label])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def drop(block: Tensor, bits: np.random.PCG64, density: float) -> Tensor:
    """The block, each entry kept with probability `density` by the next bits of the stream."""
    # Raw bits: the one output that numpy promises never to change. Two 32-bit numbers a draw.
    pairs = bits.random_raw((block.numel() + 1) // 2)
    draws = pairs.view(np.uint32)[: block.numel()]
    kept = (draws < density * 2**32).view(np.uint8)
    return block * torch.from_numpy(kept).to(block).view(block.shape)


def drop_factor(tau: Tensor | Lazy, seed: int, density: float, rescale: str) -> float:
    """What the kept entries are multiplied by: 1 / density, which keeps the mean ("inverse"), or
    the factor that keeps the tensor's L1 norm ("l1", mergekit; 1 where a norm is below 1e-7).
    """
    if rescale == "inverse":
        return 1 / density if density > 0 else 0.0
    bits = np.random.PCG64(seed)
    before = after = 0.0
    for _, (block,) in stacked([tau]):
        block.abs_()
        before += float(block.sum())
        after += float(drop(block, bits, density).sum())
    return before / after if min(before, after) >= 1e-7 else 1.0
