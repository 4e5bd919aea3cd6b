"""What does a PEFT LoRA adapter change? Factors, whole tensors, magnitudes, token rows: all of it.

tau = scaling * B A for a plain adapter, and exactly what PEFT's own merge gives for the rest, by
the names that the base's class gives its tensors.
"""

import math
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.merge.blocks import Factors
from helpers.merge.weights import no_weights, read_file, read_json

UNMERGEABLE = {
    "target_parameters": "it adapts parameters that are no layer's weight",
    "layer_replication": "it changes the number of layers",
    "alora_invocation_tokens": "it is active on part of the input only",
    "use_qalora": "its change is not B A",
    "use_bdlora": "its change is not B A",
    "arrow_config": "it routes between adapters",
    "kasa_config": "its change is not B A",
    "monteclora_config": "its change is not B A",
}
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # leave the base as it is
PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
BIAS = re.compile(r"(.+)\.lora_B\.bias")
MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")
TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")


class Adapter(NamedTuple):
    """An adapter's parts, by tensor name. The specialist's tensor is what is saved, or the base's,
    plus B A; at its magnitude where there is one; with token rows replaced, and a bias added.
    """

    factors: dict[str, Factors]
    saved: dict[str, Tensor]
    magnitudes: dict[str, Tensor]  # DoRA: the norm of each row, (out,)
    tokens: dict[str, tuple[Tensor, Tensor]]  # numbers and values of the rows
    biases: dict[str, Tensor]
    transposed: frozenset[str]  # of the factors, those turned to the base's (in, out)
    base: str | None  # the model that it was trained on, as its configuration says


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / "adapter_config.json").is_file()


def read_adapter(folder: Path, label: str) -> Adapter:
    """An adapter's parts; ValueError, with the reason, for what cannot be merged exactly."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} {no_weights(folder)}")
    config = _config(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    adapter = Adapter({}, {}, {}, {}, {}, frozenset(), config.get("base_model_name_or_path"))
    embeddings = set()
    biases = {}
    for key, tensor in read_file(file).items():
        name = key.removeprefix(PREFIX)
        if match := FACTOR.fullmatch(name):
            module, embedding, letter = match.groups()
            pairs.setdefault(module, {})[letter] = tensor.float()
            if embedding:
                embeddings.add(module)
        elif match := BIAS.fullmatch(name):
            biases[match[1]] = tensor.float()
        elif match := MAGNITUDE.fullmatch(name):
            adapter.magnitudes[f"{match[1]}.weight"] = tensor.float().flatten()
        elif match := TOKENS.fullmatch(name):
            numbers = _token_numbers(folder, config, match[1], len(tensor))
            adapter.tokens[f"{match[1]}.weight"] = (numbers, tensor.float())
        elif "lora_" in name or name == key:
            raise ValueError(f"adapter {label} holds {key}, which is no part of a LoRA adapter")
        else:
            adapter.saved[name.replace(".base_layer.", ".")] = tensor
    for module, pair in sorted(pairs.items()):
        adapter.factors[f"{module}.weight"] = _factors(label, config, module, pair)
    for module, bias in biases.items():
        adapter.biases[f"{module}.bias"] = bias * adapter.factors[f"{module}.weight"].scaling
    if config.get("use_dora") and adapter.magnitudes.keys() != adapter.factors.keys():
        raise ValueError(f"{folder} uses DoRA, but does not hold a magnitude for each matrix")
    modules = pairs if config.get("fan_in_fan_out") else embeddings
    names = frozenset(f"{module}.weight" for module in modules)
    for name in names:
        adapter.factors[name] = turned(adapter.factors[name])
    return adapter._replace(transposed=names)


def turned(factors: Factors) -> Factors:
    """The factors of the transposed matrix."""
    return Factors(factors.scaling, factors.A.T, factors.B.T)


def _config(folder: Path) -> dict[str, Any]:
    """The adapter's settings; ValueError for a kind that is no exact change of the base."""
    file = folder / "adapter_config.json"
    config = read_json(file)
    kind = config.get("peft_type")
    start = config.get("init_lora_weights", True)
    if kind != "LORA":
        raise ValueError(f"{folder} is a {kind} adapter: only LORA can be merged exactly")
    for option, reason in UNMERGEABLE.items():
        if config.get(option) not in (None, False, "none", [], {}):
            raise ValueError(f"{folder} uses {option}: {reason}; merge it into its base first")
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{folder} has init_lora_weights={start!r}, which changes the base: convert it to plain"
            " LoRA as PEFT describes (path_initial_model_for_weight_conversion)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_size, patterns.values())):
            raise ValueError(f"{file}: {key} must give a number for each pattern")
    for key in ("r", "lora_alpha"):
        if not _is_size(config.get(key)):
            raise ValueError(f"{file}: {key} must be a number above zero, not {config.get(key)!r}")
    return config


def _is_size(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value < math.inf


def _factors(label: str, config: dict, module: str, pair: Mapping[str, Tensor]) -> Factors:
    """A module's factors with PEFT's scaling, alpha / r or alpha / sqrt(r)."""
    if len(pair) != 2:
        raise ValueError(f"adapter {label} is incomplete: one factor of {module} is missing")
    A = pair["A"]
    B = pair["B"]
    if A.ndim != 2 or B.ndim != 2:
        raise ValueError(f"adapter {label}: the factors of {module} are no matrices")
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if not A.shape[0] == B.shape[1] == rank:
        raise ValueError(f"adapter {label}: {module} is not of rank {rank}, as its config says")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Factors(alpha / divisor, B, A)


def _pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, or the default."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(f"{pattern!r} of an adapter is no pattern: {error}") from error
    return default


def _token_numbers(folder: Path, config: dict, module: str, count: int) -> Tensor:
    """Which rows of a module's embedding were trained."""
    stated = config.get("trainable_token_indices")
    if isinstance(stated, dict):
        endings = [key for key in stated if f".{module}".endswith(f".{key}")]
        stated = stated[endings[0]] if endings else None
    if not isinstance(stated, list) or not all(isinstance(x, int) for x in stated):
        raise ValueError(f"{folder}: trainable_token_indices does not list the tokens of {module}")
    if len(stated) != count:
        raise ValueError(f"{folder} states {len(stated)} tokens of {module}, but holds {count}")
    return torch.tensor(stated)
