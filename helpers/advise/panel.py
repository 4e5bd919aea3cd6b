"""Models of one base, opened and checked, with a live base to try their merges on."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.advise.prompts import FEWEST, LONGEST, Prompt, encode
from helpers.merge import (
    Row,
    Source,
    check_device,
    objections,
    open_base,
    open_specialist,
    views,
)
from helpers.study.bench import Bench, body, head_of, load_base, specialist_key
from helpers.study.models import model_folder
from helpers.study.tasks import Task


@dataclass(frozen=True)
class Panel:
    """A live base, the task vectors of the models (rows in the order of `labels`), their prompts.

    contents: digest of each model's weights. inputs: token ids of each model's prompts. heads: of
    an encoder, each model's own head by parameter name. tokens: how much of an answer counts.
    """

    model: torch.nn.Module
    tokenizer: Any
    base: str
    labels: tuple[str, ...]
    rows: list[Row]
    contents: dict[str, str]
    inputs: dict[str, list[list[int]]]
    heads: dict[str, dict[str, Tensor]]
    tokens: int = 32
    batch_size: int = 16

    @property
    def encoder(self) -> bool:
        """Whether models answer with a label of their own head, not in words."""
        return bool(self.heads)

    def of(self, labels: Sequence[str]) -> list[Row]:
        """The task vectors of some of the models."""
        places = [self.labels.index(label) for label in labels]
        rows = []
        for row in self.rows:
            taus = [row.taus[place] for place in places]
            rows.append(Row(row.name, row.base, taus))
        return rows


def labels_of(models: Sequence[str]) -> list[str]:
    """What tables call the models: the last part of each path or id, or all of it if two agree.

    Raises ValueError for fewer than two models and for one that is given twice.
    """
    if len(models) < 2:
        raise ValueError(f"advice needs two models or more, not {len(models)}")
    if len(set(models)) < len(models):
        raise ValueError("a model is given twice: name each once")
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(short) else list(models)


def folder_of(model: str) -> Path:
    """A folder as it is (an adapter, or a checkpoint without config); else a model by its name."""
    path = Path(model).expanduser()
    return path if path.is_dir() else model_folder(model)


def open_panel(
    base: str,
    models: Mapping[str, str],
    prompts: Mapping[str, Sequence[Prompt]],
    device: str = "cpu",
    dtype: str = "float32",
    tokens: int = 32,
    longest: int = LONGEST,
) -> Panel:
    """The models (by label) of `base`, opened and checked; no prompt is read by a model yet.

    longest: tokens of a prompt that is read; longer ones are left out.

    Raises ValueError, with the reason, for models that cannot be merged into this base, and for
    one whose weights are pickles.
    """
    check_device(device, ["mps", "auto"])
    stored = open_base(model_folder(base))  # first: it says what is wrong with a folder
    folders = {label: folder_of(model) for label, model in models.items()}
    model, tokenizer, info = load_base(base, dtype, device)
    encoder = _is_encoder(model)
    sources = [open_specialist(path, label) for label, path in folders.items()]
    _check_meaning(stored, model_folder(base), folders, sources, encoder)
    rows = _rows(model, stored._replace(base_digest=info["digest"]), sources, encoder)
    return _panel(model, tokenizer, info["digest"], rows, folders, prompts, tokens, longest)


def panel_of(bench: Bench, tokens: int = 32) -> Panel:
    """The specialists of a study, to be tried on prompts of their tasks, without labels.

    A study scores prompts of any length, so these may have any as well.
    """
    folders = bench.specialists
    prompts = {label: trial_prompts(bench.tasks[label]) for label in folders}
    given = bench.base["digest"], bench.rows(folders), folders, prompts, tokens, sys.maxsize
    return _panel(bench.model, bench.tokenizer, *given)


def trial_prompts(task: Task) -> list[str]:
    """The probes of a task; where these are too few for advice, prompts of its dev split too."""
    probes, more = (list(task.splits[part]["prompt"]) for part in ("probe", "dev"))
    return probes + more[: max(FEWEST - len(probes), 0)]


def _panel(
    model: torch.nn.Module,
    tokenizer: Any,
    base: str,
    rows: list[Row],
    folders: Mapping[str, Path],
    prompts: Mapping[str, Sequence[Prompt]],
    tokens: int,
    longest: int,
) -> Panel:
    encoder = _is_encoder(model)
    places = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    limit = min(places - tokens * (not encoder), longest)  # leaves room for an answer
    heads = {}
    if encoder:
        for label, folder in folders.items():
            heads[label] = head_of(model, open_specialist(folder, label).tensors)
    return Panel(
        model,
        tokenizer,
        base,
        tuple(folders),
        rows,
        contents={label: specialist_key(folder) for label, folder in folders.items()},
        inputs={x: encode(prompts[x], x, tokenizer, encoder, limit) for x in folders},
        heads=heads,
        tokens=tokens,
        batch_size=16 if model.device.type == "cpu" else 64,
    )


def _check_meaning(
    base: Source,
    folder: Path,
    folders: Mapping[str, Path],
    sources: Sequence[Source],
    encoder: bool,
) -> None:
    """Raise ValueError where a merge would mean nothing: another vocabulary, unrelated weights."""
    models = [(source.label, folders[source.label], source) for source in sources]
    heads = "base" if encoder else "merge"
    for reason in objections(base, folder, models, heads):
        raise ValueError(reason)


def _is_encoder(model: torch.nn.Module) -> bool:
    return model.get_output_embeddings() is None


def _rows(
    model: torch.nn.Module,
    base: Source,
    sources: Sequence[Source],
    encoder: bool,
) -> list[Row]:
    """Task vectors, tensor by tensor; of encoders without their heads."""
    if encoder:
        live = open_base(dict(model.named_parameters()))
        base = live._replace(base_digest=base.base_digest)
        base, *sources = (body(model, source) for source in (base, *sources))
    rows = views(base, sources, model.device.type)
    if not rows:
        raise ValueError("no model differs from the base: there is nothing to merge")
    return rows
