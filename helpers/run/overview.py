"""What is there to run, what does it cost? For `python -m helpers list` and a notebook's head."""

import json

import pandas as pd

from helpers.run.profiles import (
    HOW,
    SET_BY_RUNNER,
    notebooks,
    parameters,
    profile_tables,
)
from helpers.store import ROOT

COST_COLUMNS = ["profile", "minutes", "GB", "threads", "machine", "date"]


def costs() -> dict[str, dict]:
    """Measured minutes and memory by profile, as `refresh` last recorded them."""
    path = ROOT / "data" / "results" / "minutes.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def measured(notebook: str, profile: str = "demo") -> tuple[float, float] | None:
    """Minutes and GB of a notebook, as last measured; None where they were not."""
    known = costs().get(profile)
    if known is None or notebook not in known["minutes"]:
        return None
    return known["minutes"][notebook], known["peak_gb"][notebook]


def cost_table(notebook: str) -> pd.DataFrame | None:
    """Minutes and memory of a notebook by profile, if they were measured; for its first cell."""
    rows = []
    for profile, about in costs().items():
        spent = measured(notebook, profile)
        if spent:
            rows.append(
                [profile, *spent, about["threads"], about["machine"], about["date"]]
            )
    return pd.DataFrame(rows, columns=COST_COLUMNS) if rows else None


def overview() -> str:
    """Profiles, notebooks with minutes and GB on the demo, parameters with their meaning."""
    lines = ["Profiles (python -m helpers run PROFILE)"]
    for name, table in profile_tables().items():
        lines.append(f"  {name:16} {table.get('about', '')}")
    lines += ["", "Notebooks (--only NUMBER)       minutes    GB"]
    for notebook in notebooks():
        minutes, memory = measured(notebook.name) or ("", "")
        lines.append(
            f"  {notebook.name:28} {minutes:>8} {memory:>5}  {notebook.question}"
        )
    lines += ["", "Parameters (-p NAME VALUE)", *_parameter_lines()]
    return "\n".join(lines)


def _parameter_lines() -> list[str]:
    """Each parameter once, with its default, its meaning and the notebooks that declare it."""
    defaults, meanings, declaring = {}, {}, {}
    for notebook in notebooks():
        for name, parameter in parameters(notebook.path).items():
            defaults.setdefault(name, parameter.default)
            meanings[name] = meanings.get(name) or parameter.meaning
            declaring.setdefault(name, []).append(notebook.number)
    lines = []
    for name in sorted(defaults.keys() - {*SET_BY_RUNNER, *HOW}):
        default = repr(defaults[name])
        shortened = default if len(default) <= 24 else default[:23] + "…"
        lines.append(
            f"  {name:18} {shortened:24}  {meanings[name]}  [{' '.join(declaring[name])}]"
        )
    return lines
