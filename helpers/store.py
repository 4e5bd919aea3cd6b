"""Computed once: has this been computed already, and what exactly was it computed from?

A costly step is a folder named by a key, the digest of what determines its content. It is filled
aside, under the name of this host and process, and renamed when it is whole: what can be seen is
finished, a killed run leaves nothing that could pass for a result, and hosts that share the folder
need no lock. The first writer wins; what was damaged since is found by its digests and made again.
"""

import errno
import gzip
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
"""Root of the repository; `helpers` is installed editable."""


def canonical(obj: Any) -> str:
    """The one JSON text of `obj`: keys sorted, no spaces, tuples as lists.

    Raises ValueError for NaN and infinities, for keys that are not text, and for types that JSON
    has no word for: two different objects must never share a text.
    """
    _check_json(obj, "value")
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _check_json(obj: Any, where: str) -> None:
    if isinstance(obj, dict):
        for name, value in obj.items():
            if not isinstance(name, str):
                raise ValueError(f"{where} has the key {name!r}; JSON keys are text")
            _check_json(value, f"{where}[{name!r}]")
    elif isinstance(obj, list | tuple):
        for i, value in enumerate(obj):
            _check_json(value, f"{where}[{i}]")
    elif isinstance(obj, float) and not math.isfinite(obj):
        raise ValueError(f"{where} is {obj}, which JSON cannot hold: write None")
    elif not isinstance(obj, str | bool | int | float | None):
        kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
        raise ValueError(
            f"{where} is a {kind}; use plain numbers, text, lists, dicts or a digest"
        )


def digest(obj: Any) -> str:
    """sha256 (64 hex digits) of the content of `obj`.

    bytes: themselves. Path: the content of the file, or of every file below the folder with its
    relative name. Tensor or array: dtype, shape and bytes. Anything else: its `canonical` JSON.
    """
    if isinstance(obj, bytes):
        return hashlib.sha256(obj).hexdigest()
    if isinstance(obj, Path) and obj.is_dir():
        return digest(sorted(_digests(obj).items()))
    if isinstance(obj, Path):
        with obj.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if hasattr(obj, "dtype") and hasattr(obj, "shape"):
        kind = f"{obj.dtype}{list(obj.shape)}".removeprefix("torch.")
        return digest(kind.encode() + _raw(obj))
    return digest(canonical(obj).encode())


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def _raw(array: Any) -> bytes:
    """The bytes of a tensor or array in row-major order."""
    if hasattr(array, "detach"):  # torch: bfloat16 has no NumPy type, its bytes do
        import torch

        flat = array.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes()
    return array.tobytes()


# --- results by key --------------------------------------------------------------------------

SEAL = "determinants.json"  # of each result: its origin, cost and files' digests
_intact: dict[Path, list] = {}  # what this process has checked, as it was then


def key(step: str, version: int, determinants: dict) -> str:
    """Name (16 hex digits) of the result of a step: same step, version, determinants, same key.

    `version` is raised by hand when the step's code changes what it computes.
    """
    return digest({"step": step, "version": version, "determinants": determinants})[:16]


def store() -> Path:
    """Folder of all computed steps: $MERGING_COLLAPSE_STORE, else data/runs/store."""
    return Path(
        os.environ.get("MERGING_COLLAPSE_STORE") or ROOT / "data" / "runs" / "store"
    )


def place(step: str, version: int, determinants: dict) -> Path:
    """Where the store holds this result, once it is finished."""
    return store() / step / key(step, version, determinants)


def finished(step: str, version: int, determinants: dict) -> bool:
    """Whether the store holds this result, with the content that it was finished with."""
    return _is_intact(place(step, version, determinants))


def seal(folder: Path) -> dict:
    """What a result was made from: step, version, determinants, machine, seconds, cpu_seconds."""
    return json.loads((folder / SEAL).read_text(encoding="utf-8"))


