"""Ready adapters: checked before any is taken, each fault in a sentence of its own."""

from unittest.mock import MagicMock

import pytest
import tiny
import torch
from huggingface_hub.errors import GatedRepoError

from helpers import merge
from helpers.study import bench as benches
from helpers.study import models, ready

TASKS = {x: tiny.toy(x) for x in ("task1", "task2", "task3")}


@pytest.fixture
def bench(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "store"))
    return benches.Bench(*benches.load_base(str(tiny_base)), TASKS, {})


def test_an_adapter_is_kept_once_with_the_task_vector_that_it_has(bench, tiny_adapters):
    given = {folder.name: str(folder) for folder in tiny_adapters}
    kept = ready.adopt(bench, given, rank=4)
    assert ready.adopt(bench, given) == kept and list(kept) == list(TASKS)
    for folder, place in zip(tiny_adapters, kept.values(), strict=True):
        base, _ = bench.sources([])
        both = [merge.open_specialist(x, "a") for x in (folder, place)]
        for here, there in zip(*(merge.views(base, [x]) for x in both), strict=True):
            assert torch.equal(here.taus[0][...], there.taus[0][...])


def test_every_fault_is_told_before_any_is_kept(
    bench, tiny_base, tiny_adapters, tmp_path
):
    other = tiny.save_base(tmp_path / "other", seed=1)
    elsewhere = tiny.save_adapter(tmp_path / "elsewhere", other, 1)
    given = {
        "task1": str(tiny_adapters[0]),
        "task2": str(elsewhere),
        "task3": "org/none",
    }
    with pytest.raises(ValueError) as error:
        ready.adopt(bench, given)
    first, second = str(error.value).splitlines()
    assert first.startswith("task2: ") and "trained on" in first
    assert second.startswith("task3: cannot fetch 'org/none'")
    with pytest.raises(ValueError, match="task1: .* has rank 4, not 16"):
        ready.adopt(bench, given, rank=16)
    with pytest.raises(ValueError, match="is no adapter"):
        ready.adopt(bench, given | {"task2": str(tiny_base)})
    with pytest.raises(ValueError, match="name other tasks: task3"):
        ready.adopt(bench, {x: given[x] for x in ("task1", "task2")})
    assert not list((tmp_path / "store").glob("specialist/*"))


def test_a_gated_adapter_is_told_with_what_to_do(bench, tiny_adapters, monkeypatch):
    def refuse(*_, **__):
        raise GatedRepoError("403", response=MagicMock())

    monkeypatch.setattr(models, "snapshot_download", refuse)
    given = {
        "task1": str(tiny_adapters[0]),
        "task2": "org/gated",
        "task3": str(tiny_adapters[2]),
    }
    with pytest.raises(ValueError) as error:
        ready.check(given, bench.base["name"])
    (told,) = str(error.value).splitlines()
    assert told.startswith("task2: 'org/gated' is gated: accept its terms")
