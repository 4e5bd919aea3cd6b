"""What of a run is committed? Normalised notebooks, tables, figures, the README's generated parts.

Only `refresh` writes committed results, so a stale one is a difference between files. Any profile's
tables can be committed, in data/results/<profile>; a committed notebook is an executed copy of one
profile's run, the one that its parameters cell names (`shows`).
"""

import base64
import io
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from PIL import Image

from helpers.figures import look
from helpers.run.chain import (
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
from helpers.run.page import figures_of
from helpers.store import (
    REVISION,
    ROOT,
    atomic_write,
    digest,
    read_jsonl,
    revision,
    store,
    write_table,
)

MARKS = (
    "<!-- findings: written by `python -m helpers refresh` -->",
    "<!-- end of findings -->",
    "<!-- notebooks: written by `python -m helpers refresh` -->",
    "<!-- end of notebooks -->",
    "<!-- engine: written by `python -m helpers refresh` -->",
    "<!-- end of engine -->",
)
ENOUGH = 10  # groups of tasks that an interval is given for
LARGE = 200_000  # characters of a picture in a notebook, beyond which it is made lighter


def refresh(profile: str = "demo", reuse: bool = False) -> None:
    """Rerun a profile from nothing and `publish` it; minutes and memory go to minutes.json.

    `reuse` takes up what data/runs holds; its minutes would say nothing of a first run, so they are
    left as they are. Raises ValueError for an unknown profile and on a tree with uncommitted
    changes.
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
    publish(profile)


def publish(profile: str) -> None:
    """Write what is committed of the finished notebooks in data/runs/<profile>; nothing is run.

    Tables and records go to data/results/<profile>. A notebook whose committed copy shows this
    profile goes to notebooks/ and its figures to figures/, the figures of the others to
    figures/<profile>; then agreement.csv and the README are brought up to date. A study that was
    recorded over several sessions is published as it is. Raises ValueError for an unknown profile
    and if no notebook of it is finished.
    """
    pick(profile, profiles(), "profile")
    results = ROOT / "data" / "runs" / profile
    done = finished(results)
    if not done:
        raise ValueError(f"no notebook is finished in data/runs/{profile}: run the profile first")
    _publish_tables(profile, results)
    for notebook in chain():
        if notebook.name in done:
            _publish_pictures(notebook, results, executed(results, notebook.name), profile)
    write_manifest(profile, results)
    write_agreement()
    write_readme()


def shows(notebook: Notebook) -> str:
    """The profile whose run the committed copy of a notebook shows: PROFILE in its parameters."""
    return declared(notebook.path).get("PROFILE", "demo")


def recompute(profile: str, write: bool = False) -> Path:
    """Run the notebooks that need no model on the committed tables of a profile, and compare.

    Writes tables, figures and notebooks to data/runs/recomputed/<profile> and returns that folder.
    With `write` nothing is compared: what 04 and 05 make of the tables is committed in the place of
    what they made before, as `publish` does it. Raises ValueError if there are no such tables, and
    if a table comes out another one.
    """
    import papermill

    tables = ROOT / "data" / "results" / profile
    out = ROOT / "data" / "runs" / "recomputed" / profile
    notebooks = [notebook for notebook in chain() if "OUT" in declared(notebook.path)]
    if not tables.is_dir():
        raise ValueError(
            f"there are no tables in data/results/{profile}: publish the profile first"
        )
    # The choices of 06 take a model, so they are made by a run, and not by that of every study.
    notebooks = [
        n
        for n in notebooks
        if "MODEL" not in declared(n.path)
        or not write
        and any((tables / file).exists() for file in n.produces)
    ]
    for notebook in notebooks:
        asked = profiles()[pick(profile, profiles(), "profile")]
        named = {name: asked[name] for name in declared(notebook.path) if name in asked}
        named |= {"PROFILE": profile, "OUT": str(out.relative_to(ROOT))}
        named |= {"RESULTS": str(tables.relative_to(ROOT))}
        target = out / "notebooks" / notebook.path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"{notebook.name}: {notebook.question}", flush=True)
        with environment(JUPYTER_PREFER_ENV_PATH="1"):
            papermill.execute_notebook(
                notebook.path, target, named, cwd=ROOT, kernel_name="python3", progress_bar=False
            )
    # tables, not records: 06 records the advice too, which takes a model
    names = [file for notebook in notebooks for file in notebook.produces]
    if write:
        for notebook in notebooks:
            # last digits differ from machine to machine: what agrees is left as it is
            changed = [f for f in notebook.published if not _same(tables / f, out / f)]
            for file in changed:
                shutil.copyfile(out / file, tables / file)
            if changed or shows(notebook) == profile:
                _publish_pictures(notebook, out, target.parent / notebook.path.name, profile)
        write_agreement()
        write_readme()
        print(f"Written to data/results/{profile}: {', '.join(names)}")
        return out
    stale = [file for file in names if not _same(tables / file, out / file)]
    if stale:
        raise ValueError(
            f"data/results/{profile} lacks or holds other values of {', '.join(stale)} than those "
            f"now in {out.relative_to(ROOT)}; refresh the profile"
        )
    print(f"Equal to data/results/{profile}: {', '.join(names)}. Figures: {out / 'figures'}")
    return out


TAKEN = "taken.json"
CONTROL = 20  # of so many groups, one is scored again and held to the committed scores


def take(profile: str, results: Path) -> pd.Series:
    """Fill the store with the committed scores in `results` of merges that a run makes as well.

    Notebook 01 of the profile has run, with the same specialists but for rounding
    (`study.same_training`); 02 then visits what is left (`study.take`). One group in CONTROL is
    visited instead and held to the committed scores. The run's folder keeps in taken.json, for the
    manifest, what is returned: merges (taken), loss and dose (`study.take`: how far training and
    merges lie apart), and of the controls cells, equal, beyond, largest and largest_nll
    (`compare`). Raises ValueError for an unknown profile, one without specialists or with others, a
    folder without tables or with those of other merges, and if a control lies beyond three standard
    errors.
    """
    import torch

    from helpers.study import parallel  # seconds: not paid by those who only publish
    from helpers.study import visit as study

    asked = profiles()[pick(profile, profiles(), "profile")]
    run_folder = ROOT / "data" / "runs" / profile
    for name in ("losses.csv", "examples.csv.gz", "training.csv"):
        if not (results / name).is_file():
            raise ValueError(f"there is no {name} in {results}: name a folder of data/results")
    torch.set_num_threads(asked["THREADS"])
    about = asked["MODEL"], asked["DTYPE"], asked["DEVICE"]
    bench = study.open_bench(run_folder / "bench.json", *study.load_base(*about))
    told = {"loss": study.same_training(bench, results)}
    labels, arms, seed = list(bench.tasks), asked["ARMS"], asked["SEED"]
    rules = {name: {"method": name} for name in asked["METHODS"]}
    more = {name: {"method": name} for name in asked["GROUP_METHODS"] if name != "chebyshev"}
    many = {n: asked["GROUPS_PER_SIZE"] for n in asked["GROUP_SIZES"] if 2 < n <= len(labels)}
    plan = [
        (group, rules if size == 2 else rules | more, arms)
        for size, most in ({2: asked["PAIRS"]} | many).items()
        for group in study.draw_groups(labels, size, most, asked["GROUP_SEED"])
    ]
    committed = _scores(results, True)
    named = set(committed.index.unique("merge"))
    plan = [call for call in plan if named & {study.merge_name(call[0], rule) for rule in call[1]}]
    if not plan:
        raise ValueError(f"{results} has none of the merges of {profile}")

    controls = [(*call, seed) for call in plan[::CONTROL]]
    parallel.fill(bench, about, [(study.merge_all, *call) for call in controls], asked["JOBS"])
    again = pd.concat(  # what was taken from another study before is no control
        merged.examples.groupby("task")[["correct", "nll"]].mean().assign(merge=merged.name)
        for call in controls
        for merged in study.merge_all(bench, *call)
        if study.taken_from(bench, merged.report["digest"], merged.group) == {""}
    )
    again = again.rename(columns={"correct": "score"}).set_index("merge", append=True).swaplevel()
    held = _held(*committed.align(again, "inner"), asked["TEST_EXAMPLES"])
    if held["beyond"]:
        raise ValueError(
            f"{held['beyond']} of {held['cells']} scores made again lie more than three standard "
            f"errors from those of {results}: nothing is taken from there"
        )
    calls = [(*call, results, seed) for i, call in enumerate(plan) if i % CONTROL]
    parallel.fill(bench, about, [(study.take, *call) for call in calls], asked["JOBS"])
    doses = {name: dose for call in calls for name, dose in study.take(bench, *call).items()}
    told |= {"merges": len(doses), "dose": max(doses.values(), default=0.0)} | held
    file = run_folder / TAKEN
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    with atomic_write(file) as part:
        part.write_text(json.dumps(before | {results.name: told}) + "\n", encoding="utf-8")
    return pd.Series(told)


REPRODUCED = ROOT / "data" / "results" / "reproduced.csv"


def compare(profile: str, results: Path) -> pd.Series:
    """Hold the scores of another run of a profile, or of some of its tasks, to the committed ones.

    Those of merges (losses.csv, test examples); of a run that has merged nothing yet, those of base
    and specialists (tasks.csv, dev examples). Adds a row to data/results/reproduced.csv, which the
    README quotes, and returns it: profile; scored (the models); tasks; cells (scores of one model
    on one task that both have), equal (of them), beyond (differ by more than three standard errors
    of two independent scores), largest (difference, share of examples), largest_nll (difference,
    nats; 0 where processors round alike); the run's machine, threads, date and revision. Raises
    ValueError if there is nothing to compare, if the run took committed scores over, or if more
    than one cell in a hundred lies beyond.
    """
    pick(profile, profiles(), "profile")
    if (results / TAKEN).exists():
        raise ValueError(f"{results} took scores from committed tables: it proves nothing of them")
    merged = (results / "losses.csv").exists()
    scored, size = ("merges", "TEST") if merged else ("base and specialists", "DEV")
    again = _scores(results, merged)
    committed, again = _scores(ROOT / "data" / "results" / profile, merged).align(again, "inner")
    if committed.empty:
        raise ValueError(f"{results} and data/results/{profile} have no score in common")
    ran = [row for row in read_jsonl(results / "manifest.jsonl") if row["status"] == "finished"][-1]
    row = {"profile": profile, "scored": scored, "tasks": committed.index.unique("task").size}
    row |= _held(committed, again, profiles()[profile][f"{size}_EXAMPLES"])
    row |= {"machine": ran["machine"], "threads": ran["threads"], "date": ran["started"][:10]}
    row |= {"revision": ran["revision"]}
    before = [pd.read_csv(REPRODUCED)] if REPRODUCED.exists() else []
    write_table(REPRODUCED, pd.concat([*before, pd.DataFrame([row])], ignore_index=True))
    if row["beyond"] > 0.01 * row["cells"]:
        raise ValueError(
            f"{row['beyond']} of {row['cells']} scores lie more than three standard errors from "
            f"those of data/results/{profile}"
        )
    return pd.Series(row)


def _held(committed: pd.DataFrame, again: pd.DataFrame, n: int) -> dict:
    """How scores on n examples that were made again lie from the committed ones, cell by cell."""
    apart = (again - committed).abs()
    told = {"cells": len(apart), "equal": int((apart["score"] < 1e-9).sum())}
    committed, again = committed["score"], again["score"]
    error = ((committed * (1 - committed) + again * (1 - again)) / n) ** 0.5
    # two scores at 0 or 1 have no error by this formula: one example more or less is no difference
    beyond = apart["score"] > 3 * error.clip(lower=1 / n)
    told |= {"beyond": int(beyond.sum()), "largest": apart["score"].max()}
    return told | {"largest_nll": apart["nll"].max()}


def _scores(folder: Path, merged: bool) -> pd.DataFrame:
    """score and nll by model and task: of a run's merges, or (no nll) its base and specialists."""
    file = folder / ("losses.csv" if merged else "tasks.csv")
    if not file.exists():
        raise ValueError(f"there is no {file.name} in {folder}")
    table = pd.read_csv(file)
    if merged:
        return table.set_index(["merge", "task"])[["score", "nll"]]
    scores = table.set_index("task")[["base", "specialist"]].rename_axis("model", axis=1).stack()
    return pd.DataFrame({"score": scores, "nll": math.nan})


def _same(committed: Path, again: Path) -> bool:
    """Whether two tables or records agree, numbers to nine digits (machines differ in the last).

    Shares of variance are where a search ends, on a flat top: they agree to within 0.002.
    """
    if not committed.exists():
        return False
    read = pd.read_json if committed.suffix == ".json" else pd.read_csv
    tables = [read(committed), read(again)]
    searched = tables[0].columns.intersection(["share", "share_low", "share_high"])
    parts = ([t.drop(columns=searched, errors="ignore"), t.filter(searched)] for t in tables)
    try:
        for one, other, atol in zip(*parts, (1e-8, 0.002), strict=True):
            pd.testing.assert_frame_equal(one, other, rtol=1e-9, atol=atol, check_dtype=False)
    except AssertionError:
        return False
    return True


def write_manifest(profile: str, results: Path | None = None) -> None:
    """Write data/results/<profile>/manifest.json: what the study was made of.

    parameters (a local folder of tasks is named by its digest); base: name and digest; tasks: for
    each its name, the digests of its splits and the ids of its probes; taken: from which committed
    tables scores of merges come (`take`); runs: for each notebook of the run in
    `results`, if that is given, when and at what revision it ran, for how long, on what machine and
    with which packages. What was recorded before stays where the run has nothing new.
    """
    from helpers.study import (
        assets,  # seconds: not paid by those who only bring the README up
        tasks,
    )

    file = ROOT / "data" / "results" / profile / "manifest.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    runs, taken = before.get("runs", {}), before.get("taken", {})
    if results and (results / TAKEN).exists():
        taken = json.loads((results / TAKEN).read_text(encoding="utf-8"))
    asked = dict(profiles()[profile])
    for name, row in (finished(results) if results else {}).items():
        asked |= {k: v for k, v in row["parameters"].items() if k in asked}
        runs[name] = {field: row[field] for field in RUN_FIELDS}
    sizes = [asked[f"{part}_EXAMPLES"] for part in ("MORE", "DEV", "PROBE", "TEST")]
    where = {"seed": asked["SPLIT_SEED"], "sources": asked["SOURCES"]}
    where["prompt"] = asked.get("PROMPT", "bare")
    loaded = tasks.load_tasks(asked["TASKS"], sizes=sizes, **where)
    local = {name: Path(folder) for name, folder in asked["SOURCES"].items()}
    asked["SOURCES"] = {
        name: f"a local folder, sha256 {digest(folder)}" if folder.is_dir() else str(folder)
        for name, folder in local.items()
    }
    told = {"parameters": asked, "base": assets.base_info(asked["MODEL"])}
    told["tasks"] = {
        label: {"name": task.name, "splits": {part: task.digest(part) for part in task.splits}}
        | {"probe": list(task.splits["probe"]["id"])}
        for label, task in loaded.items()
    }
    with atomic_write(file) as part:
        part.write_text(
            json.dumps(told | {"taken": taken, "runs": runs}, indent=1) + "\n", encoding="utf-8"
        )


RUN_FIELDS = ("revision", "started", "seconds", "peak_gb", "threads", "machine", "versions")


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


def _publish_pictures(notebook: Notebook, results: Path, copy: Path, profile: str) -> None:
    """Commit a notebook's figures and, if it shows this profile, its executed copy."""
    story = shows(notebook) == profile
    _publish_figures(notebook, results, ROOT / "figures" / ("" if story else profile))
    if story:
        book = nbformat.read(copy, as_version=4)
        with atomic_write(notebook.path) as part:
            nbformat.write(normalised(book), part)


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
    if len(output.get("data", {}).get("image/png", "")) > LARGE:
        output.data["image/png"] = _in_few_colours(output.data["image/png"])
    return output


def _in_few_colours(png: str) -> str:
    """A figure (base64) with a palette of its 256 main colours; one that has a palette stays."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    light = io.BytesIO()
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(light, "PNG", optimize=True)
    return base64.b64encode(light.getvalue()).decode() + "\n"


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


def _markdown(rows: list[dict]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return ["| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in cells]


def table() -> str:
    """The README's table of notebooks with their measured minutes, in Markdown."""
    measured = costs()
    demo = measured.get("demo", {"minutes": {}, "peak_gb": {}})
    rows = [
        {
            "notebook": f"[{name}](notebooks/{name}.ipynb)",
            "question": question,
            "minutes": demo["minutes"].get(name, "–"),
            "memory (GB)": demo["peak_gb"].get(name, "–"),
        }
        for name, question, *_ in chain()
    ]
    lines = _markdown(rows)
    if "demo" in measured:
        total = sum(demo["minutes"].values())
        lines.append(
            f"\nIn all {total:.0f} minutes for the demo profile, measured on {demo['date']} with "
            f"{demo['threads']} threads ({demo['machine']}; revision {demo['revision']})."
        )
    folder = ROOT / "data" / "results"
    return "\n".join([*lines, *_growth(folder / "demo"), *_study_costs(folder)])


def _growth(folder: Path) -> list[str]:
    """What one step of a study took, and so how a study grows with its tasks, in Markdown."""
    if not (folder / "costs.csv").exists():
        return []
    train = pd.read_csv(folder / "specialists.csv")["cpu_seconds"].mean()
    steps = pd.read_csv(folder / "costs.csv").set_index(["step", "models"])["cpu_seconds"]
    merges = pd.read_csv(folder / "merges.csv").query("n == 2 and arm == 'default'")
    methods = merges.loc[merges["same_as"].isna(), "method"].nunique()
    merge, scores, states = (steps[key] for key in (("merge", 2), ("scores", 0), ("states", 0)))
    pair = methods * (merge + 2 * (scores + states))
    return [
        "",
        f"How it grows: training a specialist took {train:.0f} CPU seconds, merging two "
        f"{merge:.1f}, one task's scores under one model {scores:.1f} and its hidden states "
        f"{states:.1f}. N tasks need N specialists and, with {methods} distinct methods, "
        f"N(N − 1)/2 × {methods} merges, each scored on both of its tasks: {pair:.0f} CPU seconds "
        f"a pair. From {1 + 2 * train / pair:.0f} tasks on the pairs cost more than the training.",
    ]


def _study_costs(results: Path) -> list[str]:
    """What each study took, as far as its steps' costs are known, in Markdown."""
    rows = []
    for folder in sorted(path.parent for path in results.glob("*/costs.csv")):
        trained, steps = (pd.read_csv(folder / f"{x}.csv") for x in ("specialists", "costs"))
        file = folder / "manifest.json"
        runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else {}
        peak = max([trained["peak_memory_mb"].max() / 1e3, *(r["peak_gb"] for r in runs.values())])
        hours = (steps["count"] * steps["cpu_seconds"]).sum() / 3600
        row = {"study": folder.name, "specialists kept": len(trained)}
        row |= {"their training (CPU h)": f"{trained['cpu_seconds'].sum() / 3600:.1f}"}
        row |= {
            "merges, readings": f"{steps['count'].sum():.0f}",
            "of them (CPU h)": f"{hours:.1f}",
        }
        rows.append(row | {"memory (GB)": f"{peak:.1f}"})
    if not rows:
        return []
    note = "*A study recorded in parts knows the costs of its last part only.*"
    return ["", *_markdown(rows), "", note]


def studies() -> dict[str, Path]:
    """Folders of the profiles whose findings are committed, those with verdicts."""
    folders = sorted((ROOT / "data" / "results").glob("*/verdicts.csv"))
    return {path.parent.name: path.parent for path in folders}


def write_agreement() -> None:
    """Bring data/results/agreement.csv up to date with the committed studies."""
    from helpers.run.findings import agreement

    known = studies().items()
    told = {name: pd.read_csv(folder / "statistics.csv") for name, folder in known}
    tasks = {name: set(pd.read_csv(folder / "losses.csv")["task"]) for name, folder in known}
    if told:
        write_table(ROOT / "data" / "results" / "agreement.csv", agreement(told, tasks))


def findings() -> str:
    """The README's findings, in Markdown: verdicts and key numbers of the study that 05 shows."""
    known = studies()
    teller = next((n for n in chain() if "verdicts.csv" in n.produces), None)
    profile = shows(teller) if teller else None
    if profile not in known:
        return "None is published yet."
    folder = known[profile]
    others = {name: path for name, path in known.items() if name not in (profile, "demo")}
    every = {profile: folder} | others
    names = ("verdicts", "effects")
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in names}
    kept = int(pd.read_csv(folder / "tasks.csv")["kept"].sum())
    pairs, merges = (len(pd.read_csv(folder / f"{name}.csv")) for name in ("pairs", "merges"))
    lines = [
        f"From profile `{profile}`: specialists of {kept} tasks on one base model, {pairs} pairs, "
        f"{merges} merges ([05 statistics](notebooks/{teller.name}.ipynb), which declares its plan "
        f"before it shows a result; tables: [data/results/{profile}](data/results/{profile})).",
        "",
        *_verdict_table(tables["verdicts"].fillna("")),
        "",
        *_elsewhere(others),
        *_loss_table(every),
        "",
        *_groups_table(folder),
        *_variance_sentence(tables["effects"]),
        *_seeds_sentence(folder),
        *_versions_table(every),
        *_twins_sentence(folder),
        _bound_sentence(folder),
        *_agreement_table(known),
        *_exploration(profile, known),
        *_choices(folder),
        *_reproduced_table(),
    ]
    return "\n".join(lines)


