"""What does a PEFT LoRA adapter change? Factors, whole tensors, magnitudes, token rows: all of it.

tau = scaling * B A for a plain adapter, and exactly what PEFT's own merge gives for the rest, by
the names that the base's class gives its tensors.
"""

import math
import re
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.merge.blocks import Factors
from helpers.merge.weights import FLOATS, INDEX, no_weights, read_file, read_json

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
# leave the base as it is
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
PREFIX = "base_model.model."
WRAPPER = re.compile(r"\.(base_layer|modules_to_save)\.")
KINDS = {  # of an adapter's tensors, by their names below a module's
    "A": r"lora_(?:embedding_)?A(?:\.weight)?",
    "B": r"lora_(?:embedding_)?B(?:\.weight)?",
    "embedding": r"lora_embedding_A",
    "bias": r"lora_B\.bias",
    "magnitude": r"lora_magnitude_vector(?:\.weight)?",
    "tokens": r"token_adapter\.trainable_tokens_delta",
}


class Adapter(NamedTuple):
    """An adapter's parts, by tensor name. The specialist's tensor is what is saved, or the base's,
    plus B A; at its magnitude where there is one; with token rows replaced, and a bias added.
    """

    factors: dict[str, Factors]
    saved: dict[str, Tensor]
    magnitudes: dict[str, Tensor]  # DoRA: the norm of each output's weights, (out,)
    tokens: dict[str, tuple[Tensor, Tensor]]  # numbers and values of the rows
    biases: dict[str, Tensor]
    transposed: frozenset[str]  # of the factors, those turned to the base's (in, out)
    base: str | None  # the model that it was trained on, as its configuration says


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter; ValueError if it holds a model as well."""
    if not (folder / "adapter_config.json").is_file():
        return False
    for name in (INDEX, "model.safetensors"):
        if (folder / name).is_file():
            raise ValueError(
                f"{folder} holds an adapter_config.json and a {name}: move one away"
            )
    return True


def read_adapter(folder: Path) -> Adapter:
    """An adapter's parts; ValueError, with the reason, for what cannot be merged exactly."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} {no_weights(folder)}")
    config = _config(folder)
    parts, saved = _parts(file)
    if alone := parts["A"].keys() ^ parts["B"].keys():
        raise ValueError(f"{file} is incomplete: one factor of {min(alone)} is missing")
    if alone := (parts["bias"].keys() | parts["magnitude"].keys()) - parts["A"].keys():
        raise ValueError(
            f"{file} is incomplete: the factors of {min(alone)} are missing"
        )
    if parts["magnitude"].keys() != (
        parts["A"].keys() if config.get("use_dora") else set()
    ):
        raise ValueError(
            f"{file} must hold a magnitude for each matrix with use_dora, else none"
        )
    factors = {}
    for module, A in sorted(parts["A"].items()):
        factors[f"{module}.weight"] = _factors(
            file, config, module, A, parts["B"][module]
        )
    biases = {}
    for module, bias in parts["bias"].items():
        biases[f"{module}.bias"] = bias * factors[f"{module}.weight"].scaling
    tokens = {}
    for module, rows in parts["tokens"].items():
        tokens[f"{module}.weight"] = (
            _token_numbers(folder, config, module, rows),
            rows,
        )
    magnitudes = {
        f"{module}.weight": x.flatten() for module, x in parts["magnitude"].items()
    }
    modules = parts["A"] if config.get("fan_in_fan_out") else parts["embedding"]
    transposed = frozenset(f"{module}.weight" for module in modules)
    factors |= {name: turned(factors[name]) for name in transposed}
    base = config.get("base_model_name_or_path")
    return Adapter(factors, saved, magnitudes, tokens, biases, transposed, base)


def _parts(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each kind by module, and those that were saved whole by name."""
    parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    saved = {}
    tensors = read_file(file)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        kinds = {
            kind: re.fullmatch(rf"(.+)\.{end}", name) for kind, end in KINDS.items()
        }
        found = {kind: match[1] for kind, match in kinds.items() if match}
        if found and tensor.dtype not in FLOATS:
            raise ValueError(
                f"{file} holds {key} as {tensor.dtype}: convert it to float32"
            )
        for kind, module in found.items():
            parts[kind][module] = tensor.float()
        if found:
            continue
        if "lora_" in name or name == key:
            raise ValueError(f"{file} holds {key}, which is no part of a LoRA adapter")
        plain = WRAPPER.sub(".", name)  # of a layer that PEFT has wrapped
        if ".original_module." not in name and (
            plain == name or PREFIX + plain not in tensors
        ):
            saved[plain] = tensor
    return parts, saved


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
        raise ValueError(
            f"{folder} is a {kind} adapter: only LORA can be merged exactly"
        )
    for option, reason in UNMERGEABLE.items():
        if config.get(option) not in (None, False, "none", [], {}):
            raise ValueError(
                f"{folder} uses {option}: {reason}; merge it into its base first"
            )
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{folder} has init_lora_weights={start!r}, which changes the base: convert it to plain"
            " LoRA as PEFT describes (path_initial_model_for_weight_conversion)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_size, patterns.values())):
            raise ValueError(f"{file}: {key} must give a number for each pattern")
        for pattern in patterns:
            _check_pattern(file, pattern)
    for key in ("r", "lora_alpha"):
        if not _is_size(config.get(key)):
            raise ValueError(
                f"{file}: {key} must be a number above zero, not {config.get(key)!r}"
            )
    return config


def _check_pattern(file: Path, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{file}: {pattern!r} is no regular expression: {error}"
        ) from error


def _is_size(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value < 1e300


def _factors(file: Path, config: dict, module: str, A: Tensor, B: Tensor) -> Factors:
    """A module's factors with PEFT's scaling, alpha / r or alpha / sqrt(r)."""
    if A.ndim != 2 or B.ndim != 2:
        raise ValueError(
            f"{file}: the factors of {module} are no matrices, as those of a convolution: merge it "
            "into its base first"
        )
    rank = _pattern(config, "r", "rank_pattern", module)
    alpha = _pattern(config, "lora_alpha", "alpha_pattern", module)
    if not A.shape[0] == B.shape[1] == rank:
        raise ValueError(
            f"{file}: {module} is not of rank {rank}, as adapter_config.json says"
        )
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Factors(alpha / divisor, B, A)


def _pattern(config: dict, default: str, patterns: str, module: str) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, or the default."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config[default]


def _token_numbers(folder: Path, config: dict, module: str, rows: Tensor) -> Tensor:
    """Which rows of a module's embedding were trained."""
    file = folder / "adapter_config.json"
    stated = config.get("trainable_token_indices")
    if isinstance(stated, dict):
        endings = [key for key in stated if f".{module}".endswith(f".{key}")]
        stated = stated[endings[0]] if endings else None
    if not isinstance(stated, list) or not all(
        type(x) is int and 0 <= x < 2**31 for x in stated
    ):
        raise ValueError(
            f"{file}: trainable_token_indices does not list the tokens of {module}"
        )
    if rows.ndim != 2 or len(stated) != len(rows):
        raise ValueError(
            f"{file} lists {len(stated)} tokens of {module}, its weights hold others"
        )
    return torch.tensor(stated, dtype=torch.long)
