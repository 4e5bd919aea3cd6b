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
PIECE = 1 << 17  # entries of an inner product that fp32 adds up


class Factors(NamedTuple):
    """A low-rank task vector `scaling * B @ A` of one (out, in) matrix: B (out, r), A (r, in)."""

    scaling: float
    B: Tensor
    A: Tensor


@dataclass(eq=False)
class Lazy:
    """A tensor that is dense (fp32) only in the rows asked for: `lazy[lo:hi]`, or `lazy[...]`.

    read: gives these rows, as torch does in `out`, or in memory of their own where it is None.
    """

    shape: torch.Size
    device: str
    read: Callable[[Any, Tensor | None], Tensor]
    factors: Factors | None = None

    def __getitem__(self, rows) -> Tensor:
        return self.read(rows, None)


Taus = Sequence[Tensor | Lazy]


def zero(shape: torch.Size, device: str = "cpu") -> Lazy:
    """The task vector of a specialist that left this tensor alone."""
    nothing = torch.zeros((), device=device).expand(shape)
    factors = Factors(1.0, nothing[:, :1], nothing[:1]) if len(shape) == 2 else None

    def read(rows, out: Tensor | None) -> Tensor:
        return nothing[rows].clone() if out is None else out.zero_()

    return Lazy(shape, device, read, factors)


class Block(NamedTuple):
    """Rows of a tensor: what to index it by, the flat index of their first entry, their shape."""

    rows: Any
    offset: int
    shape: torch.Size


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
        yield Block(..., 0, shape)
        return
    width = numel // shape[0]
    step = max(2, block // width // 2 * 2)
    for start in range(0, shape[0], step):
        end = min(start + step, shape[0])
        part = torch.Size([end - start, *shape[1:]])
        yield Block(slice(start, end), start * width, part)


def stacked(tensors: Taus, free: int = 0) -> Iterator[tuple[Block, Tensor]]:
    """Each block of n tensors of one shape, flat, as the rows of a matrix, fp32; below these rows
    are `free` more.

    It is the same memory every time: to give it back and ask for it again would take as long as
    the arithmetic.
    """
    shape, device = tensors[0].shape, tensors[0].device
    blocks = list(row_blocks(shape, device))
    largest = blocks[0].shape.numel()
    memory = torch.empty(
        len(tensors) + free, largest, dtype=torch.float32, device=device
    )
    for at in blocks:
        stack = memory[:, : at.shape.numel()]
        for tensor, row in zip(tensors, stack, strict=False):
            block = row.view(at.shape)
            if isinstance(tensor, Lazy):
                tensor.read(at.rows, block)
            else:
                block.copy_(tensor[at.rows])
        yield at, stack


# Rules that work block by block ------------------------------------------------------------------

# blocks of the task vectors -> block of the delta
Kernel = Callable[[list[Tensor], Block], Tensor]


def in_blocks(
    kernel: Kernel,
    taus: Taus,
    finish: Callable[[Tensor, Block], Tensor] = lambda stack, at: stack[-2],
) -> Tensor:
    """The dense result of a kernel on all blocks, or what `finish` makes of it.

    finish: of a stack of the task vectors, the result and a free row, it gives a block, flat.
    """
    n = len(taus)
    result = None
    for at, stack in stacked(taus, free=2):
        blocks = [row.view(at.shape) for row in stack[:n]]
        stack[n].view(at.shape).copy_(kernel(blocks, at))
        part = finish(stack, at)
        if result is None:
            result = torch.empty(taus[0].shape, dtype=part.dtype, device=part.device)
        result.view(-1)[at.offset : at.offset + len(part)] = part
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
    return sum(products(stack) for _, stack in stacked(tensors))


def products(rows: Tensor) -> np.ndarray:
    """All inner products of the n rows of a matrix, (n, n): over PIECE entries in fp32, the sums of
    these in fp64.

    Within 1e-6 of the product of the norms.
    """
    pieces = rows.split(PIECE, dim=1)
    if rows.is_cuda:  # one transfer
        return sum((piece @ piece.T).double() for piece in pieces).cpu().numpy()
    return sum(_products(piece.numpy()) for piece in pieces)


def _products(rows: np.ndarray) -> np.ndarray:
    """The same of rows that fp32 can add up, in NumPy, which is as exact as PIECE promises.

    Row by row, half of them, as the whole product of so thin a matrix takes longer. By `dot`: `@`
    keeps other threads waiting.
    """
    n = len(rows)
    total = np.zeros((n, n))
    for i in range(n):
        total[i, : i + 1] = np.dot(rows[: i + 1], rows[i])
    lower = np.tril(total, -1)
    return total + lower.T
