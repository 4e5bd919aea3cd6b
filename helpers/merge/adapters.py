"""What does a PEFT LoRA adapter change? tau = scaling * B A, exactly, by the base's names."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from helpers.merge.blocks import Factors
from helpers.merge.weights import no_weights, read_file, read_json

UNMERGEABLE = {
    "use_dora": "DoRA rescales the whole weight, so its change is not B A",
    "bias": "it trains biases",
    "lora_bias": "it trains biases",
    "modules_to_save": "it holds whole modules beside the factors",
    "trainable_token_indices": "it holds token embeddings beside the factors",
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
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
COPY = re.compile(r"base_model\.model\.((?:(?!lora_).)+?)(?:\.base_layer)?\.weight")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / "adapter_config.json").is_file()


def read_adapter(folder: Path, label: str) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Factors by the base's names, and the copies of base tensors that PEFT stores beside those of
    embeddings (which must be equal to the base's).

    Raises ValueError, with the reason, for what cannot be merged exactly and for pickles.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} {no_weights(folder)}")
    config = _config(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    copies = {}
    transposed = set()
    for key, tensor in read_file(file).items():
        if copy := COPY.fullmatch(key):
            copies[f"{copy[1]}.weight"] = tensor
            continue
        factor = FACTOR.fullmatch(key)
        if factor is None or tensor.ndim != 2:
            raise ValueError(f"adapter {label} holds {key}, which is no factor of a LoRA matrix")
        module, embedding, letter = factor.groups()
        pairs.setdefault(module, {})[letter] = tensor.float()
        if embedding or config.get("fan_in_fan_out"):
            transposed.add(module)
    factors = {}
    for module, pair in sorted(pairs.items()):
        if len(pair) != 2:
            raise ValueError(f"adapter {label} is incomplete: one factor of {module} is missing")
        scaling, B, A = _scaled(label, config, module, pair)
        if module in transposed:
            A, B = B.T, A.T
        factors[f"{module}.weight"] = Factors(scaling, B, A)
    return factors, copies


def _config(folder: Path) -> dict:
    """The adapter's settings; ValueError if its task vector is not scaling * B A of the base."""
    config = read_json(folder / "adapter_config.json")
    kind = config.get("peft_type")
    start = config.get("init_lora_weights", True)
    if kind != "LORA":
        raise ValueError(f"{folder} is a {kind} adapter: only LORA can be merged exactly")
    for option, reason in UNMERGEABLE.items():
        if config.get(option) not in (None, False, "none", []):
            raise ValueError(f"{folder} uses {option}: {reason}; merge it into its base first")
    if start not in PLAIN_STARTS:
        raise ValueError(f"{folder} has init_lora_weights={start!r}, which changes the base")
    return config


def _scaled(label: str, config: dict, module: str, pair: Mapping[str, Tensor]) -> Factors:
    """A module's factors with PEFT's scaling, alpha / r or alpha / sqrt(r)."""
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    A = pair["A"]
    B = pair["B"]
    if not A.shape[0] == B.shape[1] == rank:
        raise ValueError(f"adapter {label}: {module} is not of rank {rank}, as its config says")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Factors(alpha / divisor, B, A)


def _pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, or the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
