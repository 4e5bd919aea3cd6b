"""Do specialists fit the base? Names brought to the base's; tensors, shapes and kinds compared."""

from collections.abc import Sequence

from torch import Tensor

from helpers.merge.adapters import Adapter, turned
from helpers.merge.anatomy import LAYER
from helpers.merge.sources import Source
from helpers.merge.ties import equal
from helpers.merge.weights import FLOATS

HEADS = ("merge", "base")


def check(
    base: Source, specialists: Sequence[Source], heads: str = "merge"
) -> list[Source]:
    """The specialists as they are merged: under the base's names, of its shapes.

    heads: "merge" compares and merges what lies outside the body like all else, "base" leaves it
    as the base has it. Raises ValueError naming the first tensor or specialist that does not fit:
    names, shapes and kinds must agree; what is not floating-point must be equal; labels must
    differ.
    """
    return fitted(base, named(base, specialists, heads))


def named(
    base: Source, specialists: Sequence[Source], heads: str = "merge"
) -> list[Source]:
    """The specialists with their tensors under the base's names (`check`), shapes as they are."""
    labels = [s.label for s in specialists]
    if len(set(labels)) != len(labels):
        raise ValueError(f"specialists must have different labels, not {labels}")
    _check_bases(base, specialists)
    _check_plain("the base", base)
    merged = _body(base) if heads == "base" else base.tensors.keys() - base.recomputed
    known = base.anatomy.names if base.anatomy else base.tensors.keys()
    skipped = base.tensors.keys() - merged if heads == "base" else None
    under_base_names = []
    for specialist in specialists:
        who = f"specialist {specialist.label}"
        _check_plain(who, specialist)
        if specialist.adapter is not None:
            specialist = _adapter_names(who, base, specialist, skipped)
        else:
            specialist = _checkpoint_names(base, specialist)
            if skipped is not None:
                body = {
                    name: x for name, x in specialist.tensors.items() if name in merged
                }
                specialist = specialist._replace(tensors=body)
            # what its class or the base's does not load, such as a pooler, stays as it is
            asked = merged & (known | specialist.tensors.keys())
            if heads == "base" and (own := specialist.anatomy):
                asked = {name for name in asked if own.loaded(name) in own.names}
            _check_names(who, base, asked, specialist)
        under_base_names.append(specialist)
    return under_base_names


def fitted(base: Source, specialists: Sequence[Source]) -> list[Source]:
    """The specialists, their shapes and kinds checked, without what an adapter saved unchanged."""
    checked = []
    for specialist in specialists:
        who = f"specialist {specialist.label}"
        _check_tensors(who, base, specialist)
        if specialist.adapter is not None:
            _check_adapter(who, base, specialist.adapter)
            tensors = specialist.tensors.items()
            saved = {name: x for name, x in tensors if not equal(base.tensors[name], x)}
            specialist = specialist._replace(tensors=saved)
        checked.append(specialist)
    return checked


def _body(base: Source) -> set[str]:
    """The names of the base's body, below its head if it has one."""
    if base.anatomy is None:
        raise ValueError(
            "which tensors are heads is known of models that transformers knows only"
        )
    names = base.tensors.keys() - base.recomputed
    inside = {name for name in names if name.startswith(f"{base.anatomy.prefix}.")}
    return inside or set(names)


def _check_plain(who: str, source: Source) -> None:
    """Codes of a quantised model are no weights: nothing can be added to them."""
    for name, tensor in source.tensors.items():
        if tensor.dtype in FLOATS:
            continue
        if source.quantised:
            raise ValueError(
                f"{who} is quantised ({source.quantised}: {name} is {tensor.dtype}): load it with "
                "transformers, dequantize() and save it, or take the model that it was made of"
            )
        if tensor.is_floating_point():
            raise ValueError(
                f"{who} stores {name} as {tensor.dtype}: convert it to bfloat16"
            )


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


# Names -------------------------------------------------------------------------------------------


def _checkpoint_names(base: Source, specialist: Source) -> Source:
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
    ties = dict(specialist.anatomy.ties if specialist.anatomy else {}) | body.ties
    for copy, original in ties.items():
        if copy in base.tensors and original in tensors:
            tensors.setdefault(copy, tensors[original])
        elif copy in tensors:  # equal to the original (`untied`)
            tensors.setdefault(original, tensors.pop(copy))
    return specialist._replace(tensors=tensors)


def _check_names(who: str, base: Source, merged: set[str], checkpoint: Source) -> None:
    for name in sorted(merged ^ checkpoint.tensors.keys()):
        lacking = who if name in merged else "the base"
        raise ValueError(
            f"{who} and the base must hold the same tensors: {lacking} lacks {name}"
            + _remedy(base, name)
        )


