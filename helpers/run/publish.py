"""What of a run is committed? Normalised notebooks, their figures, tables, the README's numbers.

Only `refresh` writes them, so that a stale one is a difference between files. Any profile's tables
can be committed, in data/results/<profile>; a committed notebook is an executed copy of one
profile's run, the one that its parameters cell names (`shows`).
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from unittest.mock import patch

import nbformat
import pandas as pd

from helpers.run.chain import run
from helpers.run.execute import execute
from helpers.run.keys import shown
from helpers.run.normal import normalised
from helpers.run.overview import costs
from helpers.run.page import figures_of
from helpers.run.profiles import (
    Notebook,
    Step,
    all_profiles,
    chosen,
    declared,
    notebooks,
    pick,
)
from helpers.run.readme import write_readme
from helpers.run.record import executed, finished
from helpers.store import REVISION, ROOT, atomic_write, revision, store

# bytes of a committed file; the distances of 48 tasks on all probes take more
LARGEST = 8_000_000
RUN_FIELDS = (
    "revision",
    "started",
    "seconds",
    "peak_gb",
    "threads",
    "machine",
    "versions",
)


def refresh(profile: str = "demo", reuse: bool = False) -> None:
    """Rerun a profile from nothing and `publish` it; minutes and memory go to minutes.json.

    `reuse` takes up what data/runs holds; its minutes would say nothing of a first run, so they are
    left as they are. Raises ValueError for an unknown profile and on a tree with uncommitted
    changes.
    """
    pick(profile, all_profiles(), "profile")
    _check_clean()
    results, steps = ROOT / "data" / "runs" / profile, store()
    if not reuse:
        steps = ROOT / "data" / "runs" / "refresh-store"
        for folder in (results, steps):
            shutil.rmtree(folder, ignore_errors=True)
    own = [book.name for book in notebooks() if not shown(declared(book.path))]
    # What is published on the way does not make the code that ran another one.
    chosen_store = {"MERGING_COLLAPSE_STORE": str(steps), REVISION: revision() or ""}
    with patch.dict(os.environ, chosen_store):
        run(profile, own)
        _publish_tables(profile, results)
        run(profile)  # now those that show committed tables
        if not reuse:
            _write_minutes(profile, results)
        _publish_tables(profile, results)
        run(profile)  # in a fraction of the time: the notebooks print their minutes
    publish(profile)


def publish(profile: str) -> None:
    """Write what is committed of the finished notebooks in data/runs/<profile>; nothing is run.

    Tables go to data/results/<profile>; a notebook whose committed copy shows this profile goes to
    notebooks/, its figures to figures/. A study that was recorded over several sessions is
    published as it is. Raises ValueError for an unknown profile and if no notebook of it is
    finished.
    """
    pick(profile, all_profiles(), "profile")
    results = ROOT / "data" / "runs" / profile
    done = finished(results)
    if not done:
        raise ValueError(
            f"no notebook is finished in data/runs/{profile}: run the profile first"
        )
    _publish_tables(profile, results)
    _write_manifest(profile, done)
    for notebook in notebooks():
        if notebook.name in done and shows(notebook) == profile:
            publish_page(notebook, results)
    write_readme()


def shows(notebook: Notebook) -> str:
    """The profile whose run the committed copy of a notebook shows: PROFILE in its parameters."""
    return declared(notebook.path).get("PROFILE", "demo")


def publish_page(notebook: Notebook, results: Path) -> None:
    """Commit a notebook's executed copy, and its figures in the place of those that it had."""
    book = nbformat.read(executed(results, notebook.name), as_version=4)
    with atomic_write(notebook.path) as part:
        nbformat.write(normalised(book), part)
    files = [results / file for file in figures_of(results, notebook.name)]
    for old in figures_of(ROOT, notebook.name):
        if Path(old).name not in [file.name for file in files]:
            (ROOT / old).unlink()
    (ROOT / "figures").mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, ROOT / "figures" / file.name)


