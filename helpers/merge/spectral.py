"""What do the rules on singular values compute? Formulas on matrices, never dense for adapters.

Same form as in `rules`. Embeddings are matrices too; of tensors that are none the plain mean.
Stacked experts are taken one by one.
Ranks are numerical: the papers' full spectrum would put most of a low-rank sum's energy into noise.
"""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

from helpers.merge.blocks import Lazy, Taus
from helpers.merge.rules import Fraction, Weights, linear, task_arithmetic


def singular_triplets(taus: Taus, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), s (r,), V (in, r) of sum_i w_i tau_i on its numerical rank r: s > 1e-5 s_1.

    Low-rank task vectors are never made dense: thin QR of the joint factors, then a small SVD, both
    on the CPU, which is done with matrices this narrow before a GPU has begun.
    """
    factors = [getattr(tau, "factors", None) for tau in taus]
    if None in factors:
        total = task_arithmetic(taus, weights)
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        right = right.T
    else:
        left, values, right = _of_factors(factors, weights)
    kept = values > 1e-5 * values[0]
    rank = int(kept.sum())
    return left[:, :rank], values[:rank], right[:, :rank]


def _of_factors(factors: Sequence, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    outs, ins = [], []
    for (scaling, B, A), weight in zip(factors, weights, strict=True):
        outs.append(B.double().cpu() * (weight * scaling))
        ins.append(A.double().cpu())
    q_out, r_out = torch.linalg.qr(torch.cat(outs, dim=1))
    q_in, r_in = torch.linalg.qr(torch.cat(ins).T)
    core = r_out @ r_in.T
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    return q_out @ left, values, q_in @ right.T


Rule = Callable[..., Tensor]


def _plain_mean(taus: Taus, weights: Weights) -> Tensor:
    return task_arithmetic(taus, [w / len(taus) for w in weights])


def on_matrices(rest: Rule) -> Callable[[Rule], Rule]:
    """A rule on matrices, on each matrix of a stack of experts; `rest` on all other tensors."""

    def decorate(rule: Rule) -> Rule:
        @wraps(rule)
        def whole(
            taus: Taus, weights: Weights, *, stacked: bool = False, **options
        ) -> Tensor:
            if len(taus[0].shape) == 2:
                return rule(taus, weights, **options)
            if not stacked:
                return rest(taus, weights)
            of_each = []
            for i in range(taus[0].shape[0]):
                of_each.append(rule([tau[i] for tau in taus], weights, **options))
            return torch.stack(of_each)

        return whole

    return decorate


@on_matrices(_plain_mean)
def iso_c(taus: Taus, weights: Weights) -> Tensor:
    """Iso-C (Marczak et al. 2025): sum_i w_i tau_i, its singular values set to their mean."""
    left, values, right = singular_triplets(taus, weights)
    level = values.mean() if len(values) else 0.0
    return _product(left, right, taus[0].device).mul_(level).float()


@on_matrices(_plain_mean)
def iso_cts(taus: Taus, weights: Weights, *, common: Fraction = 0.8) -> Tensor:
    """Iso-CTS (Marczak et al. 2025): of the sum's rank, the share `common` of its leading
    directions; for the rest, as many of each w_i tau_i outside them; decorrelated, with the mean of
    all kept singular values for each.
    """
    left, values, right = singular_triplets(taus, weights)
    n, rank = len(taus), len(values)
    own = min(round((rank - int(rank * common)) / n), rank // n)
    leading = _first((left, values, right), rank - own * n)
    shared = leading[0]
    kept = [leading]
    for tau, weight in zip(taus, weights, strict=True):
        triplets = singular_triplets([_outside(tau, shared)], [weight])
        kept.append(_first(triplets, own))
    lefts, values, rights = _side_by_side(kept)
    level = values.mean() if len(values) else 0.0
    directions = _product(_decorrelated(lefts), _decorrelated(rights), taus[0].device)
    return directions.mul_(level).float()


def _outside(tau: Tensor | Lazy, shared: Tensor) -> Tensor | Lazy:
    """A task vector without its part in the span of orthonormal columns; factors stay factors."""
    factors = getattr(tau, "factors", None)
    if factors is None:
        dense = tau[...]
        shared = shared.to(dense)
        return dense - shared @ (shared.T @ dense)
    B = factors.B.double().cpu()
    shared = shared.double().cpu()
    outside = factors._replace(B=B - shared @ (shared.T @ B))
    return Lazy(tau.shape, tau.device, tau.read, outside)


@on_matrices(_plain_mean)
def tsv(taus: Taus, weights: Weights) -> Tensor:
    """Task singular vectors, TSV-M (Gargiulo et al. 2025): keep rank(tau_i) / n triplets of each
    w_i tau_i (at least one), decorrelate the kept left and right vectors across models, recompose.
    """
    kept = []
    for tau, weight in zip(taus, weights, strict=True):
        triplets = singular_triplets([tau], [weight])
        rank = len(triplets[1])
        kept.append(_first(triplets, max(1, rank // len(taus))))
    lefts, values, rights = _side_by_side(kept)
    outer = _decorrelated(lefts) * values
    return _product(outer, _decorrelated(rights), taus[0].device).float()


@on_matrices(linear)
def actmerge(taus: Taus, weights: Weights) -> Tensor:
    """ActMerge (2604.01329): RegMean's least squares, a task vector's own Gram matrix in place of
    its inputs': (sum_i w_i tau_i G_i) (sum_i w_i G_i)^+ with G_i = tau_i' tau_i.

    The pseudoinverse counts singular values above 1e-5 of the largest.
    """
    total = moved = 0.0
    for tau, weight in zip(taus, weights, strict=True):
        dense = tau[...].double()
        gram = weight * (dense.T @ dense)
        total = total + gram
        moved = moved + dense @ gram
    return (moved @ torch.linalg.pinv(total, rtol=1e-10, hermitian=True)).float()


def svc(delta: Tensor, taus: Taus, alpha: float = 1.0) -> Tensor:
    """Singular value calibration (2602.05536, alg. 1) of any merge: s_r of its SVD times gamma_r =
    n / sum_i max(alpha, s_ri), s_ri = <u_r' delta, u_r' tau_i> / ||u_r' tau_i||^2.

    What several models share is counted once: s_ri > 1 where the merge goes further than model i.
    The authors' code takes max(alpha, mean_i s_ri) instead, and 1 where some s_ri is negative.
    """
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    factors = torch.zeros_like(values)
    for tau in taus:
        own = left.T @ tau[...]
        square = own.square().sum(1)
        product = (values[:, None] * right * own).sum(1)
        along = product / square.clamp(min=1e-30)
        factors += torch.where(square > 0, along, 0).clamp(min=alpha)
    calibrated = values * len(taus) / factors
    return (left * calibrated) @ right


def _first(triplets: Sequence[Tensor], rank: int) -> list[Tensor]:
    return [part[..., :rank] for part in triplets]


def _side_by_side(sets: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Left vectors, values and right vectors of several sets of triplets."""
    return [torch.cat(parts, dim=-1) for parts in zip(*sets, strict=True)]


def _product(left: Tensor, right: Tensor, device: str | torch.device) -> Tensor:
    return left.to(device) @ right.to(device).T


def _decorrelated(columns: Tensor) -> Tensor:
    """The nearest orthonormal set: P Q' of the SVD P D Q'."""
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    return left @ right