def _remedy(base: Source, name: str) -> str:
    """What to do about a tensor of another size, or one that is missing."""
    if base.anatomy is None:
        return ""
    if name in base.anatomy.vocabulary:
        return (
            ": bring it to the base's vocabulary with python -m helpers merge --tokenizer base, or "
            "with resize_token_embeddings"
        )
    if name not in _body(base) and not LAYER.search(name):
        return " (a head: --heads base leaves it as the base has it)"
    return " (is it made of this base?)"


def _adapter_names(
    who: str, base: Source, specialist: Source, skipped: set[str] | None
) -> Source:
    """An adapter's parts under the base's names, turned as the base's layers store them."""
    adapter, body = specialist.adapter, base.anatomy
    loaded = body.loaded if body else str
    # what the class says goes before an adapter's flag
    turns = body.transposed if body else {}
    parts = {}
    for field in ("factors", "saved", "magnitudes", "tokens", "biases"):
        parts[field] = {}
        for name, value in getattr(adapter, field).items():
            base_name = loaded(name)
            if skipped is not None and _is_head(base, base_name, skipped):
                continue
            if (
                field == "saved"
                and body
                and base_name in body.ties.keys() - base.tensors.keys()
            ):
                continue  # equal to the original (`untied`)
            _check_known(who, base, base_name)
            parts[field][base_name] = value
    for copy, original in body.ties.items() if body else ():
        if copy in base.tensors and original in parts["biases"]:
            parts["biases"].setdefault(copy, parts["biases"][original])
    flipped = set(map(loaded, adapter.transposed))
    stored = {name for name in parts["factors"] if turns.get(name, name in flipped)}
    for name in stored ^ (flipped & parts["factors"].keys()):
        parts["factors"][name] = turned(parts["factors"][name])
    adapter = adapter._replace(**parts, transposed=frozenset(stored))
    return specialist._replace(
        tensors=adapter.saved, factors=adapter.factors, adapter=adapter
    )


def _is_head(base: Source, name: str, skipped: set[str]) -> bool:
    return name in skipped or (name not in base.tensors and not LAYER.search(name))


def _check_known(who: str, base: Source, name: str) -> None:
    if name in base.tensors:
        return
    if base.anatomy is not None and name in base.anatomy.ties:
        raise ValueError(
            f"{who} adapts {name}, which the base ties to {base.anatomy.ties[name]}"
        )
    raise ValueError(f"{who} adapts {name}: the base lacks it{_remedy(base, name)}")


# Shapes and kinds --------------------------------------------------------------------------------


def _check_tensors(who: str, base: Source, specialist: Source) -> None:
    for name, tensor in sorted(specialist.tensors.items()):
        original = base.tensors[name]
        _check_shape(who, base, name, tensor.shape)
        if original.is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"{who}: {name} is {tensor.dtype}, in the base {original.dtype}"
            )
        if not original.is_floating_point() and not equal(original, tensor):
            raise ValueError(
                f"{who}: {name} is not floating-point and differs from the base's"
            )


def _check_shape(who: str, base: Source, name: str, shape: Sequence[int]) -> None:
    expected = tuple(base.tensors[name].shape)
    if tuple(shape) != expected:
        remedy = _remedy(base, name)
        raise ValueError(
            f"{who}: {name} is {tuple(shape)}, in the base {expected}{remedy}"
        )


def _check_adapter(who: str, base: Source, adapter: Adapter) -> None:
    shapes = {
        name: (B.shape[0], A.shape[1]) for name, (_, B, A) in adapter.factors.items()
    }
    shapes |= {name: tensor.shape for name, tensor in adapter.biases.items()}
    for name, shape in shapes.items():
        _check_shape(who, base, name, shape)
        if not base.tensors[name].is_floating_point():
            raise ValueError(
                f"{who} changes {name}, which the base stores as {base.tensors[name].dtype}: "
                "dequantise it first"
            )
    for name, magnitude in adapter.magnitudes.items():
        outs = base.tensors[name].shape[int(name in adapter.transposed)]
        if magnitude.shape != (outs,):
            raise ValueError(
                f"{who}: the magnitudes of {name} are {len(magnitude)}, not {outs}"
            )
    for name, (numbers, values) in adapter.tokens.items():
        rows, width = base.tensors[name].shape
        if values.shape[1] != width or not bool((numbers < rows).all()):
            raise ValueError(
                f"{who} trains tokens of {name} that the base does not have"
            )
