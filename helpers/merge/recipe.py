"""How do people state a merge? A recipe of names and numbers; mergekit's YAML read as one."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from helpers.merge.methods import options_of

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
    round: str = "nearest"  # to that dtype, or "stochastic"
    heads: str = "merge"  # or "base": what lies outside the body stays as the base has it
    tokenizer: str = "base"  # or the model whose tokenizer and chat template are taken


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

Models = dict[str, dict[str, Any]]  # all parameters of each model


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
    _check_keys(config)
    name = config["merge_method"]
    shared = _scalars(config.get("parameters"))
    base, models = _base_and_models(config, shared)
    method, normalize, options = MERGEKIT[name]
    normalize = bool(shared.get("normalize", normalize))
    if bool(shared.get("rescale", "rescale" in options)) != ("rescale" in options):
        raise ValueError(f"rescale: {shared['rescale']} is not supported for {name}")
    if name == "slerp":
        models = _slerp_weights(shared, base, models)
    return Recipe(
        method,
        base,
        list(models),
        _weights(name, normalize, models),
        options | _options(name, method, normalize, models),
        scale=float(shared.get("lambda", 1.0)),
        dtype=config.get("out_dtype") or config.get("dtype"),
    )


def _check_keys(config: Any) -> None:
    """Raise ValueError naming the first part of a configuration that is not supported."""
    if not isinstance(config, dict) or not config.get("models"):
        raise ValueError("no models are listed")
    for key in sorted(config.keys() - KEYS - {"tokenizer_source"}):
        raise ValueError(f"{key} is not supported")
    if config.get("tokenizer_source") not in (None, "base"):
        raise ValueError("only tokenizer_source: base is supported")
    name = config.get("merge_method")
    if name not in MERGEKIT:
        raise ValueError(f"merge_method {name} is not supported: {', '.join(MERGEKIT)} are")
    if config.get("base_model") is None and name != "linear":
        raise ValueError(f"{name} needs a base_model")
    dtype = config.get("out_dtype") or config.get("dtype")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype} is not supported: {', '.join(DTYPES)} are")


def _base_and_models(config: dict, shared: Mapping[str, Any]) -> tuple[str, Models]:
    base = config.get("base_model")
    models = {}
    for stated in config["models"]:
        settings = _scalars(stated.get("parameters"))
        models[_adapter(stated["model"], base)] = {**shared, **settings}
    if base is None:
        return next(iter(models)), models  # of linear: any base gives the same weighted mean
    if config["merge_method"] in ("linear", "slerp"):
        models.setdefault(base, dict(shared))  # mergekit takes the base as one more model
    else:
        models.pop(base, None)  # the base has no task vector
    return base, models


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


def _slerp_weights(shared: Mapping[str, Any], base: str, models: Models) -> Models:
    if len(models) != 2:
        raise ValueError("slerp needs two models, one of them the base_model")
    t = _number(shared, "t")
    return {model: {"weight": 1 - t if model == base else t} for model in models}


def _weights(name: str, normalize: bool, models: Models) -> list[float]:
    weights = [_number(settings, "weight") for settings in models.values()]
    if name == "linear" and not normalize:
        raise ValueError("linear with normalize: false is not supported")
    by_the_rule = name in ("linear", "ties", "dare_ties")
    if not normalize or by_the_rule:
        return weights
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _options(name: str, method: str, normalize: bool, models: Models) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if name in ("ties", "dare_ties"):
        options["combine"] = "mean" if normalize else "sum"
    if "density" in options_of(method):
        options["density"] = _common(models, "density", 1.0)
    if name == "breadcrumbs":
        gamma = _common(models, "gamma", 0.01)
        options["outliers"] = gamma if options["density"] < 1 else 0.0
    return options


def _number(settings: Mapping[str, Any], parameter: str) -> float:
    if parameter not in settings:
        raise ValueError(f"{parameter} is missing")
    return float(settings[parameter])


def _common(models: Models, parameter: str, default: float) -> float:
    values = {float(settings.get(parameter, default)) for settings in models.values()}
    if len(values) != 1:
        raise ValueError(f"{parameter} must be the same for all models, not {sorted(values)}")
    return values.pop()
