"""What becomes of a number on a coarser grid? The nearest value there, or one of the two beside it.

A change smaller than half a step of the grid is lost to the nearest value, whatever it meant;
stochastic rounding keeps it on average, as noise.
"""

import numpy as np
import torch
from torch import Tensor

from helpers.merge.selection import stream_seed

MODES = ("nearest", "stochastic")


class Grid:
    """The way of one tensor's values onto the grid of `dtype`, a block after the other.

    seed: of stochastic rounding; None rounds to the nearest value, as torch casts.
    """

    def __init__(self, dtype: torch.dtype, seed: int | None = None):
        self.dtype = dtype
        self.is_coarse = dtype.itemsize < 4  # than fp32, in which a merge is made
        self.bits = None
        if seed is not None and dtype in (torch.bfloat16, torch.float16):
            self.bits = np.random.PCG64(seed)

    def __call__(self, values: Tensor) -> Tensor:
        if self.bits is None:
            return values.to(self.dtype)
        return _stochastic(values, self.dtype, self.bits)


def grid(dtype: torch.dtype, name: str, mode: str, seed: int) -> Grid:
    """The grid of one tensor; its random stream depends on the seed and its name alone."""
    if mode == "nearest":
        return Grid(dtype)
    return Grid(dtype, stream_seed(seed, "round", name, str(dtype)))


def _stochastic(values: Tensor, dtype: torch.dtype, bits: np.random.PCG64) -> Tensor:
    """One of the two neighbours on a 16-bit grid, the nearer one more often: right on average."""
    nearest = values.to(dtype)
    toward_zero = nearest.float().abs() > values.abs()
    # Of 16 bits, sign apart, the next code is the next magnitude.
    lower = nearest.view(torch.int16) - toward_zero.to(torch.int16)
    upper = lower + 1
    low = lower.view(dtype).float()
    step = upper.view(dtype).float() - low
    pairs = bits.random_raw((values.numel() + 1) // 2)
    draws = pairs.view(np.uint32)[: values.numel()]
    chance = torch.from_numpy(draws / 2.0**32).to(values)
    way = (values - low) / step
    up = way > chance.view(values.shape)
    rounded = torch.where(up, upper, lower).view(dtype)
    # what overflows is to be seen
    return torch.where(nearest.isfinite(), rounded, nearest)
