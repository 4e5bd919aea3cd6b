"""What does a mergekit configuration ask for? Its YAML, checked part by part, as a recipe."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from helpers.merge.configuration import (
    Configuration,
    Entry,
    Parameters,
    Slice,
    UniqueKeys,
    model_name,
    parts,
)
from helpers.merge.plans import options_of
from helpers.merge.recipe import (
    DTYPES,
    Recipe,
    Setting,
    first_fault,
    is_layered,
    normalized,
)
from helpers.merge.weights import one_line, read_text

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
Models = list[tuple[str, dict[str, Any]]]  # name and parameters of each


def read_mergekit(file: Path) -> Recipe:
    """The recipe of a mergekit configuration, with the defaults of mergekit 0.1.5.

    Raises ValueError naming the first thing that is wrong or that this engine does not have:
    another method, layers of several models stacked.
    """
    text = read_text(file)
    try:
        config = yaml.load(text, UniqueKeys)
        if not isinstance(config, dict):
            raise ValueError(
                "a configuration is a mapping with merge_method and models"
            )
        _check_method(config.get("merge_method"))
        return _recipe(Configuration.model_validate(config))
    except ValidationError as error:
        raise ValueError(f"{file}: {first_fault(error)}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from error


def _check_method(name: Any) -> None:
    if name == "passthrough":
        raise ValueError(
            "passthrough stacks layers: the result has no common base to merge into"
        )
    if not isinstance(name, str) or name not in MERGEKIT:
        raise ValueError(
            f"merge_method {name} is not supported: {', '.join(MERGEKIT)} are"
        )


def _recipe(config: Configuration) -> Recipe:
    name = config.merge_method
    rule, normalizes, implied = MERGEKIT[name]
    shared = _parameters(config.parameters, {})
    entries, layers = _entries(config)
    base_model = config.base_model
    for part in config.slices or ():
        shared = _parameters(part.parameters, shared)
        base_model = part.base_model if base_model is None else base_model
    base, models = _with_base(name, base_model, entries, shared)
    normalize = shared.get("normalize", normalizes)
    if shared.get("rescale", "rescale" in implied) != ("rescale" in implied):
        raise ValueError(f"rescale: {shared['rescale']} is not supported for {name}")
    if name == "linear" and not normalize:
        raise ValueError("linear with normalize: false is not supported")
    if name in ("slerp", "nuslerp") and len(models) != 2:
        raise ValueError(f"{name} needs two models beside or with its base_model")
    if name == "slerp":
        t = _stated("t", shared.get("t", dict(models)[base].get("t")))
        weights = [_rest(t) if model == base else t for model, _ in models]
    else:
        weights = [
            _stated(f"the weight of {model}", own.get("weight"))
            for model, own in models
        ]
    recipe = Recipe(
        rule,
        base,
        [model for model, _ in models],
        weights,
        implied | _options(name, rule, normalize, models),
        scale=_constant("lambda", shared.get("scale", 1.0)),
        dtype=_dtype(config),
        tokenizer=_tokenizer(config),
        layers=layers,
        normalize=normalize
        and name not in ("linear", "ties", "dare_ties", "slerp", "nuslerp"),
    )
    return (
        recipe if is_layered(recipe) else normalized(recipe)._replace(normalize=False)
    )


# The parts ---------------------------------------------------------------------------------------


def _dtype(config: Configuration) -> str | None:
    dtype = config.out_dtype or config.dtype
    if isinstance(dtype, str):
        dtype = dtype.removeprefix("torch.")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise ValueError(f"dtype {dtype} is not supported: {', '.join(DTYPES)} are")
    return dtype


def _tokenizer(config: Configuration) -> str | None:
    """Whose tokens the merge has, from either way to state it."""
    source = config.tokenizer_source
    if source is None and config.tokenizer is not None:
        if not isinstance(config.tokenizer, dict) or config.tokenizer.keys() != {
            "source"
        }:
            raise ValueError(
                "tokenizer is supported as {source: base, union or a model}"
            )
        source = config.tokenizer["source"]
    if source is None or source in ("base", "union"):
        return source
    return model_name(source, None)


def _entries(config: Configuration) -> tuple[list[Entry], int | None]:
    """The models, and how many layers a slice says that each has."""
    if config.slices is None:
        if config.models is None:
            raise ValueError("no models are listed: models is a list of {model: …}")
        return config.models, None
    first = config.slices[0]
    layers = 0
    if any(_content(part) != _content(first) for part in config.slices):
        raise ValueError(
            "several slices must be the whole model together, each of the same models with "
            "the same parameters: others stack layers to another depth"
        )
    for part in config.slices:
        layers = _end(part, layers)
    return first.sources, layers


def _content(part: Slice) -> dict[str, Any]:
    """All that a slice states but its layers."""
    return part.model_dump(exclude={"sources": {"__all__": {"layer_range"}}})


def _end(part: Slice, start: int) -> int:
    """The layer at which a slice ends that begins at `start`."""
    stated = [source.layer_range for source in part.sources]
    whole = stated[0]
    if not isinstance(whole, list) or any(other != whole for other in stated):
        raise ValueError("the sources of a slice need one layer_range: [0, n]")
    if len(whole) != 2 or whole[0] != start or type(whole[1]) is not int:
        raise ValueError(f"layer_range {whole} is no whole model: [0, n] is")
    return whole[1]


def _with_base(
    name: str, stated: Any, entries: list[Entry], shared: dict[str, Any]
) -> tuple[str, Models]:
    """The base and the models with a task vector, or of an average all that are averaged."""
    if stated is None and name != "linear":
        raise ValueError(f"{name} needs a base_model")
    base = _common_base(entries) if stated is None else model_name(stated, None)
    models: Models = []
    for entry in entries:
        own = _parameters(entry.parameters, shared)
        models.append((model_name(entry.model, base), own))
    if base is None:
        return models[0][0], models  # of linear: any base gives the same weighted mean
    listed = [model for model, _ in models]
    if name in ("linear", "slerp"):
        if base not in listed and stated is not None:
            # mergekit takes the base as one more model
            models.append((base, dict(shared)))
        return base, models
    # the base has no task vector
    changed = [pair for pair in models if pair[0] != base]
    if not changed:
        raise ValueError(
            f"no model is listed but the base: {name} adds up what others changed"
        )
    return base, changed


def _common_base(entries: list[Entry]) -> str | None:
    """The base of models that are all its adapters; it is not averaged."""
    bases = set()
    for entry in entries:
        base, adapter = parts(entry.model)
        bases.add(base if adapter else None)
    return bases.pop() if len(bases) == 1 else None


def _parameters(own: Parameters | None, shared: dict[str, Any]) -> dict[str, Any]:
    """A part's parameters before those of the whole, which hold where no filter matches."""
    stated = own.stated() if own else {}
    for name in stated.keys() & shared.keys():
        stated[name] = _closed(stated[name], shared[name])
    return shared | stated


