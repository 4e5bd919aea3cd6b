"""What does the live model answer, and would it give these answers?

A decoder or encoder-decoder answers in words: greedily, up to its end token or the panel's limit.
An encoder answers with a label, by the head of the model that is asked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch

from helpers.advise.panel import Panel
from helpers.states.batch import length_buckets, pad
from helpers.study.answers import batches, closing, decode, read_prompts, readings

Prompts = Sequence[list[int]]
Answers = Sequence[list[int]]  # token ids, or one label


def answer(panel: Panel, label: str, prompts: Prompts) -> list[list[int]]:
    """The live model's answers to a model's prompts, token ids of each."""
    if panel.encoder:
        best = _classify(panel, label, prompts).argmax(1)
        return [[place] for place in best.tolist()]
    return _greedy(panel, prompts)


def score(panel: Panel, label: str, prompts: Prompts, answers: Answers) -> pd.DataFrame:
    """Of the live model, a row per prompt: kept (1 if it gives the answer), nll (nats a token)."""
    if panel.encoder:
        return _score_labels(panel, label, prompts, answers)
    return _score_texts(panel, prompts, answers)


# --- models that write --------------------------------------------------------------------------


def _greedy(panel: Panel, prompts: Prompts) -> list[list[int]]:
    """Greedy continuations with their end token, at most `panel.tokens` long."""
    ends = _end_tokens(panel)
    fill = panel.tokenizer.pad_token_id
    answers: list[list[int]] = [[]] * len(prompts)
    lengths = [len(ids) for ids in prompts]
    for batch in batches(panel.model, lengths, panel.batch_size):
        some = [prompts[i] for i in batch]
        cached = read_prompts(panel.model, some, fill)
        decoded = decode(panel.model, cached, panel.tokens, ends)
        for i, tokens in zip(batch, decoded, strict=True):
            answers[i] = tokens
    return answers


def _end_tokens(panel: Panel) -> set[int]:
    ends = panel.model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {panel.tokenizer.eos_token_id, *listed} - {None}


def _score_texts(panel: Panel, prompts: Prompts, answers: Answers) -> pd.DataFrame:
    kept, nll = np.zeros(len(prompts)), np.zeros(len(prompts))
    fill, stop = panel.tokenizer.pad_token_id, closing(panel.tokenizer)
    lengths = [len(ids) for ids in prompts]
    for batch in batches(panel.model, lengths, panel.batch_size):
        cached = read_prompts(panel.model, [prompts[i] for i in batch], fill)
        candidates = [[answers[i]] for i in batch]
        read = readings(panel.model, cached, candidates, fill, stop)
        for i, (reading,) in zip(batch, read, strict=True):
            kept[i] = reading.best.all()
            nll[i] = -reading.logprob.mean()
    return pd.DataFrame({"kept": kept, "nll": nll})


# --- encoders ------------------------------------------------------------------------------------


def _score_labels(panel: Panel, label: str, prompts: Prompts, answers: Answers) -> pd.DataFrame:
    logprobs = _classify(panel, label, prompts)
    wanted = torch.tensor(answers)
    kept = logprobs.argmax(1) == wanted[:, 0]
    nll = -logprobs.gather(1, wanted)[:, 0]
    return pd.DataFrame({"kept": kept.double().numpy(), "nll": nll.double().numpy()})


@torch.no_grad()
def _classify(panel: Panel, label: str, prompts: Prompts) -> torch.Tensor:
    """Log-probabilities (prompts, labels) of the live encoder below a model's own head."""
    buckets = length_buckets([len(ids) for ids in prompts], panel.batch_size)
    parts = []
    with _head(panel, label):
        for batch in buckets:
            ids, mask = pad([prompts[i] for i in batch], 0)
            device = panel.model.device
            logits = panel.model(ids.to(device), attention_mask=mask.to(device)).logits
            parts.append(logits.float().log_softmax(1).cpu())
    order = torch.tensor([i for batch in buckets for i in batch])
    return torch.cat(parts)[order.argsort()]


@contextmanager
def _head(panel: Panel, label: str) -> Iterator[None]:
    """The live encoder with a model's own head inside the `with`."""
    model, head = panel.model, panel.heads[label]
    original = {name: model.get_parameter(name).data for name in head}
    try:
        for name, tensor in head.items():
            model.get_parameter(name).data = tensor.to(model.device, model.dtype)
        yield
    finally:
        for name, data in original.items():
            model.get_parameter(name).data = data
