"""How does the study run headless? Profiles, checked parameters, a chain of notebooks.

A profile names values for the notebooks' parameters (data/profiles.toml); the chain is the list in
data/notebooks.toml. Every notebook runs in a kernel of its own through papermill into a part file,
which gets its name only when the notebook has come to its end: what can be seen is finished. Each
finished run is a line in RESULTS/manifest.jsonl, with a key made from the notebook's text, its
parameters, the helpers, the data files, the pins and the files of the notebooks that it needs; as
long as the key holds, the notebook is not run again.
"""

import ast
import contextlib
import difflib
import fcntl
import json
import os
import platform
import re
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pandas as pd
import psutil

from helpers.run.page import figures_of, write_page
from helpers.store import ROOT, append_jsonl, canonical, digest, read_jsonl, revision

# Set by the runner wherever a notebook declares them: the profile's name, the folder whose tables
# are read, the folder that is written. They are one folder here; a notebook that by default reads
# the committed tables writes elsewhere.
SET_BY_RUNNER = ("PROFILE", "RESULTS", "OUT")
# The thread count of the kernel's libraries, whether or not a notebook declares it too.
THREADS = "THREADS"
JOBS = "JOBS"  # how many processes share the work, which changes no number
PACKAGES = ("torch", "transformers", "peft", "datasets", "numpy", "scipy", "pandas", "statsmodels")


class NotebookFailed(Exception):
    """A notebook did not come to its end; the message says which, where and why."""


class Notebook(NamedTuple):
    """One entry of data/notebooks.toml."""

    name: str
    question: str
    needs: list[str]
    produces: list[str]
    keeps: list[str] = []

    @property
    def path(self) -> Path:
        return ROOT / "notebooks" / f"{self.name}.ipynb"

    @property
    def published(self) -> list[str]:
        """The files that `refresh` commits, but for figures."""
        return [*self.produces, f"record_{self.name[:2]}.json"]

    @property
    def files(self) -> list[str]:
        """Every file that it leaves in the results folder, but for figures."""
        return [*self.published, *self.keeps]


class Step(NamedTuple):
    """One notebook of a run, the values of its parameters, the threads of its kernel."""

    notebook: Notebook
    parameters: dict[str, Any]
    threads: int


# --- what is asked for, checked before anything runs -------------------------------------------


def chain() -> list[Notebook]:
    """The notebooks of the study in running order."""
    text = (ROOT / "data" / "notebooks.toml").read_text(encoding="utf-8")
    return [Notebook(**entry) for entry in tomllib.loads(text)["notebook"]]


