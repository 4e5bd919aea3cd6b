"""Do specialists fit the base? Names brought to the base's; tensors, shapes and kinds compared."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from helpers.merge.adapters import turned
from helpers.merge.blocks import Factors
from helpers.merge.weights import FLOATS

if TYPE_CHECKING:
    from helpers.merge.vectors import Source


HEADS = ("merge", "base")


def check(base: "Source", specialists: Sequence["Source"], heads: str = "merge") -> list["Source"]:
    """The specialists with their tensors under the base's names.

    heads: "merge" compares and merges what lies outside the body like all else, "base" leaves it
    as the base has it. Raises ValueError naming the first tensor or specialist that does not fit:
    names, shapes and kinds must agree; what is not floating-point must be equal; labels must
    differ.
    """
    labels = [s.label for s in specialists]
    if len(set(labels)) != len(labels):
        raise ValueError(f"specialists must have different labels, not {labels}")
    _check_plain("the base", base)
    _check_bases(base, specialists)
    merged = base.tensors.keys() - base.recomputed
    if heads == "base":
        merged = _body(base)
    fitted = []
    for specialist in specialists:
        who = f"specialist {specialist.label}"
        _check_plain(who, specialist)
        if specialist.adapter is None:
            specialist = _under_base_names(who, base, specialist)
            if heads == "base":
                body = {name: x for name, x in specialist.tensors.items() if name in merged}
                specialist = specialist._replace(tensors=body)
            _check_checkpoint(who, base, merged, specialist)
        else:
            skipped = merged if heads == "base" else None
            specialist = _adapter_under_base_names(who, base, specialist, skipped)
        fitted.append(specialist)
    return fitted


def _body(base: "Source") -> set[str]:
    """The names of the base's body, below its head if it has one."""
    if base.anatomy is None:
        raise ValueError("which tensors are heads is known of models that transformers knows only")
    names = base.tensors.keys() - base.recomputed
    inside = {name for name in names if name.startswith(f"{base.anatomy.prefix}.")}
    return inside or set(names)


def _check_plain(who: str, source: "Source") -> None:
    """Codes of a quantised model are no weights: nothing can be added to them."""
    for name, tensor in source.tensors.items():
        packed = not tensor.is_floating_point() or tensor.dtype not in FLOATS
        if packed and source.quantised:
            raise ValueError(
                f"{who} is quantised ({source.quantised}: {name} is {tensor.dtype}): load it with "
                "transformers, dequantize() and save it, or take the model that it was made of"
            )
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise ValueError(f"{who} stores {name} as {tensor.dtype}: convert it to bfloat16")


def _check_bases(base: "Source", specialists: Sequence["Source"]) -> None:
    """The bases that are recorded must be one."""
    recorded = [source for source in (base, *specialists) if source.base_digest]
    for other in recorded[1:]:
        if other.base_digest != recorded[0].base_digest:
            than = "this one" if recorded[0] is base else recorded[0].label
            raise ValueError(
                f"specialist {other.label} was trained from another base than {than}: their "
                "recorded digests differ"
            )


# Checkpoints -------------------------------------------------------------------------------------


def _under_base_names(who: str, base: "Source", specialist: "Source") -> "Source":
    """A checkpoint under the names of the base's class, without what loading computes anew."""
    body = base.anatomy
    if body is None:
        return specialist
    tensors: dict[str, Tensor] = {}
    for name, tensor in specialist.tensors.items():
        loaded = body.loaded(name)
        if body.is_recomputed(loaded) or name in specialist.recomputed:
            continue
        tensors[loaded] = tensor
    for copy, original in body.ties.items():
        tensor = tensors.pop(copy, None)
        if tensor is not None and not torch.equal(tensors.setdefault(original, tensor), tensor):
            raise ValueError(f"{who} unties {copy}, which in the base is {original}")
    return specialist._replace(tensors=tensors)


def _check_checkpoint(who: str, base: "Source", merged: set[str], checkpoint: "Source") -> None:
    for name in sorted(merged ^ checkpoint.tensors.keys()):
        lacking = who if name in merged else "the base"
        raise ValueError(
            f"{who} and the base must hold the same tensors: {lacking} lacks {name}"
            + _remedy(base, name)
        )
    for name in sorted(merged):
        original = base.tensors[name]
        tensor = checkpoint.tensors[name]
        if original.shape != tensor.shape:
            here, there = tuple(tensor.shape), tuple(original.shape)
            remedy = _remedy(base, name)
            raise ValueError(f"{who}: {name} is {here}, in the base {there}{remedy}")
        if original.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{who}: {name} is {tensor.dtype}, in the base {original.dtype}")
        if not original.is_floating_point() and not equal(original, tensor):
            raise ValueError(f"{who}: {name} is not floating-point and differs from the base's")


