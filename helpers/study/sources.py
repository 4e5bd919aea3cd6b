"""Where do a task's examples come from? Readers of each source, and the names that it knows.

A reader takes a task's name within its source and, for GLUE and Super-NaturalInstructions, where
that source is to be read. It gives a pool of rows (prompt, answers, options), and held-out rows or
None.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset

from helpers.store import ROOT
from helpers.study import archives, generators

CATALOGUE = ROOT / "data" / "tasks.toml"
# of a Super-NaturalInstructions task that is taken for a classification …
MOST_LABELS = 10
FEWEST_EACH = 10  # … with so many examples to a label, in the mean
Rows = list[dict[str, Any]]


# --- names -----------------------------------------------------------------------------------


def short(name: str) -> str:
    """`bigbench:linguistic_mappings/plural_json` -> `plural`."""
    return (
        name.split(":", 1)[-1]
        .rsplit("/", 1)[-1]
        .removesuffix("_json")
        .removesuffix(".jsonl")
    )


def catalogue() -> dict[str, dict]:
    """The study's candidate tasks: name -> family, instruction, kind, reason, perhaps a metric."""
    return tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))


def known(name: str, sources: Mapping[str, str]) -> tuple[str, str]:
    """Source and name within it of a task; ValueError for one that the source cannot have."""
    source, _, path = name.partition(":")
    if source not in READERS or not path:
        raise ValueError(
            f"unknown task {name!r}: a task is source:name with source one of {', '.join(READERS)}"
        )
    if source == "glue" and path not in GLUE:
        raise ValueError(f"unknown GLUE task {path!r}: choose one of {', '.join(GLUE)}")
    if source == "generated" and name not in catalogue():
        names = (x for x in catalogue() if x.startswith("generated:"))
        raise ValueError(
            f"unknown generated task {name!r}: choose one of {', '.join(names)}"
        )
    if source == "sni":
        _check_sni(path, sources.get("sni"))
    return source, path


def archived(names: Iterable[str]) -> list[str]:
    """Names in the BIG-bench archive of those tasks that come from it."""
    return [name.split(":", 1)[1] for name in names if name.startswith("bigbench:")]


# --- BIG-bench -------------------------------------------------------------------------------


def read_bigbench(path: str, source: str | None) -> tuple[Rows, None]:
    """BIG-bench JSON with the benchmark's own zero-shot prompt, without the listed choices.

    The best-scored targets count; examples without any answer are left out.
    """
    text = archives.bigbench_files([path])[0].read_text(encoding="utf-8")
    task = json.loads(text)
    before = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ")
    after = task.get("example_output_prefix", "\nA: ")
    rows = []
    for example in task["examples"]:
        options = example.get("target_scores") or {}
        answers = _targets(example, options)
        if not any(answers):
            continue
        prompt = before + example["input"] + after
        chosen_from = {} if "target" in example else options
        rows.append(
            {
                "prompt": prompt.strip(),
                "answers": answers,
                "options": sorted(option.strip() for option in chosen_from),
            }
        )
    return rows, None


def _targets(example: Mapping[str, Any], options: Mapping[str, float]) -> list[str]:
    """The accepted answers of a BIG-bench example: its target(s), else its best-scored options."""
    target = example.get("target")
    if not target:
        best = max(options.values(), default=None)
        target = [option for option in options if options[option] == best]
    several = [target] if isinstance(target, str) else target
    return [str(answer).strip() for answer in several]


# --- GLUE ------------------------------------------------------------------------------------

# What the sentences of each GLUE task are called, and its labels in words, by label number.
GLUE = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (("sentence1", "sentence2"), ("different", "equivalent")),
    "qqp": (("question1", "question2"), ("different", "duplicate")),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": (("question", "sentence"), ("answered", "unanswered")),
    "rte": (("sentence1", "sentence2"), ("entailment", "unrelated")),
    "wnli": (("sentence1", "sentence2"), ("no", "yes")),
}


def read_glue(path: str, source: str | None) -> tuple[Rows, Rows]:
    """A GLUE task; its validation split is held out for testing (the test labels are hidden)."""
    data = load_dataset(source or "nyu-mll/glue", path)
    held_out = "validation_matched" if path == "mnli" else "validation"
    return _glue_rows(path, data["train"]), _glue_rows(path, data[held_out])


def _glue_rows(path: str, examples: Iterable[Mapping[str, Any]]) -> Rows:
    """Each field on a line, then the labels to choose from."""
    fields, labels = GLUE[path]
    choice = " or ".join(labels) if len(labels) == 2 else ", ".join(labels)
    rows = []
    for example in examples:
        lines = []
        for field in fields:
            name = field.rstrip("12").capitalize()
            lines.append(f"{name}: {example[field].strip()}")
        lines += [f"Question: {choice}?", "Answer:"]
        rows.append(
            {
                "prompt": "\n".join(lines),
                "answers": [labels[example["label"]]],
                "options": list(labels),
            }
        )
    return rows


# --- Super-NaturalInstructions ---------------------------------------------------------------


def sni_file(path: str, source: str | None) -> Path:
    return Path(source or ".") / f"{path.removesuffix('.jsonl')}.jsonl"


def _check_sni(path: str, source: str | None) -> None:
    """Raise ValueError for a task that a folder does not hold; a hub's is asked when it is read."""
    file = sni_file(path, source)
    folder = file.with_suffix("")
    elsewhere = source and not file.parent.exists()
    if not (file.is_file() or folder.is_dir() or elsewhere):
        raise ValueError(
            f"task file {file.name} is not in {file.parent}: name the folder that holds it"
        )


def read_sni(path: str, source: str | None) -> tuple[Rows, Rows | None]:
    """A Super-NaturalInstructions task; any listed output counts.

    Either a file of `source` (definition, input, output), or a data set of it with train and test
    splits whose inputs are whole prompts (a folder, or a collection of the hub as Lots-of-LoRAs).
    """
    file = sni_file(path, source)
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        pool = [_sni_row(json.loads(line)) for line in text.splitlines() if line]
        options = _closed_set(pool)
        return [row | {"options": options} for row in pool], None
    try:
        data = load_dataset(f"{source}/{path}")
    except OSError as error:
        raise ValueError(
            f"cannot fetch the task {source}/{path} from the hub: {error}"
        ) from error
    pool, held_out = ([_sni_row(x) for x in data[part]] for part in ("train", "test"))
    options = _closed_set(pool + held_out)
    pool, held_out = (
        [row | {"options": options} for row in rows] for rows in (pool, held_out)
    )
    return pool, held_out


def _sni_row(example: Mapping[str, Any]) -> dict[str, Any]:
    output = example["output"]
    several = [output] if isinstance(output, str) else output
    prompt = example["input"].strip()
    if "definition" in example:
        prompt = f"{example['definition'].strip()}\n\nInput: {prompt}\nOutput:"
    return {"prompt": prompt, "answers": [answer.strip() for answer in several]}


def _closed_set(rows: Rows) -> list[str]:
    """The labels of a classification: a small set of answers; none where answers are free text."""
    labels = {answer for row in rows for answer in row["answers"]}
    few = len(labels) <= MOST_LABELS and len(labels) * FEWEST_EACH <= len(rows)
    return sorted(labels) if few else []


# --- generated -------------------------------------------------------------------------------


def read_generated(path: str, source: str | None) -> tuple[Rows, None]:
    """A generated task: as many examples as any study asks for."""
    return generators.examples(short(path)), None


READERS = {
    "bigbench": read_bigbench,
    "glue": read_glue,
    "sni": read_sni,
    "generated": read_generated,
}
