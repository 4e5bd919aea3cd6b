"""How does a merge become a model on disk? The `merge` command and the folder that it writes.

The merge streams: tensor by tensor from memory-mapped inputs into safetensors shards, so memory is
a few times the largest tensor, whatever the size of the model and the number of specialists. The
folder is written under another name and renamed when it is complete.
"""

import argparse
import glob
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args, get_origin

import psutil
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from helpers.merge import engine as merging
from helpers.merge import vectors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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


class Recipe(NamedTuple):
    """A merge as a user states it. Seeds and reports call the models by position, from "1"."""

    method: str
    base: str
    models: list[str]
    weights: list[float] | None
    options: Mapping[str, Any]
    scale: float = 1.0
    match: str | None = None
    seed: int = 0
    dtype: str | None = None  # of the output; None: as the base is stored
    probes: list[str] | None = None  # for regmean: a file of texts for each model (`read_probes`)


# mergekit's configurations -----------------------------------------------------------------------

# Its methods that are also ours: our name, its default of `normalize`, options that it implies.
MERGEKIT = {
    "linear": ("linear", True, {}),
    "slerp": ("slerp", True, {}),
    "task_arithmetic": ("task_arithmetic", False, {}),
    "ties": ("ties", True, {}),
    "dare_linear": ("dare", False, {"rescale": "l1"}),
    "dare_ties": ("dare_ties", False, {"rescale": "l1"}),
    "breadcrumbs": ("breadcrumbs", False, {}),
}
KEYS = {"models", "merge_method", "base_model", "parameters", "dtype", "out_dtype"}
PARAMETERS = {"weight", "density", "gamma", "lambda", "normalize", "rescale", "t", "int8_mask"}


def read_mergekit(file: Path) -> Recipe:
    """The recipe of a mergekit configuration, with the defaults of mergekit 0.1.5.

    Raises ValueError naming the first thing that this engine does not have: another method, slices,
    filters, layer gradients, another tokenizer than the base's, densities that differ.
    """
    try:
        return _recipe(yaml.safe_load(file.read_text()))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {error}") from error


def _recipe(config: Any) -> Recipe:
    name, base, shared, models, dtype = _stated(config)
    method, normalize, options = MERGEKIT[name]
    normalize = bool(shared.get("normalize", normalize))
    if bool(shared.get("rescale", "rescale" in options)) != ("rescale" in options):
        raise ValueError(f"rescale: {shared['rescale']} is not supported for {name}")
    if name == "slerp":
        if len(models) != 2:
            raise ValueError("slerp needs two models, one of them the base_model")
        t = _number(shared, "t")
        models = {model: {"weight": 1 - t if model == base else t} for model in models}
    weights = [_number(settings, "weight") for settings in models.values()]
    if name in ("ties", "dare_ties"):
        options = options | {"combine": "mean" if normalize else "sum"}
    elif name == "linear" and not normalize:
        raise ValueError("linear with normalize: false is not supported")
    elif normalize and name != "linear":  # whose rule does it
        weights = [weight / math.fsum(weights) for weight in weights]
    if "density" in merging.options_of(method):
        options = options | {"density": _common(models, "density", 1.0)}
    if name == "breadcrumbs":
        gamma = _common(models, "gamma", 0.01)
        options = options | {"outliers": gamma if options["density"] < 1 else 0.0}
    scale = float(shared.get("lambda", 1.0))
    return Recipe(method, base, list(models), weights, options, scale, dtype=dtype)


