"""Fixtures of what is fetched: a cache, a catalogue and an index of the test's own."""

import threading
from pathlib import Path

import pytest
from package_index import Index

from helpers.study import archives


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache and a catalogue of the test's own, and an index that nothing answers."""
    monkeypatch.setenv("MERGING_COLLAPSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(
        archives, "CATALOGUE", {"cache_gb": 0, "packages": {}, "models": {}}
    )
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch):
    server = Index()
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}
    )
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
