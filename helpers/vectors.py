"""What did fine-tuning change? One stream of task vectors over checkpoints, adapters, state dicts.

A specialist theta_i of a base theta_0 is seen as its task vector tau_i = theta_i - theta_0, tensor
by tensor, in fp32, whatever it is stored as: a safetensors folder (one file or shards), a PEFT LoRA
adapter (tau = scaling * B A, exactly), a state dict in memory. Nothing is dense before it is asked
for: files stay memory-mapped, adapters stay factors, and a `Lazy` tensor reads the rows it must.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
BLOCK = {
    "cpu": 1 << 16,
    "cuda": 1 << 24,
}  # entries per block: the n + 2 blocks in use fit the cache


class Factors(NamedTuple):
    """A low-rank task vector `scaling * B @ A` of one (out, in) matrix: B (out, r), A (r, in)."""

    scaling: float
    B: Tensor
    A: Tensor


class Source(NamedTuple):
    """A base or a specialist: its tensors as stored, or an adapter's factors, by base name."""

    label: str
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, Factors]
    base_digest: str | None = None  # parameter digest of the base it belongs to, if it is recorded


class Lazy:
    """A tensor that is dense (fp32) only in the rows asked for: `lazy[lo:hi]`, or `lazy[...]`."""

    def __init__(
        self,
        shape: torch.Size,
        device: str,
        read: Callable[[Any], Tensor],
        factors: Factors | None = None,
    ):
        self.shape, self.device, self.read, self.factors = shape, device, read, factors

    def __getitem__(self, rows) -> Tensor:
        return self.read(rows)


class Row(NamedTuple):
    """One tensor of the base and its n task vectors, all of one shape, fp32 (dense or `Lazy`)."""

    name: str
    base: Tensor | Lazy
    taus: list[Tensor] | list[Lazy]


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors folder by name, memory-mapped: no byte of them is read yet.

    Raises ValueError, with the reason, if the folder has no complete set of safetensors.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted({folder / file for file in weight_map.values()})
        for file in files:
            if not file.is_file():
                raise ValueError(f"{folder} lists {file.name} in its index, but it is not there")
    else:
        files, weight_map = sorted(folder.glob("*.safetensors")), None
        if len(files) != 1:
            raise ValueError(f"{folder} {_why_not_one_file(folder, files)}")
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    for name in tensors.keys() ^ (tensors if weight_map is None else weight_map).keys():
        raise ValueError(f"{folder}: the index and the files disagree about {name}")
    return tensors


def _why_not_one_file(folder: Path, found: list[Path]) -> str:
    if found:
        return f"holds {len(found)} safetensors files and no model.safetensors.index.json"
    pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in PICKLES]
    if pickles:
        return (
            f"holds only {pickles[0]}, a pickle, which can run code when opened: "
            "save the model again as safetensors"
        )
    return "is not a folder with safetensors weights"


def open_base(source: Path | str | Mapping[str, Tensor], label: str = "base") -> Source:
    """The base model from a safetensors folder or a state dict; nothing is read yet.

    Tied tensors appear once, under their first name. Raises ValueError for pickles and adapters.
    """
    if isinstance(source, Mapping):
        return Source(label, _without_aliases(source), {})
    folder = Path(source)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} is an adapter, not a base model: give the model it was trained on"
        )
    sealed = (folder / "seals.json").is_file()  # elsewhere base.json tells of another model
    digest = _recorded_digest(folder) if sealed else None
    return Source(label, _without_tied_head(folder, read_folder(folder)), {}, digest)


def open_specialist(source: Path | str | Mapping[str, Tensor], label: str | None = None) -> Source:
    """A specialist from a PEFT LoRA folder, a safetensors folder, or a state dict.

    `label` names it in reports and seeds its random masks; a folder's own name by default. Raises
    ValueError, with the reason, for what cannot be merged exactly (`_lora_config`) and pickles.
    """
    if isinstance(source, Mapping):
        return open_base(source, label or "specialist")
    folder = Path(source)
    label = label or folder.resolve().name
    if not (folder / "adapter_config.json").is_file():
        return open_base(folder, label)._replace(base_digest=_recorded_digest(folder))
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} {_why_not_one_file(folder, [])}")
    factors, copies = _lora_factors(label, _lora_config(folder), load_file(file))
    return Source(label, copies, factors, _recorded_digest(folder))


