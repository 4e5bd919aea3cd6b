"""How are tensors written that are made one at a time? Safetensors in shards, headers first."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from helpers.merge.blocks import row_blocks
from helpers.merge.rounding import Grid
from helpers.merge.sources import Source

CODES = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}
Layout = dict[str, tuple[torch.dtype, torch.Size]]  # of each tensor, by name, sorted


def layout(base: Source, dtype: torch.dtype | None) -> Layout:
    """Dtype and shape by name, sorted, of a merged model: floats as `dtype`, or as the base's."""
    entries = {}
    for name, stored in sorted(base.tensors.items()):
        cast = dtype and stored.is_floating_point()
        entries[name] = (dtype if cast else stored.dtype, stored.shape)
    return entries


def bytes_of(entry: tuple[torch.dtype, torch.Size]) -> int:
    dtype, shape = entry
    return shape.numel() * dtype.itemsize


def write_tensors(
    out: Path,
    base: Source,
    merged_of: Callable[[str], Tensor | None],
    like: Layout,
    limit: int,
    grid_of: Callable[[str], Grid],
    metadata: Mapping[str, str],
) -> None:
    """A merged model as safetensors in `out`, in shards of `limit` bytes, each with the metadata.

    `merged_of(name)` is asked once for every tensor, in order: its values on its grid, or None for
    the base's.
    """
    sizes = {name: bytes_of(entry) for name, entry in like.items()}
    parts = shards(sizes, limit)
    places = {}
    for number, names in enumerate(parts, 1):
        suffix = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        place = f"model{suffix}.safetensors"
        filed = {name: base.filed.get(name, name) for name in names}
        places |= dict.fromkeys(filed.values(), place)
        with (out / place).open("wb") as file:
            file.write(_header({filed[name]: like[name] for name in names}, metadata))
            for name in names:
                _write_tensor(
                    file, name, base.tensors[name], merged_of(name), grid_of(name)
                )
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        text = json.dumps(index, indent=2)
        (out / "model.safetensors.index.json").write_text(text + "\n")


def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, split so that no shard exceeds `limit` bytes unless one tensor does."""
    parts: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= size
    return parts


def _header(like: Layout, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    end = 0
    for name, (dtype, shape) in like.items():
        start = end
        end = start + bytes_of((dtype, shape))
        entries[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(
    file: IO[bytes], name: str, stored: Tensor, merged: Tensor | None, grid: Grid
) -> None:
    """The merged tensor or, where there is none, the stored one on the grid, a block at a time."""
    for at in row_blocks(stored.shape):
        block = stored[at.rows] if merged is None else merged[at.rows].cpu()
        if merged is None and block.is_floating_point():
            cast = block.to(grid.dtype)
            if not cast.isfinite().all():
                raise ValueError(_not_finite(name, block, grid.dtype))
            block = cast
        entries = block.contiguous().reshape(-1)
        file.write(entries.view(torch.uint8).numpy())


def _not_finite(name: str, block: Tensor, dtype: torch.dtype) -> str:
    if block.isfinite().all():
        return f"{name}: the base overflows {dtype}: write it in bfloat16 or float32"
    return f"{name}: the base holds NaN or infinite values"
