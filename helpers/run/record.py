"""What is finished? Each run of a notebook is a line in RESULTS/manifest.jsonl."""

from collections.abc import Iterable
from pathlib import Path

from helpers.run.keys import key, tables_digest
from helpers.run.profiles import Step
from helpers.store import ROOT, digest, read_jsonl


def finished(results: Path) -> dict[str, dict]:
    """The last manifest row of every notebook that finished and whose files are as it left them."""
    rows = {row["notebook"]: row for row in read_jsonl(results / "manifest.jsonl")}
    return {
        name: row
        for name, row in rows.items()
        if row["status"] == "finished"
        and executed(results, name).exists()
        and row["outputs"] == digests(results, row["outputs"])
    }


def executed(results: Path, name: str) -> Path:
    """Where the executed notebook lies."""
    return results / "notebooks" / f"{name}.ipynb"


def digests(results: Path, files: Iterable[str]) -> dict[str, str | None]:
    """sha256 of each file; None where there is none."""
    paths = {name: results / name for name in files}
    return {
        name: digest(path) if path.exists() else None for name, path in paths.items()
    }


def step_key(step: Step, results: Path) -> str:
    """The step's key, with what it reads: files of this run, or the committed tables."""
    if reads_committed(step):
        tables = ROOT / step.parameters["RESULTS"]
        return key(step, {"committed": tables_digest(tables)})
    done = finished(results)
    return key(step, {name: done[name]["outputs"] for name in read_by(step, done)})


def read_by(step: Step, made: Iterable[str]) -> list[str]:
    """The notebooks whose files the step reads: all that it needs, and of its `uses` those made."""
    return [*step.needs, *(name for name in step.notebook.uses if name in made)]


def is_finished(step: Step, results: Path) -> bool:
    """Whether the notebook, and each that it needs, finished with this code and parameters."""
    done = finished(results)
    name = step.notebook.name
    return name in done and done[name]["key"] == step_key(step, results)


def reads_committed(step: Step) -> bool:
    return step.parameters.get("RESULTS", "").startswith("data/results/")
