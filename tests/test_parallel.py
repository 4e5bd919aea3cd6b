"""Several processes: they leave what the notebook asks next, fail as one would, and say so."""

import os

import pytest
import tiny

from helpers import merge as merging
from helpers.study import old as study
from helpers.study import parallel, specialists
from helpers.study import scores as evaluate

RECIPES = {"linear": {"method": "linear"}, "ties": {"method": "ties", "density": 0.5}}
ARMS, DOSES = [["ties", "norm"], ["dare", "norm"]], [0.0, 0.5, 1.0, 1.25]


@pytest.fixture
def model(tiny_base):
    return str(tiny_base), "float32", "cpu"


@pytest.fixture
def bench(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path))
    toys = {name: tiny.toy(name, 6, ("0", "1")) for name in "abc"}
    return study.Bench(*study.load_base(*model), toys, {})


def test_processes_leave_all_that_a_study_asks_for(bench, model, monkeypatch):
    recipe = specialists.Recipe(examples=6, epochs=1, batch_size=3, rank=4)
    parallel.fill(bench, model, [(study.try_task, x, recipe) for x in "abc"], 2)
    own = {x: study.train(bench, x, recipe) for x in "abc"}
    trained = {x: (folder / "training.json").stat().st_mtime_ns for x, folder in own.items()}
    bench = study.Bench(bench.model, bench.tokenizer, bench.base, bench.tasks, own)
    groups = [("a", "b"), ("a", "c"), ("b", "c")]
    calls = [(study.visit_group, group, RECIPES, ARMS, DOSES) for group in groups]
    parallel.fill(bench, model, calls, 2)

    def fail(*args, **kwargs):
        pytest.fail("computed again")

    for module, name in ((merging, "merge"), (evaluate, "score"), (specialists, "train_lora")):
        monkeypatch.setattr(module, name, fail)
    merged = [m for group in groups for m in study.merge_all(bench, group, RECIPES, ARMS)]
    assert [m.arm for m in merged[:3]] == ["default", "default", "norm"]  # dare is not merged
    table = study.loss_table(bench, merged, study.dose_curves(bench, DOSES))
    assert len(table) == 18 and table["nll_solo"].notna().sum() == 12
    for x, folder in own.items():
        study.on_dev(bench, x)
        assert (folder / "training.json").stat().st_mtime_ns == trained[x]


def test_one_job_leaves_the_work_to_the_notebook(bench, model, tmp_path):
    parallel.fill(bench, model, [(study.base_ability, "a")], 1)
    assert not any(tmp_path.iterdir())


def test_what_a_call_raises_is_raised(bench, model):
    with pytest.raises(KeyError, match="nobody"):
        parallel.fill(bench, model, [(study.base_ability, x) for x in ("nobody", "a")], 2)


def die(bench):
    os._exit(1)


def test_a_killed_worker_is_told_in_a_sentence(bench, model):
    with pytest.raises(RuntimeError, match="fewer JOBS"):
        parallel.fill(bench, model, [(die,), (die,)], 2)
