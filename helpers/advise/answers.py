"""What does the live model answer, and would it give these answers?

A decoder or encoder-decoder answers in words: greedily, up to its end token or the panel's limit.
An encoder answers with a label, by the head of the model that is asked.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch

from helpers.advise.panel import Panel
from helpers.study.answers import (
    Cached,
    batches,
    closing,
    decode,
    read_prompts,
    readings,
)
from helpers.study.bench import attached
from helpers.study.scores import label_logprobs

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
    answers: list[list[int]] = [[]] * len(prompts)
    for batch, cached in _read(panel, prompts):
        decoded = decode(panel.model, cached, [panel.tokens] * len(batch), ends)
        for i, tokens in zip(batch, decoded, strict=True):
            answers[i] = tokens
    return answers


def _read(panel: Panel, prompts: Prompts) -> Iterator[tuple[list[int], Cached]]:
    """Prompts that are read together: their places, and what the live model made of them."""
    lengths = [len(ids) for ids in prompts]
    for batch in batches(panel.model, lengths, panel.batch_size):
        some = [prompts[i] for i in batch]
        yield batch, read_prompts(panel.model, some, panel.tokenizer.pad_token_id)


def _end_tokens(panel: Panel) -> set[int]:
    ends = panel.model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {panel.tokenizer.eos_token_id, *listed} - {None}


def _score_texts(panel: Panel, prompts: Prompts, answers: Answers) -> pd.DataFrame:
    kept, nll = np.zeros(len(prompts)), np.zeros(len(prompts))
    fill, stop = panel.tokenizer.pad_token_id, closing(panel.tokenizer)
    for batch, cached in _read(panel, prompts):
        candidates = [[answers[i]] for i in batch]
        read = readings(panel.model, cached, candidates, fill, stop)
        for i, (reading,) in zip(batch, read, strict=True):
            kept[i] = reading.best.all()
            nll[i] = -reading.logprob.mean()
    return pd.DataFrame({"kept": kept, "nll": nll})


# --- encoders ------------------------------------------------------------------------------------


def _score_labels(
    panel: Panel, label: str, prompts: Prompts, answers: Answers
) -> pd.DataFrame:
    logprobs = _classify(panel, label, prompts)
    wanted = torch.tensor(answers)
    kept = logprobs.argmax(1) == wanted[:, 0]
    nll = -logprobs.gather(1, wanted)[:, 0]
    return pd.DataFrame({"kept": kept.double().numpy(), "nll": nll.double().numpy()})


def _classify(panel: Panel, label: str, prompts: Prompts) -> torch.Tensor:
    """Log-probabilities (prompts, labels) of the live encoder below a model's own head."""
    with attached(panel.model, panel.heads[label]):
        return label_logprobs(panel.model, prompts, panel.batch_size)
