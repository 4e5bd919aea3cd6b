"""What did fine-tuning change? One stream of task vectors over checkpoints, adapters, state dicts.

A specialist theta_i of a base theta_0 is seen as its task vector tau_i = theta_i - theta_0, tensor
by tensor, in fp32, whatever it is stored as: a safetensors folder (one file or shards), a PEFT LoRA
adapter (tau = scaling * B A, exactly), a state dict in memory. Nothing is dense before it is asked
for: files stay memory-mapped, adapters stay factors, and a `Lazy` tensor reads the rows it must.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.merge.adapters import Adapter, is_adapter, read_adapter
from helpers.merge.anatomy import Anatomy, anatomy, as_loaded, config_of
from helpers.merge.blocks import Factors, Lazy, zero
from helpers.merge.fit import changed_names, check
from helpers.merge.weights import read_folder, recorded_digest, without_aliases


class Source(NamedTuple):
    """A base or a specialist: its tensors as loaded, or an adapter's factors, by base name."""

    label: str
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, Factors]
    base_digest: str | None = None  # parameter digest of the base it belongs to, if it is recorded
    adapter: Adapter | None = None
    anatomy: Anatomy | None = None
    recomputed: frozenset[str] = frozenset()  # tensors in the file that loading leaves aside
    renamed: int = 0  # tensors whose names in the file are others
    quantised: str | None = None  # by which method


class Row(NamedTuple):
    """One tensor of the base and its n task vectors, all of one shape, fp32 (dense or `Lazy`)."""

    name: str
    base: Tensor | Lazy
    taus: list[Tensor] | list[Lazy]


def open_base(source: Path | str | Mapping[str, Tensor], label: str = "base") -> Source:
    """The base model from a safetensors folder or a state dict; nothing is read yet.

    Tensors have the names that the model's class loads them under, tied ones appear once. Raises
    ValueError for pickles and adapters.
    """
    if isinstance(source, Mapping):
        return Source(label, without_aliases(source), {})
    folder = Path(source)
    if is_adapter(folder):
        raise ValueError(f"{folder} is an adapter: give the model that it was trained on")
    sealed = (folder / "seals.json").is_file()  # elsewhere base.json tells of another model
    body = anatomy(folder)
    loaded = as_loaded(folder, read_folder(folder), body)
    quantised = config_of(folder).get("quantization_config")
    return Source(
        label,
        loaded.tensors,
        {},
        recorded_digest(folder) if sealed else None,
        anatomy=body,
        recomputed=loaded.recomputed,
        renamed=loaded.renamed,
        quantised=str(quantised.get("quant_method")) if isinstance(quantised, dict) else None,
    )


def open_specialist(source: Path | str | Mapping[str, Tensor], label: str | None = None) -> Source:
    """A specialist from a PEFT LoRA folder, a safetensors folder, or a state dict.

    `label` names it in reports and seeds its random masks; a folder's own name by default. Raises
    ValueError, with the reason, for what cannot be merged exactly and for pickles.
    """
    if isinstance(source, Mapping):
        return open_base(source, label or "specialist")
    folder = Path(source)
    label = label or folder.resolve().name
    digest = recorded_digest(folder)
    if not is_adapter(folder):
        return open_base(folder, label)._replace(base_digest=digest)
    adapter = read_adapter(folder, label)
    return Source(label, adapter.saved, adapter.factors, digest, adapter)


# The stream --------------------------------------------------------------------------------------


def views(
    base: Source, specialists: Sequence[Source], device: str = "cpu", heads: str = "merge"
) -> list[Row]:
    """The changed tensors as rows that hold no data yet, sorted by name: pass over them at will.

    Checked first (`fit.check`, which says what `heads` means).
    """
    fitted = check(base, specialists, heads)
    read = _reader(base, device)
    rows = []
    for name in changed_names(base, fitted):
        shape = base.tensors[name].shape
        origin = Lazy(shape, device, partial(read, name))
        taus = [_task_vector(name, origin, specialist) for specialist in fitted]
        rows.append(Row(name, origin, taus))
    return rows


