"""How does a merge become a model on disk? base + delta in safetensors, complete or not there.

The merge streams: tensor by tensor from memory-mapped inputs into safetensors shards, so memory is
a few times the largest tensor, whatever the size of the model and the number of specialists. The
folder is written under another name and renamed when it is complete.
"""

import glob
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from helpers.merge import engine
from helpers.merge.blocks import BLOCK, row_blocks
from helpers.merge.card import model_card, name_of
from helpers.merge.fit import check
from helpers.merge.methods import METHODS, MergePlan, plan
from helpers.merge.recipe import DTYPES, Recipe
from helpers.merge.report import Report, summary
from helpers.merge.rounding import Grid, grid
from helpers.merge.surroundings import (
    TOKENIZER,
    belonging,
    copy_surroundings,
    losses,
    objections,
)
from helpers.merge.vectors import Row, Source, open_base, open_specialist, views

OWNER = ".owner.json"  # in a folder that is being written
CODES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.bool: "BOOL",
}
GB = 10**9
Layout = dict[str, tuple[torch.dtype, torch.Size]]


def merge_to_folder(
    recipe: Recipe,
    out: Path,
    shard_size: int = 5 * GB,
    device: str = "cpu",
    folder_of: Callable[[str], Path] = Path,
    force: bool = False,
) -> Report:
    """Carry a recipe out into the folder `out`; prints its cost first and shows progress.

    folder_of: gives the folder of a base or a model by the name that the recipe states. Everything
    that can be refused is refused (ValueError) before a tensor is read; with `force` a merge that
    means nothing (`surroundings.objections`) is not.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists: name another folder, or remove it")
    labels = [str(i) for i in range(1, len(recipe.models) + 1)]
    chosen = plan(
        recipe.method,
        labels,
        recipe.weights,
        recipe.seed,
        recipe.scale,
        **recipe.options,
    )
    engine.check_match(recipe.match)
    _check_device(device)
    base_folder = folder_of(recipe.base)
    folders = [folder_of(model) for model in recipe.models]
    tokenizer = _tokenizer_folder(recipe, base_folder, folders)
    base = open_base(base_folder)
    specialists = [open_specialist(*pair) for pair in zip(folders, labels, strict=True)]
    check(base, specialists, recipe.heads)
    models = list(zip(map(name_of, recipe.models), folders, specialists, strict=True))
    _check_meaning(objections(base, base_folder, models, recipe.heads), force)
    like = layout(base, DTYPES.get(recipe.dtype))
    _print_cost(recipe, like, out)
    _print_notes(base, losses(base_folder, tokenizer, models))
    rows = views(base, specialists, device, recipe.heads)
    if not rows:
        raise ValueError("no model differs from the base: there is nothing to merge")
    with _complete_or_absent(out) as part:
        if recipe.match:
            chosen = engine.matched(rows, chosen, recipe.match)
        copy_surroundings(base_folder, tokenizer, part, recipe.dtype)
        report = _write_merge(part, base, rows, chosen, like, shard_size, recipe.round)
        text = json.dumps(report.as_dict())
        (part / "merge_report.json").write_text(text + "\n", encoding="utf-8")
        card = model_card(recipe, report, out.name)
        (part / "README.md").write_text(card, encoding="utf-8")
    return report


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda, or one of several as cuda:1, not {device!r}")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= torch.cuda.device_count():
        raise ValueError(f"torch finds no device {device} on this machine: use cpu")


def _check_meaning(reasons: Iterable[str], force: bool) -> None:
    for reason in reasons:
        if not force:
            raise ValueError(f"{reason} (--force merges all the same)")
        print(f"forced: {reason}")


def _tokenizer_folder(recipe: Recipe, base: Path, folders: Sequence[Path]) -> Path:
    """Whose tokenizer and chat template the merge takes."""
    if recipe.tokenizer == "base":
        return base
    for model, folder in zip(recipe.models, folders, strict=True):
        if recipe.tokenizer in (model, name_of(model)):
            if not belonging(folder, TOKENIZER):
                raise ValueError(f"{model} has no tokenizer that the merge could take")
            return folder
    raise ValueError(f"--tokenizer {recipe.tokenizer} is neither base nor one of the models")


def _print_notes(base: Source, notes: Iterable[str]) -> None:
    if base.renamed:
        print(f"note: {base.renamed} tensors are named as {base.anatomy.architecture} loads them")
    if base.recomputed:
        print(f"note: {len(base.recomputed)} buffers that loading computes anew stay as they are")
    for note in notes:
        print(f"note: {note}")


@contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, renamed to `out` at the end or removed on failure.

    What killed merges into `out` have left is removed first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name[:40]}.part-"
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        if _is_dead(left):
            shutil.rmtree(left)
    part = out.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    part.mkdir()
    (part / OWNER).write_text(json.dumps(_owner(os.getpid())))
    try:
        yield part
        (part / OWNER).unlink()
        _rename(part, out)
    except BaseException:
        shutil.rmtree(part)
        raise


def _rename(part: Path, out: Path) -> None:
    try:
        part.rename(out)
    except OSError as error:
        raise ValueError(f"{out} was made by another process meanwhile: {error}") from error


def _owner(pid: int) -> dict[str, Any]:
    """What tells a process from any other, on this machine and others."""
    return {"host": platform.node(), "pid": pid, "started": psutil.Process(pid).create_time()}


def _is_dead(part: Path) -> bool:
    """Whether a folder was left by a merge on this machine that is no longer running."""
    try:
        owner = json.loads((part / OWNER).read_text())
        return owner["host"] == platform.node() and owner != _owner(owner["pid"])
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, KeyError, TypeError):  # not a merge's, or another host's
        return False


# What it will take -------------------------------------------------------------------------------


def working_memory(method: str, shapes: Collection[torch.Size]) -> int:
    """Bytes that a merge holds at its peak beside Python, torch and memory-mapped files."""
    blocks = 24 * 4 * BLOCK["cpu"]
    largest = max(shape.numel() for shape in shapes)
    return blocks + METHODS[method].memory * largest


def _print_cost(recipe: Recipe, like: Layout, out: Path) -> None:
    process = psutil.Process().memory_info()
    held = process.rss - getattr(process, "shared", 0)  # by Python and torch; not mapped files
    memory = held + working_memory(recipe.method, [shape for _, shape in like.values()])
    disk = sum(map(_bytes_of, like.values()))
    place = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    print(
        f"{recipe.method} of {len(recipe.models)} models: {disk / GB:.2f} GB on disk "
        f"({free / GB:.0f} GB free), {memory / GB:.2f} GB of memory ({held / GB:.2f} GB held now)"
    )
    if disk > free:
        raise ValueError(f"{place} has {free / GB:.1f} GB free, the merge needs {disk / GB:.1f} GB")


# The file ----------------------------------------------------------------------------------------


def layout(base: Source, dtype: torch.dtype | None) -> Layout:
    """Dtype and shape by name, sorted, of a merged model: floats as `dtype`, or as the base's."""
    entries = {}
    for name, stored in sorted(base.tensors.items()):
        cast = dtype and stored.is_floating_point()
        entries[name] = (dtype if cast else stored.dtype, stored.shape)
    return entries


