"""What does a mergekit configuration ask for? Its YAML, checked part by part, as a recipe."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from helpers.merge.methods import options_of
from helpers.merge.recipe import DTYPES, Recipe, Setting, is_layered, normalized

# Its methods that are also ours: our name, its default of `normalize`, options that it implies.
MERGEKIT = {
    "linear": ("linear", True, {}),
    "slerp": ("slerp", True, {}),
    "nuslerp": ("task_slerp", True, {}),
    "task_arithmetic": ("task_arithmetic", False, {}),
    "ties": ("ties", True, {}),
    "dare_linear": ("dare", False, {"rescale": "l1"}),
    "dare_ties": ("dare_ties", False, {"rescale": "l1"}),
    "breadcrumbs": ("breadcrumbs", False, {}),
}
KEYS = {
    "models",
    "slices",
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
}
PARAMETERS = {"weight", "density", "gamma", "lambda", "normalize", "rescale", "t", "int8_mask"}
FLAGS = {"normalize", "rescale", "int8_mask"}

Parameters = dict[str, Any]
Models = list[tuple[str, Parameters]]  # name and own parameters of each


def read_mergekit(file: Path) -> Recipe:
    """The recipe of a mergekit configuration, with the defaults of mergekit 0.1.5.

    Raises ValueError naming the first thing that is wrong or that this engine does not have:
    another method, layers of several models stacked, another tokenizer than the base's.
    """
    try:
        config = yaml.load(file.read_text(encoding="utf-8-sig"), _Loader)
        return _recipe(config)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Plain data alone, each key once."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1 and name != "<<":
                raise ValueError(f"{name} is stated twice in one mapping")
        return super().construct_mapping(node, deep)


def _recipe(config: Any) -> Recipe:
    name = _method(config)
    method, normalizes, implied = MERGEKIT[name]
    shared = _parameters(config.get("parameters"))
    stated, layers = _models(config)
    base, models = _with_base(name, _model_name(config.get("base_model"), None), stated, shared)
    normalize = shared.get("normalize", normalizes)
    if shared.get("rescale", "rescale" in implied) != ("rescale" in implied):
        raise ValueError(f"rescale: {shared['rescale']} is not supported for {name}")
    if name == "linear" and not normalize:
        raise ValueError("linear with normalize: false is not supported")
    if name in ("slerp", "nuslerp") and len(models) != 2:
        raise ValueError(f"{name} needs two models beside or with its base_model")
    if name == "slerp":
        t = shared.get("t", dict(models)[base].get("t"))
        weights = [_rest(t) if model == base else _stated("t", t) for model, _ in models]
    else:
        weights = [_stated("weight", own.get("weight")) for _, own in models]
    recipe = Recipe(
        method,
        base,
        [model for model, _ in models],
        weights,
        implied | _options(name, method, normalize, models),
        scale=_constant("lambda", shared.get("lambda", 1.0)),
        dtype=_dtype(config),
        layers=layers,
        normalize=normalize and name not in ("linear", "ties", "dare_ties", "slerp", "nuslerp"),
    )
    return recipe if is_layered(recipe) else normalized(recipe)._replace(normalize=False)


# The parts ---------------------------------------------------------------------------------------


def _method(config: Any) -> str:
    """The merge method; ValueError for a configuration that is none or that has unknown parts."""
    if not isinstance(config, dict):
        raise ValueError("a configuration is a mapping with merge_method and models")
    name = config.get("merge_method")
    if name == "passthrough":
        raise ValueError("passthrough stacks layers: the result has no common base to merge into")
    if not isinstance(name, str) or name not in MERGEKIT:
        raise ValueError(f"merge_method {name} is not supported: {', '.join(MERGEKIT)} are")
    for key in config:
        if key not in KEYS:
            raise ValueError(f"{key} is not supported")
    source = config.get("tokenizer_source")
    if source is None and config.get("tokenizer") is not None:
        source = config["tokenizer"]
        source = source.get("source") if isinstance(source, dict) else source
    if source not in (None, "base"):
        raise ValueError(f"tokenizer_source {source} is not supported: base is")
    if config.get("base_model") is None and name != "linear":
        raise ValueError(f"{name} needs a base_model")
    return name


def _dtype(config: Mapping[str, Any]) -> str | None:
    dtype = config.get("out_dtype") or config.get("dtype")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise ValueError(f"dtype {dtype} is not supported: {', '.join(DTYPES)} are")
    return dtype


def _models(config: Mapping[str, Any]) -> tuple[list[Any], int | None]:
    """The listed models, and how many layers a slice says that each has."""
    slices = config.get("slices")
    if slices is None:
        models = config.get("models")
        if not isinstance(models, list) or not models:
            raise ValueError("no models are listed: models is a list of {model: …}")
        return models, None
    if not isinstance(slices, list) or not all(isinstance(x, dict) for x in slices):
        raise ValueError("slices is a list of {sources: […]}")
    if len(slices) != 1:
        raise ValueError("several slices stack layers to another depth: only one, of the whole")
    sources = slices[0].get("sources")
    if not isinstance(sources, list) or not sources:
        raise ValueError("a slice lists its sources: {model: …, layer_range: [0, n]}")
    ranges = [x.get("layer_range") if isinstance(x, dict) else None for x in sources]
    whole = ranges[0]
    if any(x != whole for x in ranges) or not isinstance(whole, list) or len(whole) != 2:
        raise ValueError("the sources of a slice need one layer_range: [0, n]")
    if whole[0] != 0 or not isinstance(whole[1], int):
        raise ValueError(f"layer_range {whole} is no whole model: [0, n] is")
    return sources, whole[1]


def _with_base(
    name: str, base: str | None, stated: list[Any], shared: Parameters
) -> tuple[str, Models]:
    models: Models = []
    for entry in stated:
        if not isinstance(entry, dict) or "model" not in entry:
            raise ValueError(f"an entry of models is a mapping with a model, not {entry!r}")
        own = _parameters(entry.get("parameters"))
        models.append((_model_name(entry["model"], base), shared | own))
    if base is None:
        return models[0][0], models  # of linear: any base gives the same weighted mean
    listed = [model for model, _ in models]
    if name in ("linear", "slerp"):
        if base not in listed:
            models.append((base, dict(shared)))  # mergekit takes the base as one more model
        return base, models
    return base, [pair for pair in models if pair[0] != base]  # the base has no task vector


def _model_name(stated: Any, base: str | None) -> str | None:
    """A model's name; of mergekit's base+adapter and {model, lora} the adapter's."""
    if isinstance(stated, dict):
        of = stated.get("model", stated)
        lora = stated.get("lora")
        of = of.get("path") if isinstance(of, dict) else of
        lora = lora.get("path") if isinstance(lora, dict) else lora
        stated = of if lora is None else f"{of}+{lora}"
    if stated is None and base is None:
        return None
    if not isinstance(stated, str) or not stated:
        raise ValueError(f"a model is named by text, not by {stated!r}")
    of, plus, adapter = stated.partition("+")
    if plus and of != base:
        raise ValueError(f"{stated}: only adapters of the base_model are supported")
    return adapter or stated


