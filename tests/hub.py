"""A hub on disk: tiny models, adapters and data sets in the hub's layout, under its names."""

import json
from collections.abc import Iterable
from pathlib import Path

import tiny
import torch
from datasets import Dataset
from huggingface_hub.constants import REPO_ID_SEPARATOR
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.states.batch import encode_examples
from helpers.states.loss import answer_loss

COMMIT = "0" * 40
GLUE = {
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "rte": ["sentence1", "sentence2"],
}


def place(cache: Path, name: str) -> Path:
    """Where huggingface_hub keeps the files of a model that it has fetched (HF_HUB_CACHE)."""
    root = cache / REPO_ID_SEPARATOR.join(["models", *name.split("/")])
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return root / "snapshots" / COMMIT


def adapter(
    folder: Path,
    base: Path,
    stated: str,
    examples: Iterable[dict] = (),
    rank: int = 16,
) -> Path:
    """An adapter of the model in `base`, published as one of `stated`: taught examples, or random.

    Queries, keys and values are adapted, as in those of Lots-of-LoRAs. An example is an
    `instruction`.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    trained = [p for name, p in adapted.named_parameters() if "lora_" in name]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.05)
    rows = [{"prompt": x["input"], "answers": x["output"]} for x in examples]
    pairs = encode_examples(tiny.byte_tokenizer(), rows)
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(40 if pairs else 0):
        loss = answer_loss(adapted, pairs) / len(pairs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.peft_config["default"].base_model_name_or_path = stated
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def collection(folder: Path, tasks: Iterable[str]) -> Path:
    """A data set for each Super-NaturalInstructions task, as Lots-of-LoRAs has them."""
    for number, task in enumerate(tasks):
        for split, count in (("train", 48), ("valid", 8), ("test", 16)):
            rows = [instruction(number, split, i) for i in range(count)]
            parquet(folder / task / "data", split, rows)
    return folder


def instruction(number: int, split: str, i: int) -> dict:
    """A whole prompt and its answers: free text, or in every other task one of two labels."""
    word = f"w{number}"
    answer = (
        f"{word} {'no' if i % 4 else 'yes'}" if number % 2 else f"{word} {split} {i}"
    )
    text = f"Definition: say {word}.\n\nInput: {split} {i}\nOutput:"
    return {"input": text, "output": [answer], "id": f"{word}-{split}-{i}"}


def glue(folder: Path) -> Path:
    """Three GLUE tasks as nyu-mll/glue has them: a configuration for each, named in the card."""
    configs = []
    for task, fields in GLUE.items():
        for split, count in (("train", 40), ("validation", 12), ("test", 4)):
            rows = []
            for i in range(count):
                text = {field: f"{task} {split} {i}" for field in fields}
                label = -1 if split == "test" else int(i % 4 == 0)
                rows.append(text | {"label": label, "idx": i})
            parquet(folder / task, split, rows)
        files = [
            {"split": x, "path": f"{task}/{x}-*"}
            for x in ("train", "validation", "test")
        ]
        configs.append({"config_name": task, "data_files": files})
    card = json.dumps({"configs": configs})  # JSON is YAML
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    return folder


def parquet(folder: Path, split: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
