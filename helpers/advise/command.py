"""The command `python -m helpers advise`: flags, refusals, exit code."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.advise import report
from helpers.advise.advice import advise
from helpers.advise.panel import TOKENS, labels_of
from helpers.advise.prompts import prompts_of
from helpers.store import atomic_write

ABSTAINED = 3  # exit code where it abstains on every model


def parser() -> argparse.ArgumentParser:
    """The flags of `python -m helpers advise`."""
    flags = argparse.ArgumentParser(
        prog="python -m helpers advise",
        description="Say which models of one base to merge, by trial merges on prompts "
        "without labels. Exit code 3: it abstains on every model.",
    )
    add = flags.add_argument
    add("--base", required=True, help="the base model: a name or a folder")
    add(
        "--models",
        nargs="+",
        required=True,
        help="two or more adapters or checkpoints of it",
    )
    add(
        "--prompts",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="a file for each model, in order: .txt, a prompt a line, or .jsonl (prompt, text or "
        "messages); 64 prompts are a good number; default: neutral sentences",
    )
    add(
        "--keep",
        type=float,
        default=0.9,
        help="share of its answers that each model must keep",
    )
    add("--budget", type=float, default=10, metavar="MINUTES", help="of search")
    add("--tokens", type=int, default=TOKENS, help="of an answer that count")
    add("--report", type=Path, metavar="OUT.html", help="write the page, too")
    add("--json", action="store_true", help="print JSON instead of text")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 or mps")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return flags


def main(argv: list[str]) -> int:
    """Parse, advise, print; the exit code. ValueError if it cannot."""
    given = parser().parse_args(argv)
    if given.report is not None:
        given.report = given.report.expanduser()
        _check_report(given.report)
    models = dict(zip(labels_of(given.models), given.models, strict=True))
    prompts = prompts_of(list(models), given.prompts)
    settings = {"device": given.device, "dtype": given.dtype, "tokens": given.tokens}
    notes = _notes(given.prompts)
    advice = advise(
        given.base, models, prompts, given.keep, given.budget, notes, **settings
    )
    if given.json:
        print(json.dumps(report.content(advice), indent=1, ensure_ascii=False))
    else:
        print(report.text(advice))
    if given.report is not None:
        report.write_page(advice, given.report)
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