def _recorded_digest(folder: Path) -> str | None:
    file = folder / "base.json"
    return json.loads(file.read_text())["digest"] if file.is_file() else None


def _without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every storage once, under its first name."""
    seen, kept = set(), {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            kept[name] = tensor.detach()
        seen.add(place)
    return kept


def _without_tied_head(folder: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Drop the copy of a tied output embedding that some tools write beside the input embedding."""
    config = folder / "config.json"
    tied = config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings", False)
    inputs = [name for name in tensors if name.endswith("embed_tokens.weight")]
    if not (tied and "lm_head.weight" in tensors and inputs):
        return tensors
    if not torch.equal(tensors["lm_head.weight"], tensors[inputs[0]]):
        raise ValueError(
            f"{folder} says that lm_head.weight is tied to {inputs[0]}, but they differ"
        )
    return {name: tensors[name] for name in tensors if name != "lm_head.weight"}


# LoRA --------------------------------------------------------------------------------------------

UNMERGEABLE = {
    "use_dora": "DoRA rescales the whole weight, so its change is not B A",
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


def _lora_config(folder: Path) -> dict:
    """The adapter's settings; ValueError if its task vector is not scaling * B A of the base."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder} is a {config.get('peft_type')} adapter: only LORA can be merged exactly"
        )
    for option, reason in UNMERGEABLE.items():
        if config.get(option):
            raise ValueError(f"{folder} uses {option}: {reason}; merge it into its base first")
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{folder} trains biases (bias={config['bias']!r}); merge it into its base first"
        )
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        start = config["init_lora_weights"]
        raise ValueError(
            f"{folder} starts from init_lora_weights={start!r}, which changes the base"
        )
    return config


def _lora_factors(
    label: str, config: dict, stored: Mapping[str, Tensor]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Factors by the base's names with PEFT's scaling, alpha / r or alpha / sqrt(r), and the copies
    of base tensors that PEFT stores beside the factors of embeddings (`check` compares them).
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    copies, transposed = {}, set()
    for key, tensor in stored.items():
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
            raise ValueError(
                f"adapter {label} holds one of the two factors of {module}: it is incomplete"
            )
        rank = _pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        A, B = pair["A"], pair["B"]
        if not A.shape[0] == B.shape[1] == rank:
            raise ValueError(
                f"adapter {label}: {module} has rank {A.shape[0]}, but {rank} by its config"
            )
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        if module in transposed:
            A, B = B.T, A.T
        factors[f"{module}.weight"] = Factors(scaling, B, A)
    return factors, copies


def _pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, or the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# The stream --------------------------------------------------------------------------------------


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
            raise ValueError(
                f"{name} of the base is stored as {tensor.dtype}: convert it to a plain float"
            )
    for specialist in specialists:
        _check_one(base, specialist)


def _check_one(base: Source, specialist: Source) -> None:
    who = f"specialist {specialist.label}"
    if (
        None not in (base.base_digest, specialist.base_digest)
        and base.base_digest != specialist.base_digest
    ):
        raise ValueError(
            f"{who} was trained from another base (its recorded parameter digest differs)"
        )
    for name, factors in specialist.factors.items():
        if name not in base.tensors:
            raise ValueError(
                f"{who} adapts {name}, which the base does not hold or holds tied to another"
            )
        shape = (factors.B.shape[0], factors.A.shape[1])
        if base.tensors[name].shape != shape:
            raise ValueError(
                f"{who}: {name} is {shape}, in the base {tuple(base.tensors[name].shape)}"
            )
    if specialist.factors:
        for name, copy in specialist.tensors.items():
            if name not in base.tensors or not torch.equal(
                base.tensors[name].float(), copy.float()
            ):
                raise ValueError(f"{who} holds its own {name}, which differs from the base's")
        return
    for name in sorted(base.tensors.keys() ^ specialist.tensors.keys()):
        where = "the base lacks it" if name in specialist.tensors else f"{who} lacks it"
        raise ValueError(f"{who} and the base must hold the same tensors: {name}: {where}")
    for name, ours in base.tensors.items():
        theirs = specialist.tensors[name]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{who}: {name} is {tuple(theirs.shape)}, in the base {tuple(ours.shape)}"
            )
        if ours.is_floating_point():
            if theirs.dtype not in FLOATS:
                raise ValueError(f"{who}: {name} is {theirs.dtype}, in the base {ours.dtype}")
        elif ours.dtype != theirs.dtype or not torch.equal(ours, theirs.to(ours.device)):
            raise ValueError(f"{who}: {name} is not floating-point and differs from the base's")


def changed_names(base: Source, specialists: Sequence[Source]) -> list[str]:
    """Names, sorted, of the tensors that at least one specialist changed; no other takes part."""

    def changed(name: str, specialist: Source) -> bool:
        if name in specialist.factors or name not in specialist.tensors:
            return name in specialist.factors
        ours, theirs = base.tensors[name], specialist.tensors[name]
        if ours.dtype != theirs.dtype:
            ours, theirs = ours.double(), theirs.double()
        return not torch.equal(ours, theirs.to(ours.device))

    return [name for name in sorted(base.tensors) if any(changed(name, s) for s in specialists)]


def _lazy_row(name: str, base: Source, specialists: Sequence[Source], device: str) -> Row:
    stored = base.tensors[name]

    def origin(rows) -> Tensor:
        return stored[rows].to(device, torch.float32)

    def tau(specialist: Source) -> Lazy:
        if name in specialist.factors:
            scaling, B, A = specialist.factors[name]
            B, A = B.to(device), A.to(device)
            factors = Factors(scaling, B, A)
            return Lazy(stored.shape, device, lambda rows: (B[rows] @ A).mul_(scaling), factors)
        if name in specialist.tensors:
            theirs = specialist.tensors[name]
            return Lazy(
                stored.shape,
                device,
                lambda rows: theirs[rows].to(device, torch.float32) - origin(rows),
            )
        return zero(stored.shape, device)

    return Row(
        name, Lazy(stored.shape, device, origin), [tau(specialist) for specialist in specialists]
    )


def zero(shape: torch.Size, device: str = "cpu") -> Lazy:
    """The task vector of a specialist that left this tensor alone."""
    nothing = torch.zeros((), device=device).expand(shape)
    factors = Factors(1.0, nothing[:, :1], nothing[:1]) if len(shape) == 2 else None
    return Lazy(shape, device, lambda rows: nothing[rows].clone(), factors)


def views(base: Source, specialists: Sequence[Source], device: str = "cpu") -> list[Row]:
    """The changed tensors as rows that hold no data yet, sorted by name: pass over them at will."""
    check(base, specialists)
    return [_lazy_row(name, base, specialists, device) for name in changed_names(base, specialists)]


def stream(base: Source, specialists: Sequence[Source], device: str = "cpu") -> Iterator[Row]:
    """The same rows one at a time with dense fp32 tensors, in the same order."""
    for row in views(base, specialists, device):
        yield Row(row.name, row.base[...], [tau[...] for tau in row.taus])


class Block(NamedTuple):
    """Rows of a tensor: what to index it by, and the flat index of their first entry."""

    rows: Any
    offset: int


def row_blocks(shape: torch.Size, device: str | torch.device = "cpu") -> Iterator[Block]:
    """Blocks of rows that stay in cache.

    The split depends on the shape alone, and every block but the last has an even number of
    entries.
    """
    numel, block = shape.numel(), BLOCK.get(torch.device(device).type, 1 << 24)
    if numel <= block:
        yield Block(..., 0)
        return
    width = numel // shape[0]
    step = max(2, block // width // 2 * 2)
    for start in range(0, shape[0], step):
        yield Block(slice(start, min(start + step, shape[0])), start * width)


@contextmanager
def applied(model: torch.nn.Module, delta: Mapping[str, Tensor]) -> Iterator[torch.nn.Module]:
    """`model` with base + delta as its parameters inside the `with`, and the base again after it.

    The base's own storage is set aside and put back, so it is restored bit for bit. Raises
    ValueError if the model is not fp32 or a name or a shape does not fit.
    """
    parameters = dict(model.named_parameters())
    for name, change in delta.items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name}")
        if parameters[name].shape != change.shape:
            raise ValueError(
                f"{name} is {tuple(change.shape)}, in the model {tuple(parameters[name].shape)}"
            )
        if parameters[name].dtype != torch.float32:
            raise ValueError(
                f"{name} of the model is {parameters[name].dtype}: load the model in fp32"
            )
    base = {name: parameters[name].data for name in delta}
    try:
        for name, change in delta.items():
            parameters[name].data = base[name] + change.to(base[name].device)
        yield model
    finally:
        for name, original in base.items():
            parameters[name].data = original