def _verdict_table(verdicts: pd.DataFrame) -> list[str]:
    rows = []
    for row in verdicts.to_dict("records"):
        needs = f" (needs {row['n']})" if row["n"] else ""
        told = {"claim": row["claim"], "the paper": row["paper"], "here": row["here"]}
        rows.append(told | {"verdict": f"**{row['verdict']}**{needs}"})
    return _markdown(rows)


def _elsewhere(studies: dict[str, Path]) -> list[str]:
    """What became of the same claims in the other studies: a column each, a study below it."""
    if not studies:
        return []
    tables = {
        name: pd.read_csv(path / "verdicts.csv").set_index("claim")["verdict"]
        for name, path in studies.items()
    }
    links = {x: f"[{x}](data/results/{x}/verdicts.csv)" for x in tables}
    claims = dict.fromkeys(claim for table in tables.values() for claim in table.index)
    rows = [
        {"the same claims elsewhere": claim}
        | {
            links[name]: table.get(claim, "").removesuffix(" here").removesuffix(" at this n")
            for name, table in tables.items()
        }
        for claim in claims
    ]
    told = [f"*{name}: {_about(path)}.*" for name, path in studies.items()]
    note = "*The figures behind each verdict, with intervals: follow the name of the study.*"
    return [*_markdown(rows), "", "  \n".join([note, *told]), ""]


