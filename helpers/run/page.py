"""What came out of a run? One HTML page of its figures and numbers, readable without Jupyter."""

import html
import json
from pathlib import Path
from typing import Any

from helpers.store import atomic_write

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } figure { margin: 2rem 0 } figcaption { color: #444 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { text-align: left }
td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
"""


def figures_of(results: Path, notebook: str) -> list[str]:
    """Files of the figures that this notebook saved, relative to the results folder."""
    sidecars = sorted((results / "figures").glob("*.json"))
    own = [
        path
        for path in sidecars
        if json.loads(path.read_text(encoding="utf-8"))["notebook"] == notebook
    ]
    pictures = [path.with_suffix(".png") for path in own]
    return [path.relative_to(results).as_posix() for path in (*own, *pictures)]


def write_page(results: Path, finished: dict[str, dict], notebooks: list) -> Path:
    """Write results/index.html: figures with captions, results with intervals, how each was made.

    `finished` holds the manifest row of each finished notebook; `notebooks` the order and question.
    """
    rows = [finished[notebook.name] for notebook in notebooks if notebook.name in finished]
    labels = dict.fromkeys(row["parameters"].get("PROFILE", results.name) for row in rows)
    title = f"Model-merging collapse: {'; '.join(labels)}"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for notebook in notebooks:
        if notebook.name in finished:
            parts += _section(results, notebook)
    parts += ["<h2>How this was made</h2>", _table(map(_made, rows))]
    body = "\n".join(parts)
    page = results / "index.html"
    with atomic_write(page) as part:
        part.write_text(
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8">\n<title>{html.escape(title)}'
            f"</title>\n<style>{STYLE}</style>\n{body}\n</html>\n",
            encoding="utf-8",
        )
    return page


def _section(results: Path, notebook: Any) -> list[str]:
    """Heading, figures and named results of one notebook."""
    link = f'<a href="notebooks/{notebook.name}.ipynb">{notebook.name}</a>'
    parts = [f"<h2>{html.escape(notebook.question)}</h2>\n<p>Notebook {link}</p>"]
    for file in figures_of(results, notebook.name):
        if file.endswith(".json"):
            told = json.loads((results / file).read_text(encoding="utf-8"))
            alt, caption = html.escape(told["alt"]), html.escape(told["caption"])
            picture = Path(file).with_suffix(".png").as_posix()
            parts.append(
                f'<figure><img src="{picture}" alt="{alt}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    record = json.loads((results / f"record_{notebook.name[:2]}.json").read_text(encoding="utf-8"))
    return [*parts, _table(map(_result, record))]


def _result(row: dict) -> dict[str, str]:
    """A named result (records.write_record) as cells of a table."""
    interval = f"{_number(row['low'])} to {_number(row['high'])} ({row['interval']})"
    return {
        "result": row["name"],
        "value": "undefined" if row["value"] is None else _number(row["value"]),
        "unit": row["unit"],
        "n": _number(row["n"]),
        "interval": interval if row["interval"] else "",
    }


def _made(row: dict) -> dict[str, str]:
    """A manifest row as cells of a table."""
    return {
        "notebook": row["notebook"],
        "minutes": f"{row['seconds'] / 60:.1f}",
        "memory": f"{row['peak_gb']:.1f} GB",
        "started": row["started"],
        "revision": row["revision"] or "",
        "machine": row["machine"],
        "parameters": ", ".join(f"{k} = {v!r}" for k, v in row["parameters"].items()),
    }


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: Any) -> str:
    """Rows of text as an HTML table."""
    rows = list(rows)
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row.values()) for row in rows]
    return "<table><tr>" + "</tr>\n<tr>".join([head, *lines]) + "</tr></table>"
