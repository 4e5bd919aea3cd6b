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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from helpers.merge import engine
from helpers.merge.anatomy import config_of
from helpers.merge.blocks import BLOCK
from helpers.merge.card import model_card, name_of
from helpers.merge.fit import check
from helpers.merge.methods import METHODS, MergePlan, depths, layers_of, plan
from helpers.merge.recipe import DTYPES, Recipe, flat, is_layered, numbers
from helpers.merge.report import Report, summary
from helpers.merge.rounding import Grid, grid
from helpers.merge.shards import Layout, bytes_of, layout, write_tensors
from helpers.merge.surroundings import (
    TOKENIZER,
    belonging,
    copy_surroundings,
    losses,
    objections,
)
from helpers.merge.vectors import Row, Source, open_base, open_specialist, views

OWNER = ".owner.json"  # in a folder that is being written
GB = 10**9


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
    chosen = _plan(recipe)
    engine.check_match(recipe.match)
    _check_device(device)
    base_folder = folder_of(recipe.base)
    folders = [folder_of(model) for model in recipe.models]
    tokenizer = _tokenizer_folder(recipe, base_folder, folders)
    base = open_base(base_folder)
    specialists = [open_specialist(*pair) for pair in zip(folders, chosen.labels, strict=True)]
    check(base, specialists, recipe.heads)
    models = list(zip(map(name_of, recipe.models), folders, specialists, strict=True))
    _check_meaning(objections(base, base_folder, models, recipe.heads), force)
    like = layout(base, DTYPES.get(recipe.dtype))
    chosen = _by_tensor(recipe, chosen, base, base_folder)
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
        _write_report(part, recipe, report, out.name)
    return report


def _plan(recipe: Recipe) -> MergePlan:
    """The checked plan, with the first number of what differs by tensor."""
    first = flat(recipe)
    labels = [str(i) for i in range(1, len(recipe.models) + 1)]
    return plan(
        first.method,
        labels,
        first.weights,
        first.seed,
        first.scale,
        first.svc,
        first.lines,
        **first.options,
    )


def _write_report(part: Path, recipe: Recipe, report: Report, name: str) -> None:
    stated = {"weights": recipe.weights} if is_layered(recipe) else {}
    text = json.dumps(report.as_dict() | stated)
    (part / "merge_report.json").write_text(text + "\n", encoding="utf-8")
    card = model_card(recipe, report, name)
    (part / "README.md").write_text(card, encoding="utf-8")


def _by_tensor(recipe: Recipe, chosen: MergePlan, base: Source, folder: Path) -> MergePlan:
    """The plan with its numbers by tensor, where the recipe has them."""
    layers = config_of(folder).get("num_hidden_layers")
    if recipe.layers is not None and recipe.layers != layers:
        raise ValueError(f"a slice has {recipe.layers} layers, the base {layers}: only all of them")
    names = list(base.tensors)
    deep = depths(names, layers if isinstance(layers, int) else layers_of(names))
    floats = [tensor for tensor in base.tensors.values() if tensor.is_floating_point()]
    entries = sum(tensor.numel() for tensor in floats)
    chosen = chosen._replace(entries=entries, depths=deep)
    if not is_layered(recipe):
        return chosen
    return chosen._replace(at_tensor=numbers(recipe, deep))


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


def working_memory(
    method: str, shapes: Collection[torch.Size], models: int = 8, svc: bool = False
) -> int:
    """Bytes that a merge holds at its peak beside Python, torch and memory-mapped files."""
    blocks = 24 * 4 * BLOCK["cpu"]
    for shape in shapes:
        if len(shape) > 1 and 2 * shape[1:].numel() > BLOCK["cpu"]:  # a block is two whole rows
            rows = min(shape[0], 2) * shape[1:].numel()
            blocks = max(blocks, 4 * (8 + models) * rows)
    entry = max(METHODS[method].memory, 28 if svc else 0)
    return blocks + entry * max(shape.numel() for shape in shapes)


def _print_cost(recipe: Recipe, like: Layout, out: Path) -> None:
    process = psutil.Process().memory_info()
    held = process.rss - getattr(process, "shared", 0)  # by Python and torch; not mapped files
    shapes = [shape for _, shape in like.values()]
    svc = recipe.svc is not None
    memory = held + working_memory(recipe.method, shapes, len(recipe.models), svc)
    disk = sum(map(bytes_of, like.values()))
    place = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    print(
        f"{recipe.method} of {len(recipe.models)} models: {disk / GB:.2f} GB on disk "
        f"({free / GB:.0f} GB free), {memory / GB:.2f} GB of memory ({held / GB:.2f} GB held now)"
    )
    if disk > free:
        raise ValueError(f"{place} has {free / GB:.1f} GB free, the merge needs {disk / GB:.1f} GB")


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