def _remedy(base: "Source", name: str) -> str:
    """What to do about a tensor of another size, or one that is missing."""
    if base.anatomy is None:
        return ""
    if base.anatomy.layers.get(name) == "Embedding" or name == "lm_head.weight":
        return ": bring it to the base's vocabulary with resize_token_embeddings, and save it"
    if name not in _body(base):
        return " (a head: --heads base leaves it as the base has it)"
    return ""


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, on whatever device and in whatever float type."""
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    return torch.equal(a, b.to(a.device))


# Adapters ----------------------------------------------------------------------------------------


def _adapter_under_base_names(
    who: str, base: "Source", specialist: "Source", merged: set[str] | None
) -> "Source":
    """An adapter's parts under the base's names and turned as the base's layers store them; whole
    tensors only where they differ from the base's. Of `merged` names, if they are given.
    """
    adapter = specialist.adapter
    parts = {}
    for field in ("factors", "saved", "magnitudes", "tokens", "biases"):
        parts[field] = {}
        for name, value in getattr(adapter, field).items():
            if merged is None or base.anatomy.loaded(name) in merged:
                parts[field][_base_name(who, base, name)] = value
    flipped = {base.anatomy.loaded(x) if base.anatomy else x for x in adapter.transposed}
    factors = {}
    for name, pair in parts["factors"].items():
        factors[name] = _oriented(base, name, pair, name in flipped)
    fitted = adapter._replace(**parts | {"factors": factors})
    _check_adapter(who, base, fitted)
    saved = {
        name: tensor
        for name, tensor in fitted.saved.items()
        if not equal(base.tensors[name], tensor)
    }
    return specialist._replace(tensors=saved, factors=factors, adapter=fitted)


def _base_name(who: str, base: "Source", name: str) -> str:
    body = base.anatomy
    if body is not None:
        name = body.loaded(name)
    if name in base.tensors:
        return name
    if body is not None and name in body.ties:
        raise ValueError(f"{who} adapts {name}, which the base ties to {body.ties[name]}")
    raise ValueError(f"{who} adapts {name}: the base lacks it{_remedy(base, name)}")


def _oriented(base: "Source", name: str, pair: Factors, flipped: bool) -> Factors:
    """The factors as the base stores the weight: its layer's class decides, if it is known, and
    else the adapter's own flag.
    """
    transposed = base.anatomy.is_transposed(name) if base.anatomy else None
    if transposed is None or transposed == flipped:
        return pair
    return turned(pair)


def _check_adapter(who: str, base: "Source", adapter) -> None:
    shapes = {name: (B.shape[0], A.shape[1]) for name, (_, B, A) in adapter.factors.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.saved.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.biases.items()}
    for name, shape in shapes.items():
        original = base.tensors[name]
        if original.shape != shape:
            raise ValueError(f"{who}: {name} is {shape}, in the base {tuple(original.shape)}")
        if not original.is_floating_point():
            raise ValueError(
                f"{who} changes {name}, which the base stores as {original.dtype}: dequantise it "
                "first"
            )
    for name, magnitude in adapter.magnitudes.items():
        if name in adapter.transposed or magnitude.shape != base.tensors[name].shape[:1]:
            raise ValueError(f"{who}: the magnitudes of {name} are not one for each of its rows")
    for name, (numbers, values) in adapter.tokens.items():
        rows, width = base.tensors[name].shape
        if values.shape[1] != width or not bool(((numbers >= 0) & (numbers < rows)).all()):
            raise ValueError(f"{who} trains tokens of {name} that the base does not have")


def changed_names(base: "Source", specialists: Sequence["Source"]) -> list[str]:
    """Names, sorted, of the tensors that at least one specialist changed; no other takes part."""

    def changed(name: str, specialist: "Source") -> bool:
        if name in specialist.factors:
            return True
        adapter = specialist.adapter
        if adapter and (name in adapter.tokens or name in adapter.biases):
            return True
        if name not in specialist.tensors:
            return False
        return not equal(base.tensors[name], specialist.tensors[name])

    return [name for name in sorted(base.tensors) if any(changed(name, s) for s in specialists)]