def _closed(setting: Setting, default: Setting) -> Setting:
    """A setting with a default for the tensors that none of its filters matches."""
    if not isinstance(setting, list) or not isinstance(setting[0], dict):
        return setting
    if any(condition["filter"] in (None, "*") for condition in setting):
        return setting
    return [*setting, *_conditions(default)]


def _conditions(setting: Setting) -> list[dict[str, Any]]:
    filtered = isinstance(setting, list) and isinstance(setting[0], dict)
    return setting if filtered else [{"filter": None, "value": setting}]


# Numbers -----------------------------------------------------------------------------------------


def _stated(name: str, setting: Setting | None) -> Setting:
    if setting is None:
        raise ValueError(
            f"{name} is missing (linear counts its base_model as one more model)"
        )
    return _simple(setting)


def _simple(setting: Setting) -> Setting:
    """A list of equal numbers is that number."""
    if isinstance(setting, list) and all(x == setting[0] for x in setting):
        return setting[0] if not isinstance(setting[0], dict) else setting
    return setting


def _rest(setting: Setting) -> Setting:
    """1 - t, of every number in a setting."""
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


def _options(name: str, rule: str, normalize: bool, models: Models) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if name in ("ties", "dare_ties"):
        options["combine"] = "mean" if normalize else "sum"
    if "density" in options_of(rule):
        stated = [_closed(own.get("density", 1.0), 1.0) for _, own in models]
        densities = list(map(_simple, stated))
        alike = all(x == densities[0] for x in densities)
        one_number = not isinstance(densities[0], list)
        options["density"] = densities[0] if alike and one_number else densities
    if name == "breadcrumbs":
        gammas = {_constant("gamma", own.get("gamma", 0.01)) for _, own in models}
        if len(gammas) != 1:
            raise ValueError(
                f"gamma must be the same for all models, not {sorted(gammas)}"
            )
        options["outliers"] = gammas.pop() if options["density"] != 1 else 0.0
    return options
