"""What do the rules on singular values compute? Formulas on matrices, never dense for adapters.

Same form as in `rules`. Embeddings are matrices too; of tensors that are none the plain mean.
Ranks are numerical: the papers' full spectrum would put most of a low-rank sum's energy into noise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.merge.blocks import Taus
from helpers.merge.rules import task_arithmetic


def singular_triplets(taus: Taus, weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
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
    rank = int((values > 1e-5 * values[0]).sum())
    return left[:, :rank], values[:rank], right[:, :rank]


def _of_factors(factors: Sequence, weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    outs, ins = [], []
    for (scaling, B, A), weight in zip(factors, weights, strict=True):
        outs.append(B.double().cpu() * (weight * scaling))
        ins.append(A.double().cpu())
    q_out, r_out = torch.linalg.qr(torch.cat(outs, dim=1))
    q_in, r_in = torch.linalg.qr(torch.cat(ins).T)
    left, values, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    return q_out @ left, values, q_in @ right.T


def iso_c(taus: Taus, weights: Sequence[float]) -> Tensor:
    """Iso-C (Marczak et al. 2025): sum_i w_i tau_i, all singular values set to their mean."""
    if len(taus[0].shape) != 2:
        return _plain_mean(taus, weights)
    left, values, right = singular_triplets(taus, weights)
    level = values.mean() if len(values) else 0.0
    return _product(left, right, taus[0].device).mul_(level).float()


def tsv(taus: Taus, weights: Sequence[float]) -> Tensor:
    """Task singular vectors, TSV-M (Gargiulo et al. 2025): keep rank(tau_i) / n triplets of each
    w_i tau_i (at least one), decorrelate the kept left and right vectors across models, recompose.
    """
    if len(taus[0].shape) != 2:
        return _plain_mean(taus, weights)
    kept = []
    for tau, weight in zip(taus, weights, strict=True):
        triplets = singular_triplets([tau], [weight])
        rank = max(1, len(triplets[1]) // len(taus))
        kept.append([part[..., :rank] for part in triplets])
    lefts, values, rights = (torch.cat(parts, dim=-1) for parts in zip(*kept, strict=True))
    outer = _decorrelated(lefts) * values
    return _product(outer, _decorrelated(rights), taus[0].device).float()


def _plain_mean(taus: Taus, weights: Sequence[float]) -> Tensor:
    return task_arithmetic(taus, [w / len(taus) for w in weights])


def _product(left: Tensor, right: Tensor, device: str | torch.device) -> Tensor:
    return left.to(device) @ right.to(device).T


def _decorrelated(columns: Tensor) -> Tensor:
    """The nearest orthonormal set: P Q' of the SVD P D Q'."""
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    return left @ right
