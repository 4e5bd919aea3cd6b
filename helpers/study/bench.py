"""What is a study done on? The live base, its tasks and their specialists, as one bench.

The base answers in words (a decoder or an encoder-decoder), or is an encoder (no LM head): each
task's specialist then brings its own classification head, which is attached while that task is
scored and never merged.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    logging,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers import merge, store
from helpers.states.batch import encode_examples
from helpers.study import identity, memory, models, specialists
from helpers.study.tasks import SPLITS, Task, load_tasks

# The settings of an adapter that its task vector depends on.
SCALING = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
)


@dataclass(frozen=True)
class Bench:
    """The live base model (fp32), its tasks and their specialists' folders, both by task label."""

    model: torch.nn.Module
    tokenizer: Any
    base: dict  # name and digest
    tasks: dict[str, Task]
    specialists: dict[str, Path]
    batch_size: int = 0  # examples read at a time; 0: as many as suit the device

    def __post_init__(self) -> None:
        if not self.batch_size:
            size = 64 if self.model.device.type == "cuda" else 32
            object.__setattr__(self, "batch_size", size)

    @property
    def encoder(self) -> bool:
        """Whether the model has no LM head."""
        return self.model.get_output_embeddings() is None

    @cached_property
    def identity(self) -> identity.Identity:
        """What the keys of this bench's visits are made of."""
        trained = {
            label: specialist_key(folder) for label, folder in self.specialists.items()
        }
        dtype = str(self.model.dtype)
        return identity.Identity(
            self.base["digest"], dtype, self.encoder, self.tasks, trained
        )

    def sources(self, labels: Iterable[str]) -> tuple[merge.Source, list[merge.Source]]:
        """The base and these specialists, open for streaming; of encoders without their heads."""
        base = merge.open_base(self.model.state_dict())
        base = base._replace(base_digest=self.base["digest"])
        trained = [merge.open_specialist(self.specialists[x], x) for x in labels]
        if self.encoder:
            base, *trained = (body(self.model, source) for source in (base, *trained))
        return base, trained

    def rows(self, labels: Iterable[str], device: str | None = None) -> list[merge.Row]:
        """Their task vectors by tensor, to pass over at will; by default on the base's device."""
        base, trained = self.sources(labels)
        return merge.views(base, trained, device or self.model.device.type)


@cache  # the store's folders never change, and an encoder's is as large as the model
def specialist_key(folder: Path) -> str:
    """What keys call a specialist: its own key in the store, or the digest of a user's folder.

    The digest is of what its task vector is made of: its tensors and their scaling.
    """
    if folder.parent == store.store() / "specialist":
        return folder.name
    weights = [store.digest(file) for file in sorted(folder.glob("*.safetensors"))]
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return store.digest([weights, {name: config.get(name) for name in SCALING}])


def load_base(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[Any, Any, dict]:
    """(model, tokenizer, name and digest) of a base; an encoder has some head, which is not used.

    Raises ValueError (AssetError) for a model that cannot be had or does not fit into what is
    free.
    """
    folder = models.model_folder(name)
    auto_class = _auto_class(folder)
    memory.check_base(name, folder, dtype, device)
    verbosity = logging.get_verbosity()
    if auto_class is AutoModelForSequenceClassification:
        # that the head is untrained is no news: no task is scored with it
        logging.set_verbosity_error()
    try:
        model, tokenizer = models.load_model(name, dtype, device, auto_class)
    finally:
        logging.set_verbosity(verbosity)
    return model, tokenizer, models.base_info(name)


def _auto_class(folder: Path) -> type:
    """Which kind of model a folder holds, by its configuration and transformers' own lists."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    writers = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if writers.intersection(config.architectures or []):
        return AutoModelForCausalLM
    return AutoModelForSequenceClassification


def check_lengths(
    model: torch.nn.Module,
    tokenizer: Any,
    tasks: Mapping[str, Task],
) -> None:
    """Raise ValueError for a task with an example longer than a writer's learned positions."""
    places = _learned_positions(model)
    if places is None or model.get_output_embeddings() is None:
        return
    # apart, or one behind the other
    read = max if model.config.is_encoder_decoder else sum
    for label, task in tasks.items():
        for split in SPLITS:
            examples = encode_examples(tokenizer, task.splits[split])
            longest = max((read(map(len, example)) for example in examples), default=0)
            if longest > places:
                raise ValueError(
                    f"{label} has an example of {longest} tokens, and the model has positions for "
                    f"{places}: leave this task out, or name another MODEL"
                )


def _learned_positions(model: torch.nn.Module) -> int | None:
    """How many positions a model has learned; None if it computes them."""
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and name.endswith(("wpe", "embed_positions"))
    ]
    return min(tables, default=None)


