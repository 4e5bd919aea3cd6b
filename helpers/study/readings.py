"""What is read of a model: scores and states of the live base, recorded as those of a row."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import merge, store
from helpers.states import prompt_states
from helpers.states.batch import encode_input, encode_prompt
from helpers.study import scores, specialists
from helpers.study.bench import Bench, with_head
from helpers.study.identity import Entry
from helpers.study.plan import SHOTS, Row
from helpers.study.probe import linear_probe
from helpers.study.tasks import SHOT_END, Task, few_shot, label_set

Delta = Mapping[str, Tensor]

# an answer may hold any character, which CSV would not give back
EXAMPLES = "examples.parquet"


def read_all(
    bench: Bench, row: Row, make: Callable[[], Delta], twin: Row | None = None
) -> None:
    """Scores and states of a row's model; copies of its twin's where that has them."""
    wanted = [bench.identity.score_entry(row, x) for x in row.scored]
    wanted += [bench.identity.state_entry(row, x) for x in row.probed]
    if twin is not None:
        for entry in wanted:
            _copy(entry, bench.identity.model_key(twin))
    read = all(store.finished(*entry) for entry in wanted)
    with nullcontext() if read else merge.applied(bench.model, make()):
        for x in row.scored:
            score(bench, row, x)
        for x in row.probed:
            states(bench, row, x)


def _copy(entry: Entry, twin: str) -> None:
    """Give an entry the files of its twin's, a model's key, if the store holds those alone."""
    step, version, what = entry
    other = what | {"model": twin}
    if store.finished(step, version, other):
        source = store.place(step, version, other)
        seal = shutil.ignore_patterns(store.SEAL)

        def compute(folder: Path) -> None:
            shutil.copytree(source, folder, ignore=seal, dirs_exist_ok=True)

        store.cached(step, version, what, compute)


def machine(bench: Bench) -> dict:
    return specialists.machine(bench.model) | {"batch_size": bench.batch_size}


def score(bench: Bench, row: Row, label: str) -> None:
    """Record scores of the live model on the examples of one task as those of the row."""

    def compute(folder: Path) -> None:
        task = bench.tasks[label]
        if not bench.encoder:
            frame = _answered(bench, row, task)
        elif row.kind in ("base", "ability"):
            frame = _probe_scores(bench, task, row.split)
        else:
            about = bench.model, bench.tokenizer, task.splits[row.split]
            with with_head(bench.model, bench.specialists[label]) as labels:
                frame = scores.classify(*about, labels, bench.batch_size)
        frame.to_parquet(folder / EXAMPLES, index=False)

    store.cached(*bench.identity.score_entry(row, label), compute, machine(bench))


def read_examples(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / EXAMPLES)


def _answered(bench: Bench, row: Row, task: Task) -> pd.DataFrame:
    """Scores of what a model writes; the untaught base is shown solved examples first.

    A decoder goes on behind them, and ends as they do; an encoder-decoder has its own end.
    """
    shots = row.options.get("shots", 0)
    rows = few_shot(task, row.split, shots) if shots else task.splits[row.split]
    goes_on = shots and not bench.model.config.is_encoder_decoder
    end = SHOT_END if goes_on else None
    about = bench.model, bench.tokenizer, rows, task.metric, bench.batch_size, end
    return scores.score(*about, texts=row.split == "test" and not shots)


def _probe_scores(bench: Bench, task: Task, split: str) -> pd.DataFrame:
    """Scores of a linear probe on the live encoder's last states, fitted to a few examples."""
    labels = label_set(task.splits["train"])
    train = _shown(task, labels)
    rows = task.splits[split]
    seen = _prompt_states(bench, [row["prompt"] for row in train])[:, -1]
    asked = _prompt_states(bench, rows["prompt"])[:, -1]
    targets = torch.tensor([labels.index(row["answers"][0]) for row in train])
    logprobs = linear_probe(seen, targets, asked, len(labels))
    return scores.graded(list(rows), labels, logprobs)


def _shown(task: Task, labels: Sequence[str]) -> list[dict]:
    """The first SHOTS training examples of each label, in the order of the split."""
    left = dict.fromkeys(labels, SHOTS)
    shown = []
    for row in task.splits["train"]:
        if left[row["answers"][0]] > 0:
            left[row["answers"][0]] -= 1
            shown.append(row)
    return shown


def states(bench: Bench, row: Row, label: str) -> Tensor:
    def compute(folder: Path) -> None:
        read = _prompt_states(bench, bench.tasks[label].splits["probe"]["prompt"])
        save_file({"states": read}, folder / "states.safetensors")

    entry = bench.identity.state_entry(row, label)
    return read_states(store.cached(*entry, compute, machine(bench)))


def read_states(folder: Path) -> Tensor:
    return load_file(folder / "states.safetensors")["states"]


def _prompt_states(bench: Bench, prompts: Iterable[str]) -> Tensor:
    """States (prompts, layers, d) of the live model at prompts."""
    encode = encode_input if bench.encoder else encode_prompt
    encoded = [encode(bench.tokenizer, prompt) for prompt in prompts]
    return prompt_states(bench.model, encoded, batch_size=bench.batch_size)