def _about(folder: Path) -> str:
    """A study in words: base, tasks that count, pairs, rules at their default scale; whose
    specialists it shares; what a model at chance would have lost, and what pairs lost of what
    exceeds chance."""
    from helpers.advise.choices import default_arm

    settings = profiles()[folder.name]
    kept = pd.read_csv(folder / "tasks.csv")["kept"]
    groups = pd.read_csv(folder / "groups.csv").query("n == 2 and arm == 'default'")
    rules = ", ".join(look(method)["label"] for method in groups["method"].unique())
    cells = default_arm(pd.read_csv(folder / "losses.csv")).query("n == 2")
    floor = 100 * (cells["chance"] / cells["specialist"] - 1)
    above = cells.groupby("method", sort=False)["chance_corrected"].mean()
    least, most = above.max(), above.min()
    return (
        f"{settings['MODEL']}, training seed {settings['SEED']}{_lent(folder)}, {kept.sum()} of "
        f"{len(kept)} tasks passed screening, {groups['group'].nunique()} pairs by {rules}; at "
        f"chance a task would have lost {-floor.max():.0f} to {-floor.min():.0f} %; of what "
        f"exceeds chance pairs lost {-least:.0f} to {-most:.0f} % on average, by rule"
        f"{_took(folder)}"
    )