# --- an encoder's heads ----------------------------------------------------------------------


def head_of(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a sequence classifier's tensors that lie outside its body."""
    prefix = f"{model.base_model_prefix}."
    return {
        name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)
    }


def body(model: torch.nn.Module, source: merge.Source) -> merge.Source:
    """A sequence classifier without its head."""
    head = head_of(model, source.tensors)
    kept = {name: tensor for name, tensor in source.tensors.items() if name not in head}
    return source._replace(tensors=kept)


@contextmanager
def attached(model: torch.nn.Module, head: Mapping[str, Tensor]) -> Iterator[None]:
    """`model` with these tensors as its head inside the `with`."""
    own = {name: model.get_parameter(name).data for name in head}
    try:
        for name, tensor in head.items():
            model.get_parameter(name).data = tensor.to(model.device, model.dtype)
        yield
    finally:
        for name, tensor in own.items():
            model.get_parameter(name).data = tensor


@contextmanager
def with_head(model: torch.nn.Module, specialist: Path) -> Iterator[list[str]]:
    """`model` with the classification head of a specialist inside the `with`: yields its labels."""
    config = json.loads((specialist / "config.json").read_text(encoding="utf-8"))
    names = config["id2label"]
    with attached(model, head_of(model, merge.read_folder(specialist))):
        yield [names[str(i)] for i in range(len(names))]


# --- specialists -----------------------------------------------------------------------------


def train(
    bench: Bench,
    label: str,
    recipe: specialists.Recipe,
    quiet: bool = True,
) -> Path:
    """Folder of the specialist of a task of the bench, trained once (`specialists.train`)."""
    about = bench.model, bench.tokenizer, bench.base, bench.tasks[label]
    return specialists.train(*about, recipe, quiet)


def twins(bench: Bench, label: str) -> Bench:
    """A task's specialist beside one of the next seed: a merge of the two has equal aims.

    The labels of the new bench are `once` and `twice`, both of the task.
    """
    first = bench.specialists[label]
    recipe = specialists.recipe_of(first)
    second = train(bench, label, replace(recipe, seed=recipe.seed + 1))
    both = {"once": first, "twice": second}
    return replace(
        bench, tasks=dict.fromkeys(both, bench.tasks[label]), specialists=both
    )


# --- from one notebook to the next -----------------------------------------------------------


def save_bench(
    bench: Bench,
    settings: Mapping[str, Any],
    file: Path,
) -> None:
    """Write what `open_bench` needs: `settings` of `tasks.load_tasks`, names and store folders."""
    folders = bench.specialists.items()
    content = {
        "base": bench.base,
        "settings": dict(settings),
        "tasks": {label: task.name for label, task in bench.tasks.items()},
        "specialists": {
            x: folder.relative_to(store.store()).as_posix() for x, folder in folders
        },
    }
    with store.atomic_write(file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def open_bench(
    file: Path,
    model: Any,
    tokenizer: Any,
    base: dict,
) -> Bench:
    """The bench that notebook 01 left, on a live base model.

    Raises ValueError if there is none, if it was made with another base, or if a specialist is no
    longer in the store.
    """
    if not file.is_file():
        raise ValueError(
            f"{file.name} is not in {file.parent}: run notebook 01 with this profile"
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["base"] != base:
        raise ValueError(
            f"the specialists of {file} were made from {content['base']['name']}, "
            f"not from {base['name']}: run notebook 01 with this model first"
        )
    folders = {x: store.store() / path for x, path in content["specialists"].items()}
    lost = [label for label, folder in folders.items() if not folder.is_dir()]
    if lost:
        raise ValueError(
            f"the specialists {', '.join(lost)} are gone from the store: delete {file.name} in "
            f"{file.parent.name} and run the same command again"
        )
    tasks = load_tasks(content["tasks"].values(), **content["settings"])
    return Bench(model, tokenizer, base, tasks, folders)
