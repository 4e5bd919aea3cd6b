"""How is one tensor of many models held? Lazily, and dense only a block of rows at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Entries per block of rows: on a CPU the blocks in use, two more than models, fit the cache.
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}
PIECE = 1 << 16  # entries of an inner product that fp32 adds up


class Factors(NamedTuple):
    """A low-rank task vector `scaling * B @ A` of one (out, in) matrix: B (out, r), A (r, in)."""

    scaling: float
    B: Tensor
    A: Tensor


@dataclass(eq=False)
class Lazy:
    """A tensor that is dense (fp32) only in the rows asked for: `lazy[lo:hi]`, or `lazy[...]`."""

    shape: torch.Size
    device: str
    read: Callable[[Any], Tensor]
    factors: Factors | None = None

    def __getitem__(self, rows) -> Tensor:
        return self.read(rows)


Taus = Sequence[Tensor | Lazy]


def zero(shape: torch.Size, device: str = "cpu") -> Lazy:
    """The task vector of a specialist that left this tensor alone."""
    nothing = torch.zeros((), device=device).expand(shape)
    factors = Factors(1.0, nothing[:, :1], nothing[:1]) if len(shape) == 2 else None
    return Lazy(shape, device, lambda rows: nothing[rows].clone(), factors)


class Block(NamedTuple):
    """Rows of a tensor: what to index it by, and the flat index of their first entry."""

    rows: Any
    offset: int


def row_blocks(
    shape: torch.Size, device: str | torch.device = "cpu"
) -> Iterator[Block]:
    """Blocks of rows that stay in cache.

    The split depends on the shape alone, and every block but the last has an even number of
    entries.
    """
    numel = shape.numel()
    block = BLOCK.get(torch.device(device).type, 1 << 24)
    if numel <= block:
        yield Block(..., 0)
        return
    width = numel // shape[0]
    step = max(2, block // width // 2 * 2)
    for start in range(0, shape[0], step):
        end = min(start + step, shape[0])
        yield Block(slice(start, end), start * width)


# Rules that work block by block ------------------------------------------------------------------

# blocks of the task vectors -> block of the delta
Kernel = Callable[[list[Tensor], Block], Tensor]


def in_blocks(
    kernel: Kernel,
    taus: Taus,
    finish: Callable[[list[Tensor], Block], Tensor] = lambda blocks, at: blocks[-1],
) -> Tensor:
    """The dense result of a kernel on all blocks, or what `finish` makes of [*taus, result]."""
    shape = taus[0].shape
    result = None
    for block in row_blocks(shape, taus[0].device):
        parts = [tau[block.rows] for tau in taus]
        part = finish([*parts, kernel(parts, block)], block)
        if part.shape == shape:
            return part
        if result is None:
            result = torch.empty(shape, dtype=part.dtype, device=part.device)
        result[block.rows] = part
    return result


def blockwise(rule: Callable[..., Kernel]) -> Callable[..., Tensor]:
    """A rule on whole tensors from one that returns a kernel (kept as `.kernel`)."""

    @wraps(rule)
    def whole(taus: Taus, weights: Sequence[float], **options) -> Tensor:
        return in_blocks(rule(taus, weights, **options), taus)

    whole.kernel = rule
    return whole


def kernel_of(
    rule: Callable[..., Tensor], taus: Taus, weights: Sequence[float], **options
) -> Kernel:
    """The kernel of a rule; of one that has none, the rows of its result."""
    if hasattr(rule, "kernel"):
        return rule.kernel(taus, weights, **options)
    delta = rule(taus, weights, **options)
    return lambda blocks, at: delta[at.rows]


# Inner products ----------------------------------------------------------------------------------


def gram_matrix(tensors: Taus) -> np.ndarray:
    """All inner products <x_i, x_j> of n tensors of one shape, (n, n): see `products`."""
    blocks = row_blocks(tensors[0].shape, tensors[0].device)
    return sum(products([tensor[at.rows] for tensor in tensors]) for at in blocks)


def products(blocks: Sequence[Tensor]) -> np.ndarray:
    """All inner products of n dense tensors of one shape, (n, n): over PIECE entries in fp32, the
    sums of these in fp64.

    Within 1e-6 of the product of the norms. Each pair is a dot product of its own: a product of
    matrices as thin as these takes twice as long.
    """
    flat = [block.reshape(-1).float().split(PIECE) for block in blocks]
    if not blocks[0].is_cuda:  # where NumPy's dot is faster than torch's
        flat = [[piece.numpy() for piece in pieces] for pieces in flat]
    total = np.zeros((len(blocks), len(blocks)))
    for pieces in zip(*flat, strict=True):
        for i, x in enumerate(pieces):
            for j, y in enumerate(pieces[: i + 1]):
                total[i, j] += float(x @ y)
    lower = np.tril(total, -1)
    return total + lower.T
