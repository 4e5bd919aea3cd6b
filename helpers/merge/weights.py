"""Which files hold a model's weights? Safetensors, as transformers finds them, never pickles."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
MIB = 1 << 20
SAMPLE = 1 << 12


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors folder by name, memory-mapped: no byte of them is read yet.

    Raises ValueError, with the reason, if the folder has no complete set of safetensors.
    """
    file = _weights_file(folder)
    if not file.name.endswith(".index.json"):
        return read_file(file)
    places = _places(file)
    tensors = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            raise ValueError(
                f"{folder} lists {shard} in its index, but it is not there"
            )
        for name, tensor in read_file(folder / shard).items():
            if places.get(name) != shard:
                raise ValueError(
                    f"{folder}: the index and {shard} disagree about {name}"
                )
            tensors[name] = tensor
    for name in places.keys() - tensors.keys():
        raise ValueError(f"{folder}: the index and the files disagree about {name}")
    return tensors


def _weights_file(folder: Path) -> Path:
    """The file or the index that transformers would load; the only safetensors file if it is
    neither.
    """
    config = folder / "config.json"
    stated = json_if_there(config).get("transformers_weights")
    if stated is not None:
        return _inside(config, stated)
    for name in ("model.safetensors", INDEX):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{folder} {no_weights(folder)}")
    return files[0]


def _places(index: Path) -> dict[str, str]:
    """The shard of each tensor, from an index."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(
            f"{index} has no weight_map of tensors and files: copy it again"
        )
    return {name: _inside(index, place).name for name, place in places.items()}


def _inside(stating: Path, name: Any) -> Path:
    """The file beside `stating` that it names; ValueError if the name leads elsewhere."""
    if (
        not isinstance(name, str)
        or name in ("", "..")
        or Path(name) != Path(Path(name).name)
    ):
        raise ValueError(f"{stating} names {name!r}, which is no file beside it")
    return stating.parent / name


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, memory-mapped; ValueError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged or cut short: copy it again ({error})"
        ) from error


def no_weights(folder: Path) -> str:
    """Why a folder cannot be read."""
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    tensors = [file for file in files if file.suffix == ".safetensors"]
    if tensors:
        return f"holds {len(tensors)} safetensors files and no {INDEX}"
    for file in files:
        if file.suffix in PICKLES:
            return (
                f"holds {file.name}, a pickle, which can run code when opened: "
                "save it as safetensors"
            )
    return "is not a folder with safetensors weights"


def read_text(file: Path) -> str:
    """A text file; ValueError, naming it, if it cannot be read as one."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The names and values of a JSON file; ValueError, naming it, if it holds anything else."""
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON dict, not {type(content).__name__}")
    return content


def json_if_there(file: Path) -> dict[str, Any]:
    """As `read_json`; empty where there is no file."""
    return read_json(file) if file.is_file() else {}


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def weights_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, sorted; of an adapter its settings, too."""
    adapter = [
        folder / name for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    if adapter[0].is_file():
        return adapter
    file = _weights_file(folder)
    if not file.name.endswith(".index.json"):
        return [file]
    return [folder / shard for shard in sorted(set(_places(file).values()))]


def sampled_digest(folder: Path) -> str:
    """What tells a folder's weights from others: SHA-256 of their files' sizes and, of every MiB,
    the first 4 KiB; of files up to 64 MiB all. A whole model is read more slowly than merged.
    """
    digest = hashlib.sha256()
    for path in weights_files(folder):
        size = path.stat().st_size
        digest.update(size.to_bytes(8))
        step = SAMPLE if size <= 64 * MIB else MIB
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def recorded_digest(folder: Path) -> str | None:
    """The digest that a folder records of the base that it belongs to."""
    return json_if_there(folder / "base.json").get("digest")


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
