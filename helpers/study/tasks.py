"""What is a task? Prompts, accepted answers and options, in disjoint seeded splits.

A task name is `source:name`: `bigbench:linguistic_mappings/plural_json` (embedded package),
`glue:mrpc` (hub id or local folder in the schema of nyu-mll/glue) or `sni:task1289_trec…`
(folder of Super-NaturalInstructions JSONL files, fields id, definition, input, output), or
`generated:vowels/doubled_vowels` (family and rule of `generators`).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import pandas as pd
from datasets import Dataset, DatasetDict

from helpers.study import archives
from helpers.study.sources import CATALOGUE, READERS, archived, catalogue, known, short

# test is drawn first: more training moves no test
SPLITS = ("test", "probe", "dev", "train")
METRICS = ("exact_match", "rouge_l")
PROMPTS = ("instructed", "bare")


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
    source, path = known(name, sources)
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
        raise ValueError(
            f"prompt {prompt!r} is unknown: choose one of {', '.join(PROMPTS)}"
        )
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
    packed = archived(names)
    if packed:
        archives.bigbench_files(packed)  # in one pass over the archive
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
        known(name, sources or {})
        labels[short(name)] = name
    listed = catalogue()
    strange = archived(name for name in labels.values() if name not in listed)
    if strange:
        archives.bigbench_files(strange)


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
    return DatasetDict(
        {part: Dataset.from_list(chosen[part]) for part in sorted(chosen)}
    )


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    """Rows with an id each, one per normalised prompt, in the order of a seeded hash."""

    def rank(text: str, salt: str) -> str:
        return hashlib.sha256(f"{salt}|{text}".encode()).hexdigest()

    unique = {}
    for row in rows:
        normalised = normal(row["prompt"])
        unique.setdefault(normalised, row | {"id": rank(normalised, "id")[:12]})
    return [
        unique[text] for text in sorted(unique, key=lambda text: rank(text, str(seed)))
    ]


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
    answers = {}
    for label, task in tasks.items():
        examples = [row for split in task.splits.values() for row in split]
        answers[label] = {
            normal(row["prompt"]): set(row["answers"]) for row in examples
        }
    rows = []
    for a, b in combinations(answers, 2):
        shared = answers[a].keys() & answers[b].keys()
        contradictory = sum(answers[a][x].isdisjoint(answers[b][x]) for x in shared)
        if contradictory:
            smaller = min(len(answers[a]), len(answers[b]))
            rows.append((a, b, len(shared), contradictory, contradictory / smaller))
    columns = ["task_a", "task_b", "shared", "contradictory", "share"]
    return pd.DataFrame(rows, columns=columns)


# closes the answers of solved examples, and so an answer of the base model
SHOT_END = "\n"


def few_shot(task: Task, split: str, shots: int) -> Dataset:
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
