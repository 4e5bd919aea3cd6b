"""How do people state a merge? A recipe of names and numbers, some of them by tensor."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import yaml
from pydantic import AfterValidator, TypeAdapter, ValidationError

from helpers.merge.fit import HEADS
from helpers.merge.plans import MergePlan, plan
from helpers.merge.rounding import MODES
from helpers.merge.weights import one_line, read_text

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GB = 10**9


def number(value: Any) -> float:
    """A finite number, text too: YAML takes 1e-1 for it. ValueError for anything else."""
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise ValueError(f"must be a number, not {value!r}")
    return parsed


def setting(value: Any) -> Any:
    """A number, numbers along the depth, or values with filters; ValueError for anything else."""
    if not isinstance(value, list):
        return number(value)
    if not value:
        raise ValueError("is an empty list")
    if not isinstance(value[0], dict):
        return [number(x) for x in value]
    conditions = [_condition(x) for x in value]
    if len(conditions) == 1 and conditions[0]["filter"] in (None, "*"):
        return conditions[0]["value"]
    return conditions


def _condition(stated: Any) -> dict[str, Any]:
    if not isinstance(stated, dict) or not {"value"} <= stated.keys() <= {
        "value",
        "filter",
    }:
        raise ValueError(f"has a filter that is no {{filter: …, value: …}}: {stated!r}")
    part = stated.get("filter")
    if not (part is None or isinstance(part, str)):
        raise ValueError(f"has a filter that is no part of a tensor's name: {part!r}")
    return {"filter": part, "value": setting(stated["value"])}


# A number; numbers along the depth; or [{"filter": part of a name, "value": setting}, …].
Setting = Annotated[Any, AfterValidator(setting)]
Number = Annotated[Any, AfterValidator(number)]


def _option(value: Any) -> Any:
    """A word, a number, or a setting for each model."""
    if isinstance(value, str):
        return value
    return [setting(x) for x in value] if isinstance(value, list) else number(value)


class Recipe(NamedTuple):
    """A merge as a user states it. Seeds and reports call the models by position, from "1"."""

    rule: str
    base: str
    models: list[str]
    weights: list[Setting] | None = None
    options: dict[str, Annotated[Any, AfterValidator(_option)]] = {}  # noqa: RUF012 (never written to)
    scale: Number = 1.0
    match: str | None = None
    seed: int = 0
    dtype: Literal[*DTYPES] | None = None  # of the output; None: as the base is stored
    round: Literal[*MODES] = "nearest"  # to that dtype, or "stochastic"
    heads: Literal[*HEADS] = (
        "merge"  # or "base": what lies outside the body stays as the base has it
    )
    # whose tokens and chat template: "base", "union" or a model's name, rows matched by token;
    # None: the base's, row by row
    tokenizer: str | None = None
    svc: Number | None = None  # calibrations of the merge: see `plans.plan`
    lines: list[Number] | None = None
    layers: int | None = None  # that the recipe speaks of: the base must have as many
    normalize: bool = False  # whether the weights are divided by their sum
    shard_size: int = 5 * GB  # bytes of a file


def read_recipe(file: Path) -> Recipe:
    """The recipe in a YAML file or in the card of a merge; ValueError, naming it, for any other."""
    text = read_text(file)
    if file.suffix == ".md":
        _, _, block = text.partition("```yaml\n")
        text, _, _ = block.partition("```")
    try:
        return TypeAdapter(Recipe).validate_python(yaml.safe_load(text))
    except ValidationError as error:
        raise ValueError(f"{file}: {first_fault(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no YAML: {one_line(error)}") from error


FAULTS = {
    "extra_forbidden": "is not supported",
    "missing": "is missing",
    "invalid_key": "is not supported",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "model_type": "must be a mapping of names and values",
    "unexpected_keyword_argument": "is not supported",
    "missing_argument": "is missing",
}


def first_fault(error: ValidationError) -> str:
    """The first fault that was found, where it is and what it is."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "the whole"
    said = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    text = FAULTS.get(first["type"], said)
    return f"{place} {text}"


# Numbers by tensor -------------------------------------------------------------------------------


def at_tensor(setting: Setting, name: str, depth: float) -> float:
    """A setting's number for one tensor, as mergekit reads it.

    depth: of the tensor's layer, from 0 to 1; of what lies outside the layers 0.
    Raises ValueError if no filter matches.
    """
    if not isinstance(setting, list | tuple):
        return setting
    if isinstance(setting[0], Mapping):
        for condition in setting:
            part = condition.get("filter")
            if part in (None, "*") or part in name:
                return at_tensor(condition["value"], name, depth)
        raise ValueError(
            f"no filter of a mergekit parameter matches {name}, and none is without"
        )
    place = depth * (len(setting) - 1)
    before = int(place)
    after = min(before + 1, len(setting) - 1)
    share = place - before
    return (1 - share) * setting[before] + share * setting[after]


def is_layered(recipe: Recipe) -> bool:
    """Whether some number of the recipe differs from tensor to tensor."""
    density = recipe.options.get("density")
    each = density if isinstance(density, list) else []
    return any(
        isinstance(setting, list) for setting in [*(recipe.weights or []), *each]
    )


def flat(recipe: Recipe) -> Recipe:
    """The recipe with the first number of each setting: for checks before the tensors are known."""
    return _with_numbers(recipe, _first)


def plan_of(recipe: Recipe) -> MergePlan:
    """The checked plan, with the first number of what differs by tensor."""
    first = flat(recipe)
    labels = [str(i) for i in range(1, len(recipe.models) + 1)]
    return plan(
        first.rule,
        labels,
        first.weights,
        first.seed,
        first.scale,
        first.svc,
        first.lines,
        **first.options,
    )


def numbers(
    recipe: Recipe, depths: Mapping[str, float]
) -> Callable[[str], tuple[list[float], dict[str, Any]]]:
    """A function that gives weights and options of one tensor by its name."""

    def of(name: str) -> tuple[list[float], dict[str, Any]]:
        local = _with_numbers(
            recipe, lambda setting: at_tensor(setting, name, depths[name])
        )
        return local.weights, local.options

    return of


def _with_numbers(recipe: Recipe, number_of: Callable[[Setting], float]) -> Recipe:
    options = dict(recipe.options)
    if isinstance(options.get("density"), list):
        options["density"] = list(map(number_of, options["density"]))
    weights = recipe.weights
    if weights:
        weights = list(map(number_of, weights))
    return normalized(recipe._replace(weights=weights, options=options))


def _first(setting: Setting) -> float:
    while isinstance(setting, list):
        setting = setting[0]["value"] if isinstance(setting[0], Mapping) else setting[0]
    return setting


def normalized(recipe: Recipe) -> Recipe:
    """The recipe with weights of sum 1, if it asks for that."""
    total = math.fsum(recipe.weights or [])
    if not recipe.normalize or total == 0:
        return recipe
    return recipe._replace(weights=[weight / total for weight in recipe.weights])
