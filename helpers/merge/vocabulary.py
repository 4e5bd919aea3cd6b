"""Which row of an embedding is which token? Vocabularies of several sizes brought together.

Rows are matched by token, as mergekit does with `tokenizer_source`: a model without a token has the
base's row for it, or that of the only model that has it, or the mean over those that have it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from helpers.merge.sources import Source
from helpers.merge.weights import json_if_there, read_text


class Vocabulary(NamedTuple):
    """Row of each token, and how many rows there are: what no token names is padding."""

    tokens: Mapping[str, int]
    rows: int


class Gathered:
    """A tensor with its rows in another order, and others where it has none; read by block."""

    def __init__(
        self, tensor: Tensor, numbers: Tensor, others: Callable[[Any], Tensor]
    ):
        self.tensor = tensor
        self.numbers = numbers  # of its own row for each row, -1 for none
        self.others = others
        self.shape = torch.Size((len(numbers), *tensor.shape[1:]))
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.ndim = tensor.ndim

    def is_floating_point(self) -> bool:
        return self.tensor.is_floating_point()

    def __getitem__(self, rows: Any) -> Tensor:
        numbers = self.numbers[rows]
        lacking = numbers < 0
        block = self.tensor[numbers.clamp(min=0)]
        if lacking.any():
            block[lacking] = self.others(rows)[lacking].to(block.dtype)
        return block


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """A folder's tokenizer; None where there is none beside the weights, as with most adapters."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no tokenizer: {error}") from error


def words_of(folder: Path) -> dict[str, int]:
    """The row of each token that a folder's tokenizer knows, also of those in older files."""
    tokenizer = tokenizer_of(folder)
    if tokenizer is not None:
        return tokenizer.get_vocab()
    listed = folder / "vocab.txt"
    if listed.is_file():
        lines = read_text(listed).removesuffix("\n").split("\n")
        return {token: row for row, token in enumerate(lines)}
    words = json_if_there(folder / "vocab.json")
    return {token: row for token, row in words.items() if isinstance(row, int)}


def united(base: Path, models: Sequence[Path]) -> Tokenizer:
    """The base's tokenizer with the tokens that were added to those of the models, in order."""
    union = tokenizer_of(base)
    if union is None:
        raise ValueError(
            f"{base} has no tokenizer.json that --tokenizer union could add tokens to"
        )
    for folder in models:
        tokenizer = tokenizer_of(folder)
        if tokenizer is None:
            continue
        added = tokenizer.get_added_tokens_decoder()
        for token, number in sorted(
            tokenizer.get_vocab().items(), key=lambda pair: pair[1]
        ):
            if union.token_to_id(token) is not None:
                continue
            if number not in added:
                raise ValueError(
                    f"{folder} has {token!r} in the vocabulary itself, not as an added token: only "
                    "--tokenizer base or a model's name is possible"
                )
            union.add_tokens([added[number]])
    return union


def chosen(
    tokenizer: str | int | None, sources: Sequence[Source], folders: Sequence[Path]
) -> tuple[Vocabulary, list[Mapping[str, int]]]:
    """The vocabulary of a merge, and the row of each token in the base and in each model.

    tokenizer: "base", "union", or the number of the model that has it; None matches row by row the
    base's. sources and folders: the base's first, then the models'. Where a model has no tokenizer
    it is the base's.
    """
    rows = [_rows(sources[0], source) for source in sources]
    size = rows[0] or 0
    if tokenizer is None:
        return Vocabulary({}, size), [{} for _ in sources]
    own = [tokenizer_of(folder) for folder in folders]
    if own[0] is None:
        raise ValueError(
            f"{folders[0]} has no tokenizer.json to match rows by token with"
        )
    tokens = [(words or own[0]).get_vocab() for words in own]
    if tokenizer == "base":
        return Vocabulary(tokens[0], size), tokens
    if tokenizer == "union":
        union = united(folders[0], folders[1:]).get_vocab()
        return Vocabulary(
            union, max(size, *(row + 1 for row in union.values()))
        ), tokens
    return Vocabulary(tokens[tokenizer], rows[tokenizer] or size), tokens