def _lent(folder: Path) -> str:
    """Whose specialists a study uses, if another one has them all: it is no replication."""
    files = sorted(folder.parent.glob("*/specialists.csv"))
    used = {file.parent.name: set(pd.read_csv(file)["folder"]) for file in files}
    mine = used.get(folder.name, set())
    lenders = [
        x
        for x, theirs in used.items()
        if mine and (mine < theirs or mine == theirs and x < folder.name)
    ]
    return f", specialists of {lenders[0]}" if lenders else ""


def _took(folder: Path) -> str:
    """Merges of a study that have another one's scores, and whether a sample of these agreed."""
    file = folder / "manifest.json"
    taken = json.loads(file.read_text(encoding="utf-8"))["taken"] if file.exists() else {}
    if not taken:
        return ""
    parts = [
        f"{at['merges']} of {name} (of {at['cells']} scores there that were made again "
        f"{at['equal']} are equal)"
        for name, at in taken.items()
    ]
    whole = len(pd.read_csv(folder / "merges.csv"))
    return f"; of its {whole} merges these have their scores from others' tables: " + ", ".join(
        parts
    )


def _loss_table(studies: dict[str, Path]) -> list[str]:
    """Mean losses of a task in a merge of two at default scales, with 95 % intervals over tasks.

    The same merges of the same specialists, in a second study, have no second row.
    """
    rows, told = [], set()
    for study, folder in studies.items():
        specialists = frozenset(pd.read_csv(folder / "specialists.csv")["folder"])
        pairs, two = (
            pd.read_csv(folder / f"{name}.csv").query("n == 2 and arm == 'default'")
            for name in ("groups", "summary")
        )
        for method, at in two.groupby("method", sort=False):
            merges = method, specialists, frozenset(pairs.query("method == @method")["group"])
            if merges in told:
                continue
            told.add(merges)
            at = at.set_index("outcome")
            loss, alone, partners = (
                f"{at.loc[x, 'value']:.0f} [{at.loc[x, 'low']:.0f}, {at.loc[x, 'high']:.0f}]"
                for x in ("loss", "alone", "partners")
            )
            share = f"{at.loc['collapsed', 'value']:.0%} of {at.loc['collapsed', 'cells']} cells"
            row = {"study": study, "pairs merged by": look(method)["label"]}
            row |= {"merging loss (%)": loss, "no partner needed": alone}
            rows.append(row | {"the partners": partners, "collapsed": share})
    note = (
        "*Mean loss of a task in a pair, 95 % bootstrap over tasks (wide by design). Cells on the "
        "floor, where a partner can do no more harm, are left out of the two parts.*"
    )
    return [*_markdown(rows), "", note]