# Numbers -----------------------------------------------------------------------------------------


def _parameters(parameters: Any) -> Parameters:
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ValueError(f"parameters is a mapping of names and values, not {parameters!r}")
    read: Parameters = {}
    for name, value in parameters.items():
        if name not in PARAMETERS:
            raise ValueError(f"parameter {name} is not supported")
        if name in FLAGS:
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, not {value!r}")
            read[name] = value
        else:
            read[name] = _setting(name, value)
    return read


def _setting(name: str, value: Any) -> Setting:
    """A number, numbers along the depth, or values with filters."""
    if not isinstance(value, list):
        return _number(name, value)
    if not value:
        raise ValueError(f"{name} is an empty list")
    if not isinstance(value[0], dict):
        return [_number(name, x) for x in value]
    conditions = []
    for condition in value:
        if not isinstance(condition, dict) or "value" not in condition:
            raise ValueError(f"a filter of {name} is {{filter: …, value: …}}, not {condition!r}")
        part = condition.get("filter")
        if not (part is None or isinstance(part, str)):
            raise ValueError(f"a filter of {name} is a part of a tensor's name, not {part!r}")
        conditions.append({"filter": part, "value": _setting(name, condition["value"])})
    if len(conditions) == 1 and conditions[0]["filter"] in (None, "*"):
        return conditions[0]["value"]
    return conditions


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML takes 1e-1 for text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, not {value!r}")
    return number


def _stated(name: str, setting: Setting | None) -> Setting:
    if setting is None:
        raise ValueError(f"{name} is missing")
    return _simple(setting)


def _simple(setting: Setting) -> Setting:
    """A list of equal numbers is that number."""
    if isinstance(setting, list) and all(x == setting[0] for x in setting):
        return setting[0] if not isinstance(setting[0], dict) else setting
    return setting


def _rest(setting: Setting | None) -> Setting:
    """1 - t, of every number in a setting."""
    setting = _stated("t", setting)
    if not isinstance(setting, list):
        return 1 - setting
    if isinstance(setting[0], dict):
        return [x | {"value": _rest(x["value"])} for x in setting]
    return [1 - x for x in setting]


def _constant(name: str, setting: Setting) -> float:
    setting = _simple(setting)
    if isinstance(setting, list):
        raise ValueError(f"{name} must be one value for all tensors")
    return setting


def _options(name: str, method: str, normalize: bool, models: Models) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if name in ("ties", "dare_ties"):
        options["combine"] = "mean" if normalize else "sum"
    if "density" in options_of(method):
        densities = [_simple(own.get("density", 1.0)) for _, own in models]
        alike = all(x == densities[0] for x in densities)
        one_number = not isinstance(densities[0], list)
        options["density"] = densities[0] if alike and one_number else densities
    if name == "breadcrumbs":
        gammas = {_constant("gamma", own.get("gamma", 0.01)) for _, own in models}
        if len(gammas) != 1:
            raise ValueError(f"gamma must be the same for all models, not {sorted(gammas)}")
        options["outliers"] = gammas.pop() if options["density"] != 1 else 0.0
    return options
