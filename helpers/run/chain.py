"""How does the study run headless? One notebook after the other, each until it is finished.

A notebook runs into a part file, which gets its name only when the notebook has come to its end:
what can be seen is finished. As long as its key holds (`keys`, `record`) it is not run again.
"""

import contextlib
import fcntl
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helpers.run import forecast
from helpers.run.execute import (
    NotebookFailed,
    execute,
    machine,
    package_versions,
    peak_memory,
)
from helpers.run.overview import costs
from helpers.run.page import figures_of, write_page
from helpers.run.profiles import (
    HOW,
    SET_BY_RUNNER,
    Notebook,
    Step,
    all_profiles,
    folder,
    notebooks,
    steps,
)
from helpers.run.record import (
    digests,
    executed,
    finished,
    is_finished,
    read_by,
    reads_committed,
    step_key,
)
from helpers.store import ROOT, append_jsonl, canonical, revision


def run(
    profile: str, only: list[str] | None = None, parameters: Mapping[str, Any] = {}
) -> Path:
    """Run the chain, or the notebooks named in `only`, and return the folder of the results.

    What is finished and unchanged is not run again. Raises ValueError for a bad request, before
    anything runs, and NotebookFailed if a notebook does not come to its end.
    """
    plan = steps(profile, only, parameters)
    results = ROOT / folder(profile, parameters)
    plan = [_from_committed(step, profile, plan, results) for step in plan]
    _check_needs(plan, results)
    with _alone(results):
        _say_plan(profile, plan)
        if not all(is_finished(step, results) for step in plan):
            _check_inputs(plan)
        titles = [
            f"[{i}/{len(plan)}] {step.notebook.name}" for i, step in enumerate(plan, 1)
        ]
        ran = [
            _advance(step, results, title)
            for step, title in zip(plan, titles, strict=True)
        ]
        page = results / "index.html"
        if any(ran) or not page.exists():
            write_page(results, finished(results), notebooks())
    if not any(ran):
        print(
            "Nothing to do: everything was finished with this code, data and parameters."
        )
    print(f"The result on one page: {page}")
    print(
        f"Executed notebooks: {results / 'notebooks'}; figures: {results / 'figures'}"
    )
    return results


# --- checks before the first notebook runs -----------------------------------------------------


def _from_committed(step: Step, profile: str, plan: list[Step], results: Path) -> Step:
    """The step, reading the profile's committed tables where this run has not made any.

    So a notebook that only reads tables, and writes elsewhere (OUT), needs no model.
    """
    tables = f"data/results/{profile}"
    here = {*finished(results), *(other.notebook.name for other in plan)}
    missing = set(step.needs) - here
    if not missing or "OUT" not in step.parameters or not (ROOT / tables).is_dir():
        return step
    print(f"{step.notebook.name} reads the committed tables in {tables}")
    return step._replace(parameters=step.parameters | {"RESULTS": tables})


def _check_needs(plan: list[Step], results: Path) -> None:
    """Raise ValueError unless what a notebook reads is there, made with the same parameters."""
    made = {name: row["parameters"] for name, row in finished(results).items()}
    # made anew: nothing to compare with
    made |= {step.notebook.name: {} for step in plan}
    for step in plan:
        if reads_committed(step):
            continue
        name = step.notebook.name
        for need in step.needs:
            if need not in made:
                raise ValueError(
                    f"{name} reads what {need} writes, and {need} is not finished in {results}: "
                    "run it as well"
                )
        for source in read_by(step, made):
            _check_same(name, step.parameters, source, made[source])


def _check_same(
    name: str, asked: dict[str, Any], need: str, made: dict[str, Any]
) -> None:
    for parameter in sorted(made.keys() & asked.keys() - {*SET_BY_RUNNER, *HOW}):
        before, now = made[parameter], asked[parameter]
        if canonical(before) != canonical(now):
            raise ValueError(
                f"{need} was run with {parameter} = {before!r}, {name} is asked for "
                f"{parameter} = {now!r}: run it as well"
            )


