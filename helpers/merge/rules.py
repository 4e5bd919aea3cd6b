"""What does each merge rule compute? Formulas on the task vectors of one tensor.

With base theta_0, task vectors tau_i = theta_i - theta_0 and weights w_i, a rule gives the merged
delta of the tensor (the merged model is theta_0 + scale * delta; the papers' lambda is that scale):

    rule(taus, weights, *, options) -> Tensor of the same shape, fp32

Task vectors are dense tensors or `blocks.Lazy` ones. Most rules are stated for a block of rows:
they return a kernel, and `blockwise` makes a rule on whole tensors of it, of which only one block
of each task vector is dense at a time. `density` is the fraction kept, everywhere. Arithmetic is
fp32. Every rule here takes every tensor alike; those on singular values are in `spectral`, those
that go along an arc in `spherical`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from helpers.merge.blocks import Block, Kernel, Taus, blockwise
from helpers.merge.selection import (
    Cut,
    cut_at,
    drop,
    drop_factor,
    magnitude_cut,
    share,
    trim,
)

# Options and their ranges: part of a rule's contract.
Fraction = Annotated[float, (0.0, 1.0)]
Scope = Literal["tensor", "model"]
Combine = Literal["mean", "sum"]
Rescale = Literal["inverse", "l1"]
Weights = Sequence[float]
Seeds = Sequence[int]  # one for each model


def each(value: float | Sequence[float], n: int) -> list[float]:
    """One value for each of n models."""
    return list(value) if isinstance(value, list | tuple) else [value] * n


# Weighted sums -----------------------------------------------------------------------------------


def add_up(blocks: Sequence[Tensor], weights: Weights) -> Tensor:
    """sum_i w_i x_i, in order: one sum for all rules, so that equal merges have equal bits."""
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total.add_(block, alpha=weight)
    return total


@blockwise
def task_arithmetic(taus: Taus, weights: Weights) -> Kernel:
    """delta = sum_i w_i tau_i (Ilharco et al. 2023, eq. 1)."""
    return lambda blocks, _: add_up(blocks, weights)


@blockwise
def linear(taus: Taus, weights: Weights) -> Kernel:
    """Model averaging: sum_i w_i theta_i / sum_i w_i, so delta = sum_i w_i tau_i / sum_i w_i.

    Equal weights: model soups (Wortsman et al. 2022); the minimax weights of the hidden states
    (`states.bound.minimax`): "chebyshev".
    """
    return task_arithmetic.kernel(taus, shares(weights))


def shares(weights: Weights) -> list[float]:
    """The weights divided by their sum, which is not zero (`plans.check_rule`)."""
    total = math.fsum(weights)
    return [w / total for w in weights]


# Keep a few entries, then elect or add -----------------------------------------------------------


def disjoint_merge(
    kept: Sequence[Tensor], weights: Weights, combine: str = "mean"
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
    total = torch.zeros_like(sign)
    weight_sum = torch.zeros_like(sign)
    for member, weight in zip(weighted, weights, strict=True):
        agreeing = torch.mul(member, sign).clamp_(min=0)
        total += agreeing
        weight_sum.add_(agreeing.sign_(), alpha=weight)
    if combine == "mean":
        nobody = torch.eq(weight_sum, 0, out=torch.empty_like(weight_sum))
        total /= weight_sum.add_(nobody)
    return total.mul_(sign)


def tensor_cuts(taus: Taus, density: float | Sequence[float]) -> list[Cut]:
    """Each model's cut in this tensor alone; density: one, or one for each."""
    pairs = zip(taus, each(density, len(taus)), strict=True)
    return [magnitude_cut(tau, kept) for tau, kept in pairs]


@blockwise
def ties(
    taus: Taus,
    weights: Weights,
    *,
    density: Fraction = 0.2,
    scope: Scope = "tensor",
    combine: Combine = "mean",
    cuts: Sequence[Cut] | None = None,
) -> Kernel:
    """TIES (Yadav et al. 2023, alg. 1): trim each task vector, elect signs, average who agrees.

    Trimming keeps the k = max(1, int(density * numel)) largest magnitudes of each tensor, as
    mergekit and PEFT do; with `scope="model"` the authors' one threshold over the whole model
    (`model_cuts`), given as `cuts`.
    """
    cuts = cuts or tensor_cuts(taus, density)

    def kernel(blocks: list[Tensor], at: Block) -> Tensor:
        pairs = zip(blocks, cuts, strict=True)
        trimmed = [trim(block, cut, at.offset) for block, cut in pairs]
        return disjoint_merge(trimmed, weights, combine)

    return kernel


@blockwise
def breadcrumbs(
    taus: Taus, weights: Weights, *, density: Fraction = 0.2, outliers: Fraction = 0.01
) -> Kernel:
    """Model breadcrumbs (Davari & Belilovsky 2023): sum_i w_i t_i with both tails masked.

    Of each tensor's magnitudes the int(outliers * numel) largest are dropped (fewer where `density`
    would not be reached), the next `density` kept, the rest dropped.
    """
    numel = taus[0].shape.numel()
    wide, narrow = [], []
    for tau, share_kept in zip(taus, each(density, len(taus)), strict=True):
        kept = share(share_kept, numel)
        top = min(int(outliers * numel), numel - kept)
        wide.append(cut_at(tau, top + kept))
        narrow.append(cut_at(tau, top))

    def kernel(blocks: list[Tensor], at: Block) -> Tensor:
        middles = []
        for block, lower, upper in zip(blocks, wide, narrow, strict=True):
            middles.append(
                trim(block, lower, at.offset) - trim(block, upper, at.offset)
            )
        return add_up(middles, weights)

    return kernel


# Drop at random ----------------------------------------------------------------------------------


def _dropping(
    taus: Taus, seeds: Sequence[int], density: float, rescale: str
) -> Callable[[list[Tensor]], list[Tensor]]:
    """A function of blocks, taken in order, that drops entries and rescales the rest."""
    streams = []
    for tau, seed, kept in zip(taus, seeds, each(density, len(taus)), strict=True):
        factor = drop_factor(tau, seed, kept, rescale)
        streams.append((np.random.PCG64(seed), kept, factor))

    def dropped(blocks: list[Tensor]) -> list[Tensor]:
        pairs = zip(blocks, streams, strict=True)
        return [
            drop(block, bits, kept).mul_(factor)
            for block, (bits, kept, factor) in pairs
        ]

    return dropped


@blockwise
def dare(
    taus: Taus,
    weights: Weights,
    *,
    seeds: Seeds,
    density: Fraction = 0.2,
    rescale: Rescale = "inverse",
) -> Kernel:
    """DARE (Yu et al. 2024): drop entries at random, rescale the rest, then sum_i w_i tau_i.

    seeds: one per model (`stream_seed`).
    """
    dropped = _dropping(taus, seeds, density, rescale)
    return lambda blocks, _: add_up(dropped(blocks), weights)


@blockwise
def dare_ties(
    taus: Taus,
    weights: Weights,
    *,
    seeds: Seeds,
    density: Fraction = 0.2,
    rescale: Rescale = "inverse",
    combine: Combine = "mean",
) -> Kernel:
    """DARE's drop in place of TIES' trim, then sign election as in TIES.

    PEFT takes the mean of the agreeing members; mergekit their sum and rescale="l1".
    """
    dropped = _dropping(taus, seeds, density, rescale)
    return lambda blocks, _: disjoint_merge(dropped(blocks), weights, combine)