def _versions_table(studies: dict[str, Path]) -> list[str]:
    """What notebook 05 saw in other draws of a rule and on a coarse grid, in every study."""
    words = {"mask1": "second draw", "mask2": "third draw", "bfloat16": "bfloat16 grid"}
    rows = [
        {"study": study, "the same merge": f"{look(at.method)['label']}, {words[at.arm]}"}
        | {"loss of pairs, default (%)": f"{at.loss:.1f}"}
        | {"the version beyond it (points)": f"{at.difference:+.1f} [{at.low:.1f}, {at.high:.1f}]"}
        | {"spread of one pair": f"{at.spread:.1f}", "r": f"{at.r:.2f}"}
        for study, folder in studies.items()
        for at in _if_there(folder / "versions.csv").itertuples()
    ]
    return [*_markdown(rows), ""] if rows else []


def _groups_table(folder: Path) -> list[str]:
    """What whole groups lost, by size and rule: this study's and those that 06 tries choices on."""
    from helpers.advise.choices import RULES, default_arm, over_tasks

    choices = folder / "choices.csv"
    tried = pd.read_csv(choices)["study"].unique() if choices.exists() else []
    rows, passed = [], []
    for study in dict.fromkeys([folder.name, *tried]):
        tasks, groups = (
            pd.read_csv(folder.parent / study / f"{x}.csv") for x in ("tasks", "groups")
        )
        passed.append(f"{tasks['kept'].sum()} of {len(tasks)} in {study}")
        groups = default_arm(groups)
        for n, of_size in groups[groups["method"].isin(RULES)].groupby("n"):
            row = {"study": study, "models": n, "groups": of_size["group"].nunique()}
            for rule in RULES:
                row[look(rule)["label"]] = ""
            for rule, mine in of_size.groupby("method"):
                loss = over_tasks(mine, "loss")
                span = f" [{loss.low:.0f}, {loss.high:.0f}]" if len(mine) >= ENOUGH else ""
                collapsed = mine["collapsed"].eq(True).sum()
                row[look(rule)["label"]] = f"{loss.value:.0f}{span}, {collapsed} collapsed"
            rows.append(row)
    note = (
        "*Mean merging loss (%) of groups of tasks merged at once, at default scales; 95 % over "
        f"tasks from {ENOUGH} groups on. Tasks that passed screening: {', '.join(passed)}.*"
    )
    return [*_markdown(rows), "", note, ""]


