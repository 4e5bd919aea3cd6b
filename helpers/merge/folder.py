"""How does a merge become a model on disk? base + delta in safetensors, complete or not there.

The merge streams: tensor by tensor from memory-mapped inputs into safetensors shards, so memory is
a few times the largest tensor, whatever the size of the model and the number of specialists. The
folder is written under another name and renamed when it is complete.
"""

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from helpers.merge import copying, engine, surroundings, vocabulary
from helpers.merge.anatomy import config_of, depths
from helpers.merge.card import model_card, name_of, provenance
from helpers.merge.cost import print_cost
from helpers.merge.fit import fitted, named
from helpers.merge.parts import complete_or_absent
from helpers.merge.plans import MergePlan
from helpers.merge.recipe import DTYPES, Recipe, is_layered, numbers, plan_of
from helpers.merge.report import Report, summary
from helpers.merge.rounding import Grid, grid
from helpers.merge.shards import Layout, layout, write_tensors
from helpers.merge.sources import Source, open_base, open_specialist
from helpers.merge.ties import untied
from helpers.merge.vectors import Row, rows_of

THREADS = 4  # tensors that are merged at once, at most: each takes the memory of one


class Inputs(NamedTuple):
    """What a merge is made of, opened and checked: the base's folder first, then the models'."""

    base: Source
    models: list[Source]
    folders: list[Path]
    names: list[str]
    rows: int | None  # of the merge's embedding, where they are others than the base's
    tokenizer: Path  # the folder whose tokenizer is copied
    words: Collection[str]  # the tokens of the merge
    labels: dict[str, str] | None  # of the models' heads, where the base's has no names


def merge_to_folder(
    recipe: Recipe,
    out: Path,
    device: str = "cpu",
    folder_of: Callable[[str], Path] = Path,
    force: bool = False,
) -> Report:
    """Carry a recipe out into the folder `out`; prints its cost first and shows progress.

    folder_of: gives the folder of a base or a model by the name that the recipe states. Everything
    that can be refused is refused (ValueError) before a tensor is read; with `force` a merge that
    means nothing (`surroundings.objections`) is not.
    """
    place = _checked_place(out)
    chosen = plan_of(recipe)
    engine.check_match(recipe.match)
    engine.check_device(device)
    inputs = _open(recipe, folder_of, force)
    base = inputs.base
    chosen = _by_tensor(recipe, chosen, base, inputs.folders[0])
    like = layout(base, DTYPES.get(recipe.dtype))
    threads = min(torch.get_num_threads(), THREADS) if device == "cpu" else 1
    print_cost(recipe, like, place, threads)
    _print_notes(inputs)
    rows = rows_of(base, inputs.models, device)
    if not rows:
        raise ValueError("no model differs from the base: there is nothing to merge")
    about = provenance(recipe, inputs.folders)
    with complete_or_absent(out) as part:
        if recipe.match:
            chosen = engine.matched(rows, chosen, recipe.match)
        _copy_surroundings(recipe, inputs, part)
        report = _write_merge(part, base, rows, chosen, like, recipe, about, threads)
        _write_report(part, recipe, report, about, out.name)
    return report


def _open(recipe: Recipe, folder_of: Callable[[str], Path], force: bool) -> Inputs:
    """Open and check what a recipe names; ValueError for what does not belong together."""
    folders = [folder_of(model) for model in (recipe.base, *recipe.models)]
    names = list(map(name_of, recipe.models))
    base = open_base(folders[0])
    opened = []
    for i, (name, folder) in enumerate(zip(names, folders[1:], strict=True), 1):
        opened.append(open_specialist(folder, f"{i} ({name})"))
    base = untied(base, opened)
    models = named(base, opened, recipe.heads)
    choice = _tokenizer(recipe, names, folders)
    target, tokens = vocabulary.chosen(choice, [base, *models], folders)
    whole, models = vocabulary.by_token([base, *models], target, tokens)
    models = fitted(whole, models)
    seen = list(zip(names, folders[1:], models, strict=True))
    by_token = recipe.tokenizer is not None
    for reason in surroundings.objections(
        whole, folders[0], seen, recipe.heads, by_token
    ):
        if not force:
            raise ValueError(f"{reason} (--force merges all the same)")
        print(f"forced: {reason}")
    rows = None if whole is base else target.rows
    tokenizer = folders[choice] if isinstance(choice, int) else folders[0]
    words = (target.tokens or vocabulary.words_of(tokenizer)).keys()
    labels = _labels(recipe, whole, models, folders)
    return Inputs(whole, models, folders, names, rows, tokenizer, words, labels)


def _labels(
    recipe: Recipe, base: Source, models: list[Source], folders: list[Path]
) -> dict[str, str] | None:
    """The labels of the models' heads, where these are merged and the base's have no names."""
    if recipe.heads != "merge" or surroundings.labels_of(base, folders[0]):
        return None
    of_models = map(surroundings.labels_of, models, folders[1:])
    return next((labels for labels in of_models if labels), None)


def _tokenizer(
    recipe: Recipe, names: list[str], folders: list[Path]
) -> str | int | None:
    """Whose tokenizer the merge takes: as the recipe says, or the number of a folder."""
    if recipe.tokenizer in (None, "base", "union"):
        return recipe.tokenizer
    wanted = Path(recipe.tokenizer)  # as paths: "model/" is "model"
    if wanted == Path(recipe.base):
        return "base"
    models = enumerate(zip(recipe.models, names, strict=True), 1)
    found = [i for i, pair in models if wanted in map(Path, pair)]
    if len(found) > 1:
        raise ValueError(
            f"--tokenizer {wanted} may be several models: give the whole path"
        )
    for i in found:
        if not copying.belonging(folders[i], copying.TOKENIZER):
            raise ValueError(
                f"{names[i - 1]} has no tokenizer that the merge could take"
            )
        return i
    raise ValueError(
        f"--tokenizer {recipe.tokenizer} is neither base, union nor one of the models"
    )


