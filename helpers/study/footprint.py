"""How much memory does a visit take? Said before it starts."""

from math import prod

import torch

from helpers.study.bench import Bench

COPIES = 3  # of the largest tensor beside the task vectors: base, change and sum, in fp32


def forecast(
    bench: Bench,
    members: int,
) -> dict[str, float]:
    """Gigabytes by purpose for the merge of so many specialists, activations left out.

    base: the model; saved: its own blocks, set aside while merged ones stand in their place;
    change: the merged change, held whole in fp32 only; tensor: the largest tensor in work.
    """
    sizes = [prod(row.base.shape) for row in bench.rows(bench.specialists, "cpu")]
    parameters = list(bench.model.parameters())
    width = parameters[0].element_size()
    whole = bench.model.dtype == torch.float32
    amounts = {
        "base": sum(p.numel() * p.element_size() for p in parameters),
        "saved": sum(sizes) * width,
        "change": 4 * sum(sizes) * whole,
        "tensor": 4 * max(sizes, default=0) * (members + COPIES),
    }
    return {name: amount / 2**30 for name, amount in amounts.items()}


def sentence(
    bench: Bench,
    members: int,
) -> str:
    """The forecast in words."""
    amounts = forecast(bench, members)
    parts = ", ".join(f"{name} {amount:.2f}" for name, amount in amounts.items() if amount)
    return f"memory of a merge of {members}: {sum(amounts.values()):.2f} GB ({parts})"
