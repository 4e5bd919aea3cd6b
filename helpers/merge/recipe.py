"""How do people state a merge? A recipe of names and numbers, some of them by tensor."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# A number; numbers along the depth; or [{"filter": part of a name, "value": setting}, …].
Setting = float | Sequence[Any]


class Recipe(NamedTuple):
    """A merge as a user states it. Seeds and reports call the models by position, from "1"."""

    method: str
    base: str
    models: list[str]
    weights: list[Setting] | None
    options: Mapping[str, Any]
    scale: float = 1.0
    match: str | None = None
    seed: int = 0
    dtype: str | None = None  # of the output; None: as the base is stored
    round: str = "nearest"  # to that dtype, or "stochastic"
    heads: str = "merge"  # or "base": what lies outside the body stays as the base has it
    tokenizer: str = "base"  # or the model whose tokenizer and chat template are taken
    svc: float | None = None  # calibrations of the merge: see `methods.plan`
    lines: Sequence[float] | None = None
    layers: int | None = None  # that the recipe speaks of: the base must have as many
    normalize: bool = False  # whether the weights are divided by their sum


def at_tensor(setting: Setting, name: str, depth: float) -> float:
    """A setting's number for one tensor, as mergekit reads it.

    depth: of the tensor's layer, from 0 (and what comes before the layers) to 1 (and after them).
    Raises ValueError if no filter matches.
    """
    if not isinstance(setting, list | tuple):
        return setting
    if isinstance(setting[0], Mapping):
        for condition in setting:
            part = condition.get("filter")
            if part in (None, "*") or part in name:
                return at_tensor(condition["value"], name, depth)
        raise ValueError(f"no filter of a mergekit parameter matches {name}, and none is without")
    place = depth * (len(setting) - 1)
    before = int(place)
    after = min(before + 1, len(setting) - 1)
    share = place - before
    return (1 - share) * setting[before] + share * setting[after]


def is_layered(recipe: Recipe) -> bool:
    """Whether some number of the recipe differs from tensor to tensor."""
    density = recipe.options.get("density")
    each = density if isinstance(density, list) else []
    return any(isinstance(setting, list) for setting in [*(recipe.weights or []), *each])


def flat(recipe: Recipe) -> Recipe:
    """The recipe with the first number of each setting: for checks before the tensors are known."""
    weights = recipe.weights
    if weights is not None:
        weights = [_first(weight) for weight in weights]
    options = dict(recipe.options)
    if isinstance(options.get("density"), list):
        options["density"] = [_first(density) for density in options["density"]]
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


def numbers(
    recipe: Recipe, depths: Mapping[str, float]
) -> Callable[[str], tuple[list[float], dict[str, Any]]]:
    """A function that gives weights and options of one tensor by its name."""

    def of(name: str) -> tuple[list[float], dict[str, Any]]:
        depth = depths[name]
        weights = [at_tensor(weight, name, depth) for weight in recipe.weights]
        options = dict(recipe.options)
        if isinstance(options.get("density"), list):
            options["density"] = [at_tensor(x, name, depth) for x in options["density"]]
        return normalized(recipe._replace(weights=weights)).weights, options

    return of