def _stated(config: Any) -> tuple[str, str, dict, dict[str, dict], str | None]:
    """Method, base, shared parameters, all parameters of each model, dtype of the output."""
    if not isinstance(config, dict) or not config.get("models"):
        raise ValueError("no models are listed")
    for key in sorted(config.keys() - KEYS - {"tokenizer_source"}):
        raise ValueError(f"{key} is not supported")
    if config.get("tokenizer_source") not in (None, "base"):
        raise ValueError("only tokenizer_source: base is supported")
    name, base = config.get("merge_method"), config.get("base_model")
    if name not in MERGEKIT:
        raise ValueError(f"merge_method {name} is not supported: {', '.join(MERGEKIT)} are")
    if base is None and name != "linear":
        raise ValueError(f"{name} needs a base_model")
    dtype = config.get("out_dtype") or config.get("dtype")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype} is not supported: {', '.join(DTYPES)} are")
    shared = _scalars(config.get("parameters"))
    models = {
        _adapter(m["model"], base): shared | _scalars(m.get("parameters")) for m in config["models"]
    }
    if base is None:
        base = next(iter(models))  # of linear: any base gives the same weighted mean
    elif name in ("linear", "slerp"):
        models.setdefault(base, shared)  # mergekit takes the base as one more model
    else:
        models.pop(base, None)  # the base has no task vector
    return name, base, shared, models, dtype


def _adapter(model: str, base: str | None) -> str:
    """mergekit's base+adapter is the adapter here; anything else stays as it is."""
    of, plus, adapter = model.partition("+")
    if plus and of != base:
        raise ValueError(f"{model}: only adapters of the base_model are supported")
    return adapter or model


def _scalars(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    for name, value in (parameters or {}).items():
        if name not in PARAMETERS:
            raise ValueError(f"parameter {name} is not supported")
        if isinstance(value, list | dict):
            raise ValueError(f"{name} must be one value: filters and gradients are not supported")
    return dict(parameters or {})


def _number(settings: Mapping[str, Any], parameter: str) -> float:
    if parameter not in settings:
        raise ValueError(f"{parameter} is missing")
    return float(settings[parameter])


def _common(models: Mapping[str, dict], parameter: str, default: float) -> float:
    values = {float(settings.get(parameter, default)) for settings in models.values()}
    if len(values) != 1:
        raise ValueError(f"{parameter} must be the same for all models, not {sorted(values)}")
    return values.pop()


# The folder --------------------------------------------------------------------------------------


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
        weights = file.suffix in (".safetensors", ".gguf", *vectors.PICKLES)
        about = file.name.endswith(".index.json") or file.name in ("base.json", "seals.json")
        code_or_card = file.suffix in (".py", ".md") or file.name.startswith(".")
        if file.is_file() and not (weights or about or code_or_card):
            shutil.copyfile(file, out / file.name)
    if dtype is not None:
        config = json.loads((out / "config.json").read_text())
        config.pop("torch_dtype", None)  # its name before transformers 5
        (out / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")


Layout = dict[str, tuple[torch.dtype, torch.Size]]


def layout(base: vectors.Source, dtype: torch.dtype | None) -> Layout:
    """Dtype and shape by name, sorted, of a merged model: floats as `dtype`, or as the base's."""
    return {
        name: (dtype if dtype and stored.is_floating_point() else stored.dtype, stored.shape)
        for name, stored in sorted(base.tensors.items())
    }


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
        start, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: IO[bytes], stored: Tensor, delta: Tensor | None, dtype: torch.dtype):
    """stored + delta, added in fp32 and cast once, a block of rows at a time."""
    for rows, _ in vectors.row_blocks(stored.shape):
        block = stored[rows]
        if delta is not None:
            block = block.float() + delta[rows].cpu()
        file.write(block.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy())


def write_tensors(
    out: Path,
    base: vectors.Source,
    delta_of: Callable[[str], Tensor | None],
    like: Layout,
    limit: int,
) -> None:
    """base + delta as safetensors in `out`, in shards of `limit` bytes.

    `delta_of(name)` is asked once for every tensor, in order; None leaves the tensor as it is.
    """
    sizes = {name: shape.numel() * dtype.itemsize for name, (dtype, shape) in like.items()}
    parts, places = shards(sizes, limit), {}
    for number, names in enumerate(parts, 1):
        suffix = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        places |= dict.fromkeys(names, f"model{suffix}.safetensors")
        with (out / places[names[0]]).open("wb") as file:
            file.write(_header({name: like[name] for name in names}))
            for name in names:
                _write_tensor(file, base.tensors[name], delta_of(name), like[name][0])
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# RegMean's data ----------------------------------------------------------------------------------


def read_probes(file: Path) -> list[str]:
    """The texts of a file: its lines or, of a .jsonl file, each line's `prompt` or else its `text`.

    Empty lines do not count. Raises ValueError naming the file, and the line, that is no such text.
    """
    texts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if file.suffix == ".jsonl" and line.strip():
            line = _json_text(line, f"{file}, line {number}")
        if line.strip():
            texts.append(line)
    if not texts:
        raise ValueError(f"{file} holds no text: give a text a line, or JSONL with prompt or text")
    return texts


def _json_text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where}: no prompt or text is given as a string")
    return text