def _rows(base: Source, source: Source) -> int | None:
    """How many rows a model's embedding has; None if it holds none."""
    names = base.anatomy.vocabulary & source.tensors.keys() if base.anatomy else ()
    return max((len(source.tensors[name]) for name in names), default=None)


def by_token(
    sources: Sequence[Source], target: Vocabulary, tokens: Sequence[Mapping[str, int]]
) -> tuple[Source, list[Source]]:
    """Base and models (`chosen`) with the rows of the target wherever rows are tokens."""
    base, *models = sources
    sizes = {_rows(base, source) for source in sources} - {None}
    if sizes <= {target.rows} and all(words == target.tokens for words in tokens):
        return base, models
    replaced: list[dict[str, Gathered]] = [{} for _ in models]
    aligned = {}
    for name in base.anatomy.vocabulary & base.tensors.keys():
        stored = base.tensors[name]
        owned = [model.tensors.get(name) for model in models]
        numbers = [
            _numbers(target, *pair) for pair in zip(tokens[1:], owned, strict=True)
        ]
        own = _numbers(target, tokens[0], stored)
        for model, words in zip(models, tokens[1:], strict=True):
            if model.adapter is not None:  # it may have trained rows of the padding
                own = own.where(own >= 0, _numbers(target, words, stored))
        lacking = torch.stack([own, *numbers]) < 0
        nobody = lacking.all(0)
        if nobody.any():
            first = int(nobody.nonzero()[0])
            raise ValueError(f"row {first} of {name} is in no model")
        whole = Gathered(stored, own, _mean(owned, numbers))
        aligned[name] = whole
        for i, tensor in enumerate(owned):
            if tensor is not None:
                moved = Gathered(tensor, numbers[i], whole.__getitem__)
                replaced[i][name] = moved
    of_base = dict(base.tensors) | aligned
    others = []
    for model, tensors, words in zip(models, replaced, tokens[1:], strict=True):
        model = _moved_parts(model, base, target, words)
        own = dict(model.tensors) | tensors
        others.append(model._replace(tensors=own))
    return base._replace(tensors=of_base), others


def _numbers(
    target: Vocabulary, tokens: Mapping[str, int], tensor: Tensor | None
) -> Tensor:
    """A tensor's row for each row of the target, -1 where it has none."""
    rows = 0 if tensor is None else len(tensor)
    numbers = torch.arange(target.rows)
    named = torch.tensor(
        [row for row in tokens.values() if row < target.rows], dtype=torch.long
    )
    numbers[named] = -1
    for token, row in target.tokens.items():
        if row < target.rows:
            numbers[row] = tokens.get(token, -1)
    return numbers.where(numbers < rows, -1)


def _mean(
    owned: Sequence[Tensor | None], numbers: Sequence[Tensor]
) -> Callable[[Any], Tensor]:
    """The mean over the models that have a row."""

    def rows(which: Any) -> Tensor:
        total, owners = 0.0, 0
        for tensor, places in zip(owned, numbers, strict=True):
            if tensor is not None:
                own = places[which]
                present = (own >= 0).view(-1, *[1] * (tensor.ndim - 1))
                stored = tensor[own.clamp(min=0)].float()
                total = total + stored * present
                owners = owners + present
        return total / owners

    return rows


def _moved_parts(
    model: Source, base: Source, target: Vocabulary, tokens: Mapping[str, int]
) -> Source:
    """An adapter's factors and trained rows of an embedding, at the target's rows."""
    if model.adapter is None:
        return model
    factors = dict(model.factors)
    trained = dict(model.adapter.tokens)
    for name in base.anatomy.vocabulary:
        if name in factors:
            pair = factors[name]
            numbers = _numbers(target, tokens, pair.B)
            moved = pair.B[numbers.clamp(min=0)] * (numbers >= 0)[:, None]
            factors[name] = pair._replace(B=moved)
        if name in trained:
            old, values = trained[name]
            numbers = _numbers(target, tokens, base.tensors[name])
            here, which = (numbers[:, None] == old).nonzero(as_tuple=True)
            trained[name] = here, values[which]
    adapter = model.adapter._replace(tokens=trained, factors=factors)
    return model._replace(factors=factors, adapter=adapter)
