"""A GPU gives what the CPU gives: the same chain on tiny models, side by side (skipped without)."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from helpers.states import encode_examples, gradients
from helpers.study import visit as study
from helpers.study.specialists import Recipe, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

RECIPES = {
    method: {"method": method}
    for method in ("linear", "task_arithmetic", "ties", "dare", "slerp", "iso_c", "tsv")
}


@pytest.fixture
def benches(tiny_base, tmp_path, monkeypatch):
    """The same three specialists, trained on the CPU and on the GPU."""
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path))
    toys = {name: tiny.toy(name, 6, ("0", "1")) for name in "abc"}
    tokenizer, base = tiny.byte_tokenizer(), {"name": "tiny", "digest": "0"}
    made = {}
    for device in ("cpu", "cuda"):
        model = AutoModelForCausalLM.from_pretrained(tiny_base).to(device).eval()
        recipe = Recipe(examples=6, epochs=2, batch_size=3, rank=4)
        about = model, tokenizer, base
        folders = {x: train(*about, task, recipe, quiet=True) for x, task in toys.items()}
        made[device] = study.Bench(*about, toys, folders, batch_size=4)
    return made["cpu"], made["cuda"]


def close(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-4)


def test_training_merging_and_reading_agree(benches):
    cpu, gpu = benches
    rows = zip(cpu.rows("abc"), gpu.rows("abc"), strict=True)
    for here, there in rows:
        for tau, other in zip(here.taus, there.taus, strict=True):
            torch.testing.assert_close(tau[...], other[...].cpu(), rtol=1e-3, atol=1e-5)
    done = [study.merge_group(bench, "ab", RECIPES) for bench in benches]
    for here, there in zip(*done, strict=True):
        close(here.examples, there.examples)
        for x in "ab":
            torch.testing.assert_close(here.states[x], there.states[x], rtol=1e-3, atol=1e-4)


def test_every_version_of_a_rule_agrees(benches):
    for rule, arm in (("ties", "norm"), ("tsv", "dose"), ("dare", "mask1"), ("linear", "bfloat16")):
        frames = []
        for bench in benches:
            linear = study.merge_group(bench, "ab", {"linear": RECIPES["linear"]})[0].report
            recipe = {rule: study.in_arm(RECIPES[rule], arm, linear, 2)}
            frames.append(study.merge_group(bench, "ab", recipe, arm=arm)[0].examples)
        close(*frames)


def test_losses_and_gradients_agree(benches):
    tables, grams = [], []
    for bench in benches:
        doses = study.dose_curves(bench, [0.0, 0.5, 1.0])
        merged = study.merge_group(bench, "ab", RECIPES)
        tables.append(study.loss_table(bench, merged, doses)[["nll", "nll_solo", "dose_own"]])
        solved = {
            label: encode_examples(bench.tokenizer, task.splits["train"].take(4))
            for label, task in bench.tasks.items()
        }
        grams.append(gradients.grams(bench.model, solved))
    close(*tables)
    np.testing.assert_allclose(*grams, rtol=1e-3, atol=1e-5)