def probe_grams(
    base: Path,
    rows: list[vectors.Row],
    texts: list[list[str]],
    folder: Path,
    device: str = "cpu",
    batch_size: int = 8,
) -> dict[str, list[Tensor]]:
    """RegMean's Gram matrices, by tensor name, one per model: of its layers' inputs on its texts.

    rows: of all models (`vectors.views`); texts: one list per model. The base is loaded once, in
    fp32, and each model is the base with its task vector applied. The matrices of one model are
    held at a time: they are written into `folder` and come back memory-mapped.
    """
    from helpers.states import batch
    from helpers.states import measures as hidden
    from helpers.study import assets  # it imports transformers, which folders need not

    model, tokenizer = assets.load_model(str(base), device=device)
    names = _linear_layers(model, rows)
    stored = []
    for i, mine in enumerate(tqdm(texts, "Gram matrices", disable=None)):
        ids = [batch.encode_prompt(tokenizer, text) for text in mine]
        batches = batch.length_buckets(list(map(len, ids)), batch_size)
        padded = (batch.pad([ids[j] for j in part], 0) for part in batches)
        with vectors.applied(model, merging.dose(rows, i, 1.0)):
            grams = hidden.input_grams(model, padded, names)
        file = folder / f"grams-{i}.safetensors"
        save_file({name: gram.cpu() for name, gram in grams.items()}, file)
        stored.append(load_file(file))
    return {name: [grams[name] for grams in stored] for name in names}


def _linear_layers(model: torch.nn.Module, rows: list[vectors.Row]) -> list[str]:
    """Which of the changed tensors are weights of linear layers below the head."""
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    layers = {row.name: modules.get(row.name.removesuffix(".weight")) for row in rows}
    return [
        name
        for name, layer in layers.items()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    ]


# The command -------------------------------------------------------------------------------------


def merge_to_folder(
    recipe: Recipe, out: Path, shard_size: int = 5 * GB, device: str = "cpu"
) -> merging.Report:
    """Carry a recipe out into the folder `out`; prints its cost first and shows progress.

    Everything that can be refused is refused (ValueError) before a tensor is read.
    """
    if out.exists():
        raise ValueError(f"{out} exists: name another folder, or remove it")
    labels = [str(i) for i in range(1, len(recipe.models) + 1)]
    texts = _probes(recipe)
    plan = merging.plan(
        *(recipe.method, labels, recipe.weights, recipe.seed, recipe.scale),
        grams=None if texts is None else {},
        **recipe.options,
    )
    merging.check_match(recipe.match)
    _check_device(device)
    base_folder = _folder(recipe.base)
    base = vectors.open_base(base_folder)
    specialists = [
        vectors.open_specialist(_folder(model), label)
        for model, label in zip(recipe.models, labels, strict=True)
    ]
    like = layout(base, DTYPES.get(recipe.dtype))
    vectors.check(base, specialists)
    _print_cost(recipe, like, out)
    rows = vectors.views(base, specialists, device)
    with _complete_or_absent(out) as part:
        if texts is not None:
            with tempfile.TemporaryDirectory(dir=part) as folder:
                grams = probe_grams(base_folder, rows, texts, Path(folder), device)
            plan = plan._replace(grams=grams)  # still mapped, though the files have no names now
        if recipe.match:
            plan = merging.matched(rows, plan, recipe.match)
        _copy_surroundings(base_folder, part, recipe.dtype)
        report = _write_merge(part, base, rows, plan, like, shard_size)
        (part / "merge_report.json").write_text(json.dumps(report.as_dict()) + "\n")
        (part / "README.md").write_text(model_card(recipe, report, out.name))
    return report


