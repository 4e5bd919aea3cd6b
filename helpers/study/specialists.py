"""How is a specialist made? By LoRA, or tuned whole; an encoder with a head of its own.

A specialist is a folder that PEFT or transformers opens, with two files more: `base.json`, the base
it belongs to, and `training.json`, what its training cost and how the loss went.
"""

import hashlib
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from helpers import store as records
from helpers.states.batch import encode_examples, encode_input, length_buckets, pad
from helpers.states.loss import answer_loss
from helpers.study.tasks import Task, label_set

VERSION = 1  # raised by hand whenever training computes something else


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. `rank` 0 trains every parameter; LoRA adapts all linear layers."""

    examples: int = 240
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 5e-4  # linearly to 0
    rank: int = 16
    alpha: int = 32  # the update is alpha / rank * B A
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("examples", "epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.rank < 0:
            raise ValueError(
                f"rank must be 0 (train everything) or more, not {self.rank}"
            )


def train(
    model, tokenizer, base: dict, task: Task, recipe: Recipe, quiet: bool = False
) -> Path:
    """Folder of the specialist of `task`, trained once and then found in the store.

    `model` is the live base (an encoder is given as its sequence classifier) and is left as it
    was; `base` is its base.json (name, digest). The key says what was asked (`determinants`); what
    only rounding depends on is recorded beside it.
    """
    rows = task.splits["train"]
    if len(rows) < recipe.examples:
        raise ValueError(
            f"task {task.name} was loaded with {len(rows)} training examples, the recipe wants "
            f"{recipe.examples}: load it with more"
        )
    if recipe.rank and model.get_output_embeddings() is None:
        raise ValueError(
            f"an encoder is tuned whole (rank 0), not {type(model).__name__} at rank {recipe.rank}"
        )
    rows = rows.select(range(recipe.examples))

    def compute(folder: Path) -> None:
        # one seed per task: specialists that share an initial A would be related by accident
        torch.manual_seed(task_seed(recipe.seed, task.name))
        run = train_lora if recipe.rank else train_full
        log = run(
            model,
            tokenizer,
            base,
            rows,
            recipe,
            folder,
            desc=None if quiet else task.label,
        )
        (folder / "base.json").write_text(json.dumps(base))
        (folder / "training.json").write_text(json.dumps(log))

    what = determinants(base, task, recipe, str(model.dtype))
    return records.cached("specialist", VERSION, what, compute, machine(model))


def determinants(base: dict, task: Task, recipe: Recipe, dtype: str) -> dict:
    """What names a specialist in the store: base, task, training examples, recipe and dtype."""
    rows = task.splits["train"].select(range(recipe.examples))
    return {
        "base": base["digest"],
        "task": task.name,
        "train": records.digest(rows.to_list()),
        "recipe": asdict(recipe),
        "dtype": dtype,
    }


def machine(model) -> dict:
    """What rounding depends on beside the numbers: device, threads, version of torch."""
    device = model.device
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine()
    )
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return {"device": kind, "threads": threads, "torch": torch.__version__}


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a specialist in the store was trained by."""
    return Recipe(**records.seal(folder)["determinants"]["recipe"])


def task_seed(seed: int, name: str) -> int:
    """Seed of one task's training: independent between tasks, repeatable within."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:4], "big")


def train_lora(
    model, tokenizer, base, rows, recipe: Recipe, folder: Path, desc: str | None
) -> dict:
    """Fine-tune a LoRA adapter of a model that writes, and save it; answer tokens only count."""
    # 3 s: not paid by those who only read results
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules="all-linear",
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        base_model_name_or_path=base["name"],
    )
    adapted = get_peft_model(model, config)
    try:
        log = descend(adapted, answer_examples(tokenizer, rows), recipe, desc)
        # PEFT notes the path that the base was loaded from: a name travels, a cache path does not
        adapted.peft_config["default"].base_model_name_or_path = base["name"]
        # no embedding is adapted; asked to find out, PEFT would look the base up on the hub
        adapted.save_pretrained(folder, save_embedding_layers=False)
    finally:
        adapted.unload()
        model.eval().requires_grad_(True)
    return log


class Examples(NamedTuple):
    """What `descend` needs of training examples, numbered from 0."""

    lengths: list[int]  # tokens that the model reads
    targets: list[int]  # how many predictions the loss counts
    # summed over those of some examples
    loss: Callable[[torch.nn.Module, list[int]], torch.Tensor]


def answer_examples(tokenizer, rows) -> Examples:
    """Prompts with their first answers; the answers' tokens are predicted, their end included."""
    pairs = encode_examples(tokenizer, rows)
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    targets = [len(answer) for _, answer in pairs]

    def loss(model, batch: list[int]) -> torch.Tensor:
        return answer_loss(model, [pairs[i] for i in batch], share=True)

    return Examples(lengths, targets, loss)


