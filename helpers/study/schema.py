"""What stands in a study's tables: every frame that is written or read is checked against it.

schema.toml says of each table its file, what a row is, and of each column type, unit and meaning;
data/results/README.md is written from it. Types: name (an identifier, empty for none), text,
list (of names, JSON in the file, a tuple in a frame), int, float, bool. A name with * is a pattern.
"""

import json
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from pandas.api import types

from helpers.store import write_table

FILE = Path(__file__).with_suffix(".toml")
SHARE_SLACK = 1e-6  # what rounding may add to a share


class Column(NamedTuple):
    type: str
    unit: str
    meaning: str


class Table(NamedTuple):
    """A table's file, what a row is, the columns that name a row, those it may lack, and all."""

    file: str
    about: str
    key: list[str]
    optional: list[str]
    columns: dict[str, Column]

    def pattern(self, column: str) -> str | None:
        """The first name in `columns` that fits, None for an unknown column."""
        fits = (name for name in self.columns if fnmatchcase(column, name))
        return next(fits, None)


@cache
def _content() -> dict:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


@cache
def tables() -> dict[str, Table]:
    """Every table of schema.toml by name; its own columns come after those it shares."""
    content = dict(_content())
    del content["introduction"]
    shared = content.pop("shared")
    found = {}
    for name, table in content.items():
        rows = {column: shared[column] for column in table.get("shared", [])}
        rows |= table["columns"]
        columns = {column: Column(*row) for column, row in rows.items()}
        key, optional = table.get("key", []), table.get("optional", [])
        found[name] = Table(table["file"], table["about"], key, optional, columns)
    return found


def of(name: str) -> Table:
    """The schema of a table; raises ValueError for a name that it does not have."""
    if name not in tables():
        raise ValueError(
            f"there is no table {name!r}: describe it in helpers/study/schema.toml"
        )
    return tables()[name]


# --- check -------------------------------------------------------------------------------------


def check(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame, columns in the order of the schema.

    Raises ValueError, naming table and column, for a column that is missing, unknown or of another
    type, a share outside [0, 1], and a row that is there twice.
    """
    table = of(name)
    _check_names(table, frame)
    for column in frame.columns:
        wanted = table.columns[table.pattern(column)]
        _check_values(f"{table.file}: column {column}", frame[column], wanted)
    if table.key and frame.duplicated(table.key).any():
        twice = frame.loc[frame.duplicated(table.key), table.key].iloc[0]
        raise ValueError(f"{table.file}: {', '.join(map(str, twice))} is there twice")
    order = list(table.columns)
    return frame[
        sorted(frame.columns, key=lambda column: order.index(table.pattern(column)))
    ]


def _check_names(table: Table, frame: pd.DataFrame) -> None:
    unknown = [column for column in frame.columns if not table.pattern(column)]
    if unknown:
        raise ValueError(
            f"{table.file}: column {unknown[0]} is not in helpers/study/schema.toml: describe it "
            "there or leave it out"
        )
    free = set(table.optional) | {column for column in table.columns if "*" in column}
    missing = [
        column for column in table.columns if column not in free | set(frame.columns)
    ]
    if missing:
        raise ValueError(
            f"{table.file}: column {missing[0]} is missing: run its notebook again"
        )


def _check_values(where: str, values: pd.Series, wanted: Column) -> None:
    values = values.dropna()
    if len(values) and not _fits(values, wanted.type):
        raise ValueError(
            f"{where} holds {values.tolist()[0]!r}, which is no {wanted.type}"
        )
    if wanted.type == "float" and wanted.unit == "share":
        beyond = values[(values < -SHARE_SLACK) | (values > 1 + SHARE_SLACK)]
        if len(beyond):
            raise ValueError(
                f"{where} holds {beyond.iloc[0]:g}, a share lies in [0, 1]"
            )


def _fits(values: pd.Series, kind: str) -> bool:
    if kind == "int":
        return types.is_integer_dtype(values)
    if kind == "float":
        return types.is_numeric_dtype(values) and not types.is_bool_dtype(values)
    wanted = {"bool": bool, "list": (list, tuple)}.get(kind, str)
    return all(isinstance(value, wanted) for value in values.tolist())


# --- read and write ----------------------------------------------------------------------------


def read(folder: Path, name: str) -> pd.DataFrame:
    """A table of the study in `folder`, checked. Raises ValueError where there is none."""
    table = of(name)
    path = folder / table.file
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {table.file}: run the notebook that writes it, or name another study"
        )
    columns = pd.read_csv(path, nrows=0).columns
    kinds = {column: _kind(table, column) for column in columns}
    words = {
        column: str
        for column, kind in kinds.items()
        if kind in ("name", "text", "list")
    }
    frame = pd.read_csv(path, dtype=words, keep_default_na=False, na_values=[""])
    for column, kind in kinds.items():
        frame[column] = _parsed(frame[column], kind)
    return check(name, frame)


def _kind(table: Table, column: str) -> str:
    pattern = table.pattern(column)
    return table.columns[pattern].type if pattern else "text"


def _parsed(values: pd.Series, kind: str) -> pd.Series:
    if kind == "list":
        return values.map(lambda text: tuple(json.loads(text)), na_action="ignore")
    if kind == "bool":
        return values.astype("boolean")
    if kind == "text":
        return values.fillna("")
    if kind == "int" and values.isna().any():
        return values.astype("Int64")
    return values


def write(folder: Path, name: str, frame: pd.DataFrame) -> None:
    """Write a table of the study in `folder`, checked, whole or not at all."""
    frame = check(name, frame)
    table = of(name)
    lists = [column for column in frame.columns if _kind(table, column) == "list"]
    texts = {column: frame[column].map(to_json, na_action="ignore") for column in lists}
    write_table(folder / table.file, frame.assign(**texts))


def to_json(names: Iterable[str]) -> str:
    """How a list of names stands in a file."""
    return json.dumps(list(names), ensure_ascii=False)


# --- describe ----------------------------------------------------------------------------------


def page() -> str:
    """data/results/README.md."""
    parts = [_content()["introduction"]]
    for table in tables().values():
        parts.append(f"## {table.file}\n\n{table.about}\n")
        rows = ["| column | type | unit | meaning |", "|---|---|---|---|"]
        rows += [
            f"| {name} | {' | '.join(column)} |"
            for name, column in table.columns.items()
        ]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    from helpers.store import ROOT

    (ROOT / "data" / "results" / "README.md").write_text(page(), encoding="utf-8")
