"""What did fine-tuning change? One stream of task vectors over checkpoints, adapters, state dicts.

A specialist theta_i of a base theta_0 is seen as its task vector tau_i = theta_i - theta_0, tensor
by tensor, in fp32, whatever it is stored as: a safetensors folder (one file or shards), a PEFT LoRA
adapter (tau = scaling * B A, exactly), a state dict in memory. Nothing is dense before it is asked
for: files stay memory-mapped, adapters stay factors, and a `Lazy` tensor reads the rows it must.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.merge.adapters import is_adapter, read_adapter
from helpers.merge.blocks import Factors, Lazy, zero
from helpers.merge.weights import (
    FLOATS,
    read_folder,
    recorded_digest,
    without_aliases,
    without_tied_head,
)


class Source(NamedTuple):
    """A base or a specialist: its tensors as stored, or an adapter's factors, by base name."""

    label: str
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, Factors]
    base_digest: str | None = None  # parameter digest of the base it belongs to, if it is recorded


class Row(NamedTuple):
    """One tensor of the base and its n task vectors, all of one shape, fp32 (dense or `Lazy`)."""

    name: str
    base: Tensor | Lazy
    taus: list[Tensor] | list[Lazy]


def open_base(source: Path | str | Mapping[str, Tensor], label: str = "base") -> Source:
    """The base model from a safetensors folder or a state dict; nothing is read yet.

    Tied tensors appear once, under their first name. Raises ValueError for pickles and adapters.
    """
    if isinstance(source, Mapping):
        return Source(label, without_aliases(source), {})
    folder = Path(source)
    if is_adapter(folder):
        raise ValueError(f"{folder} is an adapter: give the model that it was trained on")
    sealed = (folder / "seals.json").is_file()  # elsewhere base.json tells of another model
    digest = recorded_digest(folder) if sealed else None
    return Source(label, without_tied_head(folder, read_folder(folder)), {}, digest)


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
    factors, copies = read_adapter(folder, label)
    return Source(label, copies, factors, digest)


# Do they fit? ------------------------------------------------------------------------------------


def check(base: Source, specialists: Sequence[Source]) -> None:
    """Raise ValueError naming the first tensor or specialist that does not fit the base.

    Names, shapes and kinds must agree; what is not floating-point must be equal; labels must
    differ.
    """
    labels = [s.label for s in specialists]
    if len(set(labels)) != len(labels):
        raise ValueError(f"specialists must have different labels, not {labels}")
    for name, tensor in base.tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise ValueError(f"the base stores {name} as {tensor.dtype}: convert it to bfloat16")
    _check_bases(base, specialists)
    for specialist in specialists:
        who = f"specialist {specialist.label}"
        fits = _check_adapter if specialist.factors else _check_checkpoint
        fits(who, base.tensors, specialist)


def _check_bases(base: Source, specialists: Sequence[Source]) -> None:
    """The bases that are recorded must be one."""
    recorded = [source for source in (base, *specialists) if source.base_digest]
    for other in recorded[1:]:
        if other.base_digest != recorded[0].base_digest:
            than = "this one" if recorded[0] is base else recorded[0].label
            raise ValueError(
                f"specialist {other.label} was trained from another base than {than}: their "
                "recorded digests differ"
            )


def _check_adapter(who: str, base: Mapping[str, Tensor], adapter: Source) -> None:
    for name, (_, B, A) in adapter.factors.items():
        if name not in base:
            raise ValueError(f"{who} adapts {name}: the base lacks it, or ties it to another")
        shape = (B.shape[0], A.shape[1])
        if base[name].shape != shape:
            raise ValueError(f"{who}: {name} is {shape}, in the base {tuple(base[name].shape)}")
    for name, copy in adapter.tensors.items():
        if name not in base or not torch.equal(base[name].float(), copy.float()):
            raise ValueError(f"{who} holds its own {name}, which differs from the base's")


def _check_checkpoint(who: str, base: Mapping[str, Tensor], checkpoint: Source) -> None:
    for name in sorted(base.keys() ^ checkpoint.tensors.keys()):
        lacking = who if name in base else "the base"
        raise ValueError(f"{who} and the base must hold the same tensors: {lacking} lacks {name}")
    for name, original in base.items():
        tensor = checkpoint.tensors[name]
        if original.shape != tensor.shape:
            here, there = tuple(tensor.shape), tuple(original.shape)
            raise ValueError(f"{who}: {name} is {here}, in the base {there}")
        if original.is_floating_point():
            if tensor.dtype not in FLOATS:
                raise ValueError(f"{who}: {name} is {tensor.dtype}, in the base {original.dtype}")
        elif original.dtype != tensor.dtype or not _equal(original, tensor):
            raise ValueError(f"{who}: {name} is not floating-point and differs from the base's")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, on whatever device and in whatever float type."""
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    return torch.equal(a, b.to(a.device))


def changed_names(base: Source, specialists: Sequence[Source]) -> list[str]:
    """Names, sorted, of the tensors that at least one specialist changed; no other takes part."""

    def changed(name: str, specialist: Source) -> bool:
        if name in specialist.factors:
            return True
        if name not in specialist.tensors:
            return False
        return not _equal(base.tensors[name], specialist.tensors[name])

    return [name for name in sorted(base.tensors) if any(changed(name, s) for s in specialists)]


# The stream --------------------------------------------------------------------------------------


def views(base: Source, specialists: Sequence[Source], device: str = "cpu") -> list[Row]:
    """The changed tensors as rows that hold no data yet, sorted by name: pass over them at will."""
    check(base, specialists)
    read = _reader(base, device)
    return [
        _lazy_row(name, base.tensors[name].shape, read, specialists, device)
        for name in changed_names(base, specialists)
    ]


def stream(base: Source, specialists: Sequence[Source], device: str = "cpu") -> Iterator[Row]:
    """The same rows one at a time with dense fp32 tensors, in the same order."""
    for row in views(base, specialists, device):
        yield Row(row.name, row.base[...], [tau[...] for tau in row.taus])


def _lazy_row(
    name: str,
    shape: torch.Size,
    read_base: Callable[[str, Any], Tensor],
    specialists: Sequence[Source],
    device: str,
) -> Row:
    def origin(rows) -> Tensor:
        return read_base(name, rows)

    def tau(specialist: Source) -> Lazy:
        if name in specialist.factors:
            scaling, B, A = specialist.factors[name]
            B = B.to(device)
            A = A.to(device)
            factors = Factors(scaling, B, A)
            return Lazy(shape, device, lambda rows: (B[rows] @ A).mul_(scaling), factors)
        if name not in specialist.tensors:
            return zero(shape, device)
        tuned = specialist.tensors[name]

        def difference(rows) -> Tensor:
            return tuned[rows].to(device, torch.float32) - origin(rows)

        return Lazy(shape, device, difference)

    return Row(name, Lazy(shape, device, origin), [tau(specialist) for specialist in specialists])


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
