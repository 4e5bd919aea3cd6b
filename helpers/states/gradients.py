"""Do two tasks pull the base in opposite directions?

The gradient of a task's loss, at the base, over the tensors that fine-tuning changes. It needs
labelled training examples and a backward pass, but neither a specialist nor a merge.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from helpers.merge import gram_matrix
from helpers.states.batch import IGNORED, encode_answer, encode_prompt, length_buckets, pad
from helpers.states.measures import blocks_of


class Kept(NamedTuple):
    """What the backward pass needs of one batch: the inputs of every block, and dL/d(output)."""

    inputs: list[Tensor]
    others: list[tuple[tuple, dict]]  # the blocks' other arguments: masks, positions
    towards: Tensor


def training_examples(
    tasks: Mapping[str, Any], tokenizer, n: int
) -> dict[str, list[tuple[list[int], list[int]]]]:
    """The first n training examples of each task: token ids of the prompt and of its answer."""
    return {
        label: [
            (encode_prompt(tokenizer, row["prompt"]), encode_answer(tokenizer, row["answers"][0]))
            for row in task.splits["train"].take(n)
        ]
        for label, task in tasks.items()
    }


def answer_loss(
    model: nn.Module, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> Tensor:
    """Sum over all answer tokens of their negative log-likelihood in a decoder, in nats."""
    full = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    hidden_labels = [[IGNORED] * len(prompt) for prompt in prompts]
    labels, _ = pad([h + a for h, a in zip(hidden_labels, answers, strict=True)], IGNORED)
    ids, mask = pad(full, 0)
    counted = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]  # the head is a fifth of the work
    ids, mask, labels, counted = (t.to(model.device) for t in (ids, mask, labels, counted))
    logits = model(ids, attention_mask=mask, logits_to_keep=counted, use_cache=False).logits
    targets = labels[:, counted + 1].flatten()
    return cross_entropy(
        logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
    )


def grams(
    model: nn.Module,
    tasks: Mapping[str, Sequence[tuple[list[int], list[int]]]],
    names: Iterable[str] | None = None,
    batch_size: int = 16,
) -> NDArray:
    """Inner products <g_i, g_j> of the tasks' loss gradients, block by block: (blocks, n, n).

    g_i is the gradient of task i's mean negative log-likelihood per answer token, at the model as
    it stands. The gradients of n tasks do not fit into memory together. So all tasks go backwards
    through one block before the next: a first pass without a graph keeps the inputs of the blocks;
    then each block is run again on them, from the last to the first, and differentiated.

    Args:
        model: a decoder in evaluation mode; `names`' parameters are those differentiated.
        tasks: by label, (prompt ids, answer ids) of each example.
        names: parameters inside blocks; by default all matrices of the blocks.
        batch_size: how many examples at a time; it changes nothing but rounding.

    Cost: for each batch of each task two forward passes and one backward pass. Memory: the blocks'
    inputs, padded tokens * blocks * d * 4 bytes, and n times the parameters of the largest block.

    Raises:
        ValueError: a task without examples or answer tokens; a name that is in no block.
    """
    blocks, where = _parameters(model, names)
    for label, examples in tasks.items():
        if not any(answer for _, answer in examples):
            raise ValueError(f"task {label} has no answer tokens to take the gradient of")
    kept = {label: _kept(model, blocks, examples, batch_size) for label, examples in tasks.items()}
    total = np.zeros((len(blocks), len(tasks), len(tasks)))
    lowest = min(at for at, wanted in enumerate(where) if wanted)
    for at in reversed(range(lowest, len(blocks))):
        of_tasks = [_through(blocks[at], at, where[at], batches) for batches in kept.values()]
        for tensors in zip(*of_tasks, strict=True):
            total[at] += gram_matrix(tensors)
    return total


def _parameters(
    model: nn.Module, names: Iterable[str] | None
) -> tuple[nn.ModuleList, list[list[nn.Parameter]]]:
    """The blocks of a model and, for each, its parameters among `names`."""
    blocks = blocks_of(model)
    if names is None:
        return blocks, [[p for p in block.parameters() if p.ndim == 2] for block in blocks]
    chosen = {name: model.get_parameter(name) for name in names}
    owner = {p: i for i, block in enumerate(blocks) for p in block.parameters()}
    where: list[list[nn.Parameter]] = [[] for _ in blocks]
    for name, parameter in chosen.items():
        if parameter not in owner:
            raise ValueError(f"{name} is in no block of the model: its gradient is not streamed")
        where[owner[parameter]].append(parameter)
    return blocks, where


def _kept(
    model: nn.Module,
    blocks: nn.ModuleList,
    examples: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
) -> list[Kept]:
    """One forward pass over a task, differentiated from the output of the last block on."""
    tokens = sum(len(answer) for _, answer in examples)
    seen: list[tuple[Tensor, tuple, dict]] = []
    leaf: list[Tensor] = []

    def before(_, args: tuple, kwargs: dict) -> None:
        seen.append((args[0], args[1:], kwargs))

    def after(_, args: tuple, output):
        """Start the graph here: what comes after is the head and the loss."""
        torch.set_grad_enabled(True)
        first = output if isinstance(output, Tensor) else output[0]
        leaf.append(first.detach().requires_grad_())
        return leaf[-1] if isinstance(output, Tensor) else (leaf[-1], *output[1:])

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(after))
    out = []
    try:
        for batch in length_buckets([len(p) + len(a) for p, a in examples], batch_size):
            seen.clear()
            leaf.clear()
            with torch.no_grad():
                loss = answer_loss(model, *zip(*(examples[i] for i in batch), strict=True))
            (towards,) = torch.autograd.grad(loss / tokens, leaf)
            inputs, args, kwargs = zip(*seen, strict=True)
            out.append(Kept(list(inputs), list(zip(args, kwargs, strict=True)), towards))
    finally:
        for handle in handles:
            handle.remove()
    return out


def _through(
    block: nn.Module, at: int, wanted: Sequence[nn.Parameter], batches: list[Kept]
) -> list[Tensor]:
    """Gradients of the `wanted` parameters of one block; `batches` are taken to its input."""
    total = [torch.zeros_like(p) for p in wanted]
    for i, (inputs, others, towards) in enumerate(batches):
        args, kwargs = others[at]
        with torch.enable_grad():
            x = inputs[at].detach().requires_grad_()
            output = block(x, *args, **kwargs)
            output = output if isinstance(output, Tensor) else output[0]
            found = torch.autograd.grad(output, [x, *wanted], towards)
        batches[i] = Kept(inputs[:at], others, found[0])  # this block's input is done with
        for sum_, part in zip(total, found[1:], strict=True):
            sum_ += part
    return total


def pair_table(gram: NDArray, labels: Sequence[str]) -> pd.DataFrame:
    """Every pair of tasks from the inner products of their gradients, (n, n).

    Columns task_a, task_b; gradient_l2 = ||g_a - g_b||; gradient_cosine; gradient_norm_a and
    gradient_norm_b. The norm of a task's gradient says how far the base is from solving it.
    """
    norm = np.sqrt(np.diagonal(gram))
    rows = []
    for (i, a), (j, b) in combinations(enumerate(labels), 2):
        apart = np.maximum(0.0, norm[i] ** 2 + norm[j] ** 2 - 2 * gram[i, j])
        rows.append(
            {
                "task_a": a,
                "task_b": b,
                "gradient_l2": np.sqrt(apart),
                "gradient_cosine": gram[i, j] / (norm[i] * norm[j]),
                "gradient_norm_a": norm[i],
                "gradient_norm_b": norm[j],
            }
        )
    return pd.DataFrame(rows)
