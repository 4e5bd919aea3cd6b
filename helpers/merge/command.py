"""`python -m helpers merge`: the flags, read into a recipe, and what is said at the end."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from helpers.merge.card import dose_text, name_of
from helpers.merge.engine import MATCHES
from helpers.merge.fit import HEADS
from helpers.merge.folder import merge_to_folder
from helpers.merge.mergekit import read_mergekit
from helpers.merge.plans import RULES, options_of
from helpers.merge.recipe import DTYPES, Recipe, read_recipe
from helpers.merge.report import Report
from helpers.merge.rounding import MODES

KEPT = 0.9  # share of the change below which what rounding took is warned of
STATED = {"base", "models", "weights", "scale"}  # flags that a file replaces


def main(argv: list[str], folder_of: Callable[[str], Path] = Path) -> None:
    """Parse, merge, say what was done; ValueError if it cannot.

    folder_of: gives the folder of a model by its name, where it is no folder with safetensors.
    """
    arguments = _parser().parse_args(argv)
    recipe = _recipe(arguments)

    def found(model: str) -> Path:
        if not model.strip():
            raise ValueError("a model needs a name")
        path = Path(model)
        return path if list(path.glob("*.safetensors*")) else folder_of(model)

    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        report = merge_to_folder(
            recipe, arguments.out, arguments.device, found, arguments.force
        )
        _print_report(recipe, report)
        print(f"written to {arguments.out}")
    if arguments.json:
        print((arguments.out / "merge_report.json").read_text(encoding="utf-8").strip())


def _recipe(arguments: argparse.Namespace) -> Recipe:
    given = {
        name: value for name, value in vars(arguments).items() if value is not None
    }
    options = {name: given.pop(name) for name in _options() if name in given}
    stated = {name: given[name] for name in given if name in Recipe._fields}
    if arguments.mergekit or arguments.recipe:
        if options or STATED & stated.keys():
            raise ValueError(
                "the file states models, weights, scale and options: leave them out"
            )
        read = read_mergekit if arguments.mergekit else read_recipe
        recipe = read(arguments.mergekit or arguments.recipe)._replace(**stated)
    elif not {"base", "models"} <= stated.keys():
        raise ValueError("--rule needs --base and --models")
    else:
        recipe = Recipe(options=options, **stated)
    return recipe._replace(
        base=_expanded(recipe.base),
        models=[_expanded(model) for model in recipe.models],
        tokenizer=recipe.tokenizer and _expanded(recipe.tokenizer),
    )


def _expanded(model: str) -> str:
    # unlike pathlib's it leaves an unknown user's name as it is
    return os.path.expanduser(model)


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("a path must not be empty")
    if (path := _expanded(text)).startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: there is no such user")
    return Path(path)


def _print_report(recipe: Recipe, report: Report) -> None:
    for model, dose in zip(recipe.models, report.own, strict=True):
        change = "no change of the base" if dose is None else f"dose {dose_text(dose)}"
        print(f"{name_of(model)}: {change}")
    print(
        f"the change is {report.effective_scale:.3f} times a task vector, cosine to their sum "
        f"{report.cos_sum:.3f}, {report.kept:.1%} of entries not zero"
    )
    if report.plain:
        print(f"note: {report.plain} tensors that are no matrices took the plain mean")
    if RULES[recipe.rule].random:
        print(
            "note: the masks follow the order of the models: another order draws others"
        )
    if report.is_rounded and report.left < KEPT:
        print(
            f"warning: rounding left {report.left:.1%} of the change in the file: --dtype float32 "
            "keeps all of it, --round stochastic keeps it on average, as noise"
        )


def _parser() -> argparse.ArgumentParser:
    description = "Merge adapters or checkpoints of one base model into a folder."
    parser = argparse.ArgumentParser(
        prog="python -m helpers merge", description=description
    )
    # argparse takes -1e-3 for a flag before Python 3.14
    parser._negative_number_matcher = re.compile(r"-\.?\d.*")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rule", "--method", dest="rule", choices=list(RULES))
    what.add_argument(
        "--mergekit", type=_path, metavar="CONFIG", help="a mergekit configuration"
    )
    what.add_argument(
        "--recipe", type=_path, metavar="FILE", help="the card of a merge, or YAML"
    )
    add(
        "--base",
        help="the base model: a folder, or a name on the hub, org/name@revision",
    )
    add("--models", nargs="+", action="extend", help="adapters or checkpoints of it")
    add("--weights", nargs="+", action="extend", type=float, help="one per model")
    add("--scale", type=float, help="factor on the merged change")
    add("--match", choices=MATCHES, help="find the scale that gives it")
    add(
        "--svc",
        type=float,
        nargs="?",
        const=1.0,
        metavar="ALPHA",
        help="calibrate the spectrum",
    )
    add(
        "--lines",
        type=float,
        nargs=2,
        metavar=("ALPHA", "BETA"),
        help="scale by depth (LiNeS)",
    )
    add("--seed", type=int, help="of DARE's masks")
    add("--dtype", choices=list(DTYPES), help="of the output; default: the base's")
    add("--round", choices=MODES, help="how, where the dtype is coarse")
    add("--heads", choices=HEADS, help="base: leave them as the base has them")
    add(
        "--tokenizer",
        help="whose tokens, matched by token: base, union or one of the models",
    )
    add("--force", action="store_true", help="merge what seems to mean nothing")
    add("--json", action="store_true", help="print the whole report, and nothing else")
    add("--out", type=_path, required=True, help="a folder that does not exist yet")
    add("--shard-size", type=_bytes, help="of a file, such as 500MB; default: 5GB")
    add("--device", default="cpu", help="cpu, cuda or cuda:1, a tensor at a time")
    for name, (kind, owners) in _options().items():
        choices = list(get_args(kind)) if get_origin(kind) is Literal else None
        parse: dict[str, Any] = {"choices": choices} if choices else {"type": float}
        add(f"--{name}", help=f"of {', '.join(owners)}", **parse)
    return parser


def _options() -> dict[str, tuple[Any, list[str]]]:
    """Options of any rule: annotation, which is its contract, and who has it."""
    options: dict[str, tuple[Any, list[str]]] = {}
    for rule in RULES:
        for name, parameter in options_of(rule).items():
            _, owners = options.setdefault(name, (parameter.annotation, []))
            owners.append(rule)
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
