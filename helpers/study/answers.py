"""What does a model say? Candidate answers read token by token, and greedy texts.

A prompt is read once (by the encoder of an encoder-decoder); the cached keys and values then serve
every candidate answer, teacher-forced, and the greedy continuation.
"""

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers.states.batch import (
    decoder_start,
    encode_prompt,
    length_buckets,
    pad,
    read_shared,
    shared_length,
)

# candidate answers that are read at once: each takes a copy of its prompt's cache
MOST = 64
MORE = 4  # tokens that a generated answer may have beyond the longest candidate
Ids = list[int]  # tokens


class Stop(NamedTuple):
    """What closes an answer."""

    token: int  # the first token of it: greedy decoding ends here
    length: int  # tokens in all


def closing(tokenizer, end: str | None = None) -> Stop:
    """The end token closes an answer, or the tokens of the text `end`."""
    if end is None:
        return Stop(tokenizer.eos_token_id, 1)
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    return Stop(ids[0], len(ids))


# --- one pass over prompts, one over candidates ----------------------------------------------


def batches(model, lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of prompts that are read together: of similar length, shortest first.

    Of equal length where a sliding window is not far longer than the prompts, as it would count the
    padding between a prompt and its answer.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is None or 2 * max(lengths) <= window:
        return length_buckets(lengths, batch_size)
    equal = []
    for length in sorted(set(lengths)):
        same = [i for i, other in enumerate(lengths) if other == length]
        equal += [same[i : i + batch_size] for i in range(0, len(same), batch_size)]
    return equal


class Cached(NamedTuple):
    """B prompts that a model has read, and what it has read behind them."""

    mask: Tensor  # (B, T): which positions are real
    # (B, vocabulary) of the next token, or (B, t, vocabulary) after `follow`
    logits: Tensor
    cache: Any  # keys and values
    # (B, T, d): what an encoder-decoder's encoder made of them
    encoded: Tensor | None = None


@torch.no_grad()
def read_prompts(model, prompts: Sequence[Ids], fill: int) -> Cached:
    """Read prompts, padded on the right; logits are computed where one of them ends only.

    What a decoder's prompts all begin with, as their instruction, is read once.
    """
    ids, mask = pad(prompts, fill)
    ids, mask = ids.to(model.device), mask.to(model.device)
    if model.config.is_encoder_decoder:
        out = model(
            ids,
            attention_mask=mask,
            decoder_input_ids=decoder_start(model, ids),
            use_cache=True,
        )
        return Cached(
            mask, out.logits[:, 0], out.past_key_values, out.encoder_last_hidden_state
        )
    shared = shared_length(prompts)
    last = mask.sum(1) - 1 - shared
    ends, place = last.unique(return_inverse=True)
    out = model(
        ids[:, shared:],
        attention_mask=mask,
        past_key_values=read_shared(model, ids[:, :shared]),
        use_cache=True,
        logits_to_keep=ends,
    )
    each = torch.arange(len(prompts), device=model.device)
    return Cached(mask, out.logits[each, place], out.past_key_values)


@torch.no_grad()
def follow(model, cached: Cached, tokens: Tensor, real: Tensor) -> Cached:
    """Read tokens (B, t) behind what was read, those that `real` (B, t) marks; the cache grows."""
    mask, _, cache, encoded = cached
    if encoded is not None:
        out = model(
            attention_mask=mask,
            encoder_outputs=(encoded,),
            decoder_input_ids=tokens,
            past_key_values=cache,
        )
        return cached._replace(logits=out.logits)
    steps = torch.arange(tokens.shape[1], device=model.device)
    whole = torch.cat([mask, real], 1)
    out = model(
        tokens,
        attention_mask=whole,
        position_ids=mask.sum(1, keepdim=True) + steps,
        past_key_values=cache,
    )
    return Cached(whole, out.logits, cache)


def some_of(cached: Cached, rows: Tensor) -> Cached:
    """These rows of read prompts, in a cache of their own."""
    return narrowed(cached._replace(cache=deepcopy(cached.cache)), rows)


def narrowed(cached: Cached, rows: Tensor) -> Cached:
    """These rows of read prompts; the others leave the cache."""
    mask, logits, cache, encoded = cached
    cache.batch_select_indices(rows)
    return Cached(
        mask[rows], logits[rows], cache, None if encoded is None else encoded[rows]
    )


class Reading(NamedTuple):
    """One candidate answer read token by token, its closing included; arrays of that length."""

    tokens: Ids
    logprob: np.ndarray  # log-probability of each token, in nats
    best: np.ndarray  # is it the most likely token?
    unended: np.ndarray  # is it the most likely one but for the end token?
    ends: np.ndarray  # is the end token the most likely one?


def readings(
    model, cached: Cached, answers: Sequence[Sequence[Ids]], fill: int, stop: Stop
) -> list[list[Reading]]:
    """The candidate answers of each read prompt; a prompt may have many, so MOST at a time."""
    asked = [(i, ids) for i, texts in enumerate(answers) for ids in texts]
    out: list[list[Reading]] = [[] for _ in answers]
    for start in range(0, len(asked), MOST):
        owners, tokens = zip(*asked[start : start + MOST], strict=True)
        each = some_of(cached, torch.tensor(owners))
        for i, reading in zip(
            owners, _read_together(model, each, tokens, fill, stop), strict=True
        ):
            out[i].append(reading)
    return out


def _read_together(
    model, cached: Cached, tokens: Sequence[Ids], fill: int, stop: Stop
) -> Iterator[Reading]:
    """One candidate behind each read prompt."""
    target, real = (x.to(model.device) for x in pad(tokens, fill))
    rest = follow(model, cached, target[:, :-1], real[:, :-1])
    # (B, T, vocabulary)
    logits = torch.cat([cached.logits[:, None], rest.logits], 1).float()
    chosen = logits.gather(2, target[..., None])[..., 0]
    logprob = chosen - logits.logsumexp(2)
    likely = logits.argmax(2)
    logits[..., stop.token] = -torch.inf
    unended = logits.argmax(2)
    fields = logprob, likely == target, unended == target, likely == stop.token
    arrays = [field.cpu().numpy() for field in fields]
    for ids, *padded in zip(tokens, *arrays, strict=True):
        yield Reading(ids, *(array[: len(ids)] for array in padded))


def is_forced(read: Reading, stop: Stop) -> bool:
    """Whether greedy decoding gives this answer if it may not end before the answer does."""
    n = len(read.tokens) - stop.length
    return bool(read.unended[:n].all() and read.best[n:].all())


# --- greedy texts ----------------------------------------------------------------------------


def greedy_texts(
    model,
    tokenizer,
    cached: Cached,
    read: Sequence[Sequence[Reading]],
    stop: Stop,
) -> list[str]:
    """What greedy decoding says to each prompt; generated only where no candidate shows it."""
    tokens = [followed(candidates, stop) for candidates in read]
    unknown = [i for i, ids in enumerate(tokens) if ids is None]
    if unknown:
        most = [MORE + max(len(of.tokens) for of in read[i]) for i in unknown]
        rest = some_of(cached, torch.tensor(unknown))
        decoded = decode(model, rest, most, {stop.token})
        for i, ids in zip(unknown, decoded, strict=True):
            tokens[i] = before(ids, stop.token)
    return [tokenizer.decode(ids).strip() for ids in tokens]


def before(tokens: Ids, end: int) -> Ids:
    """Tokens without a closing `end`."""
    return tokens[:-1] if tokens[-1] == end else tokens


def followed(read: Sequence[Reading], stop: Stop) -> Ids | None:
    """The greedy tokens, if they are a candidate's or end within one; None otherwise."""
    for of in read:
        n = len(of.tokens) - stop.length
        if of.best.all():
            return of.tokens[:n]
        miss = int(of.best.argmin())
        if miss < n and of.ends[miss]:
            return of.tokens[:miss]
    return None


def decode(
    model,
    cached: Cached,
    most: Sequence[int],
    ends: Collection[int],
) -> list[Ids]:
    """Greedy tokens after read prompts, through one of `ends` or as many as `most` says of each.

    Changes the cache: a text that is complete leaves it, so that nothing more is computed of it.
    """
    texts: list[Ids] = [[] for _ in most]
    open_rows = list(range(len(texts)))  # in the order of the cache
    while True:
        tokens = cached.logits.argmax(-1).reshape(-1, 1)
        for row, token in zip(open_rows, tokens[:, 0].tolist(), strict=True):
            texts[row].append(token)
        kept = []
        for at, row in enumerate(open_rows):
            if len(texts[row]) < most[row] and texts[row][-1] not in ends:
                kept.append(at)
        if not kept:
            return texts
        if len(kept) < len(open_rows):
            open_rows = [open_rows[at] for at in kept]
            cached = narrowed(cached, torch.tensor(kept))
            tokens = tokens[kept]
        cached = follow(model, cached, tokens, torch.ones_like(tokens))


def generate(
    model,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Greedy continuations up to the end token, stripped."""
    texts = [""] * len(prompts)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    lengths = [len(ids) for ids in encoded]
    for batch in batches(model, lengths, batch_size):
        some = [encoded[i] for i in batch]
        cached = read_prompts(model, some, tokenizer.pad_token_id)
        out = decode(
            model, cached, [max_new_tokens] * len(some), {tokenizer.eos_token_id}
        )
        for i, ids in zip(batch, out, strict=True):
            texts[i] = tokenizer.decode(before(ids, tokenizer.eos_token_id)).strip()
    return texts
