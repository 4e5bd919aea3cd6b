"""Which tensors does a model consist of? Those of its safetensors files, each once, by name."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors folder by name, memory-mapped: no byte of them is read yet.

    Raises ValueError, with the reason, if the folder has no complete set of safetensors.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_file(_single_file(folder))
    places = read_json(index)["weight_map"]
    tensors = {}
    for file in sorted({folder / name for name in places.values()}):
        if not file.is_file():
            raise ValueError(f"{folder} lists {file.name} in its index, but it is not there")
        tensors |= read_file(file)
    for name in tensors.keys() ^ places.keys():
        raise ValueError(f"{folder}: the index and the files disagree about {name}")
    return tensors


def _single_file(folder: Path) -> Path:
    single = folder / "model.safetensors"
    if single.is_file():
        return single
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{folder} {no_weights(folder, files)}")
    return files[0]


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, memory-mapped; ValueError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short: copy it again ({error})") from error


def no_weights(folder: Path, files: Sequence[Path] = ()) -> str:
    """Why a folder cannot be read."""
    if files:
        return f"holds {len(files)} safetensors files and no model.safetensors.index.json"
    pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in PICKLES]
    if pickles:
        return (
            f"holds {pickles[0]}, a pickle, which can run code when opened: save it as safetensors"
        )
    return "is not a folder with safetensors weights"


def read_json(file: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(file.read_text(encoding="utf-8"))


def recorded_digest(folder: Path) -> str | None:
    """The digest that a folder records of the base that it belongs to."""
    file = folder / "base.json"
    return read_json(file).get("digest") if file.is_file() else None


def without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every storage once, under its first name."""
    seen = set()
    kept = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            kept[name] = tensor.detach()
        seen.add(place)
    return kept


def without_tied_head(folder: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Drop the copy of a tied output embedding that some tools write beside the input embedding."""
    config = folder / "config.json"
    tied = config.is_file() and read_json(config).get("tie_word_embeddings", False)
    inputs = [name for name in tensors if name.endswith("embed_tokens.weight")]
    if not (tied and "lm_head.weight" in tensors and inputs):
        return tensors
    if not torch.equal(tensors["lm_head.weight"], tensors[inputs[0]]):
        raise ValueError(f"{folder}: lm_head.weight is tied to {inputs[0]}, but differs from it")
    return {name: tensors[name] for name in tensors if name != "lm_head.weight"}