def train_full(
    model, tokenizer, base, rows, recipe: Recipe, folder: Path, desc: str | None
) -> dict:
    """Fine-tune a copy of the model and save all of it; an encoder's has a fresh head."""
    if model.get_output_embeddings() is None:
        labels = label_set(rows)
        specialist = _with_labels(model, labels)
        examples = label_examples(tokenizer, rows, labels)
    else:
        specialist = deepcopy(model)
        examples = answer_examples(tokenizer, rows)
    log = descend(specialist, examples, recipe, desc)
    specialist.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return log


def _with_labels(model, labels: list[str]):
    """A copy of an encoder below a classification head of its own."""
    config = deepcopy(model.config)
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.id2label = dict(enumerate(labels))  # sets the number of outputs
    specialist = type(model)(config).to(model.device, model.dtype)
    specialist.base_model.load_state_dict(model.base_model.state_dict())
    return specialist


def label_examples(tokenizer, rows, labels: list[str]) -> Examples:
    """Prompts with the number of their first answer among the labels, which a head predicts."""
    prompts = [encode_input(tokenizer, row["prompt"]) for row in rows]
    targets = torch.tensor([labels.index(row["answers"][0]) for row in rows])

    def loss(model, batch: list[int]) -> torch.Tensor:
        ids, mask = (
            tensor.to(model.device) for tensor in pad([prompts[i] for i in batch], 0)
        )
        logits = model(ids, attention_mask=mask).logits
        return cross_entropy(logits, targets[batch].to(model.device), reduction="sum")

    return Examples([len(ids) for ids in prompts], [1] * len(prompts), loss)


def descend(model, examples: Examples, recipe: Recipe, desc: str | None) -> dict:
    """AdamW over length-bucketed batches in a seeded order; what it cost and how the loss went.

    A batch is read in parts of at most TOKENS tokens, whose gradients add up to the batch's.
    """
    plan = batches(examples.lengths, recipe)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0, total_iters=len(plan)
    )
    losses, start, cpu = [], time.perf_counter(), time.process_time()
    model.train()
    for batch in tqdm(
        plan, desc=desc, unit="step", mininterval=5, disable=desc is None
    ):
        count = sum(examples.targets[i] for i in batch)
        losses.append(0.0)
        for part in parts(batch, examples.lengths):
            loss = examples.loss(model, part) / count
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    seconds = time.perf_counter() - start
    return {
        "loss": losses,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "tokens_per_second": recipe.epochs * sum(examples.lengths) / seconds,
        "trained_parameters": sum(p.numel() for p in trained),
        "peak_memory_mb": peak_memory_mb(),
    }


def batches(lengths: list[int], recipe: Recipe) -> list[list[int]]:
    """The examples of each step: every epoch holds the same buckets in another seeded order."""
    buckets = length_buckets(lengths, recipe.batch_size)
    order = torch.Generator().manual_seed(recipe.seed)
    orders = [
        torch.randperm(len(buckets), generator=order) for _ in range(recipe.epochs)
    ]
    return [buckets[i] for epoch in orders for i in epoch]


TOKENS = 1024  # of a pass, padding included; 16 prompts of 300 tokens would take 10 GB


def parts(batch: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """A batch in parts that hold at most TOKENS tokens when padded, or one example."""
    part = []
    for i in batch:
        width = max(lengths[j] for j in (*part, i))
        if part and width * (len(part) + 1) > TOKENS:
            yield part
            part = []
        part.append(i)
    yield part


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far (macOS counts bytes, Linux kibibytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