def _probes(recipe: Recipe) -> list[list[str]] | None:
    """RegMean's texts for each model; ValueError where they are missing or not asked for."""
    if (recipe.probes is not None) != (recipe.method == "regmean"):
        raise ValueError("regmean, and no other method, needs probes: a text file for each model")
    if recipe.probes is None:
        return None
    if len(recipe.probes) != len(recipe.models):
        raise ValueError(f"{len(recipe.probes)} files of probes for {len(recipe.models)} models")
    return [read_probes(Path(file)) for file in recipe.probes]


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda, or one of several as cuda:1, not {device!r}")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= torch.cuda.device_count():
        raise ValueError(f"torch finds no device {device} on this machine: use cpu")


def _folder(model: str) -> Path:
    """A folder as it is; anything else is the name of a model, which may have to be fetched."""
    if Path(model).is_dir():
        return Path(model)
    from helpers.study import (
        assets,  # imports transformers: seconds and 0.14 GB that a folder needs not
    )

    try:
        return assets.model_folder(model)
    except assets.AssetError as error:
        raise ValueError(str(error)) from error


def _write_merge(
    out: Path,
    base: vectors.Source,
    rows: list[vectors.Row],
    plan: merging.Plan,
    like: Layout,
    shard_size: int,
) -> merging.Report:
    changed, records = {row.name for row in rows}, []
    stream = merging.merge_tensors(rows, plan)
    entries = sum(shape.numel() for _, shape in like.values())
    with tqdm(total=entries, desc=plan.method, unit="", unit_scale=True, disable=None) as bar:

        def delta_of(name: str) -> Tensor | None:
            bar.update(like[name][1].numel())
            if name not in changed:
                return None
            _, delta, record = next(stream)
            records.append(record)
            return delta

        write_tensors(out, base, delta_of, like, shard_size)
    return merging.summary(plan, records)


def working_memory(method: str, shapes: Collection[torch.Size]) -> int:
    """Bytes that a merge holds at its peak beside Python, torch and memory-mapped files."""
    blocks, entries = 24 * 4 * vectors.BLOCK["cpu"], [shape.numel() for shape in shapes]
    if method == "regmean":  # base, task vector and their sum in fp32; one model's Gram matrices
        return blocks + 12 * sum(entries) + _gram_bytes(shapes)
    return blocks + merging.METHODS[method].memory * max(entries)


def _gram_bytes(shapes: Collection[torch.Size]) -> int:
    return sum(4 * shape[1] ** 2 for shape in shapes if len(shape) == 2)


def _print_cost(recipe: Recipe, like: Layout, out: Path) -> None:
    shapes = [shape for _, shape in like.values()]
    process = psutil.Process().memory_info()
    held = process.rss - getattr(process, "shared", 0)  # by Python and torch; not mapped files
    memory = held + working_memory(recipe.method, shapes)
    disk = sum(shape.numel() * dtype.itemsize for dtype, shape in like.values())
    if recipe.probes:
        disk += len(recipe.models) * _gram_bytes(shapes)
    place = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    print(
        f"{recipe.method} of {len(recipe.models)} models: {disk / GB:.2f} GB on disk "
        f"({free / GB:.0f} GB free), {memory / GB:.2f} GB of memory ({held / GB:.2f} GB held now)"
    )
    if disk > free:
        raise ValueError(f"{place} has {free / GB:.1f} GB free, the merge needs {disk / GB:.1f} GB")


CARD = """---
{front}---
# {name}

A merge of {n} models by `{method}`, made with merging-collapse.

| model | weight | dose |
|---|---|---|
{table}

Dose: how far the merge goes along a model's task vector tau, <delta, tau> / ||tau||^2; 1 is all of
what fine-tuning changed. The merged change is {scale:.3f} times as long as a task vector on
average, its cosine to their sum is {cos:.3f}, and {kept:.1%} of its entries are not zero. More:
`merge_report.json`.

```yaml
{recipe}```
"""


