"""Advice as text, as JSON (advice.schema.json) and as a page (advice.html.j2)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from helpers.advise.advice import Advice
from helpers.figures import look
from helpers.store import atomic_write

NAMED = 6  # models that a sentence names; of more it says how many
MANY = 300  # prompts that nobody will give
WIDE = 8  # models up to which a cell has room for its interval
HERE = Path(__file__).parent


def sentence(advice: Advice) -> str:
    """The decision in one sentence."""
    parts = []
    for merge in advice.merges:
        if merge["verdict"] == "safe":
            least = min(row["least"] for row in merge["kept"])
            how = f"by {how_of(merge)}"
            parts.append(
                f"merge {_list(merge['models'])} {how}: each keeps at least {least:.0%}"
            )
    by_decision = advice.models.groupby("decision")["model"].agg(list)
    if "leave out" in by_decision:
        parts.append(f"leave out {_list(by_decision['leave out'])}")
    if "keep apart" in by_decision:
        parts.append(f"do not merge {_list(by_decision['keep apart'])}")
    if "abstain" in by_decision:
        parts.append(
            f"it cannot tell for {_list(by_decision['abstain'])}{_more(advice)}"
        )
    if advice.spent:
        parts.append("the budget ended the search: the same command goes on")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _more(advice: Advice) -> str:
    """How many prompts would settle what is undecided."""
    undecided = [merge for merge in advice.merges if merge["verdict"] == "undecided"]
    wanted = max((merge["more_prompts"] for merge in undecided), default=0)
    if wanted > MANY:
        return (
            f" (answers kept lie close to the {advice.keep:.0%} asked: "
            "another --keep settles it)"
        )
    return f" ({wanted:.0f} more prompts of each would settle it)" if wanted else ""


def how_of(merge: dict) -> str:
    """A merge's rule, scale and weights in words."""
    words = look(merge["rule"])["label"]
    if merge["scale"] != 1:
        words += f" at scale {merge['scale']:g}"
    if merge["weights"]:
        words += (
            f" at weights {', '.join(f'{weight:g}' for weight in merge['weights'])}"
        )
    return words


def _list(names: Sequence[str]) -> str:
    if len(names) > NAMED:
        return f"{len(names)} models"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- the matrix ----------------------------------------------------------------------------------


def matrix(advice: Advice) -> list[list[dict | None]]:
    """Rows of cells, victims by partners in the order of the models; None where nothing is."""
    cells = {
        (row["victim"], row["partner"]): row for row in advice.cells.to_dict("records")
    }
    models = list(advice.sources)
    return [[cells.get((victim, partner)) for partner in models] for victim in models]


def matrix_text(advice: Advice) -> str:
    """The matrix in characters: retention in %, a column for each partner by its number."""
    width = max(map(len, advice.sources))
    head = "".join(f"{number:>5}" for number in range(1, len(advice.sources) + 1))
    lines = [f"{'':{width + 4}}{head}"]
    for number, (victim, row) in enumerate(
        zip(advice.sources, matrix(advice), strict=True), 1
    ):
        cells = "".join(map(_cell_text, row))
        lines.append(f"{number:>3} {victim:<{width}}{cells}")
    return "\n".join(lines)


def _cell_text(cell: dict | None) -> str:
    if cell is None:
        return "   · "
    return f"{100 * cell['kept']:4.0f}{cell['cause'][:1] or ' '}"


# --- three forms ---------------------------------------------------------------------------------


def text(advice: Advice) -> str:
    """The advice as it is printed: the sentence, the matrix, the commands, limits."""
    parts = [sentence(advice), ""]
    parts += ["Answers kept in pairs by LA (%), rows: whose, columns: beside whom"]
    parts += ["d: lost by its dose alone, p: lost to the partner", matrix_text(advice)]
    for merge in advice.merges:
        kept = [
            f"{row['model']} {row['kept']:.0%} [{row['least']:.0%}, "
            for row in merge["kept"]
        ]
        parts += [
            "",
            f"{merge['verdict']}: {' + '.join(merge['models'])} by {how_of(merge)}",
        ]
        parts += [
            "  " + "; ".join(f"{word}100%]" for word in kept),
            "  " + merge["command"],
        ]
    parts += [
        "",
        f"{len(advice.trials)} cells tried in {advice.minutes:.1f} minutes",
        "Limits",
    ]
    return "\n".join(parts + [f"- {limit}" for limit in advice.limits])


def content(advice: Advice) -> dict[str, Any]:
    """The advice as JSON holds it (advice.schema.json)."""
    out: dict[str, Any] = {"sentence": sentence(advice)}
    for name, value in advice._asdict().items():
        if isinstance(value, pd.DataFrame):
            value = json.loads(value.to_json(orient="records"))
        out[name] = value
    return _defined(out)


def _defined(value: Any) -> Any:
    """NaN, which JSON has not, as null."""
    if isinstance(value, dict):
        return {key: _defined(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def page(advice: Advice) -> str:
    """The advice as one HTML page, whole in itself."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("advice.html.j2").render(
        advice=advice,
        sentence=sentence(advice),
        matrix=matrix(advice),
        wide=len(advice.sources) <= WIDE,
        how=how_of,
        many=MANY,
        models=advice.models.to_dict("records"),
        pairs=advice.pairs.to_dict("records"),
        studies=advice.studies.to_dict("records"),
    )


def write_page(advice: Advice, file: Path) -> None:
    """The page as `file`, whole or not at all."""
    with atomic_write(file) as part:
        part.write_text(page(advice), encoding="utf-8")
