"""The sums that conflict metrics are made of: every pair of models, in one pass over the tensors.

Most are Gram matrices of the stacked task vectors, one matrix product for all pairs; only sums of
|differences| are taken pair by pair. Sums are float64. Memory: one tensor of every model, and
blocks of BLOCK coordinates. CPU time: O(n) readings and selections and O(n^2) sums for n models.
"""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pdist

from helpers.merge import Lazy, Row, singular_triplets

BLOCK = 1 << 15  # coordinates at a time: a few MB for a dozen models
# share of each tensor's coordinates that counts as its largest; ties all count
DENSITY = 0.2


def pair_sums(
    rows: Iterable[Row], labels: Sequence[str], directions: int = 8
) -> pd.DataFrame:
    """The sums that METRICS are made of: one row per tensor and pair of models.

    Args:
        rows: (name, base, taus) per tensor, from `helpers.merge.vectors`; read once.
        labels: the models' names, in the order of `taus`.
        directions: how many leading singular directions are compared. They come from the factors of
            LoRA models, exactly and for little; models given as dense tensors take no part.

    Returns:
        Columns tensor, kind ("self_attn.q_proj"), layer (-1: none), task_a, task_b, and the sums.

    Raises:
        ValueError: fewer than two labels, or one twice; another number of task vectors; no tensor.
    """
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ValueError(
            f"two or more models with different labels are needed, got {list(labels)}"
        )
    pairs = pd.DataFrame(combinations(labels, 2), columns=["task_a", "task_b"])
    tables = []
    for name, _, taus in rows:
        if len(taus) != len(labels):
            raise ValueError(
                f"{name} has {len(taus)} task vectors for {len(labels)} labels"
            )
        sums = _coordinate_sums([tau[...].flatten() for tau in taus])
        sums |= _subspace_sums([_principal(tau, directions) for tau in taus])
        tables.append(pairs.assign(tensor=name, **_place(name), **sums))
    if not tables:
        raise ValueError(
            "there is no tensor to compare: the models do not differ from the base"
        )
    return pd.concat(tables, ignore_index=True)


def _place(name: str) -> dict[str, str | int]:
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    kind = name[number.end() :] if number else name
    layer = int(number[1]) if number else -1
    return {"kind": kind.removesuffix(".weight"), "layer": layer}


def _pairs(matrix: Tensor) -> np.ndarray:
    """Entries i < j of a matrix over models, in the order of itertools.combinations."""
    return matrix.cpu().numpy()[np.triu_indices(len(matrix), 1)]


def _coordinate_sums(taus: Sequence[Tensor]) -> dict[str, np.ndarray]:
    coordinates = len(taus[0])
    thresholds = torch.stack([_kth_largest(tau) for tau in taus])[:, None]
    total = _Totals(len(taus), taus[0].device)
    for start in range(0, coordinates, BLOCK):
        block = torch.stack([tau[start : start + BLOCK] for tau in taus])
        total.add(block, thresholds)
    return total.table(coordinates)