def cached(
    step: str,
    version: int,
    determinants: dict,
    compute: Callable[[Path], None],
    machine: dict | None = None,
) -> Path:
    """Folder of the step's result, computed only if no earlier run has finished it.

    `compute(folder)` fills an empty folder; SEAL is added, with `machine` (what rounding depends
    on, which is in no key), and the folder renamed to store()/step/key. Of two processes that
    compute one result the first wins. Raises OSError, in a sentence, where the store is full or
    cannot be written.
    """
    done = place(step, version, determinants)
    if _is_intact(done):
        return done
    made_from = {"step": step, "version": version, "determinants": determinants}
    _remove_leftovers(done)
    mark = f".{done.name}-{platform.node()}-{os.getpid()}"
    part = done.with_name(f"{mark}-{uuid.uuid4().hex[:8]}.part")
    try:
        with _explained(store()):
            part.mkdir(parents=True)
            start, cpu = time.perf_counter(), time.process_time()
            compute(part)
            made_from["seconds"] = time.perf_counter() - start
            made_from["cpu_seconds"] = time.process_time() - cpu
            made_from |= {"machine": machine or {}, "files": _digests(part)}
            (part / SEAL).write_text(json.dumps(made_from, indent=1, sort_keys=True))
            _move(part, done)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return done


def _is_intact(folder: Path) -> bool:
    """Whether a result has the key and the files that it was sealed with."""
    if not folder.is_dir():
        return False
    now = sorted(
        (str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")
    )
    if _intact.get(folder) == now:
        return True
    try:
        made_from = seal(folder)
        name = key(*(made_from[field] for field in ("step", "version", "determinants")))
        files = _digests(folder)
        files.pop(SEAL)
        if (name, files) == (folder.name, made_from["files"]):
            _intact[folder] = now
            return True
    except (OSError, ValueError, KeyError):
        pass
    return False


def _move(part: Path, done: Path) -> None:
    """Rename a filled folder to its name, unless another process has finished the same result."""
    if done.exists() and not _is_intact(done):
        warnings.warn(
            f"{done} was damaged since it was computed: computed again", stacklevel=2
        )
        broken = part.with_suffix(".broken")
        done.rename(broken)
        shutil.rmtree(broken)
    try:
        part.rename(done)
    except OSError:
        if not _is_intact(done):
            raise


def _remove_leftovers(done: Path) -> None:
    """Remove what killed processes of this host left of a result; other hosts' are not ours."""
    mark = f".{done.name}-{platform.node()}-"
    for part in done.parent.glob(f"{mark}*.part"):
        if not psutil.pid_exists(int(part.name.removeprefix(mark).split("-")[0])):
            shutil.rmtree(part, ignore_errors=True)


FAULTS = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "has reached its quota",
    errno.EROFS: "is read-only",
    errno.EACCES: "may not be written",
}


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say in a sentence why `folder` cannot be written to."""
    try:
        yield
    except Exception as error:
        # safetensors and pandas have their own words for a full disk
        number = getattr(error, "errno", None)
        if "No space left" in str(error):
            number = errno.ENOSPC
        file = Path(getattr(error, "filename", None) or folder)
        if number not in FAULTS or not file.is_relative_to(folder):
            raise
        remedy = "free space there or name another folder (the store's: MERGING_COLLAPSE_STORE)"
        message = f"{folder} {FAULTS[number]}: {remedy}; what is finished is kept"
        raise OSError(number, message) from error


# --- whole files -----------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix), renamed to it if the body succeeds."""
    part = path.with_name(f".part-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        with _explained(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def append_jsonl(path: Path, row: dict) -> None:
    """Append one row as one line of canonical JSON; on a full disk the file stays as it was."""
    before = path.read_bytes() if path.exists() else b""
    with atomic_write(path) as part:
        part.write_bytes(before + (canonical(row) + "\n").encode())


def read_jsonl(path: Path) -> list[dict]:
    """All rows of a JSON-lines file, oldest first; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def write_table(path: Path, frame: Any) -> None:
    """Write a data frame as CSV, whole or not at all; equal tables give equal bytes."""
    text = frame.to_csv(index=False, lineterminator="\n").encode()
    with atomic_write(path) as part:
        part.write_bytes(gzip.compress(text, mtime=1) if path.suffix == ".gz" else text)


def write_arrays(path: Path, compressed: bool = True, **arrays: Any) -> None:
    """Write named arrays as an .npz, whole or not at all; compressing states saves little."""
    import numpy as np

    with atomic_write(path) as part:
        (np.savez_compressed if compressed else np.savez)(part, **arrays)


REVISION = "MERGING_COLLAPSE_REVISION"


def revision() -> str | None:
    """Git revision of the code ("-dirty" if edited); None outside a checkout, as in an archive.

    `refresh` names it in the environment, because it writes into the checkout while it runs.
    """
    if os.environ.get(REVISION):
        return os.environ[REVISION]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None
