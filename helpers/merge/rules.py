"""What does each merge rule compute? Formulas on the task vectors of one tensor.

With base theta_0, task vectors tau_i = theta_i - theta_0 and weights w_i, a rule gives the merged
delta of the tensor (the merged model is theta_0 + scale * delta; the papers' lambda is that scale):

    rule(taus, weights, *, options) -> Tensor of the same shape, fp32

Task vectors are dense tensors or `blocks.Lazy` ones. Most rules are stated for a block of rows:
they return a kernel, and `blockwise` makes a rule on whole tensors of it, of which only one block
of each task vector is dense at a time. `density` is the fraction kept, everywhere. Arithmetic is
fp32. Every rule here takes every tensor alike; those on singular values are in `spectral`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers.merge.blocks import Block, Kernel, Lazy, Taus, blockwise, gram_matrix
from helpers.merge.selection import Cut, cut_at, drop, drop_factor, magnitude_cut, share, trim

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


def _add_up(blocks: Sequence[Tensor], weights: Weights) -> Tensor:
    """sum_i w_i x_i, in order: one sum for all rules, so that equal merges have equal bits."""
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total.add_(block, alpha=weight)
    return total


@blockwise
def task_arithmetic(taus: Taus, weights: Weights) -> Kernel:
    """delta = sum_i w_i tau_i (Ilharco et al. 2023, eq. 1)."""
    return lambda blocks, _: _add_up(blocks, weights)


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


# Spherical interpolation -------------------------------------------------------------------------

SLERP_THRESHOLD = 0.9995  # mergekit's: above this |cosine| the interpolation is linear


class Arc(NamedTuple):
    """Where an interpolation ends, on_base * theta_0 + sum_i on_taus[i] * tau_i, and its steps."""

    on_base: float
    on_taus: list[float]
    steps: dict[str, int]  # how many were linear, how many spherical


def spherical(gram: np.ndarray, weights: Weights) -> tuple[np.ndarray, int]:
    """Coefficients of the iterated spherical interpolation of n points; number of linear steps.

    gram: (n, n) inner products of the points. Point i is reached from the interpolation of those
    before it at t = w_i / (w_1 + .. + w_i).
    """
    coefficients = np.eye(len(weights))[0]
    total = weights[0]
    linear_steps = 0
    for i in range(1, len(weights)):
        total += weights[i]
        t = weights[i] / total if total else 0.0
        square = max(coefficients @ gram @ coefficients, 0.0)  # of opposite points: 0 or below
        lengths = math.sqrt(square), math.sqrt(gram[i, i])
        cosine = 0.0
        if min(lengths) > 1e-8:
            cosine = coefficients @ gram[i] / (lengths[0] * lengths[1])
        linear_steps += abs(cosine) > SLERP_THRESHOLD
        before, after = _step(cosine, t)
        coefficients = before * coefficients
        coefficients[i] = after
    return coefficients, int(linear_steps)


def _step(cosine: float, t: float) -> tuple[float, float]:
    """What a and b are multiplied by at t of the way: (sin((1-t) angle), sin(t angle)) / sin(angle)
    with the angle between their directions, (1-t, t) where |cos| > 0.9995 (Shoemake 1985; threshold
    and raw points as mergekit).
    """
    if abs(cosine) > SLERP_THRESHOLD:
        return 1 - t, t
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


def model_arc(taus: Taus, weights: Weights, base: Tensor | Lazy) -> Arc:
    """The arc between the models theta_0 + tau_i."""
    n = len(taus)
    models = np.hstack([np.ones((n, 1)), np.eye(n)])
    gram = models @ gram_matrix([base, *taus]) @ models.T
    coefficients, lerp = spherical(gram, weights)
    on_base = 0.0 if lerp == n - 1 else float(coefficients.sum()) - 1
    return Arc(on_base, coefficients.tolist(), {"lerp": lerp, "slerp": n - 1 - lerp})


def task_arc(taus: Taus, weights: Weights) -> Arc:
    """The arc between the task vectors."""
    coefficients, lerp = spherical(gram_matrix(taus), weights)
    return Arc(0.0, coefficients.tolist(), {"lerp": lerp, "slerp": len(taus) - 1 - lerp})


@blockwise
def slerp(taus: Taus, weights: Weights, *, base: Tensor | Lazy, arc: Arc) -> Kernel:
    """Spherical interpolation of the models themselves, tensor by tensor, flattened (`spherical`).

    Two models by definition (t = w_2 / (w_1 + w_2)); more are taken one after the other. Where the
    models are close (|cos| > 0.9995) it is the weighted mean, by the very sum that `linear` takes.

    arc: `model_arc` of these models.
    """
    if arc.on_base == 0:
        return task_arithmetic.kernel(taus, arc.on_taus)
    coefficients = [*arc.on_taus, arc.on_base]
    return lambda blocks, at: _add_up([*blocks, base[at.rows]], coefficients)


@blockwise
def task_slerp(taus: Taus, weights: Weights, *, arc: Arc) -> Kernel:
    """Spherical interpolation of each tensor's task vectors (mergekit's nuslerp with a base).

    arc: `task_arc` of these task vectors.
    """
    return task_arithmetic.kernel(taus, arc.on_taus)


# Keep a few entries, then elect or add -----------------------------------------------------------


def disjoint_merge(kept: Sequence[Tensor], weights: Weights, combine: str = "mean") -> Tensor:
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
            middles.append(trim(block, lower, at.offset) - trim(block, upper, at.offset))
        return _add_up(middles, weights)

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
        return [drop(block, bits, kept).mul_(factor) for block, (bits, kept, factor) in pairs]

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
    return lambda blocks, _: _add_up(dropped(blocks), weights)


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