class _Totals:
    """Running sums over blocks of coordinates: (n, n) matrices over models, or one entry a pair."""

    def __init__(self, n: int, device: torch.device):
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.inner = zeros(n, n)
        # coordinates of one sign, less those of opposite signs
        self.signs = zeros(n, n)
        self.nonzero = zeros(n, n)  # coordinates where both are nonzero
        self.mass = zeros(n, n)  # |i| where j is not zero
        # |i| where j has its sign, less where it has the other
        self.signed_mass = zeros(n, n)
        self.largest = zeros(n, n)
        self.relative_gaps = zeros(n, n)
        self.difference = zeros(n * (n - 1) // 2)
        self.gap = zeros(n * (n - 1) // 2)

    def add(self, x: Tensor, thresholds: Tensor) -> None:
        size, signs = x.abs(), x.sign()
        nonzero = signs.abs()
        largest = ((size >= thresholds) & (size > 0)).float()
        self.signs += signs @ signs.T  # whole numbers below 2^24: exact in fp32
        self.nonzero += nonzero @ nonzero.T
        self.largest += largest @ largest.T
        self._add_relative_gaps(size)
        x, size = x.double(), size.double()
        self.inner += x @ x.T
        self.mass += size @ nonzero.double().T
        self.signed_mass += x @ signs.double().T
        self.difference += pdist(x, 1)
        self.gap += pdist(size, 1)

    def _add_relative_gaps(self, size: Tensor) -> None:
        """sum ||a| - |b|| / max(|a|, |b|); 0 / 0 counts as 0."""
        floor = size.clamp(min=torch.finfo(size.dtype).tiny)
        for i in range(len(size) - 1):
            ratio = torch.sub(size[i + 1 :], size[i]).abs_()
            ratio /= torch.maximum(floor[i + 1 :], floor[i])
            self.relative_gaps[i, i + 1 :] += ratio.sum(dim=1)

    def table(self, coordinates: int) -> dict[str, np.ndarray]:
        """The sums by name, one entry a pair."""
        i, j = np.triu_indices(len(self.inner), 1)
        square = self.inner.diagonal().cpu().numpy()
        l1 = self.mass.diagonal().cpu().numpy()
        largest = self.largest.diagonal().cpu().numpy()
        both = (square[i] > 0) & (square[j] > 0)
        norms = np.sqrt(np.where(both, square[i] * square[j], 1))
        opposite_mass = (self.mass - self.signed_mass) / 2
        return {
            "coordinates": np.full(len(i), coordinates),
            "opposite": _pairs(self.nonzero - self.signs) / 2,
            "opposite_mass": _pairs(opposite_mass + opposite_mass.T),
            "inner": _pairs(self.inner),
            "square_a": square[i],
            "square_b": square[j],
            "cosines": _pairs(self.inner) / norms,  # a zero task vector adds 0
            "tensors": both.astype(int),
            "l1_a": l1[i],
            "l1_b": l1[j],
            "l1_difference": self.difference.cpu().numpy(),
            "l1_gap": self.gap.cpu().numpy(),
            "relative_gaps": _pairs(self.relative_gaps),
            "top_a": largest[i],
            "top_b": largest[j],
            "top_shared": _pairs(self.largest),
            "top_expected": largest[i] * largest[j] / coordinates,
        }


def _kth_largest(tau: Tensor) -> Tensor:
    """Magnitude of the k-th largest coordinate, k = max(1, int(DENSITY * numel)), as TIES trims."""
    k = max(1, int(DENSITY * len(tau)))
    if tau.is_cuda:
        return tau.abs().topk(k, sorted=False).values.min()
    magnitudes = tau.abs().numpy()
    magnitudes.partition(len(tau) - k)  # several times as fast as torch's kthvalue
    return torch.tensor(magnitudes[len(tau) - k])


def _principal(tau: Tensor | Lazy, directions: int) -> tuple[Tensor, Tensor] | None:
    """Leading left and right singular vectors, (out, r) and (in, r); None without factors."""
    if getattr(tau, "factors", None) is None:
        return None
    # on the numerical rank: 0 for a zero vector
    left, _, right = singular_triplets([tau], [1.0])
    return left[:, :directions], right[:, :directions]


def _subspace_sums(
    bases: Sequence[tuple[Tensor, Tensor] | None],
) -> dict[str, np.ndarray]:
    rank = np.array([0 if basis is None else basis[0].shape[1] for basis in bases])
    i, j = np.triu_indices(len(bases), 1)
    sums = {"directions": np.minimum(rank[i], rank[j])}
    for side, name in enumerate(("left", "right")):
        present = [basis[side] for basis in bases if basis is not None]
        shared, size = np.zeros(len(i)), 1
        if present:
            shared = _shared(torch.cat(present, dim=1), rank)
            size = len(present[0])
        sums[f"{name}_shared"] = shared
        sums[f"{name}_expected"] = rank[i] * rank[j] / size
    return sums


def _shared(stacked: Tensor, rank: np.ndarray) -> np.ndarray:
    """||U_i' U_j||_F^2 of every pair, from all bases side by side."""
    owner = (
        torch.eye(len(rank)).repeat_interleave(torch.tensor(rank), dim=0).to(stacked)
    )
    squares = (stacked.T @ stacked).square()
    return _pairs(owner.T @ squares @ owner)
