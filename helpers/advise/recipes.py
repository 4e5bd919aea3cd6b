"""A merge as others make it: a command line, and a configuration of mergekit."""

import math
import shlex
from collections.abc import Mapping

import yaml

from helpers.advise.merges import Merge
from helpers.merge import plan


def command(merge: Merge, base: str, sources: Mapping[str, str], out: str) -> str:
    """The command line that makes the merge; sources: folder or id of each model."""
    words = ["python", "-m", "helpers", "merge", "--rule", merge.rule, "--base", base]
    words += ["--models", *(sources[model] for model in merge.models)]
    if merge.weights is not None:
        words += ["--weights", *map(str, merge.weights)]
    if merge.scale != 1:
        words += ["--scale", str(merge.scale)]
    return shlex.join([*words, "--out", out])


def mergekit(
    merge: Merge, base: str, sources: Mapping[str, str], adapters: set[str]
) -> str:
    """The same merge as a mergekit configuration; adapters: the models that are no checkpoints.

    Averaging is stated as task arithmetic at weights of sum 1: the same model, and mergekit's
    `linear` would take the base for one more.
    """
    chosen = plan(merge.rule, merge.models, merge.weights)
    average = merge.rule == "linear"
    total = math.fsum(chosen.weights) if average else 1.0
    models = []
    for model, weight in zip(merge.models, chosen.weights, strict=True):
        prefix = f"{base}+" if model in adapters else ""
        parameters = {"weight": weight / total}
        models.append({"model": prefix + sources[model], "parameters": parameters})
    shared: dict[str, float | bool] = {"lambda": merge.scale}
    if merge.rule == "ties":
        shared["density"] = chosen.options["density"]
        shared["normalize"] = chosen.options["combine"] == "mean"
    config = {
        "merge_method": "task_arithmetic" if average else merge.rule,
        "base_model": base,
        "models": models,
        "parameters": shared,
    }
    return yaml.safe_dump(config, sort_keys=False)
