"""A GPU gives what the CPU gives: the same chain on tiny models, side by side (skipped without)."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from helpers.states import encode_examples, gradients
from helpers.study import plan, visit
from helpers.study.bench import Bench
from helpers.study.specialists import Recipe, train

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device"
)

RULES = ("linear", "task_arithmetic", "ties", "dare", "slerp", "iso_c", "tsv")


@pytest.fixture
def benches(tiny_base, tmp_path, monkeypatch):
    """The same three specialists, trained on the CPU and on the GPU, each with a store of its own.

    Keys name what was asked, not the device: one store would hold the CPU's results only.
    """
    toys = {name: tiny.toy(name, 6, ("0", "1")) for name in "abc"}
    tokenizer, base = tiny.byte_tokenizer(), {"name": "tiny", "digest": "0"}
    made = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / device))
        model = AutoModelForCausalLM.from_pretrained(tiny_base).to(device).eval()
        recipe = Recipe(examples=6, epochs=2, batch_size=3, rank=4)
        about = model, tokenizer, base
        folders = {
            x: train(*about, task, recipe, quiet=True) for x, task in toys.items()
        }
        made[device] = Bench(*about, toys, folders, batch_size=4)
        assert made[device].identity.specialists  # named while its store is the store
    return made


def test_training_merging_and_reading_agree(benches, tmp_path, monkeypatch):
    rows = zip(*(bench.rows("abc") for bench in benches.values()), strict=True)
    for here, there in rows:
        for tau, other in zip(here.taus, there.taus, strict=True):
            torch.testing.assert_close(tau[...], other[...].cpu(), rtol=1e-3, atol=1e-5)
    arms = [
        ("ties", "norm"),
        ("tsv", "dose"),
        ("dare", "mask1"),
        ("linear", "bfloat16"),
    ]
    asked = plan.merges(["ab"], RULES, arms) + plan.doses("ab", [0.0, 0.5, 1.0])
    asked += plan.solos(asked)
    done = []
    for device, bench in benches.items():
        monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / device))
        visits = visit.run(bench, asked)
        done.append(
            [(x.key, x.examples, x.states, x.report.get("own")) for x in visits]
        )
    for here, there in zip(*done, strict=True):
        assert here[0] == there[0]  # two machines name the same merge alike
        pd.testing.assert_series_equal(
            here[1]["nll"], there[1]["nll"], rtol=1e-3, atol=1e-4
        )
        for x in here[2]:
            torch.testing.assert_close(here[2][x], there[2][x], rtol=1e-3, atol=1e-4)
        assert here[3] == pytest.approx(there[3], rel=1e-3)


def test_gradients_agree(benches):
    grams = []
    for bench in benches.values():
        solved = {
            label: encode_examples(bench.tokenizer, task.splits["train"].take(4))
            for label, task in bench.tasks.items()
        }
        grams.append(gradients.grams(bench.model, solved))
    np.testing.assert_allclose(*grams, rtol=1e-3, atol=1e-5)
