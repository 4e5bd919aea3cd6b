"""What does not fit is said before it starts, with what to lower."""

import shutil

import pytest
import tiny

from helpers.study import bench, memory, models


def test_numbers_are_counted_as_they_are_loaded(tiny_base, tmp_path):
    held = sum(p.numel() for p in tiny.llama().parameters())
    assert memory.parameters(tiny_base) == held
    folder = shutil.copytree(tiny_base, tmp_path / "twice")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert memory.parameters(folder) == held, "transformers loads one of the two"


def test_a_base_that_does_not_fit_is_refused_before_it_is_loaded(
    tiny_base, monkeypatch
):
    needed = memory.parameters(tiny_base) * 8 / memory.GB
    monkeypatch.setattr(models, "load_model", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr(memory, "free_gb", lambda device: 0.99 * needed)
    with pytest.raises(
        ValueError, match="are free .cpu.: name a smaller model, another DTYPE"
    ):
        bench.load_base(str(tiny_base))
    memory.check_base("tiny", tiny_base, "bfloat16", "cpu")  # three quarters of it


def test_workers_that_do_not_fit_are_too_many(monkeypatch):
    monkeypatch.setattr(memory, "free_gb", lambda: 7.0)
    assert memory.sentence(3.0, 2).endswith("so 2 fit here")
    assert memory.sentence(3.0, 4).endswith("so 2 fit here: lower WORKERS from 4")
