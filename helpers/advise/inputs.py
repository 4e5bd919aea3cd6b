"""What is given: models of one base, prompts of each, and a live base to try merges on."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import store
from helpers.merge import Row, Source, objections, open_base, open_specialist, views
from helpers.states.batch import encode_input, encode_prompt
from helpers.study.bench import load_base, specialist_key
from helpers.study.models import model_folder

NEUTRAL = store.ROOT / "data" / "neutral_probes.txt"
FEWEST = 8  # prompts of a model: fewer say nothing
LONGEST = 1024  # tokens of a prompt that is read; longer ones are left out
Prompt = str | list[dict]  # a text, or the messages of a chat


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
        return [Row(row.name, row.base, [row.taus[i] for i in places]) for row in self.rows]


# --- prompts -------------------------------------------------------------------------------------


def read_prompts(file: Path) -> list[Prompt]:
    """Each prompt of a file once: its lines or, of a .jsonl file, each line's object.

    An object has `prompt` or `text` (a string) or `messages` (a chat). Raises ValueError, naming
    the file and the line, for what is no prompt and for fewer than FEWEST.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise ValueError(f"prompts {file} are no file: name a .txt or .jsonl file for each model")
    if file.suffix == ".json":
        raise ValueError(f"{file} is one JSON value: write .jsonl, an object a line")
    prompts: list[Prompt] = []
    for number, line in enumerate(_lines(file), 1):
        line = line.strip()
        if line and file.suffix == ".jsonl":
            prompts.append(_prompt(line, f"{file}, line {number}"))
        elif line:
            prompts.append(line)
    unique = list({store.canonical(prompt): prompt for prompt in prompts}.values())
    if len(unique) < FEWEST:
        raise ValueError(
            f"{file} holds {len(unique)} different prompts: give {FEWEST} or more, better 64"
        )
    return unique


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{file} holds NUL bytes: it is no text")
    return text.split("\n")


def _prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    row = row if isinstance(row, dict) else {}
    text, chat = row.get("prompt", row.get("text")), row.get("messages")
    if isinstance(text, str) and text.strip():
        return text.strip()
    if isinstance(chat, list) and chat and all(map(_is_message, chat)):
        return chat
    raise ValueError(f'{where}: an object needs "prompt", "text" or "messages" (of a chat)')


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()


def prompts_of(labels: Sequence[str], files: Sequence[Path]) -> dict[str, list[Prompt]]:
    """Prompts by model: a file each, in order, or one for all; neutral sentences without any.

    Raises ValueError for another number of files, and what `read_prompts` does.
    """
    files = list(files) or [NEUTRAL]
    if len(files) not in (1, len(labels)):
        raise ValueError(
            f"{len(files)} files of prompts for {len(labels)} models: give one for each, in order"
        )
    read = [read_prompts(file) for file in files]
    read = read if len(read) == len(labels) else read * len(labels)
    return dict(zip(labels, read, strict=True))


def _encode(panel: Panel, label: str, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of the prompts that are short enough; ValueError if too few are."""
    tokenizer, limit = panel.tokenizer, LONGEST
    if any(not isinstance(prompt, str) for prompt in prompts) and not tokenizer.chat_template:
        raise ValueError(f"prompts of {label} are chats, but the base has no chat template")
    places = getattr(panel.model.config, "max_position_embeddings", None)
    if places:
        limit = min(limit, places - (0 if panel.encoder else panel.tokens))
    encoded = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        elif panel.encoder:
            ids = encode_input(tokenizer, prompt)
        else:
            ids = encode_prompt(tokenizer, prompt)
        if 0 < len(ids) <= limit:
            encoded.append(ids)
    if len(encoded) < FEWEST:
        raise ValueError(
            f"{label}: {len(encoded)} of {len(prompts)} prompts have at most {limit} tokens, "
            f"{FEWEST} are needed: give shorter ones"
        )
    return encoded


# --- models --------------------------------------------------------------------------------------


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


def check_device(device: str) -> None:
    """Raise ValueError unless torch has this device here."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda, cuda:1 or mps, not {device!r}")
    kind, _, number = device.partition(":")
    missing = kind == "cuda" and int(number or 0) >= torch.cuda.device_count()
    missing |= kind == "mps" and not torch.backends.mps.is_available()
    if missing:
        raise ValueError(f"torch finds no device {device} on this machine: use cpu")


def open_panel(
    base: str,
    models: Mapping[str, str],
    prompts: Mapping[str, Sequence[Prompt]],
    device: str = "cpu",
    dtype: str = "float32",
    tokens: int = 32,
) -> Panel:
    """The models (by label) of `base`, opened and checked; no prompt is read by a model yet.

    Raises ValueError, with the reason, for models that cannot be merged into this base, for one
    whose weights are pickles, and for an encoder-decoder.
    """
    check_device(device)
    folders = {label: folder_of(model) for label, model in models.items()}
    model, tokenizer, info = load_base(base, dtype, device)
    encoder = model.get_output_embeddings() is None
    opened = [open_specialist(path, label) for label, path in folders.items()]
    stored = open_base(model_folder(base))
    _check_meaning(stored, model_folder(base), folders, opened, encoder)
    heads = {}
    if encoder:
        prefix = f"{model.base_model_prefix}."
        heads = {source.label: _outside(source.tensors, prefix) for source in opened}
        stored = open_base(dict(model.named_parameters()))
        stored, *opened = (_inside(source, prefix) for source in (stored, *opened))
    stored = stored._replace(base_digest=info["digest"])
    rows = views(stored, opened, torch.device(device).type)
    if not rows:
        raise ValueError("no model differs from the base: there is nothing to merge")
    panel = Panel(
        model,
        tokenizer,
        info["digest"],
        tuple(models),
        rows,
        contents={label: specialist_key(path) for label, path in folders.items()},
        inputs={},
        heads=heads,
        tokens=tokens,
        batch_size=16 if device == "cpu" else 64,
    )
    inputs = {label: _encode(panel, label, prompts[label]) for label in models}
    return replace(panel, inputs=inputs)


def _check_meaning(
    base: Source,
    folder: Path,
    folders: Mapping[str, Path],
    sources: Sequence[Source],
    encoder: bool,
) -> None:
    """Raise ValueError where a merge would mean nothing: another vocabulary, unrelated weights."""
    models = [(source.label, folders[source.label], source) for source in sources]
    for reason in objections(base, folder, models, "base" if encoder else "merge"):
        raise ValueError(reason)


def _outside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def _inside(source: Source, prefix: str) -> Source:
    tensors = {name: t for name, t in source.tensors.items() if name.startswith(prefix)}
    return source._replace(tensors=tensors)
