"""What does a merged model say of itself? Its card: base, tags, recipe, and what the merge did."""

from pathlib import Path

import yaml

from helpers.merge.recipe import Recipe, Setting, is_layered
from helpers.merge.report import Report

CARD = """---
{front}---
# {name}

A merge of {n} models by `{method}`, made with merging-collapse.

| model | weight | dose |
|---|---|---|
{table}

Dose: how far the merge goes along a model's task vector tau, <delta, tau> / ||tau||^2; 1 is all of
what fine-tuning changed{written}. The merged change is {scale:.3f} times as long as a task vector
on average, its cosine to their sum is {cos:.3f}, and {kept:.1%} of its entries are not zero.{plain}
More: `merge_report.json`.

```yaml
{recipe}```
"""


def model_card(recipe: Recipe, report: Report, name: str) -> str:
    """The README of a merged model: names, no paths."""
    base = name_of(recipe.base)
    models = [name_of(model) for model in recipe.models]
    plan = report.plan
    front = {"base_model": [base, *models], "tags": ["merge"], "library_name": "transformers"}
    weights = plan.weights
    options = plan.options
    if is_layered(recipe):
        weights = recipe.weights
        options = dict(recipe.options)
    stated = recipe._asdict() | {
        "base": base,
        "models": models,
        "weights": weights,
        "options": options,
        "scale": plan.scale,
    }
    table = [
        f"| {model} | {_weight_text(weight)} | {dose_text(dose)} |"
        for model, weight, dose in zip(models, weights, report.own, strict=True)
    ]
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        name=name,
        n=len(models),
        method=recipe.method,
        table="\n".join(table),
        scale=report.effective_scale,
        cos=report.cos_sum,
        kept=report.kept,
        written=rounding_text(report),
        plain=f" {report.plain} tensors that are no matrices took the plain mean."
        * bool(report.plain),
        recipe=yaml.safe_dump(stated, sort_keys=False, allow_unicode=True),
    )


def _weight_text(weight: Setting) -> str:
    return "by tensor" if isinstance(weight, list) else f"{weight:g}"


def dose_text(dose: float | None) -> str:
    return "-" if dose is None else f"{dose:.3f}"


def plain_text(report: Report) -> str:
    """How many tensors a rule on matrices did not apply to."""
    if not report.plain:
        return ""
    return f" {report.plain} tensors that are no matrices took the plain mean."


def rounding_text(report: Report) -> str:
    """What rounding to the file's grid left; nothing where it was not coarse."""
    if not report.is_rounded:
        return ""
    return f", measured in the file, which holds {report.left:.1%} of the merged change"


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