def stream(base: Source, specialists: Sequence[Source], device: str = "cpu") -> Iterator[Row]:
    """The same rows one at a time with dense fp32 tensors, in the same order."""
    for row in views(base, specialists, device):
        yield Row(row.name, row.base[...], [tau[...] for tau in row.taus])


def _task_vector(name: str, origin: Lazy, specialist: Source) -> Lazy:
    """What a specialist changed in one tensor of the base."""
    shape, device = origin.shape, origin.device
    factors = specialist.factors.get(name)
    saved = specialist.tensors.get(name)
    if _has_extras(name, specialist):
        return _whole_change(name, origin, specialist)
    if factors is not None and saved is None:
        scaling = factors.scaling
        B = factors.B.to(device)
        A = factors.A.to(device)
        low_rank = Factors(scaling, B, A)
        return Lazy(shape, device, lambda rows: (B[rows] @ A).mul_(scaling), low_rank)
    if saved is None:
        return zero(shape, device)

    def difference(rows) -> Tensor:
        tuned = saved[rows].to(device, torch.float32)
        if factors is not None:
            tuned = tuned + (factors.B[rows] @ factors.A).mul_(factors.scaling).to(device)
        return tuned - origin[rows]

    return Lazy(shape, device, difference)


def _has_extras(name: str, specialist: Source) -> bool:
    adapter = specialist.adapter
    if adapter is None:
        return False
    return any(name in part for part in (adapter.magnitudes, adapter.tokens, adapter.biases))


def _whole_change(name: str, origin: Lazy, specialist: Source) -> Lazy:
    """The change of a tensor with a magnitude (DoRA: m (W + s B A) / ||W + s B A|| by rows; Liu et
    al. 2024, eq. 5), with trained token rows or with an added bias, as PEFT merges them.
    """
    shape, device, adapter = origin.shape, origin.device, specialist.adapter
    plain = specialist._replace(adapter=None)
    change = _task_vector(name, origin, plain)
    magnitude = adapter.magnitudes.get(name)
    bias = adapter.biases.get(name)
    numbers, values = adapter.tokens.get(name, (torch.tensor([]), None))

    def read(rows) -> Tensor:
        tuned = origin[rows] + change[rows]
        if magnitude is not None:
            factor = magnitude[rows].to(device) / torch.linalg.vector_norm(tuned, dim=1)
            tuned = tuned * factor[:, None]
        if bias is not None:
            tuned = tuned + bias[rows].to(device)
        if values is not None:
            here = torch.arange(shape[0])[rows]
            at, token = (here[:, None] == numbers).nonzero(as_tuple=True)
            tuned[at.to(device)] = values[token].to(device)
        return tuned - origin[rows]

    return Lazy(shape, device, read)


def _reader(base: Source, device: str) -> Callable[[str, Any], Tensor]:
    """Rows of a base's tensor in fp32; asked for the same ones again, as n task vectors do, it
    converts them once.
    """
    last: tuple[Any, Tensor | None] = (None, None)

    def read(name: str, rows: Any) -> Tensor:
        nonlocal last
        if last[0] != (name, rows):
            block = base.tensors[name][rows]
            last = (name, rows), block.to(device, torch.float32)
        return last[1]

    return read


# Into a live model -------------------------------------------------------------------------------


@contextmanager
def applied(model: torch.nn.Module, delta: Mapping[str, Tensor]) -> Iterator[torch.nn.Module]:
    """`model` with base + delta as its parameters inside the `with`, and the base again after it.

    The base's own storage is set aside and put back, so it is restored bit for bit. Raises
    ValueError if the model is not fp32 or a name or a shape does not fit.
    """
    parameters = dict(model.named_parameters())
    for name, change in delta.items():
        _check_parameter(name, parameters.get(name), change)
    base = {name: parameters[name].data for name in delta}
    try:
        for name, change in delta.items():
            parameters[name].data = base[name] + change.to(base[name].device)
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
    if parameter.dtype != torch.float32:
        raise ValueError(f"{name} of the model is {parameter.dtype}: load the model in fp32")
