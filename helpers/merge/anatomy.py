"""How does a model class name its tensors, and which of them are one? Asked of transformers itself.

Files hold a model's tensors under several names: without the class's prefix (the hub's GPT-2), by
the names of older versions (LayerNorm.gamma), with copies of tied ones, with buffers that loading
computes anew. What counts is what is loaded.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.merge.weights import json_if_there, one_line, read_text

COUNTED = re.compile("layer|block|expert|num_labels")  # what a class makes one by one
MOST = 100_000  # of each that a configuration may ask for


class Anatomy(NamedTuple):
    """What the class of a model says of its tensors, all by the names that it loads them under."""

    architecture: str
    prefix: str  # of the body's names in a model with a head
    names: frozenset[str]  # of what is loaded from files
    ties: Mapping[str, str]  # a copy's name -> the name of the tensor that it is
    recomputed: frozenset[str]  # buffers that no file needs to hold
    ignored: tuple[str, ...]  # patterns of names in files that are not loaded
    # a weight's name -> whether it is stored (in, out) for LoRA
    transposed: Mapping[str, bool]
    vocabulary: frozenset[str]  # tensors with a row for each token
    settings: Mapping[str, Any]  # the configuration, as the class reads it
    layers: int | None  # of the part that reads text
    renamings: Sequence[Any]  # transformers' own, of names in older files

    def loaded(self, name: str) -> str:
        """The name under which a file's tensor is loaded: with or without the class's prefix, or
        from an older one.
        """
        if found := self._known(name):
            return found
        renamed = name
        for renaming in self.renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        return self._known(renamed) or name

    def _known(self, name: str) -> str | None:
        for candidate in (
            name,
            f"{self.prefix}.{name}",
            name.removeprefix(f"{self.prefix}."),
        ):
            if candidate in self.names or candidate in self.recomputed:
                return candidate
        return None

    def is_recomputed(self, name: str) -> bool:
        """Whether loading leaves a file's tensor aside."""
        if name in self.names:
            return False
        return name in self.recomputed or any(re.search(x, name) for x in self.ignored)


def anatomy(folder: Path) -> Anatomy | None:
    """The anatomy of the model in a folder; None if transformers has no class of that name.

    The class is made on the meta device, from its configuration alone: no weight is read, no code
    of the folder is run.
    """
    config = config_of(folder)
    architectures = config.get("architectures")
    if (
        not isinstance(architectures, list)
        or not architectures
        or "model_type" not in config
    ):
        return None
    file = folder / "config.json"
    text, architecture = read_text(file), str(architectures[0])
    try:
        return _anatomy(text, architecture)
    except Exception as error:
        # whatever a class makes of a configuration that it cannot take
        raise ValueError(
            f"{file} describes no {architecture}: {one_line(error)}"
        ) from error


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's model configuration; empty if it has none."""
    return json_if_there(folder / "config.json")


@lru_cache
def _anatomy(text: str, architecture: str) -> Anatomy | None:
    """The anatomy by a configuration's text, which many models share."""
    # seconds and 0.2 GB: not for folders that say nothing of a class
    import transformers

    model_class = getattr(transformers, architecture, None)
    config_class = getattr(model_class, "config_class", None)
    if config_class is None:
        return None
    stated = json.loads(text)
    _check_counts(stated)
    # infinity and NaN, which JSON does not have, as transformers writes them
    config = config_class.from_dict(config_class._decode_special_floats(stated))
    with torch.device("meta"):
        model = model_class(config)
    names = model.state_dict().keys()
    buffers = {name for name, _ in model.named_buffers()}
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ())]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")  # of each layer, in old files
    ties = dict(model.all_tied_weights_keys)
    turned = (torch.nn.Embedding, transformers.pytorch_utils.Conv1D)
    transposed = {}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(path, recurse=False):
            transposed[name] = isinstance(module, turned)
    return Anatomy(
        architecture,
        model.base_model_prefix,
        frozenset(names),
        ties,
        frozenset(buffers - names),
        tuple(patterns),
        transposed,
        frozenset(_vocabulary(model)),
        config.to_dict(),
        getattr(config.get_text_config(), "num_hidden_layers", None),
        _renamings(model),
    )


def _check_counts(config: Mapping[str, Any]) -> None:
    """Raise ValueError for more of a thing than any model has: its class would make every one."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif isinstance(value, int) and value > MOST and COUNTED.search(key):
            raise ValueError(f"{key} is {value}")


def _renamings(model: torch.nn.Module) -> list[Any]:
    """How transformers renames old files' tensors; not how it stacks them, as experts."""
    from transformers import conversion_mapping, core_model_loading

    transforms = conversion_mapping.get_model_conversion_mapping(model)
    stacks = core_model_loading.WeightConverter
    return [x for x in transforms if not isinstance(x, stacks)]


def _vocabulary(model: torch.nn.Module) -> list[str]:
    """The parameters of the layers that read and write tokens."""
    ends = []
    for layer in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # a model of no text
            ends.append(layer())
    shared = {
        id(x) for end in ends if end is not None for x in end.parameters(recurse=False)
    }
    parameters = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if id(parameter) in shared]


def as_loaded(
    where: Path, stored: dict[str, Tensor], body: Anatomy | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors under the names of the class, every tied one once, and the names that the
    file has for those that it calls otherwise.

    A copy that differs from its original is a tensor of its own, as transformers has it (the head
    of flan-t5). Raises ValueError for two names of one tensor.
    """
    if body is None:
        return stored, {}
    tensors: dict[str, Tensor] = {}
    filed = {}
    for name, tensor in stored.items():
        loaded = body.loaded(name)
        if loaded in tensors:
            raise ValueError(f"{where} holds {loaded} twice, once as {name}")
        tensors[loaded] = tensor
        if loaded != name:
            filed[loaded] = name
    for copy, original in body.ties.items():
        tensor = tensors.get(copy)
        if tensor is not None and torch.equal(
            tensors.setdefault(original, tensor), tensor
        ):
            del tensors[copy]
    return tensors, filed


# Layers ------------------------------------------------------------------------------------------

LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def layers_of(names: Iterable[str]) -> Mapping[str, int]:
    """How many layers each stack of a model has, by what its tensors' names begin with."""
    counts: dict[str, int] = {}
    for name in names:
        if match := LAYER.search(name):
            stack = name[: match.start(1)]
            counts[stack] = max(counts.get(stack, 0), int(match[1]) + 1)
    return counts


def depths(names: Sequence[str], after: float = 1.0) -> dict[str, float]:
    """How deep each tensor lies in its stack: its layer's number / (layers - 1), 1 of a single
    layer; embeddings 0, what comes after the layers `after`."""
    layers = layers_of(names)
    deep = {}
    for name in names:
        match = LAYER.search(name)
        if match:
            last = layers[name[: match.start(1)]] - 1
            deep[name] = int(match[1]) / last if last else 1.0
        else:
            embeds = re.search(r"embed|(^|\.)wte\.|(^|\.)shared\.", name)
            deep[name] = 0.0 if embeds else after
    return deep
