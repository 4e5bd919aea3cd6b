"""Fixtures that every room's tests share."""

import os
from pathlib import Path

# Two shared cores: one thread a process is faster than threads that spin, and sums are repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tiny
import toy


def pytest_collection_modifyitems(items):
    """The chain is longest: begun first, it runs beside everything else (pytest -n 2)."""
    items.sort(key=lambda item: item.get_closest_marker("chain") is None)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama with tokenizer."""
    return tiny.save_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_adapters(tiny_base, tmp_path_factory) -> list[Path]:
    """Folders of three random LoRA adapters of `tiny_base`."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        tiny.save_adapter(root / f"task{seed}", tiny_base, seed) for seed in (1, 2, 3)
    ]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project of two small notebooks, for the runner."""
    return toy.make(tmp_path, monkeypatch)
