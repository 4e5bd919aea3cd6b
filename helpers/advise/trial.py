"""What does a merge keep? Trial merges in memory, read on prompts that need no labels.

Each model answers its own prompts greedily: its answers are the reference. A trial merge is made a
tensor at a time, reads the same prompts teacher-forced, and is scored for each of its models by
    retention  share of prompts on which greedy decoding of the merge gives the model's own answer
    rise       mean NLL per token of that answer under the merge less under the model, nats
Of an encoder the answer is the label that the model's own head gives. Every trial is remembered in
the store, so a killed search goes on and a second call is instant.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from helpers import store
from helpers.advise.inputs import Panel
from helpers.advise.merges import Merge, alone
from helpers.merge import merge_tensors, plan, summary
from helpers.states.batch import length_buckets, pad
from helpers.study.answers import closing, read_prompts, readings

VERSION = 1  # raised by hand whenever a trial records something else
EVERY: Mapping[str, slice] = {}


@contextmanager
def applied(panel: Panel, merge: Merge) -> Iterator[list[float]]:
    """The live base as the merge; yields each model's dose, <change, tau> / ||tau||^2.

    One tensor's change is held at a time beside base and merge; both are rounded as the base is.
    Afterwards the base is back bit for bit.
    """
    chosen = plan(merge.rule, merge.models, merge.weights, scale=merge.scale)
    parameters = dict(panel.model.named_parameters())
    original, records = {}, []
    try:
        for row, change, record in merge_tensors(panel.of(merge.models), chosen):
            parameter = parameters[row.name]
            original[row.name] = parameter.data
            parameter.data = (parameter.data.float() + change).to(parameter.dtype)
            records.append(record)
        yield [dose or 0.0 for dose in summary(chosen, records).own]
    finally:
        for name, data in original.items():
            parameters[name].data = data


# --- the models' own answers ---------------------------------------------------------------------


def references(panel: Panel, label: str) -> pd.DataFrame:
    """A model's own answers to its prompts: columns answer (token ids, or [label]) and nll.

    Answers end with the end token, or after `panel.tokens` tokens.
    """

    def compute(folder: Path) -> None:
        prompts = panel.inputs[label]
        with applied(panel, alone(label, 1.0)):
            if panel.encoder:
                answers = [[int(row.argmax())] for row in _classified(panel, label, prompts)]
            else:
                answers = _greedy(panel, prompts)
            nll = _scored(panel, label, prompts, answers)["nll"]
        rows = {"answers": answers, "nll": nll.tolist()}
        (folder / "answers.json").write_text(json.dumps(rows), encoding="utf-8")

    folder = store.cached("answers", VERSION, _determinants(panel, label), compute)
    rows = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return pd.DataFrame({"answer": rows["answers"], "nll": rows["nll"]})


def _determinants(panel: Panel, label: str) -> dict:
    return {
        "base": panel.base,
        "model": panel.contents[label],
        "prompts": store.digest(panel.inputs[label]),
        "tokens": panel.tokens,
        "dtype": str(panel.model.dtype),
    }


@torch.no_grad()
def _greedy(panel: Panel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy continuations with their end token, at most `panel.tokens` long."""
    model, tokenizer = panel.model, panel.tokenizer
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    answers: list[list[int]] = [[]] * len(prompts)
    for batch in length_buckets([len(ids) for ids in prompts], panel.batch_size):
        ids, mask = pad([prompts[i][::-1] for i in batch], tokenizer.pad_token_id)
        out = model.generate(
            ids.flip(1).to(model.device),
            attention_mask=mask.flip(1).to(model.device),
            max_new_tokens=panel.tokens,
            do_sample=False,
            repetition_penalty=1.0,  # some bases set another, and exact match knows none
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
        )
        for i, answer in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            end = next((at for at, token in enumerate(answer, 1) if token in ends), None)
            answers[i] = answer[:end]
    return answers


