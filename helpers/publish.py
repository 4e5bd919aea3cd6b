"""What of a run is committed? Normalised notebooks, tables, figures, the README's table of costs.

Only `refresh` writes committed results, so a stale one is a difference between files.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nbformat

from helpers.page import figures_of
from helpers.records import REVISION, ROOT, atomic_write, revision, store
from helpers.run import (
    Notebook,
    chain,
    costs,
    declared,
    environment,
    executed,
    finished,
    pick,
    profiles,
    run,
    shown,
)

MARKS = (
    "<!-- notebooks: written by `python -m helpers refresh` -->",
    "<!-- end of notebooks -->",
)


def refresh(profile: str = "demo", reuse: bool = False) -> None:
    """Rerun a profile from nothing and write what is committed of it.

    Tables and records go to data/results/<profile>, minutes and memory to minutes.json beside it.
    The default profile also gives notebooks/, figures/ and the README's table; the figures of
    others go to figures/<profile>. `reuse` takes up what data/runs holds; its minutes would say
    nothing of a first run, so they are left as they are. Raises ValueError for an unknown
    profile and on a tree with uncommitted changes.
    """
    pick(profile, profiles(), "profile")
    _check_clean()
    results = ROOT / "data" / "runs" / profile
    steps = store()
    if not reuse:
        steps = ROOT / "data" / "runs" / "refresh-store"
        for folder in (results, steps):
            if folder.exists():
                shutil.rmtree(folder)
    # What we publish on the way does not make the code that ran another one.
    with environment(MERGING_COLLAPSE_STORE=str(steps), **{REVISION: revision() or ""}):
        run(profile, [n.name for n in chain() if not shown(declared(n.path))])
        _publish_tables(profile, results)
        run(profile)  # now those that show committed tables
        _publish_tables(profile, results)
        if not reuse:
            _write_minutes(profile, results)
        run(profile)  # again, in a fraction of the time: the notebooks print their minutes
    story = profile == "demo"
    for notebook in chain():
        _publish_figures(notebook, results, ROOT / "figures" / ("" if story else profile))
        if story:
            book = nbformat.read(executed(results, notebook.name), as_version=4)
            with atomic_write(notebook.path) as part:
                nbformat.write(normalised(book), part)
    if story:
        write_readme()


def _check_clean() -> None:
    command = ["git", "status", "--porcelain"]
    changed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if changed:
        raise ValueError(
            f"{len(changed.splitlines())} files are not committed, {changed.split()[1]} first; "
            "commit them, so that the results can name the code that made them"
        )


def _publish_tables(profile: str, results: Path) -> None:
    """Copy the files of every finished notebook."""
    tables = ROOT / "data" / "results" / profile
    tables.mkdir(parents=True, exist_ok=True)
    done = finished(results)
    for notebook in chain():
        if notebook.name in done:
            for file in notebook.published:
                shutil.copyfile(results / file, tables / file)


def _publish_figures(notebook: Notebook, results: Path, folder: Path) -> None:
    """Put the notebook's figures in the place of those that it had."""
    folder.mkdir(parents=True, exist_ok=True)
    sidecars = [results / f for f in figures_of(results, notebook.name) if f.endswith(".json")]
    for old in folder.glob("*.json"):
        own = json.loads(old.read_text(encoding="utf-8"))["notebook"] == notebook.name
        if own and old.name not in [path.name for path in sidecars]:
            old.unlink()
            old.with_suffix(".png").unlink()
    for sidecar in sidecars:
        _publish_figure(sidecar, folder)


def _publish_figure(sidecar: Path, folder: Path) -> None:
    """Copy a figure, unless nothing but the revision it was drawn at would change."""
    old = folder / sidecar.name
    picture = sidecar.with_suffix(".png")
    if old.exists() and old.with_suffix(".png").read_bytes() == picture.read_bytes():
        told = [json.loads(path.read_text(encoding="utf-8")) for path in (old, sidecar)]
        if told[0] | {"revision": None} == told[1] | {"revision": None}:
            return
    for path in (sidecar, picture):
        shutil.copyfile(path, folder / path.name)


def normalised(book: Any) -> Any:
    """An executed notebook without anything that differs between two runs of the same code.

    Kept: cells, tags, kernel, outputs. Dropped: injected parameters, timings, papermill's and
    widgets' metadata, standard error (progress bars). Cells are counted 1..n.
    """
    cells, count = [], 0
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            continue
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_stable, cell.outputs) if output]
            cell.execution_count = None
            if cell.source.strip():
                cell.execution_count = count = count + 1
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
        cells.append(cell)
    return nbformat.from_dict(
        {
            "cells": cells,
            "metadata": {
                "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                "language_info": {"file_extension": ".py", "name": "python"},
            },
            "nbformat": 4,
            "nbformat_minor": 5,
        }
    )


def _stable(output: Any) -> Any:
    """The output as it is committed, or None."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return None  # a widget shows nothing without its kernel
    return output


def _write_minutes(profile: str, results: Path) -> None:
    done = finished(results)
    rows = {notebook.name: done[notebook.name] for notebook in chain()}
    told = next(iter(rows.values()))
    measured = costs() | {
        profile: {
            "minutes": {name: round(row["seconds"] / 60, 1) for name, row in rows.items()},
            "peak_gb": {name: row["peak_gb"] for name, row in rows.items()},
            "machine": told["machine"],
            "threads": told["threads"],
            "date": told["started"][:10],
            "revision": told["revision"],
        }
    }
    path = ROOT / "data" / "results" / "minutes.json"
    with atomic_write(path) as part:
        part.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def table() -> str:
    """The README's table of notebooks with their measured minutes, in Markdown."""
    measured = costs()
    demo = measured.get("demo", {"minutes": {}, "peak_gb": {}})
    lines = ["| notebook | question | minutes | memory (GB) |", "|---|---|---|---|"]
    for name, question, *_ in chain():
        minutes, memory = demo["minutes"].get(name, "–"), demo["peak_gb"].get(name, "–")
        link = f"[{name}](notebooks/{name}.ipynb)"
        lines.append(f"| {link} | {question} | {minutes} | {memory} |")
    if "demo" in measured:
        total = sum(demo["minutes"].values())
        lines.append(
            f"\nIn all {total:.0f} minutes for the demo profile, measured on {demo['date']} with "
            f"{demo['threads']} threads ({demo['machine']}; revision {demo['revision']})."
        )
    return "\n".join(lines)


def readme() -> str:
    """The README's text with the table between its marks brought up to date."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not all(text.count(mark) == 1 for mark in MARKS):
        raise ValueError(f"README.md needs the lines {MARKS[0]!r} and {MARKS[1]!r} once each")
    head, rest = text.split(MARKS[0])
    return f"{head}{MARKS[0]}\n{table()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def write_readme() -> None:
    """Bring the README's table up to date."""
    text = readme()
    with atomic_write(ROOT / "README.md") as part:
        part.write_text(text, encoding="utf-8")
