"""`python -m helpers merge`: the flags, read into a recipe, and what is said at the end."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from helpers.merge.card import dose_text, name_of
from helpers.merge.engine import MATCHES
from helpers.merge.fit import HEADS
from helpers.merge.folder import merge_to_folder
from helpers.merge.mergekit import read_mergekit
from helpers.merge.methods import METHODS, options_of
from helpers.merge.recipe import DTYPES, Recipe
from helpers.merge.report import Report
from helpers.merge.rounding import MODES

KEPT = 0.9  # share of the change below which what rounding took is warned of
STATED = {"base", "models", "weights", "scale"}  # flags that a mergekit file replaces


def main(argv: list[str], folder_of: Callable[[str], Path] = Path) -> None:
    """Parse, merge, say what was done; ValueError if it cannot.

    folder_of: gives the folder of a model by its name, where it is no folder itself.
    """
    arguments = _parser().parse_args(argv)
    recipe = _recipe(arguments)

    def found(model: str) -> Path:
        path = Path(model)
        return path if path.is_dir() else folder_of(model)

    report = merge_to_folder(
        recipe,
        arguments.out,
        arguments.shard_size,
        arguments.device,
        found,
        arguments.force,
    )
    if arguments.json:
        print(json.dumps(report.as_dict()))
        return
    _print_report(recipe, report)
    print(f"written to {arguments.out}")


def _recipe(arguments: argparse.Namespace) -> Recipe:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    options = {name: given[name] for name in _options() & given.keys()}
    stated = {name: given[name] for name in STATED & given.keys()}
    if arguments.mergekit:
        if stated or options:
            raise ValueError("--mergekit states models, weights, scale and options: leave them out")
        recipe = read_mergekit(arguments.mergekit)
    elif not {"base", "models"} <= stated.keys():
        raise ValueError("--method needs --base and --models")
    else:
        recipe = Recipe(arguments.method, options=options, **({"weights": None} | stated))
    return recipe._replace(
        base=_expanded(recipe.base),
        models=[_expanded(model) for model in recipe.models],
        match=arguments.match,
        seed=arguments.seed,
        dtype=arguments.dtype or recipe.dtype,
        svc=arguments.svc,
        lines=arguments.lines,
        round=arguments.round,
        heads=arguments.heads,
        tokenizer=_expanded(arguments.tokenizer),
    )


def _expanded(model: str) -> str:
    return str(Path(model).expanduser()) if model.startswith("~") else model


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("a path must not be empty")
    return Path(text).expanduser()


def _print_report(recipe: Recipe, report: Report) -> None:
    for model, dose in zip(recipe.models, report.own, strict=True):
        print(f"{name_of(model)}: dose {dose_text(dose)}")
    print(
        f"the change is {report.effective_scale:.3f} times a task vector, cosine to their sum "
        f"{report.cos_sum:.3f}, {report.kept:.1%} of entries not zero"
    )
    if report.plain:
        print(f"note: {report.plain} tensors that are no matrices took the plain mean")
    if METHODS[recipe.method].random:
        print("note: the masks follow the order of the models: another order draws others")
    if report.is_rounded and report.left < KEPT:
        print(
            f"warning: rounding left {report.left:.1%} of the change in the file: --dtype float32 "
            "keeps all of it, --round stochastic keeps it on average, as noise"
        )


def _parser() -> argparse.ArgumentParser:
    description = "Merge adapters or checkpoints of one base model into a folder."
    parser = argparse.ArgumentParser(prog="python -m helpers merge", description=description)
    # argparse takes -1e-3 for a flag before Python 3.14
    parser._negative_number_matcher = re.compile(r"-\.?\d.*")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", choices=list(METHODS))
    what.add_argument("--mergekit", type=_path, metavar="CONFIG", help="a mergekit configuration")
    add("--base", help="the base model: a name or a folder")
    add("--models", nargs="+", action="extend", help="adapters or checkpoints of it")
    add("--weights", nargs="+", action="extend", type=float, help="one per model")
    add("--scale", type=float, help="factor on the merged change")
    add("--match", choices=MATCHES, help="find the scale that gives it")
    add("--svc", type=float, nargs="?", const=1.0, metavar="ALPHA", help="calibrate the spectrum")
    add("--lines", type=float, nargs=2, metavar=("ALPHA", "BETA"), help="scale by depth (LiNeS)")
    add("--seed", type=int, default=0, help="of DARE's masks")
    add("--dtype", choices=list(DTYPES), help="of the output; default: the base's")
    add("--round", choices=MODES, default="nearest", help="how, where the dtype is coarse")
    add("--heads", choices=HEADS, default="merge", help="base: leave them as the base has them")
    add("--tokenizer", default="base", help="base, or the model whose tokenizer is taken")
    add("--force", action="store_true", help="merge what seems to mean nothing")
    add("--json", action="store_true", help="print the whole report")
    add("--out", type=_path, required=True, help="a folder that does not exist yet")
    add("--shard-size", type=_bytes, default="5GB", help="such as 500MB")
    add("--device", default="cpu", help="cpu, cuda or cuda:1, a tensor at a time")
    for name, (kind, methods) in _options().items():
        choices = list(get_args(kind)) if get_origin(kind) is Literal else None
        parse: dict[str, Any] = {"choices": choices} if choices else {"type": float}
        add(f"--{name}", help=f"of {', '.join(methods)}", **parse)
    return parser


def _options() -> dict[str, tuple[Any, list[str]]]:
    """Options of any method: annotation, which is the method's contract, and who has it."""
    options: dict[str, tuple[Any, list[str]]] = {}
    for method in METHODS:
        for name, parameter in options_of(method).items():
            _, methods = options.setdefault(name, (parameter.annotation, []))
            methods.append(method)
    return options


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    power = "KMG".index(match[2]) + 1
    size = int(float(match[1]) * 1000**power)
    if size < 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is too small for a shard")
    return size