def _bytes_of(entry: tuple[torch.dtype, torch.Size]) -> int:
    dtype, shape = entry
    return shape.numel() * dtype.itemsize


def _write_merge(
    out: Path,
    base: Source,
    rows: list[Row],
    chosen: MergePlan,
    like: Layout,
    shard_size: int,
    rounding: str,
) -> Report:
    def grid_of(name: str) -> Grid:
        return grid(like[name][0], name, rounding, chosen.seed)

    def coarse(name: str) -> Grid | None:
        return grid_of(name) if like[name][0].itemsize < 4 else None

    changed = {row.name for row in rows}
    records = []
    stream = engine.merge_tensors(rows, chosen, coarse)
    entries = sum(shape.numel() for _, shape in like.values())
    with tqdm(total=entries, desc=chosen.method, unit="", unit_scale=True, disable=None) as bar:

        def delta_of(name: str) -> Tensor | None:
            bar.update(like[name][1].numel())
            if name not in changed:
                return None
            _, delta, numbers = next(stream)
            records.append(numbers)
            return delta

        write_tensors(out, base, delta_of, like, shard_size, grid_of)
    return summary(chosen, records)


def write_tensors(
    out: Path,
    base: Source,
    delta_of: Callable[[str], Tensor | None],
    like: Layout,
    limit: int,
    grid_of: Callable[[str], Grid],
) -> None:
    """base + delta as safetensors in `out`, in shards of `limit` bytes.

    `delta_of(name)` is asked once for every tensor, in order; None leaves the tensor as it is.
    """
    sizes = {name: _bytes_of(entry) for name, entry in like.items()}
    parts = shards(sizes, limit)
    places = {}
    for number, names in enumerate(parts, 1):
        suffix = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        place = f"model{suffix}.safetensors"
        places |= dict.fromkeys(names, place)
        with (out / place).open("wb") as file:
            file.write(_header({name: like[name] for name in names}))
            for name in names:
                _write_tensor(file, name, base.tensors[name], delta_of(name), grid_of(name))
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


def _header(like: Layout) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in like.items():
        start = end
        end = start + _bytes_of((dtype, shape))
        entries[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(
    file: IO[bytes], name: str, stored: Tensor, delta: Tensor | None, grid: Grid
) -> None:
    """stored + delta, added in fp32 and rounded once, a block of rows at a time."""
    for rows, _ in row_blocks(stored.shape):
        block = stored[rows]
        if delta is not None:
            block = grid(block.float() + delta[rows].cpu())
        elif block.is_floating_point():
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
