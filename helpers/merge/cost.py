"""What will a merge take? Its memory and disk, said before a tensor is read."""

import shutil
from collections.abc import Collection
from pathlib import Path

import psutil
import torch

from helpers.merge.blocks import BLOCK
from helpers.merge.plans import RULES
from helpers.merge.recipe import GB, Recipe
from helpers.merge.shards import Layout, bytes_of


def working_memory(
    rule: str,
    shapes: Collection[torch.Size],
    models: int = 8,
    svc: bool = False,
    threads: int = 1,
) -> int:
    """Bytes that a merge holds at its peak beside Python, torch and memory-mapped files.

    With threads, each has a tensor in the making, and one delta more waits to be written.
    """
    blocks = 4 * (16 + models) * BLOCK["cpu"]
    for shape in shapes:
        # a block is two whole rows
        if len(shape) > 1 and 2 * shape[1:].numel() > BLOCK["cpu"]:
            rows = min(shape[0], 2) * shape[1:].numel()
            blocks = max(blocks, 4 * (8 + models) * rows)
    entry = max(RULES[rule].memory, 28 if svc else 0)
    largest = sorted((shape.numel() for shape in shapes), reverse=True)
    waiting = 4 * sum(largest[threads : threads + 1]) if threads > 1 else 0
    return threads * blocks + entry * sum(largest[:threads]) + waiting


def print_cost(recipe: Recipe, like: Layout, place: Path, threads: int) -> None:
    process = psutil.Process().memory_info()
    # by Python and torch; not mapped files
    held = process.rss - getattr(process, "shared", 0)
    shapes = [shape for _, shape in like.values()]
    svc = recipe.svc is not None
    memory = held + working_memory(
        recipe.rule, shapes, len(recipe.models), svc, threads
    )
    disk = sum(map(bytes_of, like.values()))
    free = shutil.disk_usage(place).free
    print(
        f"{recipe.rule} of {len(recipe.models)} models: {disk / GB:.2f} GB on disk "
        f"({free / GB:.0f} GB free), {memory / GB:.2f} GB of memory ({held / GB:.2f} GB held now)"
    )
    if disk > free:
        raise ValueError(
            f"{place} has {free / GB:.1f} GB free, the merge needs {disk / GB:.1f} GB"
        )
