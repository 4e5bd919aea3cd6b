"""What is merged? A base and its specialists: safetensors folders, PEFT adapters, state dicts.

Nothing is read before it is asked for: files stay memory-mapped, adapters stay factors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from helpers.merge.adapters import Adapter, is_adapter, read_adapter
from helpers.merge.anatomy import Anatomy, anatomy, as_loaded, config_of
from helpers.merge.blocks import Factors
from helpers.merge.weights import read_folder, recorded_digest, without_aliases


class Source(NamedTuple):
    """A base or a specialist: its tensors as loaded, or an adapter's factors, by base name."""

    label: str
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, Factors]
    # parameter digest of the base it belongs to, if it is recorded
    base_digest: str | None = None
    adapter: Adapter | None = None
    anatomy: Anatomy | None = None
    # tensors in the file that loading leaves aside
    recomputed: frozenset[str] = frozenset()
    filed: Mapping[str, str] = {}  # noqa: RUF012 (a tensor's name -> another in the file)
    quantised: str | None = None  # how


def open_base(source: Path | str | Mapping[str, Tensor], label: str = "base") -> Source:
    """The base model from a safetensors folder or a state dict; nothing is read yet.

    Tensors have the names that the model's class loads them under, tied ones appear once. Raises
    ValueError for pickles and adapters.
    """
    if isinstance(source, Mapping):
        return Source(label, without_aliases(source), {})
    folder = Path(source)
    if is_adapter(folder):
        raise ValueError(
            f"{folder} is an adapter: give the model that it was trained on"
        )
    # elsewhere base.json tells of another model
    sealed = (folder / "seals.json").is_file()
    body = anatomy(folder)
    tensors, filed = as_loaded(folder, read_folder(folder), body)
    recomputed = frozenset(
        name for name in tensors if body and body.is_recomputed(name)
    )
    quantised = config_of(folder).get("quantization_config")
    return Source(
        label,
        tensors,
        {},
        recorded_digest(folder) if sealed else None,
        anatomy=body,
        recomputed=recomputed,
        filed=filed,
        quantised=str(quantised.get("quant_method"))
        if isinstance(quantised, dict)
        else None,
    )


def open_specialist(
    source: Path | str | Mapping[str, Tensor], label: str | None = None
) -> Source:
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
    adapter = read_adapter(folder)
    return Source(label, adapter.saved, adapter.factors, digest, adapter)