def model_card(recipe: Recipe, report: merging.Report, name: str) -> str:
    """The README of a merged model: base, tags, recipe, and what the merge did. Names, no paths."""
    base, models = _name(recipe.base), [_name(model) for model in recipe.models]
    front = {"base_model": [base, *models], "tags": ["merge"], "library_name": "transformers"}
    stated = recipe._asdict() | {"base": base, "models": models, "weights": report.plan.weights}
    stated |= {"options": report.plan.options, "scale": report.plan.scale}
    stated["probes"] = [Path(file).name for file in recipe.probes or []]
    doses = ["-" if dose is None else f"{dose:.3f}" for dose in report.own]
    table = [
        f"| {model} | {weight:g} | {dose} |"
        for model, weight, dose in zip(models, report.plan.weights, doses, strict=True)
    ]
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        name=name,
        n=len(models),
        method=recipe.method,
        table="\n".join(table),
        scale=report.effective_scale,
        cos=report.cos_sum,
        kept=report.kept,
        recipe=yaml.safe_dump(stated, sort_keys=False),
    )


def _name(model: str) -> str:
    """What a card calls a model: its name, or the name of its folder, never a path."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model


STATED = {"base", "models", "weights", "scale", "probes"}  # flags that a mergekit file replaces


def main(argv: list[str]) -> None:
    """`python -m helpers merge`: parse, merge, say what was done; ValueError if it cannot."""
    description = "Merge adapters or checkpoints of one base model into a folder."
    parser = argparse.ArgumentParser(prog="python -m helpers merge", description=description)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", choices=list(merging.METHODS))
    what.add_argument("--mergekit", type=Path, metavar="CONFIG", help="a mergekit configuration")
    parser.add_argument("--base", help="the base model: a name or a folder")
    parser.add_argument("--models", nargs="+", help="adapters or checkpoints of it")
    parser.add_argument("--weights", nargs="+", type=float, help="one per model")
    parser.add_argument(
        "--probes", nargs="+", metavar="FILE", help="of regmean: texts, a file for each model"
    )
    parser.add_argument("--scale", type=float, help="factor on the merged change")
    parser.add_argument("--match", choices=merging.MATCHES, help="find the scale that gives it")
    parser.add_argument("--seed", type=int, default=0, help="of DARE's masks")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the output; default: the base's")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--shard-size", type=_bytes, default="5GB", help="such as 500MB")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1, a tensor at a time")
    known = _add_method_options(parser)
    arguments = parser.parse_args(argv)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    options = {name: given[name] for name in known & given.keys()}
    stated = {name: given[name] for name in STATED & given.keys()}
    if arguments.mergekit:
        if stated or options:
            raise ValueError("--mergekit states models, weights, scale and options: leave them out")
        recipe = read_mergekit(arguments.mergekit)
    elif not {"base", "models"} <= stated.keys():
        raise ValueError("--method needs --base and --models")
    else:
        recipe = Recipe(arguments.method, options=options, **({"weights": None} | stated))
    dtype = arguments.dtype or recipe.dtype
    recipe = recipe._replace(match=arguments.match, seed=arguments.seed, dtype=dtype)
    report = merge_to_folder(recipe, arguments.out, arguments.shard_size, arguments.device)
    for model, dose in zip(recipe.models, report.own, strict=True):
        print(f"{_name(model)}: dose {'-' if dose is None else f'{dose:.3f}'}")
    print(
        f"the change is {report.effective_scale:.3f} times a task vector, cosine to their sum "
        f"{report.cos_sum:.3f}, {report.kept:.1%} of entries not zero"
    )
    print(f"written to {arguments.out}")


def _add_method_options(parser: argparse.ArgumentParser) -> set[str]:
    """One flag per option of any method, from the annotations that are the methods' contracts."""
    users: dict[str, list[str]] = {}
    kinds = {}
    for method in merging.METHODS:
        for name, parameter in merging.options_of(method).items():
            users.setdefault(name, []).append(method)
            kinds[name] = parameter.annotation
    for name, kind in kinds.items():
        choices = list(get_args(kind)) if get_origin(kind) is Literal else None
        parse = {"choices": choices} if choices else {"type": float}
        parser.add_argument(f"--{name}", help=f"of {', '.join(users[name])}", **parse)
    return set(kinds)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** ("KMG".index(match[2]) + 1))
