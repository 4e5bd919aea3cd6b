"""When must a notebook run again? When something changed that its imports reach.

A notebook's key is the digest of its text, its parameters, the rooms of `helpers` that its imports
reach, the data files that these name, the pins, and the files that it reads. `helpers.run` counts
for nothing: it decides when a notebook is run and how it is published, not what it computes.
"""

import ast
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat

from helpers.run.profiles import HOW, SET_BY_RUNNER, Notebook, Step
from helpers.store import ROOT, digest

HELPERS = Path(__file__).resolve().parents[1]
RUNNER = "run"
WRITTEN_BY_RUNS = (*SET_BY_RUNNER, "FINDINGS")


def code_of(notebook: Path) -> str:
    """The notebook's Python, without lines for the shell or for IPython."""
    cells = nbformat.read(notebook, as_version=4).cells
    lines = [
        line
        for cell in cells
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
        if not line.lstrip().startswith(("%", "!"))
    ]
    return "\n".join(lines)


def imported_rooms(source: str) -> set[str]:
    """Names of the rooms of `helpers` that Python text imports, at its top or later."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "helpers":
            modules += [f"helpers.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
    parts = [module.split(".") for module in modules]
    rooms = {part[1] for part in parts if part[0] == "helpers" and len(part) > 1}
    return rooms - {RUNNER}


def room_files(room: str) -> list[Path]:
    """The Python files of a room, and what lies beside them in its folder (schemas, templates)."""
    folder = HELPERS / room
    if not folder.is_dir():
        return [HELPERS / f"{room}.py"]
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path.suffix != ".pyc")


def reached_files(source: str) -> list[Path]:
    """Every file of every room that Python text reaches, through the rooms' own imports."""
    reached: set[str] = set()
    waiting = imported_rooms(source)
    while waiting:
        room = waiting.pop()
        reached.add(room)
        for path in room_files(room):
            if path.suffix == ".py":
                waiting |= imported_rooms(path.read_text(encoding="utf-8")) - reached
    return [path for room in sorted(reached) for path in room_files(room)]


def named_data(sources: Iterable[str]) -> list[Path]:
    """Files in data/ whose names stand in these texts, and the pins."""
    text = "\n".join(sources)
    about_runs = ("profiles.toml", "notebooks.toml")  # these arrive as parameters
    files = [
        path for path in (ROOT / "data").glob("*.*") if path.name not in about_runs
    ]
    named = [path for path in files if path.is_file() and path.name in text]
    return sorted([*named, ROOT / "requirements.txt"])


def code_key(notebook: Notebook) -> str:
    """Digest of the code and data that a notebook reaches."""
    source = code_of(notebook.path)
    files = reached_files(source)
    sources = [
        path.read_text(encoding="utf-8") for path in files if path.suffix == ".py"
    ]
    files += named_data([source, *sources])
    return digest([[path.name, digest(path)] for path in files])


def key(step: Step, needed: dict[str, Any]) -> str:
    """Name (16 hex digits) of a run of a notebook; `needed` is the digest of each file it reads."""
    cells = nbformat.read(step.notebook.path, as_version=4).cells
    text = [
        [cell.cell_type, cell.metadata.get("tags", []), cell.source] for cell in cells
    ]
    values = {name: value for name, value in step.parameters.items() if name not in HOW}
    committed = [tables_digest(ROOT / folder) for folder in shown(step.parameters)]
    local = _local_files(values)
    parts = [
        text,
        values,
        step.threads,
        code_key(step.notebook),
        needed,
        committed,
        local,
    ]
    return digest(parts)[:16]


def tables_digest(folder: Path) -> str:
    """Digest of the tables in a folder of committed results; its manifest says when, not what."""
    files = sorted(path for path in folder.glob("*") if path.suffix != ".json")
    return digest([[path.name, digest(path)] for path in files])


def _local_files(values: dict[str, Any]) -> list[list]:
    """Path, size and time of the files that parameters name, such as a model's folder: one that
    was edited in place is another model."""
    given = {
        name: value for name, value in values.items() if name not in WRITTEN_BY_RUNS
    }
    stamps = []
    for text in texts(given):
        path = ROOT / text
        if text and os.path.exists(path):
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            stats = [(file, file.stat()) for file in files if file.is_file()]
            stamps += [
                [str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats
            ]
    return stamps


def texts(value: Any) -> Iterator[str]:
    """Every text inside a parameter's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def shown(given: dict[str, Any]) -> list[str]:
    """Folders of committed tables that a notebook shows whatever the run computes."""
    values = {name: value for name, value in given.items() if name not in SET_BY_RUNNER}
    return [text for text in texts(values) if text.startswith("data/results/")]