def _variance_sentence(effects: pd.DataFrame) -> list[str]:
    """Whose property is the loss? Shares of its variance over cells, with intervals if any."""
    loss = effects[(effects["outcome"] == "loss") & (effects["arm"] == "default")]
    shares = loss.dropna(subset="share").set_index("effect") if "share" in loss else loss.iloc[:0]
    words = {"own": "the task scored", "partner": "its partner", "method": "the method"}
    words["residual"] = "the rest, which is the pair's and noise"
    told = []
    for effect, word in words.items():
        if effect in shares.index:
            share, low, high = shares.loc[effect, ["share", "share_low", "share_high"]].astype(
                float
            )
            span = f" [{low:.0%}, {high:.0%}]" if low == low else ""
            told.append(f"{word} {share:.0%}{span}")
    return ["Of the variance of the losses: " + ", ".join(told) + ".", ""] if told else []


def _if_there(path: Path) -> pd.DataFrame:
    """A committed table; an empty one where a study has none."""
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def _recorded(folder: Path, notebook: str) -> dict[str, dict]:
    """The named results of a notebook (its number) in a committed study."""
    rows = json.loads((folder / f"record_{notebook}.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in rows}


def _seeds_sentence(folder: Path) -> list[str]:
    """What notebook 05 found in every two runs of a study from different training seeds."""
    repeats = _if_there(folder / "repeats.csv")
    if repeats.empty:
        return []
    loss = repeats.query("what == 'loss' and method == 'mean'")
    distance = repeats[repeats["what"] == "hidden_sim"]
    sentence = (
        f"Trained from {1 + loss['second'].nunique()} seeds on the same examples "
        f"({_from_to(loss['tasks'], '.0f')} tasks), the losses of the pairs correlate between two "
        f"runs at r = {_from_to(loss['raw'])}, their pair-specific parts at r = "
        f"{_from_to(loss['specific'])}; one pair's loss has a standard deviation between trainings "
        f"of {_from_to(loss['spread'], '.0f')} points."
    )
    if len(distance):
        sentence += f" Their hidden distances correlate at r = {_from_to(distance['raw'])}."
    return [sentence, ""]


def _from_to(values: pd.Series, form: str = ".2f") -> str:
    """The least and the largest of some values, or the one that they all are."""
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (values.min(), values.max())))


