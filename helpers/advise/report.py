"""Advice as text, as JSON (advice.schema.json) and as a page (advice.html.j2); the command."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from helpers.advise import inputs
from helpers.advise.advice import Advice, advise, check
from helpers.figures import look
from helpers.store import atomic_write

ABSTAINED = 3  # exit code where it abstains on every model
NAMED = 6  # models that a sentence names; of more it says how many
WIDE = 8  # models up to which a cell has room for its interval
HERE = Path(__file__).parent


def sentence(advice: Advice) -> str:
    """The decision in one sentence."""
    parts = []
    for merge in advice.merges:
        if merge["verdict"] == "safe":
            least = min(row["least"] for row in merge["kept"])
            how = f"by {how_of(merge)}"
            parts.append(f"merge {_list(merge['models'])} {how}: each keeps at least {least:.0%}")
    by_decision = advice.models.groupby("decision")["model"].agg(list)
    if "leave out" in by_decision:
        parts.append(f"leave out {_list(by_decision['leave out'])}")
    if "keep apart" in by_decision:
        parts.append(f"keep {_list(by_decision['keep apart'])} apart")
    if "abstain" in by_decision:
        parts.append(f"it cannot tell for {_list(by_decision['abstain'])}{_more(advice)}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _more(advice: Advice) -> str:
    """How many prompts would settle what is undecided."""
    wanted = [merge["more_prompts"] for merge in advice.merges if merge["verdict"] == "undecided"]
    return f" ({max(wanted):.0f} more prompts of each would settle it)" if wanted else ""


def how_of(merge: dict) -> str:
    """A merge's rule, scale and weights in words."""
    words = look(merge["rule"])["label"]
    if merge["scale"] != 1:
        words += f" at scale {merge['scale']:g}"
    if merge["weights"]:
        words += f" at weights {', '.join(f'{weight:g}' for weight in merge['weights'])}"
    return words


def _list(names: list[str]) -> str:
    if len(names) > NAMED:
        return f"{len(names)} models"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- the matrix ----------------------------------------------------------------------------------


def matrix(advice: Advice) -> list[list[dict | None]]:
    """Rows of cells, victims by partners in the order of the models; None where nothing is."""
    cells = {(row["victim"], row["partner"]): row for row in advice.cells.to_dict("records")}
    rows = []
    for victim in advice.sources:
        row = []
        for partner in advice.sources:
            row.append(cells.get((victim, partner)))
        rows.append(row)
    return rows


def matrix_text(advice: Advice) -> str:
    """The matrix in characters: retention in %, a column for each partner by its number."""
    width = max(map(len, advice.sources))
    head = "".join(f"{number:>5}" for number in range(1, len(advice.sources) + 1))
    lines = [f"{'':{width + 4}}{head}"]
    for number, (victim, row) in enumerate(zip(advice.sources, matrix(advice), strict=True), 1):
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
        kept = [f"{row['model']} {row['kept']:.0%} [{row['least']:.0%}, " for row in merge["kept"]]
        parts += ["", f"{merge['verdict']}: {' + '.join(merge['models'])} by {how_of(merge)}"]
        parts += ["  " + "; ".join(f"{word}100%]" for word in kept), "  " + merge["command"]]
    parts += ["", f"{len(advice.trials)} cells tried in {advice.minutes:.1f} minutes", "Limits"]
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
    template = environment.get_template("advice.html.j2")
    tables = {
        "models": advice.models,
        "explained": advice.explained,
        "studies": advice.studies,
    }
    records = {name: table.to_dict("records") for name, table in tables.items()}
    return template.render(
        advice=advice,
        sentence=sentence(advice),
        matrix=matrix(advice),
        wide=len(advice.sources) <= WIDE,
        how=how_of,
        **records,
    )


def write_page(advice: Advice, file: Path) -> None:
    """The page as `file`, whole or not at all."""
    with atomic_write(file) as part:
        part.write_text(page(advice), encoding="utf-8")


# --- the command ---------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The flags of `python -m helpers advise`."""
    flags = argparse.ArgumentParser(
        prog="python -m helpers advise",
        description="Say which models of one base to merge, by trial merges on prompts "
        "without labels. Exit code 3: it abstains on every model.",
    )
    add = flags.add_argument
    add("--base", required=True, help="the base model: a name or a folder")
    add("--models", nargs="+", required=True, help="two or more adapters or checkpoints of it")
    add(
        "--prompts",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="a file for each model, in order: .txt, a prompt a line, or .jsonl (prompt, text or "
        "messages); 64 prompts are a good number; default: neutral sentences",
    )
    add("--keep", type=float, default=0.9, help="share of its answers that each model must keep")
    add("--budget", type=float, default=10, metavar="MINUTES", help="of search")
    add("--tokens", type=int, default=32, help="of an answer that count")
    add("--report", type=Path, metavar="OUT.html", help="write the page, too")
    add("--json", action="store_true", help="print JSON instead of text")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 or mps")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return flags


def main(argv: list[str]) -> int:
    """Parse, advise, print; the exit code. ValueError if it cannot."""
    given = parser().parse_args(argv)
    check(given.keep, given.budget)
    if given.report is not None:
        given.report = given.report.expanduser()
        _check_report(given.report)
    models = dict(zip(inputs.labels_of(given.models), given.models, strict=True))
    prompts = inputs.prompts_of(list(models), given.prompts)
    advice = advise(
        given.base,
        models,
        prompts,
        given.keep,
        given.budget,
        _notes(given.prompts),
        device=given.device,
        dtype=given.dtype,
        tokens=given.tokens,
    )
    if given.json:
        print(json.dumps(content(advice), indent=1, ensure_ascii=False))
    else:
        print(text(advice))
    if given.report is not None:
        write_page(advice, given.report)
        print(f"written: {given.report}", file=sys.stderr)
    return ABSTAINED if advice.models["decision"].eq("abstain").all() else 0


def _notes(files: Sequence[Path]) -> list[str]:
    """What has to be said of prompts that are no model's own."""
    if not files:
        return [
            "no prompts were given: models were tried on neutral sentences, which are not their "
            "tasks; give each model's own prompts before you rely on this"
        ]
    if len(files) == 1:
        return ["all models were tried on one file of prompts: give each model its own"]
    return []


def _check_report(file: Path) -> None:
    """Raise ValueError for a report that could not be written, before any work."""
    if file.suffix.lower() != ".html":
        raise ValueError(f"{file} must end in .html")
    if file.is_dir():
        raise ValueError(f"{file} is a folder: name a file for the report")
    try:
        with atomic_write(file.with_name(f".try-{file.name}")) as part:
            part.touch()
        file.with_name(f".try-{file.name}").unlink()
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({error.strerror})") from error
