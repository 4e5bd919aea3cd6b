"""How do task vectors disagree? Every pair of models, in one pass over the stream of tensors.

Each metric is a ratio of sums over coordinates. So a tensor is looked at once and its sums are kept
(one row per tensor and pair); layers, tensor kinds and whole models are the same ratios of added-up
sums. Sums are float64. Most are Gram matrices of the stacked task vectors, one matrix product for
all pairs; only sums of |differences| are taken pair by pair. Memory: one tensor of every model, and
blocks of BLOCK coordinates. CPU time: O(n) readings and selections and O(n^2) sums for n models.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pdist

from helpers.merge import Lazy, Row, singular_triplets

BLOCK = 1 << 15  # coordinates at a time: a few MB for a dozen models
WHERE = ["tensor", "kind", "layer", "task_a", "task_b"]
SQUARES = ["square_a", "square_b"]


class Metric(NamedTuple):
    """A metric as data: its meaning for two flattened task vectors a and b, its formula on sums."""

    meaning: str
    formula: Callable[[pd.DataFrame], pd.Series]
    conflict: bool | None = None  # True: larger is more conflict; False: agreement; None: neither


def _distance2(s: pd.DataFrame) -> pd.Series:
    return s.square_a + s.square_b - 2 * s.inner


# The first four are the study's primary readings of the metrics of arXiv:2603.09463, which gives
# them in words; the others are its sensitivity family and its rivals.
METRICS = {
    "sign_change": Metric(
        "share of coordinates with a b < 0",
        lambda s: s.opposite / s.coordinates,
        True,
    ),
    "magnitude_change": Metric(
        "sum |a - b| / sum (|a| + |b|)",
        lambda s: s.l1_difference / (s.l1_a + s.l1_b),
        True,
    ),
    "conflict_magnitude": Metric(
        "share of sum (|a| + |b|) on coordinates with a b < 0",
        lambda s: s.opposite_mass / (s.l1_a + s.l1_b),
        True,
    ),
    "cosine": Metric(
        "<a, b> / (||a|| ||b||)",
        lambda s: s.inner / np.sqrt(s.square_a * s.square_b),
        False,
    ),
    "cosine_tensors": Metric(
        "mean of the cosines of single tensors",
        lambda s: s.cosines / s.tensors,
        False,
    ),
    "magnitude_gap": Metric(
        "sum ||a| - |b|| / sum max(|a|, |b|)",
        lambda s: 2 * s.l1_gap / (s.l1_a + s.l1_b + s.l1_gap),
        True,
    ),
    "relative_gap": Metric(
        "mean over coordinates of ||a| - |b|| / max(|a|, |b|)",
        lambda s: s.relative_gaps / s.coordinates,
        True,
    ),
    "conflict_min": Metric(
        "share of sum min(|a|, |b|) on coordinates with a b < 0",
        lambda s: (s.l1_difference - s.l1_gap) / (s.l1_a + s.l1_b - s.l1_gap),
        True,
    ),
    "norm_ratio": Metric(
        "smaller norm / larger norm",
        lambda s: np.sqrt(s[SQUARES].min(axis=1) / s[SQUARES].max(axis=1)),
    ),
    "top_overlap": Metric(
        "shared part of the largest coordinates of each tensor",
        lambda s: 2 * s.top_shared / (s.top_a + s.top_b),
    ),
    "top_chance": Metric(
        "the same for sets drawn independently",
        lambda s: 2 * s.top_expected / (s.top_a + s.top_b),
    ),
    "left_overlap": Metric(
        "||U_a' U_b||_F^2 / r, leading left singular vectors (output space)",
        lambda s: s.left_shared / s.directions,
    ),
    "left_chance": Metric(
        "the same for random subspaces",
        lambda s: s.left_expected / s.directions,
    ),
    "right_overlap": Metric(
        "||V_a' V_b||_F^2 / r, leading right singular vectors (input space)",
        lambda s: s.right_shared / s.directions,
    ),
    "right_chance": Metric(
        "the same for random subspaces",
        lambda s: s.right_expected / s.directions,
    ),
    "variance": Metric(
        "variance of (a, b), mean over coordinates: PRISM (arXiv:2610.03199), raw",
        lambda s: _distance2(s) / (4 * s.coordinates),
        True,
    ),
    "variance_share": Metric(
        "PRISM relative to the mean square: 0 equal, 1/2 orthogonal, 1 opposite",
        lambda s: _distance2(s) / (2 * (s.square_a + s.square_b)),
        True,
    ),
    "norm_a": Metric("||a||", lambda s: np.sqrt(s.square_a)),
    "norm_b": Metric("||b||", lambda s: np.sqrt(s.square_b)),
}
PRIMARY = tuple(METRICS)[:4]


def pair_metrics(
    rows: Iterable[Row], labels: Sequence[str], by: Sequence[str] = (), density: float = 0.2
) -> pd.DataFrame:
    """All METRICS of all pairs of models in one pass over `rows`; arguments as below."""
    return metrics(pair_sums(rows, labels, density), by)


def metrics(sums: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """METRICS of every pair; `by` = "layer", "kind" or "tensor" tells those apart, too.

    A ratio with nothing below the line (a zero task vector, no low-rank matrix) is NaN.
    """
    parts = [column for column in sums if column not in WHERE]
    total = sums.groupby(["task_a", "task_b", *by], sort=False)[parts].sum()
    values = {name: metric.formula(total) for name, metric in METRICS.items()}
    return pd.DataFrame(values).reset_index()


def group_variance(pairs: pd.DataFrame, members: Sequence[str], relative: bool = False) -> float:
    """PRISM's interference score of n task vectors, from the table of their pairs.

    Variance across the models, mean over coordinates: sum_i ||tau_i - mean||^2 / (n d), which is
    sum_{i<j} ||tau_i - tau_j||^2 / (n^2 d). `relative` divides it by the mean square coordinate: 0
    if all are equal, 1 - 1/n if they are orthogonal, at most 1. The summary of arXiv:2610.03199
    leaves the normalisation open; its 5 destructive and 15 harmless merges split at 1.9e-3.

    Raises:
        ValueError: unless every pair of members is there once.
    """
    n = len(members)
    inside = pairs[pairs.task_a.isin(members) & pairs.task_b.isin(members)]
    if n < 2 or len(inside) != n * (n - 1) // 2:
        raise ValueError(f"{n} members have {n * (n - 1) // 2} pairs, but {len(inside)} are given")
    if not relative:
        return float(4 / n**2 * inside.variance.sum())
    square = inside.norm_a**2 + inside.norm_b**2  # every model counts in n - 1 pairs
    return float(2 * (n - 1) / n * (inside.variance_share * square).sum() / square.sum())


def pair_sums(
    rows: Iterable[Row], labels: Sequence[str], density: float = 0.2, directions: int = 8
) -> pd.DataFrame:
    """The sums that METRICS are made of: one row per tensor and pair of models.

    Args:
        rows: (name, base, taus) per tensor, from `helpers.vectors.views` or `stream`; read once.
        labels: the models' names, in the order of `taus`.
        density: share of each tensor's coordinates that counts as its largest; ties all count.
        directions: how many leading singular directions are compared. They come from the factors of
            LoRA models, exactly and for little; models given as dense tensors take no part.

    Returns:
        Columns tensor, kind ("self_attn.q_proj"), layer (-1: none), task_a, task_b, and the sums.

    Raises:
        ValueError: fewer than two labels, or one twice; another number of task vectors; no tensor.
    """
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ValueError(f"two or more models with different labels are needed, got {list(labels)}")
    pairs = pd.DataFrame(combinations(labels, 2), columns=["task_a", "task_b"])
    tables = []
    for name, _, taus in rows:
        if len(taus) != len(labels):
            raise ValueError(f"{name} has {len(taus)} task vectors for {len(labels)} labels")
        sums = _coordinate_sums([tau[...].flatten() for tau in taus], density)
        sums |= _subspace_sums([_principal(tau, directions) for tau in taus])
        tables.append(pairs.assign(tensor=name, **_place(name), **sums))
    if not tables:
        raise ValueError("there is no tensor to compare: the models do not differ from the base")
    return pd.concat(tables, ignore_index=True)


def _place(name: str) -> dict[str, str | int]:
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    kind = name[found.end() :] if found else name
    return {"kind": kind.removesuffix(".weight"), "layer": int(found[1]) if found else -1}


def _pairs(matrix: Tensor) -> np.ndarray:
    """Entries i < j of a matrix over models, in the order of itertools.combinations."""
    return matrix.cpu().numpy()[np.triu_indices(len(matrix), 1)]


def _coordinate_sums(taus: Sequence[Tensor], density: float) -> dict[str, np.ndarray]:
    n, coordinates, device = len(taus), len(taus[0]), taus[0].device
    thresholds = torch.stack([_kth_largest(tau, density) for tau in taus])[:, None]
    inner, sign, live, mass, signed_mass, top, relative = torch.zeros(
        7, n, n, dtype=torch.float64, device=device
    )
    difference, gap = torch.zeros(2, n * (n - 1) // 2, dtype=torch.float64, device=device)
    for start in range(0, coordinates, BLOCK):
        x = torch.stack([tau[start : start + BLOCK] for tau in taus])
        size = x.abs()
        signs = x.sign()
        nonzero = signs.abs()
        largest = ((size >= thresholds) & (size > 0)).float()
        sign += signs @ signs.T  # whole numbers below 2^24: exact in fp32
        live += nonzero @ nonzero.T
        top += largest @ largest.T
        _add_relative_gaps(relative, size)
        x, size = x.double(), size.double()
        inner += x @ x.T
        mass += size @ nonzero.double().T  # of i, where j is not zero
        signed_mass += x @ signs.double().T  # of i, where j has its sign, less where the other
        difference += pdist(x, 1)
        gap += pdist(size, 1)

    opposite_mass = (mass - signed_mass) / 2
    i, j = np.triu_indices(n, 1)
    square, l1, count = (m.diagonal().cpu().numpy() for m in (inner, mass, top))
    both = (square[i] > 0) & (square[j] > 0)
    norms = np.sqrt(np.where(both, square[i] * square[j], 1))
    return {
        "coordinates": np.full(len(i), coordinates),
        "opposite": _pairs(live - sign) / 2,
        "opposite_mass": _pairs(opposite_mass + opposite_mass.T),
        "inner": _pairs(inner),
        "square_a": square[i],
        "square_b": square[j],
        "cosines": _pairs(inner) / norms,  # a zero task vector adds 0
        "tensors": both.astype(int),
        "l1_a": l1[i],
        "l1_b": l1[j],
        "l1_difference": difference.cpu().numpy(),
        "l1_gap": gap.cpu().numpy(),
        "relative_gaps": _pairs(relative),
        "top_a": count[i],
        "top_b": count[j],
        "top_shared": _pairs(top),
        "top_expected": count[i] * count[j] / coordinates,
    }


def _kth_largest(tau: Tensor, density: float) -> Tensor:
    """Magnitude of the k-th largest coordinate, k = max(1, int(density * numel)), as TIES trims."""
    k = max(1, int(density * len(tau)))
    if tau.is_cuda:
        return tau.abs().topk(k, sorted=False).values.min()
    magnitudes = tau.abs().numpy()
    magnitudes.partition(len(tau) - k)  # several times as fast as torch's kthvalue
    return torch.tensor(magnitudes[len(tau) - k])


def _add_relative_gaps(total: Tensor, size: Tensor) -> None:
    """Add sum ||a| - |b|| / max(|a|, |b|) over a block to total[i, j], i < j; 0 / 0 counts as 0."""
    floor = size.clamp(min=torch.finfo(size.dtype).tiny)
    for i in range(len(size) - 1):
        ratio = torch.sub(size[i + 1 :], size[i]).abs_()
        ratio /= torch.maximum(floor[i + 1 :], floor[i])
        total[i, i + 1 :] += ratio.sum(dim=1)


def _principal(tau: Tensor | Lazy, directions: int) -> tuple[Tensor, Tensor] | None:
    """Leading left and right singular vectors, (out, r) and (in, r); None without factors."""
    if getattr(tau, "factors", None) is None:
        return None
    left, _, right = singular_triplets([tau], [1.0])  # on the numerical rank: 0 for a zero vector
    return left[:, :directions], right[:, :directions]


def _subspace_sums(bases: Sequence[tuple[Tensor, Tensor] | None]) -> dict[str, np.ndarray]:
    rank = np.array([0 if basis is None else basis[0].shape[1] for basis in bases])
    i, j = np.triu_indices(len(bases), 1)
    sums = {"directions": np.minimum(rank[i], rank[j])}
    for side, at in (("left", 0), ("right", 1)):
        sums[f"{side}_shared"] = sums[f"{side}_expected"] = np.zeros(len(i))
        present = [basis[at] for basis in bases if basis is not None]
        if present:
            stacked = torch.cat(present, dim=1)
            owner = torch.eye(len(bases)).repeat_interleave(torch.tensor(rank), dim=0)
            owner = owner.to(stacked)
            shared = owner.T @ (stacked.T @ stacked).square() @ owner
            sums[f"{side}_shared"] = _pairs(shared)
            sums[f"{side}_expected"] = rank[i] * rank[j] / len(stacked)
    return sums
