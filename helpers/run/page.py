"""What came out of a run? One HTML page, readable without Jupyter and without a server."""

import json
from pathlib import Path

import jinja2
import pandas as pd

from helpers import figures
from helpers.run.profiles import Notebook
from helpers.store import atomic_write
from helpers.study.tables import Study

TEMPLATES = Path(__file__).parent
HARMS = "figures/02_pair_losses.png"  # who harms whom, beside the verdicts


def pictures(results: Path, notebook: str) -> list[dict]:
    """The sidecars of the figures that this notebook saved, each with its `picture`'s file."""
    saved = []
    for sidecar in sorted((results / "figures").glob("*.json")):
        about = json.loads(sidecar.read_text(encoding="utf-8"))
        if about["notebook"] == notebook:
            saved.append(about | {"picture": f"figures/{sidecar.stem}.png"})
    return saved


def figures_of(results: Path, notebook: str) -> list[str]:
    """Files of the figures that this notebook saved, relative to the results folder."""
    stems = [
        about["picture"].removesuffix(".png") for about in pictures(results, notebook)
    ]
    return [stem + end for stem in stems for end in (".json", ".png")]


def write_page(
    results: Path, finished: dict[str, dict], notebooks: list[Notebook]
) -> Path:
    """Write results/index.html and return it.

    `finished` holds the manifest row of each finished notebook; `notebooks` the order and question.
    """
    done = [notebook for notebook in notebooks if notebook.name in finished]
    rows = [finished[notebook.name] for notebook in done]
    names = dict.fromkeys(
        row["parameters"].get("PROFILE", results.name) for row in rows
    )
    sections = [
        about._asdict() | {"figures": pictures(results, about.name)} for about in done
    ]
    shown = [about for section in sections for about in section["figures"]]
    answered = (results / "answers.csv").exists()
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    text = templates.get_template("page.html").render(
        title=f"Model-merging collapse: {', '.join(names)}",
        playground=figures.playground(Study(results)) if answered else "",
        harms=[about for about in shown if about["picture"] == HARMS],
        verdicts=_verdicts(results),
        sections=sections,
        made=pd.DataFrame([_made(row) for row in rows]),
    )
    page = results / "index.html"
    with atomic_write(page) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return page


def _verdicts(results: Path) -> pd.DataFrame | None:
    """The claims and their verdicts, where notebook 05 has told them."""
    path = results / "verdicts.csv"
    if not path.exists():
        return None
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table[["claim", "paper", "here", "verdict"]]


def _made(row: dict) -> dict[str, str]:
    """A manifest row as cells of a table."""
    parameters = row["parameters"].items()
    return {
        "notebook": row["notebook"],
        "minutes": f"{row['seconds'] / 60:.1f}",
        "memory": f"{row['peak_gb']:.1f} GB",
        "started": row["started"],
        "revision": row["revision"] or "",
        "machine": row["machine"],
        "parameters": ", ".join(f"{name} = {value!r}" for name, value in parameters),
    }
