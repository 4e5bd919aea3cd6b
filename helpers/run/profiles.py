"""What can be asked for: profiles, notebooks, parameters, all checked before anything runs.

A profile (data/profiles.toml) names values for the notebooks' parameters; data/notebooks.toml lists
the notebooks in running order. A parameter is declared in the one cell of its notebook that is
tagged `parameters`: an annotated literal, its meaning and unit in the comment behind it.
"""

import ast
import contextlib
import difflib
import io
import json
import tokenize
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nbformat

from helpers.store import ROOT, canonical

SET_BY_RUNNER = ("PROFILE", "RESULTS", "OUT")
"""Profile's name, folder whose tables are read, folder that is written (where it differs)."""
HOW = ("WORKERS", "CLUSTER")
"""How the work is shared out, which changes no number."""
THREADS = "THREADS"
KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "text"}


class Notebook(NamedTuple):
    """One entry of data/notebooks.toml; `produces` is committed, `keeps` is for later notebooks.

    What those in `uses` wrote is read where it is there. With a value for the parameter `unless`,
    such as models of one's own, nothing is needed. Its tables are committed with `study` alone.
    """

    name: str
    question: str
    needs: list[str]
    produces: list[str]
    keeps: list[str] = []
    uses: list[str] = []
    unless: str = ""
    study: str = ""  # empty: with every study

    @property
    def path(self) -> Path:
        return ROOT / "notebooks" / f"{self.name}.ipynb"

    @property
    def number(self) -> str:
        """What stands before the first underscore: "04", "03a"."""
        return self.name.partition("_")[0]

    @property
    def files(self) -> list[str]:
        """Every file that it leaves in the results folder, but for figures."""
        return [*self.produces, *self.keeps]


class Parameter(NamedTuple):
    """A declared parameter: its default and what the comment behind it says."""

    default: Any
    meaning: str


class Step(NamedTuple):
    """One notebook of a run, the values of its parameters, the threads of its kernel."""

    notebook: Notebook
    parameters: dict[str, Any]
    threads: int

    @property
    def needs(self) -> list[str]:
        """The notebooks whose files this step reads."""
        brought = self.parameters.get(self.notebook.unless)
        return [] if brought else self.notebook.needs


def notebooks() -> list[Notebook]:
    """The notebooks of the study in running order."""
    text = (ROOT / "data" / "notebooks.toml").read_text(encoding="utf-8")
    entries = tomllib.loads(text)["notebook"]
    return [Notebook(**entry) for entry in entries]


def profile_tables() -> dict[str, dict[str, Any]]:
    """data/profiles.toml as it is written."""
    return tomllib.loads((ROOT / "data" / "profiles.toml").read_text(encoding="utf-8"))


def ancestry(profile: str) -> Iterator[str]:
    """The profile, the one that it is `like`, and so on to the first of all."""
    tables = profile_tables()
    first = next(iter(tables))
    while profile != first:
        yield profile
        profile = tables[profile].get("like", first)
    yield first


def all_profiles() -> dict[str, dict[str, Any]]:
    """Parameters of every profile: those of the one it is `like` (`demo`), and its own."""
    resolved: dict[str, dict[str, Any]] = {}
    for name, table in profile_tables().items():
        own = {key: value for key, value in table.items() if key.isupper()}
        parent = {}
        if resolved:
            parent = resolved[pick(table.get("like", "demo"), resolved, "profile")]
        resolved[name] = parent | own
    return resolved


def parameters(path: Path) -> dict[str, Parameter]:
    """The parameters that a notebook declares, by name.

    Read with `ast`: papermill's own inspection overlooks lines and only warns about unknown names.
    Raises ValueError unless exactly one cell is tagged and it holds nothing but NAME = literal.
    """
    source = _parameters_cell(path)
    comments = _comments(source)
    declared = {}
    for statement in ast.parse(source).body:
        try:
            name, value = _literal(statement)
        except (AttributeError, ValueError):
            raise ValueError(
                f"{path.name}: line {statement.lineno} of the parameters cell is not NAME = literal"
            ) from None
        lines = (statement.lineno, statement.end_lineno)
        meaning = next((comments[line] for line in lines if line in comments), "")
        declared[name] = Parameter(value, meaning)
    return declared


def declared(path: Path) -> dict[str, Any]:
    """Names and default values of the parameters that a notebook declares."""
    return {name: parameter.default for name, parameter in parameters(path).items()}


def _parameters_cell(path: Path) -> str:
    if not path.exists():
        raise ValueError(f"there is no notebook {path.name} in {path.parent.name}/")
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(
            f"{path.name} has {len(tagged)} cells tagged 'parameters'; one is needed"
        )
    return tagged[0].source


def _literal(statement: ast.stmt) -> tuple[str, Any]:
    if isinstance(statement, ast.Assign):
        (target,) = statement.targets
    else:
        target = statement.target
    return target.id, ast.literal_eval(statement.value)


