"""What did fine-tuning change? One stream of task vectors over checkpoints, adapters, state dicts.

A specialist theta_i of a base theta_0 is seen as its task vector tau_i = theta_i - theta_0, tensor
by tensor, in fp32, whatever it is stored as: a safetensors folder (one file or shards), a PEFT LoRA
adapter (tau = scaling * B A, exactly), a state dict in memory. Nothing is dense before it is asked
for: files stay memory-mapped, adapters stay factors, and a `Lazy` tensor reads the rows it must.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.merge.adapters import Adapter
from helpers.merge.blocks import Factors, Lazy, row_blocks, zero
from helpers.merge.fit import check
from helpers.merge.sources import Source
from helpers.merge.ties import equal, untied


class Row(NamedTuple):
    """One tensor of the base and its n task vectors, all of one shape, fp32 (dense or `Lazy`)."""

    name: str
    base: Tensor | Lazy
    taus: list[Tensor] | list[Lazy]


# The stream --------------------------------------------------------------------------------------


def views(
    base: Source,
    specialists: Sequence[Source],
    device: str = "cpu",
    heads: str = "merge",
) -> list[Row]:
    """The changed tensors as rows that hold no data yet, sorted by name: pass over them at will.

    Checked first (`fit.check`, which says what `heads` means).
    """
    base = untied(base, specialists)
    return rows_of(base, check(base, specialists, heads), device)


def rows_of(base: Source, fitted: Sequence[Source], device: str = "cpu") -> list[Row]:
    """The rows of specialists that `fit.check` has seen."""
    read = _reader(base, device)
    rows = []
    for name in changed_names(base, fitted):
        tensor = base.tensors[name]
        origin = Lazy(tensor.shape, device, partial(read, name))
        taus = [
            _task_vector(name, origin, specialist, tensor.dtype)
            for specialist in fitted
        ]
        rows.append(Row(name, origin, taus))
    return rows


def changed_names(base: Source, specialists: Sequence[Source]) -> list[str]:
    """Names, sorted, of the tensors that at least one specialist changed; no other takes part."""
    names = sorted(base.tensors)
    return [name for name in names if any(_changes(name, base, s) for s in specialists)]


def _changes(name: str, base: Source, specialist: Source) -> bool:
    factors, adapter = specialist.factors.get(name), specialist.adapter
    if factors is not None and bool(factors.B.any()) and bool(factors.A.any()):
        return True
    if adapter and _has_extras(name, adapter):
        return True
    return name in specialist.tensors and not equal(
        base.tensors[name], specialist.tensors[name]
    )


def _has_extras(name: str, adapter: Adapter) -> bool:
    """Whether a tensor has a magnitude, trained token rows or an added bias."""
    return any(
        name in part for part in (adapter.magnitudes, adapter.tokens, adapter.biases)
    )


def stream(
    base: Source, specialists: Sequence[Source], device: str = "cpu"
) -> Iterator[Row]:
    """The same rows one at a time with dense fp32 tensors, in the same order."""
    for row in views(base, specialists, device):
        yield Row(row.name, row.base[...], [tau[...] for tau in row.taus])


def _task_vector(
    name: str, origin: Lazy, specialist: Source, stored: torch.dtype
) -> Lazy:
    """What a specialist changed in one tensor of the base, which is stored in that type."""
    shape, device = origin.shape, origin.device
    factors = specialist.factors.get(name)
    saved = specialist.tensors.get(name)
    if specialist.adapter is not None and _has_extras(name, specialist.adapter):
        plain = _task_vector(name, origin, specialist._replace(adapter=None), stored)
        return _whole_change(name, origin, plain, specialist.adapter)
    if saved is not None:
        return _saved_change(origin, saved, factors, stored)
    if factors is None:
        return zero(shape, device)
    scaling, B, A = factors.scaling, factors.B.to(device), factors.A.to(device)
    low_rank = Factors(scaling, B, A)

    def product(rows, out: Tensor | None) -> Tensor:
        return torch.matmul(B[rows], A, out=out).mul_(scaling)

    return Lazy(shape, device, product, low_rank)


def _saved_change(
    origin: Lazy, saved: Tensor, factors: Factors | None, stored: torch.dtype
) -> Lazy:
    """The change to a tensor that was saved whole, with an adapter's factors beside it or without.

    Saved on a coarser grid than the base's, what that grid makes of the base is no change.
    """
    device = origin.device
    coarse = saved.dtype != stored and saved.dtype.itemsize < 4

    def difference(rows, out: Tensor | None) -> Tensor:
        base = origin[rows]
        block = saved[rows].to(device)
        tuned = block.to(torch.float32)
        if coarse:
            tuned = torch.where(base.to(block.dtype) == block, base, tuned)
        if factors is not None:
            tuned = tuned + (factors.B[rows] @ factors.A).mul_(factors.scaling).to(
                device
            )
        return torch.sub(tuned, base, out=out)

    return Lazy(origin.shape, device, difference)


def _whole_change(name: str, origin: Lazy, change: Lazy, adapter: Adapter) -> Lazy:
    """The change of a tensor with magnitudes (DoRA: m (W + s B A) / ||W + s B A|| by outputs; Liu
    et al. 2024, eq. 5), with trained token rows or with an added bias, as PEFT merges them.
    """
    shape, device = origin.shape, origin.device
    magnitude = adapter.magnitudes.get(name)
    bias = adapter.biases.get(name)
    numbers, values = adapter.tokens.get(name, (torch.tensor([]), None))
    by_columns = name in adapter.transposed

    @cache
    def column_norms() -> Tensor:
        squares = 0.0
        for at in row_blocks(shape, device):
            tuned = (origin[at.rows] + change[at.rows]).double()
            squares = squares + tuned.square().sum(0)
        return squares.sqrt()

    def read(rows, out: Tensor | None) -> Tensor:
        tuned = origin[rows] + change[rows]
        if magnitude is not None and by_columns:
            tuned = tuned * (magnitude.to(device) / column_norms().float())
        elif magnitude is not None:
            norms = torch.linalg.vector_norm(tuned, dim=1)
            factor = magnitude[rows].to(device) / norms
            tuned = tuned * factor[:, None]
        if bias is not None:
            tuned = tuned + bias[rows].to(device)
        if values is not None:
            here = torch.arange(shape[0])[rows]
            at, token = (here[:, None] == numbers).nonzero(as_tuple=True)
            tuned[at.to(device)] = values[token].to(device)
        return torch.sub(tuned, origin[rows], out=out)

    return Lazy(shape, device, read)


def _reader(base: Source, device: str) -> Callable[[str, Any], Tensor]:
    """Rows of a base's tensor in fp32; asked for the same ones again, as n task vectors do, it
    converts them once.
    """
    last = threading.local()  # each thread is at a tensor of its own

    def read(name: str, rows: Any, out: Tensor | None) -> Tensor:
        asked = name, rows
        if getattr(last, "asked", None) != asked:
            block = base.tensors[name][rows]
            last.block = block.to(device, torch.float32)
            last.asked = asked
        return last.block if out is None else out.copy_(last.block)

    return read


# Into a live model -------------------------------------------------------------------------------


@contextmanager
def applied(
    model: torch.nn.Module, delta: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> Iterator[torch.nn.Module]:
    """`model` with base + delta as its parameters inside the `with`, and the base again after it.

    Sums are taken in fp32 and rounded to the model's own type. The base's storage of what changes
    is set aside and put back, so it is restored bit for bit. Pairs (name, change) are taken one at
    a time: beside base and merge no change is then held. Raises ValueError if a name or a shape
    does not fit.
    """
    parameters = dict(model.named_parameters())
    changes = delta.items() if isinstance(delta, Mapping) else delta
    base: dict[str, Tensor] = {}
    try:
        for name, change in changes:
            _check_parameter(name, parameters.get(name), change)
            original = parameters[name].data
            base[name] = original
            summed = original.float() + change.to(original.device)
            parameters[name].data = summed.to(original.dtype)
        yield model
    finally:
        for name, original in base.items():
            parameters[name].data = original


def _check_parameter(name: str, parameter: Tensor | None, change: Tensor) -> None:
    if parameter is None:
        raise ValueError(f"the model has no parameter {name}")
    if parameter.shape != change.shape:
        shape = tuple(parameter.shape)
        raise ValueError(f"{name} is {tuple(change.shape)}, in the model {shape}")
