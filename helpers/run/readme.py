"""The README's numbers: each stands between marks that name it, and is written from a table.

The sentences are a person's; `<!-- name -->12<!-- / -->` holds the value that findings.csv of the
study that notebook 08 shows has for `name`, and `<!-- table: name -->` ... `<!-- / -->` a table.
"""

import re

import pandas as pd

from helpers.run.overview import measured
from helpers.run.profiles import declared, notebooks
from helpers.store import ROOT, atomic_write

MARK = re.compile(r"<!-- ((?:table: )?[\w.]+) -->.*?<!-- / -->", re.DOTALL)


def markdown(frame: pd.DataFrame) -> str:
    """A frame of texts as a Markdown table."""
    rows = [
        list(frame.columns),
        ["---"] * frame.shape[1],
        *frame.astype(str).to_numpy().tolist(),
    ]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def notebook_table() -> pd.DataFrame:
    """The notebooks with their questions, and minutes and memory as measured on the demo."""
    rows = []
    for notebook in notebooks():
        spent = measured(notebook.name) or ("–", "–")
        link = f"[{notebook.name}](notebooks/{notebook.name}.ipynb)"
        rows.append([link, notebook.question, *spent])
    return pd.DataFrame(
        rows, columns=["notebook", "question", "minutes", "peak memory (GB)"]
    )


def found(table: str) -> pd.DataFrame | None:
    """A table of notebook 08, as text, of the study that its committed copy shows."""
    pages = [
        notebook for notebook in notebooks() if f"{table}.csv" in notebook.produces
    ]
    for page in pages:
        path = (
            ROOT / "data" / "results" / declared(page.path)["PROFILE"] / f"{table}.csv"
        )
        if path.exists():
            return pd.read_csv(path, dtype=str, keep_default_na=False)
    return None


def contents() -> dict[str, str]:
    """What may stand between marks: numbers as text by their name, tables by "table: name"."""
    findings = found("findings")
    held = (
        {}
        if findings is None
        else dict(zip(findings["name"], findings["text"], strict=True))
    )
    tables = {"notebooks": notebook_table(), "findings": found("findings_table")}
    for name, table in tables.items():
        if table is not None:
            held[f"table: {name}"] = f"\n{markdown(table)}\n"
    return held


def readme() -> str:
    """The README's text with what stands between its marks brought up to date.

    Raises ValueError for a mark that names no value and no table.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    held = contents()

    def current(match: re.Match) -> str:
        name = match[1]
        if name not in held:
            raise ValueError(f"README.md names {name!r}, which no table holds")
        return f"<!-- {name} -->{held[name]}<!-- / -->"

    return MARK.sub(current, text)


def write_readme() -> None:
    """Bring what the README quotes up to date."""
    text = readme()
    with atomic_write(ROOT / "README.md") as part:
        part.write_text(text, encoding="utf-8")
