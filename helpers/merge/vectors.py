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
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Entries per block of rows: on a CPU the blocks in use, two more than models, fit the cache.
BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}


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
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    places = None
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / file for file in places.values()})
    elif len(files) != 1:
        raise ValueError(f"{folder} {_no_weights(folder, files)}")
    tensors = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} lists {file.name} in its index, but it is not there")
        tensors |= _read_file(file)
    for name in tensors.keys() ^ (tensors if places is None else places).keys():
        raise ValueError(f"{folder}: the index and the files disagree about {name}")
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short: copy it again ({error})") from error


def _no_weights(folder: Path, found: Sequence[Path] = ()) -> str:
    """Why a folder cannot be read."""
    if found:
        return f"holds {len(found)} safetensors files and no model.safetensors.index.json"
    pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in PICKLES]
    if pickles:
        return (
            f"holds {pickles[0]}, a pickle, which can run code when opened: save it as safetensors"
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
        raise ValueError(f"{folder} is an adapter: give the model that it was trained on")
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
        raise ValueError(f"{folder} {_no_weights(folder)}")
    factors, copies = _lora_factors(label, _lora_config(folder), _read_file(file))
    return Source(label, copies, factors, _recorded_digest(folder))


def _recorded_digest(folder: Path) -> str | None:
    file = folder / "base.json"
    return json.loads(file.read_text(encoding="utf-8")).get("digest") if file.is_file() else None


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
    tied = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get(
        "tie_word_embeddings", False
    )
    inputs = [name for name in tensors if name.endswith("embed_tokens.weight")]
    if not (tied and "lm_head.weight" in tensors and inputs):
        return tensors
    if not torch.equal(tensors["lm_head.weight"], tensors[inputs[0]]):
        raise ValueError(f"{folder}: lm_head.weight is tied to {inputs[0]}, but differs from it")
    return {name: tensors[name] for name in tensors if name != "lm_head.weight"}


# LoRA --------------------------------------------------------------------------------------------

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


def _lora_config(folder: Path) -> dict:
    """The adapter's settings; ValueError if its task vector is not scaling * B A of the base."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise ValueError(f"{folder} is a {kind} adapter: only LORA can be merged exactly")
    for option, reason in UNMERGEABLE.items():
        if config.get(option) not in (None, False, "none", []):
            raise ValueError(f"{folder} uses {option}: {reason}; merge it into its base first")
    if start not in PLAIN_STARTS:
        raise ValueError(f"{folder} has init_lora_weights={start!r}, which changes the base")
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
            raise ValueError(f"adapter {label} is incomplete: one factor of {module} is missing")
        rank = _pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        A, B = pair["A"], pair["B"]
        if not A.shape[0] == B.shape[1] == rank:
            raise ValueError(f"adapter {label}: {module} is not of rank {rank}, as its config says")
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
            raise ValueError(f"the base stores {name} as {tensor.dtype}: convert it to bfloat16")
    recorded = [source for source in (base, *specialists) if source.base_digest]
    for other in recorded[1:]:
        if other.base_digest != recorded[0].base_digest:
            than = "this one" if recorded[0] is base else recorded[0].label
            raise ValueError(
                f"specialist {other.label} was trained from another base than {than}: their "
                "recorded digests differ"
            )
    for specialist in specialists:
        who = f"specialist {specialist.label}"
        fits = _check_adapter if specialist.factors else _check_checkpoint
        fits(who, base.tensors, specialist)


def _check_adapter(who: str, base: Mapping[str, Tensor], adapter: Source) -> None:
    for name, (_, B, A) in adapter.factors.items():
        if name not in base:
            raise ValueError(f"{who} adapts {name}: the base lacks it, or ties it to another")
        if base[name].shape != (B.shape[0], A.shape[1]):
            shape = (B.shape[0], A.shape[1])
            raise ValueError(f"{who}: {name} is {shape}, in the base {tuple(base[name].shape)}")
    for name, copy in adapter.tensors.items():
        if name not in base or not torch.equal(base[name].float(), copy.float()):
            raise ValueError(f"{who} holds its own {name}, which differs from the base's")


def _check_checkpoint(who: str, base: Mapping[str, Tensor], checkpoint: Source) -> None:
    for name in sorted(base.keys() ^ checkpoint.tensors.keys()):
        lacking = who if name in base else "the base"
        raise ValueError(f"{who} and the base must hold the same tensors: {lacking} lacks {name}")
    for name, ours in base.items():
        theirs = checkpoint.tensors[name]
        if ours.shape != theirs.shape:
            here, there = tuple(theirs.shape), tuple(ours.shape)
            raise ValueError(f"{who}: {name} is {here}, in the base {there}")
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
            B, A = B.to(device), A.to(device)
            factors = Factors(scaling, B, A)
            return Lazy(shape, device, lambda rows: (B[rows] @ A).mul_(scaling), factors)
        if name in specialist.tensors:
            theirs = specialist.tensors[name]
            return Lazy(
                shape, device, lambda rows: theirs[rows].to(device, torch.float32) - origin(rows)
            )
        return zero(shape, device)

    return Row(name, Lazy(shape, device, origin), [tau(specialist) for specialist in specialists])


def _reader(base: Source, device: str) -> Callable[[str, Any], Tensor]:
    """Rows of a base's tensor in fp32; asked for the same ones again, as n task vectors do, it
    converts them once.
    """
    last: tuple[Any, Tensor | None] = (None, None)

    def read(name: str, rows: Any) -> Tensor:
        nonlocal last
        if last[0] != (name, rows):
            last = (name, rows), base.tensors[name][rows].to(device, torch.float32)
        return last[1]

    return read


def zero(shape: torch.Size, device: str = "cpu") -> Lazy:
    """The task vector of a specialist that left this tensor alone."""
    nothing = torch.zeros((), device=device).expand(shape)
    factors = Factors(1.0, nothing[:, :1], nothing[:1]) if len(shape) == 2 else None
    return Lazy(shape, device, lambda rows: nothing[rows].clone(), factors)


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
