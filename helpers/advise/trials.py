"""What does a merge keep? Trial merges in memory, read on prompts that need no labels.

Each model answers its own prompts: its answers are the reference. A trial merge is made a tensor at
a time, reads the same prompts, and is scored for each of its models by
    kept  1 where greedy decoding of the merge gives the model's own answer, else 0
    rise  NLL per token of that answer under the merge less under the model, nats
Every trial is remembered in the store: a killed search goes on, a second call is instant.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from helpers import store
from helpers.advise import answers
from helpers.advise.merges import Merge, alone
from helpers.advise.panel import Panel, panel_of
from helpers.merge import applied as merged
from helpers.merge import merge_tensors, plan, summary
from helpers.study.bench import Bench
from helpers.study.executor import call_each

VERSION = 2  # raised by hand whenever a trial records something else
TRIED = ["prompt", "kept", "rise", "confidence", "cpu_seconds"]


@contextmanager
def applied(panel: Panel, merge: Merge) -> Iterator[list[float]]:
    """The live base as the merge; yields each model's dose, <change, tau> / ||tau||^2.

    One tensor's change is held at a time beside base and merge. Afterwards the base is back bit for
    bit.
    """
    chosen = plan(merge.rule, merge.models, merge.weights, scale=merge.scale)
    records = []

    def changes() -> Iterator[tuple[str, Tensor]]:
        for row, change, record in merge_tensors(panel.of(merge.models), chosen):
            records.append(record)
            yield row.name, change

    with merged(panel.model, changes()):
        yield [dose or 0.0 for dose in summary(chosen, records).own]


def references(panel: Panel, label: str) -> pd.DataFrame:
    """A model's own answers to its prompts.

    Columns answer (token ids, or [label]), nll (nats a token), confidence (the model's probability
    of the whole answer).
    """

    def compute(folder: Path) -> None:
        prompts = panel.inputs[label]
        with applied(panel, alone(label, 1.0)):
            own = answers.answer(panel, label, prompts)
            scored = answers.score(panel, label, prompts, own)
        rows = {"answer": own, "nll": scored["nll"].tolist()}
        (folder / "answers.json").write_text(json.dumps(rows), encoding="utf-8")

    folder = store.cached("answers", VERSION, _determinants(panel, label), compute)
    rows = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    own = pd.DataFrame(rows)
    own["confidence"] = np.exp(-own["nll"] * own["answer"].map(len))
    return own


def trial(panel: Panel, merge: Merge, parts: Mapping[str, slice] = {}) -> pd.DataFrame:
    """The merge on each of its models' prompts.

    Columns model, prompt (its number), kept, rise, confidence (`references`), dose (how far the
    merge goes along the model's own task vector), cpu_seconds (the model's share of the merge, and
    its reading). parts: which prompts of each model; all of a model that is not named.
    """
    read = {}
    for model in merge.models:
        prompts = range(len(panel.inputs[model]))
        read[model] = list(prompts[parts.get(model, slice(None))])

    def compute(folder: Path) -> None:
        own = {model: references(panel, model) for model in merge.models}
        started = time.process_time()
        frames = []
        with applied(panel, merge) as doses:
            merging = (time.process_time() - started) / len(doses)
            for place, model in enumerate(merge.models):
                frame = _held(panel, model, own[model].iloc[read[model]])
                frame["cpu_seconds"] += merging
                frames.append(frame.assign(place=place, dose=doses[place]))
        pd.concat(frames).to_csv(folder / "trial.csv", index=False)

    what = merge._asdict()
    what["models"] = [_determinants(panel, model) for model in merge.models]
    what["read"] = list(read.values())
    folder = store.cached("trial", VERSION, what, compute)
    table = pd.read_csv(folder / "trial.csv")
    table["model"] = [merge.models[place] for place in table["place"]]
    return table[["model", *TRIED, "dose"]]


def try_pairs(
    bench: Bench,
    pairs: Sequence[tuple[str, str]],
    rules: Sequence[str],
    pool: Executor | None = None,
) -> pd.DataFrame:
    """Trials of pairs of a study's specialists on prompts of their tasks.

    A row for each rule, pair (tasks), task and prompt. `pool`: who does the work
    (`study.executor`).
    """
    merges = [Merge(pair, rule) for rule in rules for pair in pairs]
    call_each(bench, _fill, [(merge,) for merge in merges], pool, "trial merges")
    panel = panel_of(bench)
    frames = []
    for merge in merges:
        table = trial(panel, merge)
        frames.append(table.assign(rule=merge.rule, tasks=[merge.models] * len(table)))
    table = pd.concat(frames, ignore_index=True).rename(columns={"model": "task"})
    return table[["rule", "tasks", "task", *TRIED]]


def _fill(bench: Bench, merge: Merge) -> None:
    """Make a trial where it is not in the store; a worker sends nothing back."""
    members = {label: bench.specialists[label] for label in merge.models}
    tasks = {label: bench.tasks[label] for label in merge.models}
    trial(panel_of(replace(bench, specialists=members, tasks=tasks)), merge)


def _held(panel: Panel, label: str, own: pd.DataFrame) -> pd.DataFrame:
    """The live model held to a model's own answers: columns TRIED."""
    started = time.process_time()
    prompts = [panel.inputs[label][i] for i in own.index]
    scored = answers.score(panel, label, prompts, own["answer"].tolist())
    frame = pd.DataFrame({"prompt": own.index, "kept": scored["kept"]})
    frame["rise"] = scored["nll"] - own["nll"].to_numpy()
    frame["confidence"] = own["confidence"].to_numpy()
    frame["cpu_seconds"] = time.process_time() - started
    return frame


def _determinants(panel: Panel, label: str) -> dict:
    """What a model's answers depend on."""
    return {
        "base": panel.base,
        "model": panel.contents[label],
        "prompts": store.digest(panel.inputs[label]),
        "tokens": panel.tokens,
        "dtype": str(panel.model.dtype),
    }