def _check_inputs(plan: list[Step]) -> None:
    """Fetch the model and its ready adapters, and look up the tasks that the notebooks will open.

    Raises ValueError for what cannot be had.
    """
    asked = [step.parameters for step in plan if not reads_committed(step)]
    bases = dict.fromkeys(given["MODEL"] for given in asked if "MODEL" in given)
    with_tasks = [given for given in asked if "TASKS" in given]
    if not bases and not with_tasks:
        return
    # seconds: not paid by a run that has nothing to do
    from helpers.study import models, tasks

    for base in bases:
        models.model_folder(base)
    for given in with_tasks:
        tasks.check_names(given["TASKS"], given.get("SOURCES"))
    for given in with_tasks:
        if "LORA_RANK" in given and given["SPECIALISTS"]:  # 01: adapters, to be adopted
            from helpers.study import ready

            base = models.base_info(given["MODEL"])["name"]
            ready.check(given["SPECIALISTS"], base, given["LORA_RANK"])


@contextlib.contextmanager
def _alone(results: Path) -> Iterator[None]:
    """Hold the results folder; a second run into the same folder is refused."""
    results.mkdir(parents=True, exist_ok=True)
    with (results / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing to {results}; wait for its end"
            ) from None
        yield


def _say_plan(profile: str, plan: list[Step]) -> None:
    """Print what will run, and how long it took where it was last measured."""
    names = [step.notebook.name for step in plan]
    print(f"Profile {profile}: {', '.join(names)}")
    if profile not in costs():
        asked = all_profiles()[profile]
        for step in plan:
            asked = asked | step.parameters
        if any("TASKS" in step.parameters for step in plan):
            print(*forecast.lines(profile, asked), sep="\n")
        return
    measured = costs()[profile]
    minutes = {name: m for name, m in measured["minutes"].items() if name in names}
    if not minutes:
        return
    each = ", ".join(f"{name.partition('_')[0]} {m:.1f}" for name, m in minutes.items())
    most = max([measured["peak_gb"][name] for name in minutes], default=0.0)
    where = f"at most {most:.1f} GB of memory, on {measured['machine']}"
    print(f"Expected: {sum(minutes.values()):.0f} minutes ({each}) and {where}")


# --- running ------------------------------------------------------------------------------------


def _advance(step: Step, results: Path, title: str) -> bool:
    """Run one notebook unless it is finished under the same key; tell whether it ran."""
    if is_finished(step, results):
        print(f"{title}: finished before")
        return False
    row = _begin(step, results)
    print(f"{title}: {step.notebook.question}", flush=True)
    name, start = step.notebook.name, time.monotonic()
    part = executed(results, name).with_name(f"{name}.part.ipynb")
    failure = None
    with peak_memory() as peak:
        try:
            execute(step, part)
            _check_written(step.notebook, results)
        except NotebookFailed as error:
            failure = error
    row["seconds"] = round(time.monotonic() - start, 1)
    row["peak_gb"] = round(peak[0] / 1e9, 2)
    if failure:
        append_jsonl(
            results / "manifest.jsonl",
            row | {"status": "failed", "error": str(failure)},
        )
        raise failure
    files = step.notebook.files + figures_of(results, name)
    row |= {"status": "finished", "outputs": digests(results, files)}
    part.rename(executed(results, name))
    append_jsonl(results / "manifest.jsonl", row)
    minutes, seconds = divmod(round(row["seconds"]), 60)
    print(f"{title}: {minutes}:{seconds:02d} minutes, at most {row['peak_gb']:.1f} GB")
    return True


def _begin(step: Step, results: Path) -> dict[str, Any]:
    """Clear what an earlier run left; the manifest row of this one, as far as it is known."""
    row = {
        "notebook": step.notebook.name,
        "key": step_key(step, results),
        "parameters": step.parameters,
        "threads": step.threads,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(),
        "versions": package_versions(),
    }
    _forget(step.notebook, results)
    stale = {step.notebook.name, *step.notebook.uses} - finished(results).keys()
    old = [file for book in notebooks() if book.name in stale for file in book.files]
    for file in old + figures_of(results, step.notebook.name):  # of another run
        (results / file).unlink(missing_ok=True)
    return row


def _forget(notebook: Notebook, results: Path) -> None:
    """Take away what says that this notebook, and those that read its files, are finished.

    The last first: a run killed in the middle leaves no page, nor a notebook, without its sources.
    """
    stale = [notebook.name]
    for other in notebooks():
        if not {*other.needs, *other.uses}.isdisjoint(stale):
            stale.append(other.name)
    (results / "index.html").unlink(missing_ok=True)
    for name in reversed(stale):
        executed(results, name).unlink(missing_ok=True)


def _check_written(notebook: Notebook, results: Path) -> None:
    missing = [file for file in notebook.files if not (results / file).exists()]
    if missing:
        raise NotebookFailed(
            f"{notebook.name} ran but did not write {', '.join(missing)} to {results}"
        )
