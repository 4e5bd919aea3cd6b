"""What is a task? Prompts, accepted answers and options, in disjoint seeded splits.

A task name is `source:name`: `bigbench:linguistic_mappings/plural_json` (embedded package),
`glue:mrpc` (hub id or local folder in the schema of nyu-mll/glue) or `sni:task1289_trec…`
(folder of Super-NaturalInstructions JSONL files, fields id, definition, input, output), or
`generated:vowels/doubled_vowels` (family and rule of `generators`).
"""

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from datasets import Dataset, DatasetDict, load_dataset

from helpers.study import assets, generators

SPLITS = ("test", "probe", "dev", "train")  # test is drawn first: more training moves no test
METRICS = ("exact_match", "rouge_l")
PROMPTS = ("instructed", "bare")
CATALOGUE = Path(__file__).parents[2] / "data" / "tasks.toml"

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


class Sizes(NamedTuple):
    """Examples in each split of a task."""

    train: int
    dev: int
    probe: int
    test: int


@dataclass(frozen=True)
class Task:
    """Splits are datasets with columns id, prompt, answers (first is trained on) and options.

    Tasks of one `family` are relatives. Every prompt begins with the line `instruction`; where that
    is empty, prompts are bare.
    """

    name: str
    metric: str
    splits: DatasetDict
    family: str = ""
    instruction: str = ""

    @property
    def label(self) -> str:
        """Short name for tables and figures."""
        return short(self.name)

    def digest(self, *splits: str) -> str:
        """sha256 of the metric and the rows of these splits (of all, if none is named)."""
        asked = tuple(sorted(splits or self.splits))
        if asked not in self._digests:
            chosen = {split: self.splits[split].to_list() for split in asked}
            text = json.dumps([self.metric, chosen], sort_keys=True, ensure_ascii=False)
            self._digests[asked] = hashlib.sha256(text.encode()).hexdigest()
        return self._digests[asked]

    @cached_property
    def _digests(self) -> dict[tuple[str, ...], str]:
        """Those that were asked for: every visit asks, and the splits stay as they are."""
        return {}


def short(name: str) -> str:
    """`bigbench:linguistic_mappings/plural_json` -> `plural`."""
    return name.split(":", 1)[-1].rsplit("/", 1)[-1].removesuffix("_json").removesuffix(".jsonl")


def catalogue() -> dict[str, dict]:
    """The study's candidate tasks: name -> family, instruction, kind, reason, perhaps a metric."""
    return tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))


def load_task(
    name: str,
    sizes: Sizes,
    seed: int = 0,
    sources: dict[str, str] | None = None,
    prompt: str = "instructed",
) -> Task:
    """The task's splits, disjoint by normalised input, drawn by a hash seeded with `seed`.

    `sources` says where `glue` (hub id or folder) and `sni` (folder) are to be read. A prompt is
    "instructed" (the task's line of instruction, then its own prompt) or "bare" (as the source has
    it); both hold the same examples under the same ids.
    The metric is the catalogue's, else ROUGE-L for free answers of Super-NaturalInstructions and
    exact match for all others. A task with fewer inputs than are asked for has a smaller train
    split. Raises ValueError for an unknown task or metric and for a task with too few distinct
    inputs for the other splits.
    """
    sources = sources or {}
    source, path = _known(name, sources)
    entry = catalogue().get(name, {})
    metric = entry.get("metric")
    instruction = _instruction(name, entry, prompt)
    if metric not in (None, *METRICS):
        raise ValueError(
            f"task {name} has metric {metric!r} in {CATALOGUE.name}: choose one of "
            f"{', '.join(METRICS)}"
        )
    pool, held_out = READERS[source](path, sources.get(source))
    if metric is None:
        free = source == "sni" and not any(row["options"] for row in pool)
        metric = "rouge_l" if free else "exact_match"
    splits = split(pool, held_out, Sizes(*sizes), seed, name, instruction)
    family = entry.get("family", path.split("/")[0])
    return Task(name, metric, splits, family, instruction)


