"""How is a folder complete or not there at all? Written beside its place and renamed at the end."""

import errno
import glob
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

OWNER = ".owner.json"  # in a folder that is being written


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, renamed to `out` at the end or removed on failure.

    What killed merges into `out` have left is removed first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name[:40]}.part-"
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        if _is_dead(left):
            shutil.rmtree(left)
    part = out.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    part.mkdir()
    (part / OWNER).write_text(json.dumps(_owner(os.getpid())))
    try:
        yield part
        (part / OWNER).unlink()
        _rename(part, out)
    except BaseException as error:
        shutil.rmtree(part)
        # safetensors has an exception of its own for it
        if "No space left" in str(error):
            sentence = f"{out.parent} is full: free space there or name another --out"
            raise OSError(errno.ENOSPC, sentence) from error
        raise


def _rename(part: Path, out: Path) -> None:
    try:
        part.rename(out)
    except OSError as error:
        raise ValueError(
            f"{out} was made by another process meanwhile: {error}"
        ) from error


def _owner(pid: int) -> dict[str, Any]:
    """What tells a process from any other, on this machine and others."""
    return {
        "host": platform.node(),
        "pid": pid,
        "started": psutil.Process(pid).create_time(),
    }


def _is_dead(part: Path) -> bool:
    """Whether a folder was left by a merge on this machine that is no longer running."""
    try:
        owner = json.loads((part / OWNER).read_text())
        return owner["host"] == platform.node() and owner != _owner(owner["pid"])
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        # not a merge's, or another host's
        return False
