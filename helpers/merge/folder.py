"""How does a merge become a model on disk? base + delta in safetensors, complete or not there.

The merge streams: tensor by tensor from memory-mapped inputs into safetensors shards, so memory is
a few times the largest tensor, whatever the size of the model and the number of specialists. The
folder is written under another name and renamed when it is complete.
"""

import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from helpers.merge import engine
from helpers.merge.blocks import BLOCK, row_blocks
from helpers.merge.card import model_card
from helpers.merge.methods import METHODS, MergePlan, plan
from helpers.merge.recipe import DTYPES, Recipe
from helpers.merge.report import Report, summary
from helpers.merge.vectors import Row, Source, check, open_base, open_specialist, views
from helpers.merge.weights import PICKLES, read_json

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
) -> Report:
    """Carry a recipe out into the folder `out`; prints its cost first and shows progress.

    folder_of: gives the folder of a base or a model by the name that the recipe states. Everything
    that can be refused is refused (ValueError) before a tensor is read.
    """
    if out.exists():
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
    base = open_base(base_folder)
    models = zip(recipe.models, labels, strict=True)
    specialists = [open_specialist(folder_of(model), label) for model, label in models]
    like = layout(base, DTYPES.get(recipe.dtype))
    check(base, specialists)
    _print_cost(recipe, like, out)
    rows = views(base, specialists, device)
    with _complete_or_absent(out) as part:
        if recipe.match:
            chosen = engine.matched(rows, chosen, recipe.match)
        _copy_surroundings(base_folder, part, recipe.dtype)
        report = _write_merge(part, base, rows, chosen, like, shard_size)
        text = json.dumps(report.as_dict())
        (part / "merge_report.json").write_text(text + "\n")
        (part / "README.md").write_text(model_card(recipe, report, out.name))
    return report


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda, or one of several as cuda:1, not {device!r}")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= torch.cuda.device_count():
        raise ValueError(f"torch finds no device {device} on this machine: use cpu")


@contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, renamed to `out` at the end or removed on failure.

    What killed merges into `out` have left is removed first.
    """
    prefix = f".{out.name}.part-"
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        process = left.name.removeprefix(prefix)
        running = process != str(os.getpid()) and psutil.pid_exists(int(process))
        if not running:
            shutil.rmtree(left)
    part = out.parent / f"{prefix}{os.getpid()}"
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part)
        raise


def _copy_surroundings(base: Path, out: Path, dtype: str | None) -> None:
    """Config, tokenizer and licence of the base: no weights, no code, no seals of the base."""
    for file in sorted(base.iterdir()):
        weights = file.suffix in (".safetensors", ".gguf", *PICKLES)
        about = file.name.endswith(".index.json") or file.name in ("base.json", "seals.json")
        code_or_card = file.suffix in (".py", ".md") or file.name.startswith(".")
        if file.is_file() and not (weights or about or code_or_card):
            shutil.copyfile(file, out / file.name)
    if dtype is not None:
        file = out / "config.json"
        config = read_json(file)
        config.pop("torch_dtype", None)  # its name before transformers 5
        config["dtype"] = dtype
        file.write_text(json.dumps(config, indent=2) + "\n")


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
) -> Report:
    changed = {row.name for row in rows}
    records = []
    stream = engine.merge_tensors(rows, chosen)
    entries = sum(shape.numel() for _, shape in like.values())
    with tqdm(total=entries, desc=chosen.method, unit="", unit_scale=True, disable=None) as bar:

        def delta_of(name: str) -> Tensor | None:
            bar.update(like[name][1].numel())
            if name not in changed:
                return None
            _, delta, numbers = next(stream)
            records.append(numbers)
            return delta

        write_tensors(out, base, delta_of, like, shard_size)
    return summary(chosen, records)


def write_tensors(
    out: Path,
    base: Source,
    delta_of: Callable[[str], Tensor | None],
    like: Layout,
    limit: int,
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
                _write_tensor(file, base.tensors[name], delta_of(name), like[name][0])
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


def _write_tensor(file: IO[bytes], stored: Tensor, delta: Tensor | None, dtype: torch.dtype):
    """stored + delta, added in fp32 and cast once, a block of rows at a time."""
    for rows, _ in row_blocks(stored.shape):
        block = stored[rows]
        if delta is not None:
            block = block.float() + delta[rows].cpu()
        entries = block.to(dtype).contiguous().reshape(-1)
        file.write(entries.view(torch.uint8).numpy())
