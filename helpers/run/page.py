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


def figures_of(results: Path, notebook: str) -> list[str]:
    """Files of the figures that this notebook saved, relative to the results folder."""
    files = []
    for sidecar in sorted((results / "figures").glob("*.json")):
        about = json.loads(sidecar.read_text(encoding="utf-8"))
        if about["notebook"] == notebook:
            files += [sidecar, sidecar.with_suffix(".png")]
    return [path.relative_to(results).as_posix() for path in files]


def write_page(results: Path, finished: dict[str, dict], notebooks: list[Notebook]) -> Path:
    """Write results/index.html and return it.

    `finished` holds the manifest row of each finished notebook; `notebooks` the order and question.
    """
    done = [notebook for notebook in notebooks if notebook.name in finished]
    rows = [finished[notebook.name] for notebook in done]
    names = dict.fromkeys(row["parameters"].get("PROFILE", results.name) for row in rows)
    text = _template("page.html").render(
        title=f"Model-merging collapse: {', '.join(names)}",
        playground=_playground(results),
        tables=_verdicts(results),
        sections=[_section(results, notebook) for notebook in done],
        made=pd.DataFrame([_made(row) for row in rows]),
    )
    page = results / "index.html"
    with atomic_write(page) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return page


def _playground(results: Path) -> str:
    """The playground of this run, once its merges have answered."""
    if not (results / "answers.csv").exists():
        return ""
    return figures.playground(Study(results))


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    surroundings = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    return surroundings.get_template(name)


def _verdicts(results: Path) -> dict[str, pd.DataFrame]:
    """The claims and their verdicts, where notebook 05 has told them."""
    path = results / "verdicts.csv"
    if not path.exists():
        return {}
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return {"What of the paper holds here?": table[["claim", "paper", "here", "verdict"]]}


def _section(results: Path, notebook: Notebook) -> dict:
    """Name, question and figures of one notebook."""
    files = figures_of(results, notebook.name)
    pictures = []
    for sidecar in (file for file in files if file.endswith(".json")):
        about = json.loads((results / sidecar).read_text(encoding="utf-8"))
        picture = Path(sidecar).with_suffix(".png").as_posix()
        pictures.append(about | {"picture": picture})
    return {"name": notebook.name, "question": notebook.question, "figures": pictures}


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
