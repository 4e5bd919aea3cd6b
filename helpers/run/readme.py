"""The README's numbers: each stands between marks that name it, and is written from a table.

The sentences are a person's; `<!-- name -->12<!-- / -->` holds the value that findings.csv of the
study that notebook 08 shows has for `name`, and `<!-- table: name -->` ... `<!-- / -->` a table.
"""

import re

import pandas as pd

from helpers.run.profiles import costs, declared, notebooks
from helpers.store import ROOT, atomic_write

VALUE = re.compile(r"<!-- ([\w.]+) -->([^<]*)<!-- / -->")
TABLE = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- / -->", re.DOTALL)


def markdown(frame: pd.DataFrame) -> str:
    """A frame of texts as a Markdown table."""
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.astype(str).to_numpy().tolist()]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def notebook_table() -> pd.DataFrame:
    """The notebooks with their questions, and minutes and memory as measured on the demo."""
    measured = costs().get("demo", {"minutes": {}, "peak_gb": {}})
    rows = []
    for notebook in notebooks():
        link = f"[{notebook.name}](notebooks/{notebook.name}.ipynb)"
        minutes = measured["minutes"].get(notebook.name, "–")
        memory = measured["peak_gb"].get(notebook.name, "–")
        rows.append([link, notebook.question, minutes, memory])
    return pd.DataFrame(rows, columns=["notebook", "question", "minutes", "GB"])


def found(table: str) -> pd.DataFrame | None:
    """A table of notebook 08, as text, of the study that its committed copy shows."""
    pages = [notebook for notebook in notebooks() if f"{table}.csv" in notebook.produces]
    for page in pages:
        path = ROOT / "data" / "results" / declared(page.path)["PROFILE"] / f"{table}.csv"
        if path.exists():
            return pd.read_csv(path, dtype=str, keep_default_na=False)
    return None


def tables() -> dict[str, pd.DataFrame]:
    """The tables that the README may name: notebooks, and the claims of notebook 08."""
    claims = found("findings_table")
    return {"notebooks": notebook_table()} | ({} if claims is None else {"findings": claims})


def values() -> dict[str, str]:
    """The numbers that the README may name, as text."""
    frame = found("findings")
    return {} if frame is None else dict(zip(frame["name"], frame["text"], strict=True))


def readme() -> str:
    """The README's text with what stands between its marks brought up to date.

    Raises ValueError for a mark that names no value and no table.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    known_tables, known_values = tables(), values()

    def table(match: re.Match) -> str:
        name = _known(match[1], known_tables)
        return f"<!-- table: {name} -->\n{markdown(known_tables[name])}\n<!-- / -->"

    def value(match: re.Match) -> str:
        name = _known(match[1], known_values)
        return f"<!-- {name} -->{known_values[name]}<!-- / -->"

    return VALUE.sub(value, TABLE.sub(table, text))


def _known(name: str, known: dict) -> str:
    if name not in known:
        raise ValueError(f"README.md names {name!r}, which no table holds")
    return name


def write_readme() -> None:
    """Bring what the README quotes up to date."""
    text = readme()
    with atomic_write(ROOT / "README.md") as part:
        part.write_text(text, encoding="utf-8")
