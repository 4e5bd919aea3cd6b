"""Specialists: trained, saved and opened as plain PEFT and transformers would."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from helpers.study import specialists
from helpers.study.specialists import Recipe

BASE = {"name": "tiny", "digest": "0"}
RECIPE = Recipe(examples=8, epochs=8, batch_size=4, learning_rate=0.05, rank=4)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def train(task, recipe=RECIPE, model=None):
    model = model or tiny.llama(0)
    return specialists.train(
        model, tiny.byte_tokenizer(), BASE, task, recipe, quiet=True
    )


def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(store):
    model = tiny.llama(0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    folder = train(tiny.toy("a"), model=model)
    log = json.loads((folder / "training.json").read_text())
    assert len(log["loss"]) == 16
    assert sum(log["loss"][-4:]) < 0.9 * sum(log["loss"][:4])
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_folder_is_a_plain_peft_adapter_that_names_its_base(store, tiny_base):
    folder = train(tiny.toy("a"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert json.loads((folder / "base.json").read_text()) == BASE
    adapted = PeftModel.from_pretrained(tiny.llama(0), folder)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert not torch.allclose(adapted(ids).logits, tiny.llama(0)(ids).logits)
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".md"}


def test_same_seed_same_bits_other_seed_or_task_other_weights(
    store, monkeypatch, tmp_path
):
    def weights(task="a", **change):
        folder = train(tiny.toy(task), replace(RECIPE, **change))
        return load_file(folder / "adapter_model.safetensors")

    first, other_seed, other_task = weights(), weights(seed=1), weights("b")
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "second"))
    again = weights()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other_seed[name]) for name in first)
    assert (
        specialists.recipe_of(train(tiny.toy("a"), replace(RECIPE, seed=1))).seed == 1
    )
    down = [name for name in first if "lora_A" in name]
    assert not any(torch.allclose(first[name], other_task[name]) for name in down)


def test_the_loss_counts_answer_tokens_only(store, tmp_path):
    """The first step's loss is the answer's mean NLL under the base, prompts left out."""
    from helpers.study import scores as evaluate

    task = tiny.toy("a", n=4)
    log = json.loads(
        (train(task, Recipe(4, 1, 4, 1e-9, 4)) / "training.json").read_text()
    )  # one batch holds every example
    model, tokenizer = tiny.llama(0), tiny.byte_tokenizer()
    scores = evaluate.score(model, tokenizer, task.splits["train"])
    sizes = [len(row["answers"][0]) + 2 for row in task.splits["train"]]  # space, end
    assert log["loss"][0] == pytest.approx(
        (scores["nll"] * sizes).sum() / sum(sizes), abs=1e-4
    )


def test_what_is_finished_is_not_trained_again(store, monkeypatch):
    folder = train(tiny.toy("a"))
    monkeypatch.setattr(
        specialists, "descend", lambda *a, **k: pytest.fail("trained again")
    )
    assert train(tiny.toy("a")) == folder


def test_a_killed_training_leaves_nothing_and_can_be_repeated(store):
    script = (
        f"import sys; sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})\n"
        "import os, signal, tiny\n"
        "from helpers.study import specialists\n"
        "def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n"
        "specialists.peak_memory_mb = die\n"  # trained, nothing written yet
        "specialists.train(tiny.llama(0), tiny.byte_tokenizer(), {'name': 'tiny', 'digest': '0'},"
        " tiny.toy('a'), specialists.Recipe(8, 1, 4, 0.05, 4), quiet=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert not list((store / "specialist").glob("[0-9a-f]*"))
    assert (train(tiny.toy("a"), Recipe(8, 1, 4, 0.05, 4)) / "training.json").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("examples", 0),
        ("epochs", 0),
        ("batch_size", -1),
        ("learning_rate", 0.0),
        ("rank", -1),
    ],
)
def test_a_recipe_that_trains_nothing_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        replace(RECIPE, **{name: value})


def test_too_few_examples_are_refused(store):
    with pytest.raises(ValueError, match="8 training examples, the recipe wants 9"):
        train(tiny.toy("a"), replace(RECIPE, examples=9))


@pytest.fixture
def encoder(tmp_path):
    return AutoModelForSequenceClassification.from_pretrained(
        tiny.save_encoder(tmp_path / "bert")
    )


def test_an_encoder_is_tuned_whole_with_a_head_of_its_own(store, encoder):
    recipe = Recipe(examples=8, epochs=40, batch_size=8, learning_rate=0.005, rank=0)
    # by prompt length
    folder = train(tiny.toy("a", options=("x", "y", "z")), recipe, encoder)
    log = json.loads((folder / "training.json").read_text())
    assert sum(log["loss"][-10:]) < 0.8 * sum(log["loss"][:10])
    opened = AutoModelForSequenceClassification.from_pretrained(folder)
    assert opened.config.id2label == {0: "x", 1: "y", 2: "z"}
    with pytest.raises(ValueError, match="needs a task with options, the same"):
        train(tiny.toy("b"), recipe, encoder)
    with pytest.raises(ValueError, match="not BertForSequenceClassification at rank 4"):
        train(tiny.toy("a", options=("no", "yes")), RECIPE, encoder)


GOLDEN = json.loads(
    (Path(tiny.__file__).parent / "golden.json").read_text(encoding="utf-8")
)


def test_a_training_that_computes_something_else_has_a_new_version(store, encoder):
    """Golden values beside VERSION: if one changes, raise VERSION and renew the value.

    The tolerance is rounding's between machines; a changed computation is far outside it.
    """

    def seen(folder: Path) -> dict[str, float]:
        losses = json.loads((folder / "training.json").read_text())["loss"]
        weights = load_file(next(folder.glob("*.safetensors"))).values()
        norm = sum(tensor.double().square().sum() for tensor in weights).sqrt()
        return {"first_loss": losses[0], "last_loss": losses[-1], "norm": float(norm)}

    lora = train(tiny.toy("a"), Recipe(8, 2, 4, 0.01, 4))
    full = train(
        tiny.toy("a", options=("no", "yes")), Recipe(8, 2, 4, 0.001, 0), encoder
    )
    found = {"version": specialists.VERSION, "lora": seen(lora), "full": seen(full)}
    assert found["version"] == GOLDEN["specialist"]["version"]
    for kind in ("lora", "full"):
        assert found[kind] == pytest.approx(GOLDEN["specialist"][kind], rel=1e-3)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 60))
def test_parts_of_a_batch_hold_every_example_once_within_the_budget(lengths, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specialists, "TOKENS", most)
        parts = list(specialists.parts(list(range(len(lengths))), lengths))
    assert [i for part in parts for i in part] == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= most


def test_a_batch_read_in_parts_takes_the_same_step(store, tmp_path, monkeypatch):
    recipe = Recipe(8, 2, 8, 0.01, 4)
    whole = load_file(train(tiny.toy("a"), recipe) / "adapter_model.safetensors")
    monkeypatch.setattr(specialists, "TOKENS", 30)  # one or two examples at a time
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "other"))
    halves = load_file(train(tiny.toy("a"), recipe) / "adapter_model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, rtol=1e-4, atol=1e-5)
