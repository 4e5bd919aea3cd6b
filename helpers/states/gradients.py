"""Do two tasks pull the base in opposite directions?

The gradient of a task's loss, at the base, over the tensors that fine-tuning changes. It needs
labelled training examples and a backward pass, but neither a specialist nor a merge. An example is
(prompt ids, answer ids), from `encode_examples`.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from helpers.merge import gram_matrix
from helpers.states.batch import length_buckets
from helpers.states.loss import Example, answer_loss
from helpers.states.read import blocks_of


class Kept(NamedTuple):
    """What the backward pass needs of one batch: how each block was called, and dL/d(output)."""

    # its input; its other arguments: masks, positions
    calls: list[tuple[Tensor, tuple, dict]]
    towards: Tensor


def grams(
    model: nn.Module,
    tasks: Mapping[str, Sequence[Example]],
    names: Iterable[str] | None = None,
    batch_size: int = 16,
) -> NDArray:
    """Inner products <g_i, g_j> of the tasks' loss gradients, block by block: (blocks, n, n).

    g_i is the gradient of task i's mean negative log-likelihood per answer token, at the model as
    it stands. The gradients of n tasks do not fit into memory together. So all tasks go backwards
    through one block before the next: a first pass without a graph keeps the inputs of the blocks;
    then each block is run again on them, from the last to the first, and differentiated.

    Args:
        model: a decoder in evaluation mode, or an encoder-decoder, of which the decoder's blocks
            are differentiated; `names`' parameters are those.
        tasks: by label, (prompt ids, answer ids) of each example.
        names: parameters inside blocks; by default all matrices of the blocks. An embedding is not
            one: T5's position bias, of the first block, reaches the others as a constant.
        batch_size: how many examples at a time; it changes nothing but rounding.

    Cost: for each batch of each task two forward passes and one backward pass. Memory: the blocks'
    inputs, padded tokens * blocks * d * 4 bytes, and n times the parameters of the largest block.

    Raises:
        ValueError: a task without examples or answer tokens; a name that is in no block.
    """
    blocks, wanted = _parameters(model, names)
    for label, examples in tasks.items():
        if not any(answer for _, answer in examples):
            raise ValueError(
                f"task {label} has no answer tokens to take the gradient of"
            )
    kept = [
        _forward(model, blocks, examples, batch_size) for examples in tasks.values()
    ]
    products = np.zeros((len(blocks), len(tasks), len(tasks)))
    lowest = min(at for at, parameters in enumerate(wanted) if parameters)
    for at in reversed(range(lowest, len(blocks))):
        gradients = [_backward(blocks[at], at, wanted[at], batches) for batches in kept]
        for tensors in zip(*gradients, strict=True):
            products[at] += gram_matrix(tensors)
    return products


def _parameters(
    model: nn.Module, names: Iterable[str] | None
) -> tuple[nn.ModuleList, list[list[nn.Parameter]]]:
    """The blocks of a model and, for each, its parameters among `names`."""
    blocks = blocks_of(model)
    if names is None:
        tables = {m.weight for m in blocks.modules() if isinstance(m, nn.Embedding)}
        matrices = [[p for p in block.parameters() if p.ndim == 2] for block in blocks]
        return blocks, [[p for p in block if p not in tables] for block in matrices]
    owner = {p: i for i, block in enumerate(blocks) for p in block.parameters()}
    wanted: list[list[nn.Parameter]] = [[] for _ in blocks]
    for name in names:
        parameter = model.get_parameter(name)
        if parameter not in owner:
            raise ValueError(
                f"{name} is in no block of the model: its gradient is not streamed"
            )
        wanted[owner[parameter]].append(parameter)
    return blocks, wanted


def _first(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _forward(
    model: nn.Module,
    blocks: nn.ModuleList,
    examples: Sequence[Example],
    batch_size: int,
) -> list[Kept]:
    """One forward pass over a task, differentiated from the output of the last block on."""
    tokens = sum(len(answer) for _, answer in examples)
    lengths = [len(prompt) + len(answer) for prompt, answer in examples]
    calls: list[tuple[Tensor, tuple, dict]] = []
    leaves: list[Tensor] = []

    def before(_, args: tuple, kwargs: dict) -> None:
        calls.append((args[0], args[1:], kwargs))

    def after(_, args: tuple, output):
        torch.set_grad_enabled(True)  # what comes after is the head and the loss
        leaves.append(_first(output).detach().requires_grad_())
        return leaves[-1] if isinstance(output, Tensor) else (leaves[-1], *output[1:])

    kept = []
    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(
                block.register_forward_pre_hook(before, with_kwargs=True)
            )
        hooks.enter_context(blocks[-1].register_forward_hook(after))
        for batch in length_buckets(lengths, batch_size):
            with torch.no_grad():  # until the hook behind the last block
                loss = answer_loss(model, [examples[i] for i in batch])
            (towards,) = torch.autograd.grad(loss / tokens, [leaves.pop()])
            kept.append(Kept(calls.copy(), towards))
            calls.clear()
    return kept


def _backward(
    block: nn.Module, at: int, wanted: Sequence[nn.Parameter], batches: list[Kept]
) -> list[Tensor]:
    """Gradients of the `wanted` parameters of one block; `batches` are taken to its input."""
    total = [torch.zeros_like(p) for p in wanted]
    for i, (calls, towards) in enumerate(batches):
        given, args, kwargs = calls[at]
        with torch.enable_grad():
            x = given.detach().requires_grad_()
            output = _first(block(x, *args, **kwargs))
            to_input, *parts = torch.autograd.grad(output, [x, *wanted], towards)
        batches[i] = Kept(calls[:at], to_input)  # this block's input is done with
        for gradient, part in zip(total, parts, strict=True):
            gradient += part
    return total


def gradient_table(gram: NDArray, labels: Sequence[str]) -> pd.DataFrame:
    """Every pair of tasks from the inner products of their gradients, (n, n).

    Columns task_a, task_b; gradient_l2 = ||g_a - g_b||; gradient_cosine; gradient_norm_a and
    gradient_norm_b. The norm of a task's gradient says how far the base is from solving it.
    """
    norm = np.sqrt(np.diagonal(gram))
    i, j = np.triu_indices(len(gram), 1)
    squares = norm[i] ** 2 + norm[j] ** 2 - 2 * gram[i, j]
    table = pd.DataFrame(combinations(labels, 2), columns=["task_a", "task_b"])
    return table.assign(
        gradient_l2=np.sqrt(np.maximum(0.0, squares)),
        gradient_cosine=gram[i, j] / (norm[i] * norm[j]),
        gradient_norm_a=norm[i],
        gradient_norm_b=norm[j],
    )