def _instruction(name: str, entry: dict, prompt: str) -> str:
    """The line that says which task it is; none for bare prompts.

    Prompts of Super-NaturalInstructions and GLUE say it themselves.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"prompt {prompt!r} is unknown: choose one of {', '.join(PROMPTS)}")
    if prompt == "bare" or name.startswith(("sni:", "glue:")):
        return ""
    if not entry.get("instruction"):
        raise ValueError(
            f"task {name} has no instruction in data/{CATALOGUE.name}: write one line there, or "
            'ask for bare prompts (PROMPT = "bare")'
        )
    return entry["instruction"]


def load_tasks(names: Iterable[str], **settings) -> dict[str, Task]:
    """Several tasks by their labels, in this order; `settings` are those of `load_task`.

    Raises ValueError, before any is read, for the names that `check_names` refuses.
    """
    names = list(names)
    check_names(names, settings.get("sources"))
    archived = _archived(names)
    if archived:
        assets.bigbench_files(archived)  # in one pass over the archive
    return {short(name): load_task(name, **settings) for name in names}


def check_names(names: Iterable[str], sources: dict[str, str] | None = None) -> None:
    """Raise ValueError for a task that cannot be had, and for two of one label.

    Reads nothing of the tasks. BIG-bench's own list is asked (and its archive fetched, if it never
    was) only for names that are not in the catalogue.
    """
    labels: dict[str, str] = {}
    for name in names:
        if short(name) in labels:
            raise ValueError(
                f"tasks {labels[short(name)]} and {name} are both called {short(name)!r} in tables "
                "and figures: choose one of them"
            )
        _known(name, sources or {})
        labels[short(name)] = name
    listed = catalogue()
    strange = _archived(name for name in labels.values() if name not in listed)
    if strange:
        assets.bigbench_files(strange)


def _known(name: str, sources: dict[str, str]) -> tuple[str, str]:
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
        raise ValueError(f"unknown generated task {name!r}: choose one of {', '.join(names)}")
    if source == "sni" and not (file := _sni_file(path, sources.get("sni"))).is_file():
        raise ValueError(
            f"task file {file.name} is not in {file.parent}: name the folder that holds it"
        )
    return source, path


def _archived(names: Iterable[str]) -> list[str]:
    """Names in the BIG-bench archive of those tasks that come from it."""
    return [name.split(":", 1)[1] for name in names if name.startswith("bigbench:")]


def split(
    pool: list[dict],
    held_out: list[dict] | None,
    sizes: Sizes,
    seed: int,
    name: str,
    instruction: str = "",
) -> DatasetDict:
    """Rows (prompt, answers, options) in four splits, none sharing a normalised prompt.

    The order is that of sha256(seed, normalised prompt), so a row keeps its place when rows are
    added. Test rows come from `held_out` where the source has such a split; train is what is left,
    up to its size. An instruction stands before every prompt, and moves no row to another split.
    """
    line = f"{instruction}\n" if instruction else ""
    rest = shuffled(pool, seed)
    chosen = {}
    if held_out is not None:
        chosen["test"] = shuffled(held_out, seed)[: sizes.test]
        taken = {row["id"] for row in chosen["test"]}
        rest = [row for row in rest if row["id"] not in taken]
    for part in SPLITS:
        if part not in chosen:
            wanted = getattr(sizes, part)
            chosen[part], rest = rest[:wanted], rest[wanted:]
    for part, rows in chosen.items():
        wanted = getattr(sizes, part) if part != "train" else min(sizes.train, 1)
        if len(rows) < wanted:
            raise ValueError(
                f"task {name} has only {len(rows)} of the {getattr(sizes, part)} different inputs "
                f"asked for its {part} split: ask for fewer examples"
            )
        chosen[part] = [row | {"prompt": line + row["prompt"]} for row in rows]
    return DatasetDict({part: Dataset.from_list(chosen[part]) for part in sorted(chosen)})


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    """Rows with an id each, one per normalised prompt, in the order of a seeded hash."""

    def rank(text: str, salt: str) -> str:
        return hashlib.sha256(f"{salt}|{text}".encode()).hexdigest()

    unique = {}
    for row in rows:
        normalised = normal(row["prompt"])
        unique.setdefault(normalised, row | {"id": rank(normalised, "id")[:12]})
    return [unique[text] for text in sorted(unique, key=lambda text: rank(text, str(seed)))]


def normal(prompt: str) -> str:
    """A prompt as it counts: case and white space make no difference."""
    return " ".join(prompt.casefold().split())


def collisions(tasks: Mapping[str, Task]) -> pd.DataFrame:
    """Pairs of tasks with prompts that both have and that no answer serves in both.

    A row for each pair that has any: task_a, task_b; shared, number of prompts that both have;
    contradictory, how many of these have no common accepted answer; share, contradictory prompts
    among all prompts of the smaller task. No model can do both tasks there: the loss of such a pair
    is ambiguity, not incompatibility.
    """
    answers = {label: _answers(task) for label, task in tasks.items()}
    rows = []
    for a, b in combinations(answers, 2):
        shared = answers[a].keys() & answers[b].keys()
        contradictory = sum(answers[a][x].isdisjoint(answers[b][x]) for x in shared)
        if contradictory:
            smaller = min(len(answers[a]), len(answers[b]))
            rows.append((a, b, len(shared), contradictory, contradictory / smaller))
    columns = ["task_a", "task_b", "shared", "contradictory", "share"]
    return pd.DataFrame(rows, columns=columns)


def _answers(task: Task) -> dict[str, set[str]]:
    """The accepted answers to each normalised prompt, of all splits."""
    return {
        normal(row["prompt"]): set(row["answers"])
        for split in task.splits.values()
        for row in split
    }


SHOT_END = "\n"  # closes the answers of solved examples, and so an answer of the base model


def few_shot(task: Task, split: str, shots: int = 4) -> Dataset:
    """The examples of a split, each behind the same `shots` solved training examples.

    A base model that was never taught the format learns it here; score it with `end=SHOT_END`. The
    instruction stands once, before the shots. Options are left out: behind long prompts each would
    cost as much as the answer.
    """
    line = f"{task.instruction}\n" if task.instruction else ""
    shown = line
    for row in task.splits["train"].take(shots):
        solved = row["prompt"].removeprefix(line) + " " + row["answers"][0]
        shown += solved + 2 * SHOT_END
    rows = [
        row | {"prompt": shown + row["prompt"].removeprefix(line), "options": []}
        for row in task.splits[split]
    ]
    return Dataset.from_list(rows)


def label_set(rows: Iterable[dict]) -> list[str]:
    """The labels of a classification task, sorted; ValueError if the rows do not share them."""
    sets = {tuple(sorted(row["options"])) for row in rows}
    if len(sets) != 1 or sets == {()}:
        raise ValueError(
            "an encoder needs a task with options, the same for every example: its head has one "
            "output for each"
        )
    return list(sets.pop())


# --- sources ---------------------------------------------------------------------------------


def read_bigbench(path: str, source: str | None) -> tuple[list[dict], None]:
    """BIG-bench JSON with the benchmark's own zero-shot prompt, without the listed choices.

    The best-scored targets count; examples without any answer are left out.
    """
    task = json.loads(assets.bigbench_json(path).read_text(encoding="utf-8"))
    before = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ")
    after = task.get("example_output_prefix", "\nA: ")
    rows = []
    for example in task["examples"]:
        scores = example.get("target_scores") or {}
        found = example.get("target") or [o for o in scores if scores[o] == max(scores.values())]
        answers = [str(a).strip() for a in ([found] if isinstance(found, str) else found)]
        if not any(answers):
            continue
        rows.append(
            {
                "prompt": (before + example["input"] + after).strip(),
                "answers": answers,
                "options": sorted(o.strip() for o in scores) if "target" not in example else [],
            }
        )
    return rows, None


def read_glue(path: str, source: str | None) -> tuple[list[dict], list[dict]]:
    """A GLUE task; its validation split is held out for testing (the test labels are hidden)."""
    fields, labels = GLUE[path]
    data = load_dataset(source or "nyu-mll/glue", path)
    ask = f" {labels[0]} or {labels[1]}?" if len(labels) == 2 else f" {', '.join(labels)}?"

    def rows(split: str) -> list[dict]:
        return [
            {
                "prompt": "\n".join(
                    f"{field.rstrip('12').capitalize()}: {row[field].strip()}" for field in fields
                )
                + f"\nQuestion:{ask}\nAnswer:",
                "answers": [labels[row["label"]]],
                "options": list(labels),
            }
            for row in data[split]
        ]

    return rows("train"), rows("validation_matched" if path == "mnli" else "validation")


def read_sni(path: str, source: str | None) -> tuple[list[dict], None]:
    """A Super-NaturalInstructions task: definition, input, output(s); any listed output counts."""
    file = _sni_file(path, source)
    raw = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    answers = [
        [o.strip() for o in ([r["output"]] if isinstance(r["output"], str) else r["output"])]
        for r in raw
    ]
    # A small closed set of single answers is a classification; anything else is free text.
    labels = sorted({a for accepted in answers for a in accepted})
    options = labels if len(labels) <= 10 and len(labels) * 10 <= len(raw) else []
    return [
        {
            "prompt": f"{row['definition'].strip()}\n\nInput: {row['input'].strip()}\nOutput:",
            "answers": accepted,
            "options": options,
        }
        for row, accepted in zip(raw, answers, strict=True)
    ], None


def _sni_file(path: str, source: str | None) -> Path:
    return Path(source or ".") / f"{path.removesuffix('.jsonl')}.jsonl"


def read_generated(path: str, source: str | None) -> tuple[list[dict], None]:
    """A generated task: as many examples as any study asks for."""
    return generators.examples(short(path)), None


READERS = {
    "bigbench": read_bigbench,
    "glue": read_glue,
    "sni": read_sni,
    "generated": read_generated,
}
