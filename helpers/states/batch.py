"""From text to tokens, and from token lists to padded batches."""

from collections.abc import Iterable, Sequence
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # label of a position that a loss does not count (torch's own default)


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, behind the model's own start token if it has one."""
    return tokenizer(prompt)["input_ids"]


def encode_input(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt as an encoder reads it: between its marks, cut at its last position."""
    return tokenizer(prompt, truncation=True)["input_ids"]


def encode_answer(tokenizer, answer: str, end: str | None = None) -> list[int]:
    """Token ids of an answer as a continuation, closed by the end token or by the text `end`."""
    ids = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    if end is None:
        return [*ids, tokenizer.eos_token_id]
    return ids + tokenizer(end, add_special_tokens=False)["input_ids"]


def pad(sequences: Sequence[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T) and the mask of real positions: the fill may be a real token's id."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), fill)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def decoder_start(model: nn.Module, ids: Tensor) -> Tensor:
    """What the decoder of an encoder-decoder reads first for each prompt of ids (B, T): (B, 1)."""
    return torch.full_like(ids[:, :1], model.config.decoder_start_token_id)


def shared_length(prompts: Sequence[list[int]]) -> int:
    """Tokens that several prompts begin with, as an instruction; of each at least one is left."""
    if len(prompts) == 1:
        return 0
    return min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)


def read_shared(model: nn.Module, ids: Tensor) -> Any:
    """A decoder's cache of prompts (B, t) that are all equal, read once; None of empty ones."""
    rows, length = ids.shape
    if not length:
        return None
    cache = model.get_decoder()(ids[:1], use_cache=True).past_key_values
    cache.batch_repeat_interleave(rows)
    return cache


def length_buckets(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, shortest first: little padding is computed on."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def encode_examples(
    tokenizer, rows: Iterable[dict]
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of examples with a prompt and answers, of which the first counts."""
    examples = []
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        answer = encode_answer(tokenizer, row["answers"][0])
        examples.append((prompt, answer))
    return examples
