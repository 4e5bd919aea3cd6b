"""Does it fit? Gigabytes that a process takes and that are free, asked before long work."""

from pathlib import Path
from typing import Any

import pandas as pd
import psutil

GB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# of the largest tensor beside the task vectors: base, change and sum, in fp32
COPIES = 3


def free_gb(device: str = "cpu") -> float:
    """What is free on this machine, on its CUDA device, or on all of them ("auto")."""
    if device == "cpu":
        return psutil.virtual_memory().available / GB
    import torch

    devices = range(torch.cuda.device_count()) if device == "auto" else [device]
    free = sum(torch.cuda.mem_get_info(each)[0] for each in devices) / GB
    return free or free_gb()  # accelerate falls back on the CPU


def parameters(folder: Path) -> int:
    """How many numbers the weights that a folder loads hold; none of them is read."""
    from helpers import merge  # loads torch

    return sum(tensor.numel() for tensor in merge.read_folder(folder).values())


def with_merge_gb(parameters: float, dtype: str) -> float:
    """What a base of so many parameters and one merge of it take."""
    return parameters * 2 * BYTES.get(dtype, 4) / GB


def check_base(name: str, folder: Path, dtype: str, device: str) -> None:
    """Raise ValueError unless a base and one merge of it fit into what is free."""
    needed = with_merge_gb(parameters(folder), dtype)
    free = free_gb(device)
    if needed > free:
        raise ValueError(
            f"{name} in {dtype} and one merge of it take {needed:.1f} GB, and {free:.1f} GB are "
            f"free ({device}): name a smaller model, another DTYPE or DEVICE, or fewer WORKERS"
        )


def forecast(bench: Any, members: int) -> dict[str, float]:
    """Gigabytes by purpose for the merge of so many specialists, activations left out.

    base: the model; saved: its own blocks, set aside while merged ones stand in their place;
    change: the merged change, held whole in fp32 only; tensor: the largest tensor in work. `bench`
    is a `Bench`.
    """
    sizes = [row.base.shape.numel() for row in bench.rows(bench.specialists, "cpu")]
    width = bench.model.dtype.itemsize
    amounts = {
        "base": sum(p.numel() * p.element_size() for p in bench.model.parameters()),
        "saved": sum(sizes) * width,
        "change": 4 * sum(sizes) * (width == 4),
        "tensor": 4 * max(sizes, default=0) * (members + COPIES),
    }
    return {name: amount / GB for name, amount in amounts.items()}


def merge_sentence(bench: Any, members: int) -> str:
    """The forecast in words."""
    amounts = forecast(bench, members)
    parts = ", ".join(
        f"{name} {amount:.2f}" for name, amount in amounts.items() if amount
    )
    return f"memory of a merge of {members}: {sum(amounts.values()):.2f} GB ({parts})"


def peak_gb(study: Path) -> float:
    """The most that a process held while it trained a committed study's specialists."""
    return pd.read_csv(study / "specialists.csv")["peak_memory_mb"].max() / 2**10


def sentence(each: float, workers: int) -> str:
    """How many processes of `each` GB fit here, and what to do where `workers` do not."""
    free = free_gb()
    fit = max(int(free / each), 1)
    text = f"A process holds up to {each:.1f} GB; {free:.0f} GB are free, so {fit} fit here"
    return f"{text}: lower WORKERS from {workers}" if workers > fit else text
