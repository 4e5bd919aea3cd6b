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
    check_device,
    objections,
    open_base,
    open_specialist,
    views,
)
from helpers.study.bench import Bench, head_of, load_base, specialist_key
from helpers.study.models import model_folder
from helpers.study.tasks import Task

TOKENS = 32  # of an answer that count


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
    tokens: int
    batch_size: int

    @property
    def encoder(self) -> bool:
        """Whether models answer with a label of their own head, not in words."""
        return bool(self.heads)

    def of(self, labels: Sequence[str]) -> list[Row]:
        """The task vectors of some of the models."""
        places = [self.labels.index(label) for label in labels]
        return [
            row._replace(taus=[row.taus[place] for place in places])
            for row in self.rows
        ]


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
    tokens: int = TOKENS,
    longest: int = LONGEST,
) -> Panel:
    """The models (by label) of `base`, opened and checked; no prompt is read by a model yet.

    longest: tokens of a prompt that is read; longer ones are left out. Raises ValueError, with the
    reason, for models that cannot be merged into this base, and for one whose weights are pickles.
    """
    check_device(device, ["mps", "auto"])
    folder = model_folder(base)
    stored = open_base(folder)  # first: it says what is wrong with a folder
    folders = {label: folder_of(model) for label, model in models.items()}
    bench = Bench(*load_base(base, dtype, device), tasks={}, specialists=folders)
    sources = {label: open_specialist(path, label) for label, path in folders.items()}
    given = [(label, folders[label], source) for label, source in sources.items()]
    for reason in objections(
        stored, folder, given, "base" if bench.encoder else "merge"
    ):
        raise ValueError(reason)
    if bench.encoder:
        rows = bench.rows(folders)
    else:
        stored = stored._replace(base_digest=bench.base["digest"])
        rows = views(stored, [*sources.values()], bench.model.device.type)
    if not rows:
        raise ValueError("no model differs from the base: there is nothing to merge")
    return _panel(bench, rows, prompts, tokens, longest)


def panel_of(bench: Bench) -> Panel:
    """The specialists of a study, to be tried on prompts of their tasks, without labels.

    A study scores prompts of any length, so these may have any as well.
    """
    prompts = {label: trial_prompts(bench.tasks[label]) for label in bench.specialists}
    return _panel(bench, bench.rows(bench.specialists), prompts, TOKENS, sys.maxsize)


def trial_prompts(task: Task) -> list[str]:
    """The probes of a task; where these are too few for advice, prompts of its dev split too."""
    probes, more = (list(task.splits[part]["prompt"]) for part in ("probe", "dev"))
    return probes + more[: max(FEWEST - len(probes), 0)]


def _panel(
    bench: Bench,
    rows: list[Row],
    prompts: Mapping[str, Sequence[Prompt]],
    tokens: int,
    longest: int,
) -> Panel:
    model, folders, encoder = bench.model, bench.specialists, bench.encoder
    places = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    limit = min(places - tokens * (not encoder), longest)  # leaves room for an answer
    heads = {}
    if encoder:
        for label, folder in folders.items():
            heads[label] = head_of(model, open_specialist(folder, label).tensors)
    return Panel(
        model,
        bench.tokenizer,
        bench.base["digest"],
        tuple(folders),
        rows,
        contents={label: specialist_key(folder) for label, folder in folders.items()},
        inputs={
            x: encode(prompts[x], x, bench.tokenizer, encoder, limit) for x in folders
        },
        heads=heads,
        tokens=tokens,
        batch_size=16 if model.device.type == "cpu" else 64,
    )