def profiles() -> dict[str, dict[str, Any]]:
    """Parameters of every profile: of the one above it that it is `like` (`demo`), and its own."""
    tables = tomllib.loads((ROOT / "data" / "profiles.toml").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for name, own in tables.items():
        model = found[pick(own.get("like", "demo"), found, "profile")] if found else {}
        found[name] = model | {key: value for key, value in own.items() if key.isupper()}
    return found


def costs() -> dict[str, dict]:
    """Measured minutes and memory by profile, as `refresh` last recorded them."""
    path = ROOT / "data" / "results" / "minutes.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def declared(path: Path) -> dict[str, Any]:
    """Names and default values in the notebook's cell tagged `parameters`.

    Read with `ast`: papermill's own inspection overlooks lines and only warns about unknown names.
    Raises ValueError unless there is exactly one such cell and it holds nothing but NAME = literal.
    """
    if not path.exists():
        raise ValueError(f"there is no notebook {path.name} in {path.parent.name}/")
    cells = [
        cell
        for cell in nbformat.read(path, as_version=4).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    if len(cells) != 1:
        raise ValueError(f"{path.name} has {len(cells)} cells tagged 'parameters'; one is needed")
    values = {}
    for statement in ast.parse(cells[0].source).body:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        try:
            (name,) = (target.id for target in targets)
            values[name] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            raise ValueError(
                f"{path.name}: line {statement.lineno} of the parameters cell is not NAME = literal"
            ) from None
    return values


def pick(name: str, known: Iterable[str], what: str) -> str:
    """`name` if it is known. Raises ValueError with the nearest known name otherwise."""
    known = list(known)
    if name in known:
        return name
    folded = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"did you mean {folded[close[0]]}?" if close else f"there are {', '.join(known)}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")


def conform(name: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`: an int where a float is declared becomes one.

    A list is checked element by element against the default's first. Raises ValueError otherwise.
    """
    if default is None:
        return value
    if isinstance(default, list) and isinstance(value, list | tuple):
        return [conform(f"each of {name}", item, (default or [None])[0]) for item in value]
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{name} takes {_kind(default)}, as in {default!r}; got {value!r}")
    return value


def _kind(default: Any) -> str:
    words = {bool: "True or False", int: "an integer", float: "a number", str: "text"}
    return words.get(type(default)) or f"a {type(default).__name__}"


def parse(text: str, default: Any) -> Any:
    """The value that a person typed: a Python or JSON literal, or plain text for a text default."""
    value: Any = text
    with contextlib.suppress(ValueError, SyntaxError, TypeError):
        value = json.loads(text) if text in ("true", "false") else ast.literal_eval(text)
    return text if isinstance(default, str) and not isinstance(value, str) else value


def typed(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Parameters given as text on the command line, parsed after the type of their default."""
    defaults = _defaults(chain())
    return {name: parse(text, defaults[pick(name, defaults, "parameter")]) for name, text in pairs}


def _defaults(notebooks: list[Notebook]) -> dict[str, Any]:
    """All parameter names that these notebooks know."""
    found = {THREADS: 1}
    for notebook in notebooks:
        found |= declared(notebook.path)
    return found


def plan(profile: str, only: list[str] | None, parameters: dict[str, Any]) -> list[Step]:
    """The notebooks to run, each with the value of every parameter that it declares.

    `only` holds names or numbers ("04"). Raises ValueError for an unknown profile, notebook or
    parameter and for a value of another type than the default's.
    """
    settings = profiles()[pick(profile, profiles(), "profile")]
    notebooks = chain()
    everywhere = _defaults(notebooks)
    for name in settings:
        pick(name, everywhere, f"parameter in profile {profile!r}:")
    if only:
        numbers = {notebook.name[:2]: notebook.name for notebook in notebooks}
        names = [notebook.name for notebook in notebooks]
        wanted = {pick(numbers.get(text, text), names, "notebook") for text in only}
        notebooks = [notebook for notebook in notebooks if notebook.name in wanted]
    here = _defaults(notebooks)
    for name in {"PROFILE", "OUT"} & parameters.keys():
        raise ValueError(f"{name} is set by the runner: name a profile, and -p RESULTS FOLDER")
    canonical(parameters)  # refuses what JSON cannot hold: it would arrive as text
    parameters = {
        name: conform(name, value, here[pick(name, here, "parameter")])
        for name, value in parameters.items()
    }
    altered = {
        name: value
        for name, value in sorted(parameters.items())
        if name not in (*SET_BY_RUNNER, THREADS, JOBS) and value != settings.get(name, here[name])
    }
    label = profile + "".join(f", {n} = {_placeless(v)!r}" for n, v in altered.items())
    folder = parameters.get("RESULTS", f"data/runs/{profile}")
    if (ROOT / "data" / "results") in (ROOT / folder / "x").resolve().parents:
        raise ValueError("RESULTS may not lie in data/results: only `refresh` writes there")
    values = settings | {"PROFILE": label, "RESULTS": folder, "OUT": folder} | parameters
    return [
        Step(
            notebook,
            {
                name: conform(name, values.get(name, default), default)
                for name, default in declared(notebook.path).items()
            },
            conform(THREADS, values.get(THREADS, 1), 1),
        )
        for notebook in notebooks
    ]


def _placeless(value: Any) -> Any:
    """A parameter's value for a label that others read: where our folders lie is none of it."""
    if isinstance(value, dict):
        return {name: _placeless(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_placeless(item) for item in value]
    return "a local folder" if isinstance(value, str) and Path(value).is_absolute() else value


# --- running ------------------------------------------------------------------------------------


def run(
    profile: str, only: list[str] | None = None, parameters: dict[str, Any] | None = None
) -> Path:
    """Run the chain, or the notebooks named in `only`, and return the folder of the results.

    What is finished and unchanged is not run again. Raises ValueError for a bad request, before
    anything runs, and NotebookFailed if a notebook does not come to its end.
    """
    parameters = parameters or {}
    steps = plan(profile, only, parameters)
    results = ROOT / parameters.get("RESULTS", f"data/runs/{profile}")
    _check_needs(steps, results)
    surroundings = _surroundings()
    with _alone(results):
        _say_plan(profile, steps)
        if not all(_is_finished(step, results, surroundings) for step in steps):
            _check_inputs(steps)
        ran = [
            _advance(step, results, surroundings, f"[{i}/{len(steps)}] {step.notebook.name}")
            for i, step in enumerate(steps, 1)
        ]
        page = results / "index.html"
        if any(ran) or not page.exists():
            write_page(results, finished(results), chain())
    if not any(ran):
        print("Nothing to do: everything was finished with this code, data and parameters.")
    print(f"The result on one page: {page}")
    print(f"Executed notebooks: {results / 'notebooks'}; figures: {results / 'figures'}")
    return results


def finished(results: Path) -> dict[str, dict]:
    """The last manifest row of every notebook that finished and whose files are as it left them."""
    rows = {row["notebook"]: row for row in read_jsonl(results / "manifest.jsonl")}
    return {
        name: row
        for name, row in rows.items()
        if row["status"] == "finished"
        and executed(results, name).exists()
        and row["outputs"] == _hashes(results, row["outputs"])
    }


def executed(results: Path, name: str) -> Path:
    """Where the executed notebook lies."""
    return results / "notebooks" / f"{name}.ipynb"


def _hashes(results: Path, files: Iterable[str]) -> dict[str, str | None]:
    """sha256 of each file; None where there is none."""
    paths = {name: results / name for name in files}
    return {name: digest(path) if path.exists() else None for name, path in paths.items()}


def _check_needs(steps: list[Step], results: Path) -> None:
    """Raise ValueError unless what a notebook reads is there, made with the same parameters."""
    made = {name: row["parameters"] for name, row in finished(results).items()}
    for step in steps:
        made[step.notebook.name] = {}  # made anew, so nothing to compare with
    for step in steps:
        for need in step.notebook.needs:
            if need not in made:
                raise ValueError(
                    f"{step.notebook.name} reads what {need} writes, and {need} is not finished in "
                    f"{results}: run it as well"
                )
            for name in sorted(made[need].keys() & step.parameters.keys() - {*SET_BY_RUNNER, JOBS}):
                if canonical(made[need][name]) != canonical(step.parameters[name]):
                    raise ValueError(
                        f"{need} was run with {name} = {made[need][name]!r}, {step.notebook.name} "
                        f"is asked for {name} = {step.parameters[name]!r}: run it as well"
                    )


def shown(parameters: dict[str, Any]) -> list[str]:
    """Folders of committed tables that the notebook shows whatever the run computes."""
    texts = [value for name, value in parameters.items() if name not in SET_BY_RUNNER]
    return [text for text in texts if isinstance(text, str) and text.startswith("data/results/")]


def _check_inputs(steps: list[Step]) -> None:
    """Fetch the model and look up the tasks that the notebooks will open, before the first runs.

    Raises ValueError for what cannot be had.
    """
    from helpers.study import (
        assets,  # seconds: not paid by a run that has nothing to do
        tasks,
    )

    for model in dict.fromkeys(x.parameters["MODEL"] for x in steps if "MODEL" in x.parameters):
        assets.model_folder(model)
    for step in steps:
        if "TASKS" in step.parameters:
            tasks.check_names(step.parameters["TASKS"], step.parameters.get("SOURCES"))


def _surroundings() -> str:
    """Digest of what every notebook depends on: helpers, data files, pins, measured minutes.

    The profiles and the list of notebooks come in through the parameters; results depend on us.
    """
    helpers = Path(__file__).parents[1]
    files = [*helpers.rglob("*.py"), *helpers.glob("*.mplstyle"), ROOT / "requirements.txt"]
    files += (ROOT / "data" / "results").glob("minutes.json")
    files += (ROOT / "data").glob("*.txt")
    files += [
        path
        for path in (ROOT / "data").glob("*.toml")
        if path.name not in ("profiles.toml", "notebooks.toml")
    ]
    return digest([[path.name, digest(path)] for path in sorted(files)])


def _key(step: Step, surroundings: str, done: dict[str, dict]) -> str:
    cells = nbformat.read(step.notebook.path, as_version=4).cells
    source = [[cell.cell_type, cell.metadata.get("tags", []), cell.source] for cell in cells]
    needed = {need: done[need]["outputs"] for need in step.notebook.needs}
    committed = [digest(ROOT / folder) for folder in shown(step.parameters)]
    local = _local_files(step.parameters)
    given = {name: value for name, value in step.parameters.items() if name != JOBS}
    seen = [source, given, step.threads, surroundings, needed, committed, local]
    return digest(seen)[:16]


def _local_files(parameters: dict[str, Any]) -> list[list]:
    """Path, size and time of the files that parameters name, such as a model's folder: one that
    was edited in place is another model."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from texts(item)

    written = (*SET_BY_RUNNER, "FINDINGS")  # tables, which a run writes itself
    given = {name: value for name, value in parameters.items() if name not in written}
    found = []
    for text in texts(given):
        if text and os.path.exists(ROOT / text):
            path = ROOT / text
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            told = [(file, file.stat()) for file in files if file.is_file()]
            found += [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in told]
    return found


def _is_finished(step: Step, results: Path, surroundings: str) -> bool:
    """Whether the notebook, and each that it needs, finished with this code and parameters."""
    done = finished(results)
    name = step.notebook.name
    return name in done and done[name]["key"] == _key(step, surroundings, done)


def _advance(step: Step, results: Path, surroundings: str, title: str) -> bool:
    """Run one notebook unless it is finished under the same key; tell whether it ran."""
    done = finished(results)
    key = _key(step, surroundings, done)
    name = step.notebook.name
    if name in done and done[name]["key"] == key:
        print(f"{title}: finished before")
        return False
    _forget(step.notebook, results)
    print(f"{title}: {step.notebook.question}", flush=True)
    row = {
        "notebook": name,
        "key": key,
        "parameters": step.parameters,
        "threads": step.threads,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
    }
    start = time.monotonic()
    part = executed(results, name).with_name(f"{name}.part.ipynb")
    with _peak_memory() as peak:
        try:
            _execute(step, part, results)
        except NotebookFailed as error:
            row |= {"status": "failed", "error": str(error)}
        else:
            files = step.notebook.files + figures_of(results, name)
            row |= {"status": "finished", "outputs": _hashes(results, files)}
    row |= {"seconds": round(time.monotonic() - start, 1), "peak_gb": round(peak[0] / 1e9, 2)}
    if row["status"] == "finished":
        part.rename(executed(results, name))
    append_jsonl(results / "manifest.jsonl", row)
    if row["status"] == "failed":
        raise NotebookFailed(row["error"])
    minutes, seconds = divmod(round(row["seconds"]), 60)
    print(f"{title}: {minutes}:{seconds:02d} minutes, at most {row['peak_gb']:.1f} GB")
    return True


def _forget(notebook: Notebook, results: Path) -> None:
    """Take away what says that this notebook, and those that read its files, are finished."""
    stale = {notebook.name}
    for other in chain():
        if stale & {other.name, *other.needs}:
            stale.add(other.name)
            executed(results, other.name).unlink(missing_ok=True)
    (results / "index.html").unlink(missing_ok=True)


def _execute(step: Step, part: Path, results: Path) -> None:
    """Run the notebook into `part`. Raises NotebookFailed unless every cell ran and every file is
    there: after a killed kernel papermill's output looks finished, so only the exception counts."""
    import papermill  # slow to import, and not needed to skip
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    name = step.notebook.name
    part.parent.mkdir(parents=True, exist_ok=True)
    for file in step.notebook.files + figures_of(results, name):
        (results / file).unlink(missing_ok=True)
    terminal = sys.stderr if sys.stderr.isatty() else None
    threads = str(step.threads)
    variables = environment(
        OMP_NUM_THREADS=threads,
        MKL_NUM_THREADS=threads,
        OPENBLAS_NUM_THREADS=threads,
        JUPYTER_PREFER_ENV_PATH="1",  # the kernel of this environment, whatever the user registered
        MPLBACKEND="module://matplotlib_inline.backend_inline",
    )
    with variables, tempfile.TemporaryDirectory() as folder:
        sockets = (
            f"{folder}/kernel.json"  # files beside it carry the messages: no ports to race for
        )
        try:
            book = papermill.execute_notebook(
                step.notebook.path,
                part,
                parameters=step.parameters,
                kernel_name="python3",
                cwd=ROOT,
                progress_bar={"desc": name, "leave": False, "disable": None},
                stderr_file=terminal,  # the bars of long steps
                config=Config({"KernelManager": {"transport": "ipc", "connection_file": sockets}}),
                extra_arguments=["--IPKernelApp.log_level=50"],  # it logs that it is told to stop
            )
        except papermill.PapermillExecutionError as error:
            # the first arrow of the traceback points to the line of the cell
            trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))  # without colours
            arrow = re.search(r"-+> \d+ +(.*)", trace)
            line = f" ({arrow[1]})" if arrow else ""
            raise NotebookFailed(
                f"{name} failed in In [{error.exec_count}]{line}: {error.ename}: {error.evalue}\n"
                f"Its output so far, with the traceback: {part}"
            ) from error
        except DeadKernelError as error:
            raise NotebookFailed(
                f"{name} stopped: its kernel was killed, perhaps for want of memory; the same "
                f"command takes it up again\nIts output so far: {part}"
            ) from error
    for i, cell in enumerate(book.cells, 1):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise NotebookFailed(f"{name} stopped before its end, at cell {i}: {part}")
    missing = [file for file in step.notebook.files if not (results / file).exists()]
    if missing:
        raise NotebookFailed(f"{name} ran but did not write {', '.join(missing)} to {results}")


@contextlib.contextmanager
def _alone(results: Path) -> Iterator[None]:
    """Hold the results folder; a second run into the same folder is refused."""
    results.mkdir(parents=True, exist_ok=True)
    with (results / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {results}; wait for its end") from None
        yield


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables that the kernel inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Yield a list whose one item grows to the most bytes that we and our children held."""
    peak, stop = [0], threading.Event()

    def sample() -> None:
        me = psutil.Process()
        while not stop.wait(0.5):
            total = 0
            for process in (me, *me.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it was listed
                    total += process.memory_info().rss
            peak[0] = max(peak[0], total)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()


def machine() -> str:
    """This machine in words."""
    memory = psutil.virtual_memory().total / 1e9
    gpus = "".join(f"{name}, " for name in _gpus())
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GB, {gpus}{platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}"
    )


def _gpus(told: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """The names of the NVIDIA devices, as their driver tells them: no library need be loaded."""
    texts = [file.read_text() for file in sorted(told.glob("*/information"))]
    return re.findall(r"^Model:\s*(.+?)\s*$", "\n".join(texts), flags=re.MULTILINE)


def _say_plan(profile: str, steps: list[Step]) -> None:
    """Print what will run and how long it took where it was last measured, or a forecast."""
    measured = costs().get(profile)
    names = [step.notebook.name for step in steps]
    print(f"Profile {profile}: {', '.join(names)}")
    if measured:
        minutes = {n: m for n, m in measured["minutes"].items() if n in names}
        each = ", ".join(f"{name[:2]} {value:.1f}" for name, value in minutes.items())
        print(f"Expected: {sum(minutes.values()):.0f} minutes ({each}), on {measured['machine']}")
    else:
        _say_forecast(profile, steps)


def _say_forecast(profile: str, steps: list[Step]) -> None:
    """Print the forecast of 01 and 02, if they are among the steps and the demo was measured."""
    from helpers.study import forecast  # not read by `run` but for this line

    known = profiles()
    units = forecast.unit_costs(ROOT / "data" / "results" / "demo", known["demo"])
    numbers = [step.notebook.name[:2] for step in steps if step.notebook.name[:2] in ("01", "02")]
    if units and numbers:
        asked = dict(known[profile])  # 02 alone declares neither tasks nor examples
        for step in steps:
            asked |= step.parameters
        print(forecast.sentence(asked, units, numbers))


# --- what a notebook shows of it ---------------------------------------------------------------


def cost_table(notebook: str) -> pd.DataFrame:
    """Minutes and memory of a notebook by profile, as last measured; for its first cell."""
    rows = [
        {"profile": profile, "minutes": told["minutes"][notebook], "GB": told["peak_gb"][notebook]}
        | {"threads": told["threads"], "machine": told["machine"], "date": told["date"]}
        for profile, told in costs().items()
        if notebook in told["minutes"]
    ]
    return pd.DataFrame(rows, columns=["profile", "minutes", "GB", "threads", "machine", "date"])


def versions() -> str:
    """The packages that results depend on, in one line."""
    found = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {found}"