def _twins_sentence(folder: Path) -> list[str]:
    """What notebook 03 saw in two specialists of one task, beside those of different tasks."""
    twins = _if_there(folder / "twins.csv")
    if twins.empty:
        return []
    pairs = pd.read_csv(folder / "pairs.csv")
    low, high = pairs.min(numeric_only=True), pairs.max(numeric_only=True)
    sign, distance, loss = twins[["sign_change", "hidden_sim", "loss"]].mean()
    signs, distances = ([low[name], high[name]] for name in ("sign_change", "hidden_sim"))
    sentence = (
        f"Two specialists of *one* task from two seeds (mean of {len(twins)} tasks) disagree in "
        f"sign on {sign:.0%} of the coordinates, those of different tasks on {signs[0]:.0%} to "
        f"{signs[1]:.0%}; their hidden distance is {distance:.2f}, that of different tasks "
        f"{distances[0]:.2f} to {distances[1]:.2f}. Averaging them changes the score by "
        f"{loss:+.0f} %."
    )
    return [sentence, ""]


def _bound_sentence(folder: Path) -> str:
    """What notebook 04 recorded of the rate-distortion bound."""
    told = _recorded(folder, "04")
    below, slack = told["merges below the floor"], told["least slack delta_max / R^2"]
    return (
        "The paper's bound, taken step by step ([04 bound](notebooks/04_bound.ipynb)): "
        f"{below['value']:.0f} of {below['n']} merges lie below its floor; the nearest lies "
        f"{slack['value']:.2f} times as high."
    )


ESTIMAND_WORDS = {"between": "between tasks", "specific": "pair-specific"}


def _agreement_table(known: dict[str, Path]) -> list[str]:
    """Hidden distance and loss in every study, and pooled where studies share no pair of tasks."""
    if len(known) < 2:
        return []
    agreed = pd.read_csv(ROOT / "data" / "results" / "agreement.csv")
    rows = [
        {
            "hidden distance and loss": ESTIMAND_WORDS[row["estimand"]],
            "study": row["study"],
            "tasks": row["n_tasks"],
            "r [95 %]": f"{row['r']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
        }
        for row in agreed[agreed["metric"] == "hidden_sim"].to_dict("records")
    ]
    note = (
        "*Studies that share pairs of tasks are not pooled; those on one base are no replications.*"
    )
    return ["", *_markdown(rows), "", note]


def _exploration(profile: str, known: dict[str, Path]) -> list[str]:
    """Which of the metrics that were not declared go with the loss, corrected over all of them."""
    from helpers.advise.rivals import RIVALS
    from helpers.run.findings import (
        explored,  # seconds, as is rivals: paid only where a study is told
    )

    related = {study: _if_there(folder / "statistics.csv") for study, folder in known.items()}
    tested = {study: explored(table) for study, table in related.items() if len(table)}
    if profile not in tested:
        return []
    mine = tested[profile]
    found = mine[mine["p_holm"] < 0.05]
    lines = [
        "",
        f"Exploration, {mine['metric'].nunique()} further metrics: p < .05 after Holm's correction "
        f"over all of them in {len(found)} of {len(mine)} tests of `{profile}`.",
    ]
    every = pd.concat([table.assign(study=study) for study, table in tested.items()])
    for row in found.itertuples():
        what = f", the {RIVALS[row.metric].meaning}" if row.metric in RIVALS else ""
        same = (every["metric"] == row.metric) & (every["estimand"] == row.estimand)
        seen = [
            f"{x.study} {x.r:.2f} [{x.low:.2f}, {x.high:.2f}]" for x in every[same].itertuples()
        ]
        told = f"({ESTIMAND_WORDS[row.estimand]}, p {row.p_holm:.3f}): r = {', '.join(seen)}."
        lines.append(f"`{row.metric}`{what} {told}")
    return lines


def _reproduced_table() -> list[str]:
    """What came of running a study, or a part of it, once more from nothing (`compare`)."""
    if not REPRODUCED.exists():
        return []
    rows = [
        {"trained and scored again from nothing": f"{row.profile}: {row.scored}, {row.tasks} tasks"}
        | {"scores": row.cells, "equal": row.equal, "beyond 3 standard errors": row.beyond}
        | {"NLLs apart (nats)": "" if math.isnan(row.largest_nll) else f"{row.largest_nll:.1g}"}
        | {"date": row.date, "machine": f"{row.machine}, {row.threads} threads"}
        for row in pd.read_csv(REPRODUCED).itertuples()
    ]
    return ["", *_markdown(rows)]


POLICIES = {
    "member": "who leaves a pair",
    "swap": "who leaves, who enters",
    "subset": "which to keep",
}