@torch.no_grad()
def _classified(panel: Panel, label: str, prompts: Sequence[list[int]]) -> torch.Tensor:
    """Log-probabilities (prompts, labels) of the live encoder below a model's own head."""
    model, head = panel.model, panel.heads[label]
    original = {name: model.get_parameter(name).data for name in head}
    batches = length_buckets([len(ids) for ids in prompts], panel.batch_size)
    parts = []
    try:
        for name, tensor in head.items():
            model.get_parameter(name).data = tensor.to(model.device, model.dtype)
        for batch in batches:
            ids, mask = (t.to(model.device) for t in pad([prompts[i] for i in batch], 0))
            logits = model(ids, attention_mask=mask).logits
            parts.append(logits.float().log_softmax(1).cpu())
    finally:
        for name, data in original.items():
            model.get_parameter(name).data = data
    order = torch.tensor([i for batch in batches for i in batch])
    return torch.cat(parts)[order.argsort()]


@torch.no_grad()
def _scored(
    panel: Panel, label: str, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> pd.DataFrame:
    """Of the live model, a row per prompt: kept (gives the answer), nll (nats a token)."""
    kept, nll = np.zeros(len(prompts)), np.zeros(len(prompts))
    if panel.encoder:
        logprobs = _classified(panel, label, prompts).numpy()
        wanted = np.array([answer[0] for answer in answers])
        nll = -logprobs[np.arange(len(prompts)), wanted]
        return pd.DataFrame({"kept": (logprobs.argmax(1) == wanted) * 1.0, "nll": nll})
    fill, stop = panel.tokenizer.pad_token_id, closing(panel.tokenizer)
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    for batch in length_buckets(lengths, panel.batch_size):
        cached = read_prompts(panel.model, [prompts[i] for i in batch], fill)
        read = readings(panel.model, cached, [[answers[i]] for i in batch], fill, stop)
        for i, (answer,) in zip(batch, read, strict=True):
            kept[i] = answer.best.all()
            nll[i] = -answer.logprob.mean()
    return pd.DataFrame({"kept": kept, "nll": nll})


# --- a trial -------------------------------------------------------------------------------------


def trial(panel: Panel, merge: Merge, parts: Mapping[str, slice] = EVERY) -> pd.DataFrame:
    """The merge on each of its models' prompts: columns model, prompt, kept, rise,
    dose, cpu_seconds.

    parts: which prompts of each model (all, if it is not named). One row per model and prompt; dose
    is how far the merge goes along the model's own task vector; cpu_seconds are the model's share
    of the merge and its reading, as they were when it was computed.
    """
    part_of = {model: parts.get(model, slice(None)) for model in merge.models}
    keys = {model: _key(panel, merge, model, part) for model, part in part_of.items()}
    left = [model for model, key in keys.items() if not store.finished(*key)]
    own = {model: references(panel, model) for model in left}
    if left:
        started = time.process_time()
        with applied(panel, merge) as doses:
            merging = (time.process_time() - started) / len(left)
            for model in left:
                dose = doses[merge.models.index(model)]
                _try(panel, model, part_of[model], own[model], (dose, merging), keys[model])
    frames = []
    for model, key in keys.items():
        frame = pd.read_csv(store.place(*key) / "trial.csv")
        frames.append(frame.assign(model=model))
    return pd.concat(frames, ignore_index=True)


def _key(panel: Panel, merge: Merge, label: str, part: slice) -> tuple[str, int, dict]:
    models = [panel.contents[x] for x in merge.models]
    prompts = range(len(panel.inputs[label]))[part]
    what = merge._asdict() | {"models": models, "place": merge.models.index(label)}
    return "trial", VERSION, _determinants(panel, label) | what | {"part": list(prompts)}


def _try(
    panel: Panel,
    label: str,
    part: slice,
    own: pd.DataFrame,
    merged: tuple[float, float],
    key: tuple,
) -> None:
    """Leave a cell's rows in the store; merged: its dose, and CPU seconds of merging."""
    dose, merging = merged

    def compute(folder: Path) -> None:
        started = time.process_time()
        own_part = own.iloc[part]
        prompts, answers = panel.inputs[label][part], own_part["answer"].tolist()
        scored = _scored(panel, label, prompts, answers)
        frame = pd.DataFrame({"prompt": own_part.index, "kept": scored["kept"]})
        frame["rise"] = scored["nll"] - own_part["nll"].to_numpy()
        frame["dose"] = dose
        frame["cpu_seconds"] = merging + time.process_time() - started
        frame.to_csv(folder / "trial.csv", index=False)

    store.cached(*key, compute)
