"""Large models: a base in half precision, merges in place, and what the cast leaves of them."""

import pandas as pd
import pytest
import tiny
import torch
from benchmarks import bench_gpu

from helpers import merge
from helpers.study import bench as benches
from helpers.study import memory, plan, scores, visit

LABELS = ["task1", "task2"]
TASKS = {x: tiny.toy(x, 4) for x in LABELS}


@pytest.fixture
def half(tiny_base, tiny_adapters, tmp_path, monkeypatch):
    """A bench in bfloat16 with two ready adapters."""
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "store"))
    model = benches.load_base(str(tiny_base), "bfloat16")
    return benches.Bench(*model, TASKS, dict(zip(LABELS, tiny_adapters, strict=False)))


def test_a_merge_is_added_in_fp32_rounded_once_and_taken_back(half):
    before = {name: p.clone() for name, p in half.model.named_parameters()}
    asked = plan.merges([tuple(LABELS)], ["ties"], [("ties", "norm")])
    asked += plan.doses(LABELS, [0.5]) + plan.solos(asked)
    found = visit.run(half, asked)[0]
    assert all(
        torch.equal(before[name], p) for name, p in half.model.named_parameters()
    )

    rows = half.rows(LABELS)
    delta, _ = merge.merge(rows, "ties", LABELS)
    with merge.applied(half.model, delta):
        steps = {
            x: p.float() - before[x].float() for x, p in half.model.named_parameters()
        }
        task = TASKS["task1"].splits["test"]
        expected = scores.score(
            half.model, half.tokenizer, task, batch_size=half.batch_size
        )
    own = found.examples.query("task == 'task1'").drop(columns="task")
    pd.testing.assert_frame_equal(own.reset_index(drop=True), expected)
    for i, dose in enumerate(found.report["own"]):
        taus = {row.name: row.taus[i][...] for row in rows}
        along = sum((steps[name] * tau).sum() for name, tau in taus.items())
        square = sum(tau.square().sum() for tau in taus.values())
        assert dose == pytest.approx(float(along / square), rel=1e-3)


def test_the_forecast_counts_a_model_in_half_precision_once_and_its_changed_blocks_again(
    half,
):
    amounts = memory.forecast(half, 2)
    entries = sum(p.numel() for p in half.model.parameters())
    changed = sum(row.base.shape.numel() for row in half.rows(LABELS))
    assert amounts["base"] * 2**30 == 2 * entries
    assert amounts["saved"] * 2**30 == 2 * changed and amounts["change"] == 0


def test_a_model_that_accelerate_places_is_the_same(half, tiny_base):
    spread, _, _ = benches.load_base(str(tiny_base), "bfloat16", "auto")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(spread(ids).logits, half.model(ids).logits)


def test_the_figures_of_a_gpu_are_measured_at_tiny_shapes_too():
    found = bench_gpu.measure("cpu", bench_gpu.TINY, tokens=8, prompts=4, members=2)
    assert found["matmul_tflops"] > 0 and 0 < found["share_of_matmul"] < 1
    assert all(found[f"{rule}_seconds"] > 0 for rule in bench_gpu.RULES)