def _comments(source: str) -> dict[int, str]:
    """The text of each comment by its line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = (token for token in tokens if token.type == tokenize.COMMENT)
    return {token.start[0]: token.string.lstrip("# ") for token in found}


def pick(name: str, known: Iterable[str], what: str) -> str:
    """`name` if it is known. Raises ValueError with the nearest known name otherwise."""
    known = list(known)
    if name in known:
        return name
    folded = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"there are {', '.join(known)}"
    if close:
        hint = f"did you mean {folded[close[0]]}?"
    raise ValueError(f"unknown {what} {name!r}; {hint}")


def conform(name: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`: an int where a float is declared becomes one.

    A list is checked element by element against the default's first. Raises ValueError otherwise.
    """
    if default is None:
        return value
    if isinstance(default, list) and isinstance(value, list | tuple):
        first = default[0] if default else None
        return [conform(f"each of {name}", item, first) for item in value]
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        kind = KINDS.get(type(default), f"a {type(default).__name__}")
        raise ValueError(f"{name} takes {kind}, as in {default!r}; got {value!r}")
    return value


def parse(text: str, default: Any) -> Any:
    """The value that a person typed: a Python or JSON literal, or plain text for a text default."""
    value: Any = text
    with contextlib.suppress(ValueError, SyntaxError, TypeError):
        value = (
            json.loads(text) if text in ("true", "false") else ast.literal_eval(text)
        )
    if isinstance(default, str) and not isinstance(value, str):
        return text
    return value


def typed(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Parameters given as text on the command line, parsed after the type of their default."""
    defaults = _defaults(notebooks())
    values = {}
    for name, text in pairs:
        default = defaults[pick(name, defaults, "parameter")]
        values[name] = parse(text, default)
    return values


def _defaults(books: Iterable[Notebook]) -> dict[str, Any]:
    """Every parameter that these notebooks declare."""
    found = {THREADS: 1}
    for notebook in books:
        found |= declared(notebook.path)
    return found


def skipped(profile: str) -> list[str]:
    """The notebooks that a profile, or the one that it is `like`, leaves out of its chain."""
    tables = profile_tables()
    stated = (tables[name].get("skip") for name in ancestry(profile))
    return next(filter(None, stated), [])


def chosen(only: list[str] | None, profile: str = "demo") -> list[Notebook]:
    """The notebooks that `only` names by number or name; without it all that the profile runs."""
    books = notebooks()
    if not only:
        return [notebook for notebook in books if notebook.name not in skipped(profile)]
    numbers = {notebook.number: notebook.name for notebook in books}
    names = [notebook.name for notebook in books]
    wanted = {pick(numbers.get(text, text), names, "notebook") for text in only}
    return [notebook for notebook in books if notebook.name in wanted]


def folder(profile: str, given: Mapping[str, Any]) -> str:
    """Where a run writes, from the repository's root: another seed never overwrites the first."""
    if "RESULTS" in given:
        return given["RESULTS"]
    seed = all_profiles()[profile].get("SEED", 0)
    if given.get("SEED", seed) == seed:
        return f"data/runs/{profile}"
    return f"data/runs/{profile}-seed{given['SEED']}"


def steps(profile: str, only: list[str] | None, given: Mapping[str, Any]) -> list[Step]:
    """The notebooks to run, each with the value of every parameter that it declares.

    Raises ValueError for an unknown profile, notebook or parameter, and for a value of another type
    than the default's.
    """
    settings = all_profiles()[pick(profile, all_profiles(), "profile")]
    everywhere = _defaults(notebooks())
    for name in settings:
        pick(name, everywhere, f"parameter in profile {profile!r}:")
    books = chosen(only, profile)
    given = _checked(given, _defaults(books))
    results = folder(profile, given)
    if ROOT / "data" / "results" in (ROOT / results / "x").resolve().parents:
        raise ValueError("RESULTS may not lie in data/results: `refresh` writes there")
    values = settings | given | {"PROFILE": profile, "RESULTS": results, "OUT": results}
    return [_step(notebook, values) for notebook in books]


def _checked(given: Mapping[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    for name in {"PROFILE", "OUT"} & given.keys():
        raise ValueError(
            f"{name} is set by the runner: name a profile, and -p RESULTS FOLDER"
        )
    canonical(given)  # refuses what JSON cannot hold: it would arrive as text
    return {
        name: conform(name, value, defaults[pick(name, defaults, "parameter")])
        for name, value in given.items()
    }


def _step(notebook: Notebook, values: dict[str, Any]) -> Step:
    defaults = declared(notebook.path)
    parameters = {
        name: conform(name, values.get(name, default), default)
        for name, default in defaults.items()
    }
    threads = conform(THREADS, values.get(THREADS, 1), 1)
    return Step(notebook, parameters, threads)