def _choices(folder: Path) -> list[str]:
    """What notebook 06 found a score's choices to be worth, in pairs and in larger groups."""
    if not (folder / "choices.csv").exists():
        return []
    told = pd.read_csv(folder / "choices.csv").query("criterion != 'random'")
    titles = {(folder.name, policy, "linear"): title for policy, title in POLICIES.items()}
    for at in told[["study", "policy", "rule"]].drop_duplicates().itertuples(index=False):
        if at.policy.startswith("member_of_"):
            size = at.policy.removeprefix("member_of_")
            titles[tuple(at)] = f"who leaves {size} ({look(at.rule)['label']}, {at.study})"
    cells = told.set_index(["study", "policy", "rule", "criterion"])
    rows = []
    for criterion in dict.fromkeys(told["criterion"]):
        row = {"a choice by": criterion}
        for column, title in titles.items():
            if column in cells.index.droplevel("criterion"):
                at = cells.reindex([(*column, criterion)]).iloc[0]
                span = f"{at['gain']:+.1f} [{at['gain_low']:.1f}, {at['gain_high']:.1f}]"
                row[title] = "abstains" if math.isnan(at["gain"]) else span
        rows.append(row)
    regrets = cells["regret"].xs("MDS", level="criterion")
    left = ", ".join(f"{title} {regrets[x]:.1f}" for x, title in titles.items() if x in regrets)
    seen = _recorded(folder, "06")
    rank, skill, cover = (
        seen[f"{name}, own tasks, linear"] for name in ("foretold", "skill", "coverage")
    )
    larger = " ".join(_before_swaps(*column) for column in titles if column[1] not in POLICIES)
    return [
        "",
        "What a choice by each score saves beyond a random one, in points of merging loss "
        "([06 choose](notebooks/06_choose.ipynb)):",
        "",
        *_markdown(rows),
        "",
        "*Pairs and subsets by linear averaging; 95 % over tasks. Points that the best possible "
        f"choice would save beyond that of MDS: {left}. {larger} Near -100 % no choice can show "
        "its worth.*",
        "",
        "A line from hidden distance, fitted without the tasks of a pair, foretells the losses of "
        f"pairs with rank correlation {rank['value']:.2f} [{rank['low']:.2f}, {rank['high']:.2f}] "
        f"and skill {skill['value']:.2f} (below 0: worse than saying the mean); "
        f"{cover['value']:.0%} of its 90 % intervals hold the loss.",
        *_ranks(folder),
    ]


def _ranks(folder: Path) -> list[str]:
    """How notebook 06 saw MDS rank whole groups, as the paper has it, where there are enough."""
    path = folder / "ranks.csv"
    ranks = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["criterion"])
    told = [
        f"{at.spearman:.2f} by {look(at.rule)['label']} (p {at.p:.2f}, {at.groups} groups of "
        f"{at.n} in {at.study})"
        for at in ranks[ranks["criterion"] == "MDS"].itertuples()
    ]
    sentence = f"MDS ranks whole groups by their mean loss with {', '.join(told)}."
    return ["", sentence] if told else []


def _before_swaps(study: str, policy: str, rule: str) -> str:
    """What larger groups had lost before their swaps: near -100 % no choice can show its worth."""
    swaps = pd.read_csv(ROOT / "data" / "results" / study / "swaps.csv")
    groups = swaps[swaps["method"] == rule].groupby("group")
    before, best = groups["before"].first().mean(), groups["after"].max().mean()
    size, by = policy.removeprefix("member_of_"), look(rule)["label"]
    return (
        f"The {len(groups)} groups of {size} of {study} had lost {before:.0f} % by {by} before any "
        f"swap, {best:.0f} % after their best one."
    )


def engine() -> str:
    """The benchmark of the merge engine (tests/benchmarks/bench_merge.py), in Markdown."""
    path = ROOT / "data" / "results" / "bench_merge.csv"
    if not path.exists():
        return "Not measured yet."
    table = pd.read_csv(path)
    cells = table.groupby(["size", "dtype", "method", "models"], sort=False)
    rows = []
    for (size, dtype, method, models), cell in cells:
        of = cell.set_index("subject")
        ours = of.loc["ours"]
        row = {"merge": f"{method} of {models:.0f}", "parameters": f"{size} {dtype}"}
        row |= {"CPU s": f"{ours['cpu_merge']:.1f}", "mergekit": "", "times faster": ""}
        row |= {"memory (GB)": f"{ours['anonymous_gb']:.2f}", "mergekit's": ""}
        if "mergekit" in of.index:
            theirs = of.loc["mergekit"]
            row["mergekit"] = f"{theirs['cpu_merge']:.1f}"
            row["times faster"] = f"{theirs['cpu_merge'] / ours['cpu_merge']:.1f}"
            row["mergekit's"] = f"{theirs['anonymous_gb']:.2f}"
        rows.append(row)
    note = (
        "*CPU seconds of the merge itself (medians of "
        f"{table['repeats'].min():.0f} to {table['repeats'].max():.0f} runs) and peak anonymous "
        f"memory, one thread, torch {table['torch'].iloc[0]}, on synthetic checkpoints: `make "
        "bench`.*"
    )
    return "\n".join([*_markdown(rows), "", note])


def readme() -> str:
    """The README's text with what stands between its marks brought up to date."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    written = zip(MARKS[::2], MARKS[1::2], (findings, table, engine), strict=True)
    for start, end, write in written:
        if not text.count(start) == text.count(end) == 1:
            raise ValueError(f"README.md needs the lines {start!r} and {end!r} once each")
        head, rest = text.split(start)
        text = f"{head}{start}\n{write()}\n{end}{rest.split(end)[1]}"
    return text


def write_readme() -> None:
    """Bring what the README generates up to date."""
    text = readme()
    with atomic_write(ROOT / "README.md") as part:
        part.write_text(text, encoding="utf-8")