def _copy_surroundings(recipe: Recipe, inputs: Inputs, part: Path) -> None:
    base, tokenizer = inputs.folders[0], inputs.tokenizer
    copying.copy_surroundings(base, tokenizer, part, recipe.dtype, inputs.rows)
    untied = (
        inputs.base.anatomy
        and inputs.base.anatomy.ties.keys() & inputs.base.tensors.keys()
    )
    # of encoder-decoders transformers reads another formula in this setting
    if untied and not config_of(part).get("is_encoder_decoder"):
        copying.edit(part / "config.json", {"tie_word_embeddings": False})
    if inputs.labels:
        numbers = {name: int(key) for key, name in inputs.labels.items()}
        labels = {"id2label": inputs.labels, "label2id": numbers}
        copying.edit(part / "config.json", labels)
    if recipe.tokenizer == "union":
        union = vocabulary.united(base, inputs.folders[1:])
        union.save(str(part / "tokenizer.json"))


def _write_report(
    part: Path, recipe: Recipe, report: Report, about: dict[str, Any], name: str
) -> None:
    content = report.as_dict()
    if is_layered(recipe):
        content["weights"] = recipe.weights
    content |= about
    content["method"] = recipe.rule  # what rule was called, for readers of that time
    text = json.dumps(content)
    (part / "merge_report.json").write_text(text + "\n", encoding="utf-8")
    card = model_card(recipe, report, name)
    (part / "README.md").write_text(card, encoding="utf-8")


def _by_tensor(
    recipe: Recipe, chosen: MergePlan, base: Source, folder: Path
) -> MergePlan:
    """The plan with its numbers by tensor, where the recipe has them."""
    known = base.anatomy and base.anatomy.layers
    layers = known or config_of(folder).get("num_hidden_layers")
    if recipe.layers is not None and recipe.layers != layers:
        raise ValueError(
            f"a slice has {recipe.layers} layers, the base {layers}: only all of them"
        )
    names = list(base.tensors)
    entries = sum(
        x.shape.numel() for x in base.tensors.values() if x.is_floating_point()
    )
    chosen = chosen._replace(entries=entries, depths=depths(names))
    if not is_layered(recipe):
        return chosen
    if recipe.options.get("scope") == "model" and is_layered(
        recipe._replace(weights=None)
    ):
        raise ValueError(
            "density must be one number a model where scope is model, not by tensor"
        )
    # mergekit 0.1.5 reads settings along the depth at 0 for all that lies outside the layers
    numbers_of = numbers(recipe, depths(names, after=0.0))
    for name in names:
        numbers_of(name)  # a filter that is missing is noticed before any work
    return chosen._replace(at_tensor=numbers_of)


def _checked_place(out: Path) -> Path:
    """The nearest folder above `out` that exists; ValueError if nothing can be made there."""
    try:
        str(out).encode()  # safetensors writes no other names
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(out)!r} is no UTF-8: name another --out") from error
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists: name another folder, or remove it")
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not place.is_dir():
        raise ValueError(f"{place} is a file: {out} cannot be written below it")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{place} cannot be written to: name another --out")
    return place


def _print_notes(inputs: Inputs) -> None:
    base = inputs.base
    models = list(zip(inputs.names, inputs.folders[1:], inputs.models, strict=True))
    if base.filed:
        print(
            f"note: {len(base.filed)} tensors have the base's names in the file, not those of "
            f"{base.anatomy.architecture}"
        )
    for copy in base.anatomy.ties.keys() & base.tensors.keys() if base.anatomy else ():
        print(f"note: {copy} is not tied to {base.anatomy.ties[copy]}: each is written")
    if base.recomputed:
        print(
            f"note: {len(base.recomputed)} buffers that loading computes anew stay as they are"
        )
    if inputs.rows is not None:
        print(
            f"note: embeddings have {inputs.rows} rows; models without one have the base's there"
        )
    for note in surroundings.losses(
        base, inputs.folders[0], inputs.tokenizer, inputs.words, models
    ):
        print(f"note: {note}")


def _write_merge(
    out: Path,
    base: Source,
    rows: list[Row],
    chosen: MergePlan,
    like: Layout,
    recipe: Recipe,
    about: dict[str, Any],
    threads: int,
) -> Report:
    def grid_of(name: str) -> Grid:
        return grid(like[name][0], name, recipe.round, chosen.seed)

    changed = {row.name for row in rows}
    records = []
    stream = engine.merge_tensors(rows, chosen, grid_of, threads)
    entries = sum(shape.numel() for _, shape in like.values())
    with tqdm(
        total=entries, desc=chosen.rule, unit="", unit_scale=True, disable=None
    ) as bar:

        def merged_of(name: str) -> Tensor | None:
            bar.update(like[name][1].numel())
            if name not in changed:
                return None
            _, merged, numbers = next(stream)
            records.append(numbers)
            return merged

        metadata = {key: json.dumps(value) for key, value in about.items()}
        write_tensors(out, base, merged_of, like, recipe.shard_size, grid_of, metadata)
    return summary(chosen, records)