def recompute(profile: str, write: bool = False) -> Path:
    """Rerun the notebooks that need no model on a study's committed tables, and compare.

    Tables, figures and notebooks go to data/runs/recomputed/<profile>, which is returned. With
    `write` what came out replaces the committed tables that differ, and the pages that show this
    study. Raises ValueError if there are no such tables, or if one comes out another.
    """
    pick(profile, all_profiles(), "profile")
    tables = ROOT / "data" / "results" / profile
    out = ROOT / "data" / "runs" / "recomputed" / profile
    if not tables.is_dir():
        raise ValueError(
            f"there are no tables in data/results/{profile}: publish it first"
        )
    own = [book for book in chosen(None, profile) if _belongs(book, profile)]
    books = [book for book in own if _recomputable(book, tables)]
    for book in books:
        _rerun(book, profile, tables, out)
    produced = [file for book in books for file in book.produces]
    # a page that has no trials of models writes no table of them
    files = [x for x in produced if (tables / x).exists() or (out / x).exists()]
    stale = [file for file in files if not same(tables / file, out / file)]
    if write:
        for file in stale:
            shutil.copyfile(out / file, tables / file)
        for book in books:
            if shows(book) == profile:
                publish_page(book, out)
        write_readme()
        print(f"Written to data/results/{profile}: {', '.join(stale) or 'nothing'}")
    elif stale:
        raise ValueError(
            f"data/results/{profile} lacks or holds other values of {', '.join(stale)} than those "
            f"now in {out.relative_to(ROOT)}; refresh the profile"
        )
    else:
        print(
            f"Equal to data/results/{profile}: {', '.join(files)}. Figures: {out / 'figures'}"
        )
    return out


def _recomputable(notebook: Notebook, tables: Path) -> bool:
    """Whether a notebook only reads a study's tables, or its products are among them."""
    names = declared(notebook.path)
    if "OUT" not in names:
        return False
    return "MODEL" not in names or any(
        (tables / file).exists() for file in notebook.produces
    )


def _rerun(notebook: Notebook, profile: str, tables: Path, out: Path) -> None:
    settings = all_profiles()[profile]
    own = declared(notebook.path)
    values = {name: settings[name] for name in own if name in settings}
    values |= {"PROFILE": profile, "RESULTS": _relative(tables), "OUT": _relative(out)}
    print(f"{notebook.name}: {notebook.question}", flush=True)
    execute(Step(notebook, values, threads=1), executed(out, notebook.name))


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def same(committed: Path, again: Path) -> bool:
    """Whether two tables agree, numbers to nine digits (machines differ in the last one)."""
    if not committed.exists() or not again.exists():
        return False
    if committed.suffix == ".npz":
        return committed.read_bytes() == again.read_bytes()
    old, new = pd.read_csv(committed), pd.read_csv(again)
    try:
        pd.testing.assert_frame_equal(old, new, rtol=1e-9, atol=1e-8, check_dtype=False)
    except AssertionError:
        return False
    return True


def _publish_tables(profile: str, results: Path) -> None:
    tables = ROOT / "data" / "results" / profile
    tables.mkdir(parents=True, exist_ok=True)
    done = finished(results)
    for notebook in notebooks():
        if notebook.name in done and _belongs(notebook, profile):
            for file in notebook.produces:
                if (results / file).stat().st_size > LARGEST:
                    print(
                        f"not committed, larger than {LARGEST / 1e6:.0f} MB: {results / file}"
                    )
                else:
                    shutil.copyfile(results / file, tables / file)


def _belongs(notebook: Notebook, profile: str) -> bool:
    """Whether a page's tables are committed with this study."""
    return notebook.study in ("", profile)


def _write_manifest(profile: str, done: dict[str, dict]) -> None:
    """Write data/results/<profile>/manifest.json: parameters, and when and where each notebook ran.

    A folder of this machine is named by nothing but its kind; what was recorded before stays where
    the run has nothing new.
    """
    path = ROOT / "data" / "results" / profile / "manifest.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings, runs = dict(all_profiles()[profile]), before.get("runs", {})
    for name, row in done.items():
        settings |= {k: v for k, v in row["parameters"].items() if k in settings}
        runs[name] = {field: row[field] for field in RUN_FIELDS}
    settings["SOURCES"] = {
        name: "a local folder" if Path(source).is_dir() else source
        for name, source in settings.get("SOURCES", {}).items()
    }
    about = before | {"profile": profile, "parameters": settings, "runs": runs}
    _write_json(path, about)


def _write_minutes(profile: str, results: Path) -> None:
    rows = finished(results)
    first = next(iter(rows.values()))
    measured = {
        "minutes": {name: round(row["seconds"] / 60, 1) for name, row in rows.items()},
        "peak_gb": {name: row["peak_gb"] for name, row in rows.items()},
        "date": first["started"][:10],
    }
    measured |= {field: first[field] for field in ("machine", "threads", "revision")}
    _write_json(
        ROOT / "data" / "results" / "minutes.json", costs() | {profile: measured}
    )


def _write_json(path: Path, value: dict) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _check_clean() -> None:
    command = ["git", "status", "--porcelain"]
    changed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if changed:
        first = changed.split()[1]
        raise ValueError(
            f"{len(changed.splitlines())} files are not committed, {first} first; commit them, so "
            "that the results can name the code that made them"
        )
