"""What does a merged model say of itself? Its card and its origin: base, recipe, what it did."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from helpers.merge.recipe import Recipe
from helpers.merge.report import Report
from helpers.merge.weights import sampled_digest

CARD = """---
{front}---
# {name}

A merge of {n} models by `{rule}`, made with merging-collapse.

| model | weight | dose |
|---|---|---|
{table}

Dose: how far the merge goes along a model's task vector tau, <delta, tau> / ||tau||^2; 1 is all of
what fine-tuning changed{written}. The merged change is {scale:.3f} times as long as a task vector
on average, its cosine to their sum is {cos:.3f}, and {kept:.1%} of its entries are not zero.{plain}
More: `merge_report.json`. Made again, from where the models are found by these names, by
`python -m helpers merge --recipe README.md --out AGAIN`:

```yaml
{recipe}```
"""


def model_card(recipe: Recipe, report: Report, name: str) -> str:
    """The README of a merged model: names, no paths."""
    stated = as_stated(recipe)
    models = stated["models"]
    bases = [model.partition("@")[0] for model in (stated["base"], *models)]
    front = {"base_model": bases, "tags": ["merge"], "library_name": "transformers"}
    weights = recipe.weights or report.plan.weights
    table = []
    for model, weight, dose in zip(models, weights, report.own, strict=True):
        number = "by tensor" if isinstance(weight, list) else f"{weight:g}"
        table.append(f"| {model} | {number} | {dose_text(dose)} |")
    rounded = (
        f", measured in the file, which holds {report.left:.1%} of the merged change"
    )
    plain = f" {report.plain} tensors that are no matrices took the plain mean."
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        name=name,
        n=len(models),
        rule=recipe.rule,
        table="\n".join(table),
        scale=report.effective_scale,
        cos=report.cos_sum,
        kept=report.kept,
        written=rounded if report.is_rounded else "",
        plain=plain if report.plain else "",
        recipe=yaml.safe_dump(stated, sort_keys=False, allow_unicode=True),
    )


def as_stated(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says beside the defaults, with names in the place of paths."""
    named = recipe._replace(
        base=name_of(recipe.base),
        models=list(map(name_of, recipe.models)),
        tokenizer=recipe.tokenizer and name_of(recipe.tokenizer),
    )
    defaults = Recipe._field_defaults
    stated = named._asdict().items()
    return {key: x for key, x in stated if key not in defaults or x != defaults[key]}


def provenance(recipe: Recipe, folders: Sequence[Path]) -> dict[str, Any]:
    """Where a merge comes from: this package's version, the recipe, and what tells the inputs'
    weights from others (`weights.sampled_digest`), the base's first.
    """
    inputs = []
    for model, folder in zip((recipe.base, *recipe.models), folders, strict=True):
        about = {"model": name_of(model), "digest": sampled_digest(folder)}
        place = folder.absolute()
        if place.parent.name == "snapshots":  # a commit in the hub's cache
            about["revision"] = place.name
        inputs.append(about)
    try:
        installed = version("merging-collapse")
    except PackageNotFoundError:  # a checkout that nobody installed
        installed = "unknown"
    return {
        "merging_collapse": installed,
        "recipe": as_stated(recipe),
        "inputs": inputs,
    }


def dose_text(dose: float | None) -> str:
    return "-" if dose is None else f"{dose:.3f}"


def name_of(model: str) -> str:
    """What a card calls a model: its name, or the name of its folder, never a path.

    A folder of the hub's cache has the name of the model that it holds, not that of its commit.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    for part in folder.resolve().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return folder.resolve().name
