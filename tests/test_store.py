"""The store: content keys; nothing unfinished or damaged ever counts as finished."""

import errno
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers import store as records

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda child: (
        st.lists(child, max_size=3) | st.dictionaries(st.text(), child, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "store"))


@given(JSON)
def test_canonical_is_json_and_keeps_the_value(obj):
    assert json.loads(records.canonical(obj)) == obj


def test_canonical_ignores_the_order_of_keys_and_the_kind_of_sequence():
    assert records.canonical({"b": 1, "a": (1, 2)}) == records.canonical(
        {"a": [1, 2], "b": 1}
    )
    assert records.canonical({"a": 1}) != records.canonical({"a": 1.0})


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        ({"loss": [0.1, math.nan]}, r"value\['loss'\]\[1\] is nan"),
        ({"loss": -math.inf}, "is -inf"),
        ({"seed": np.int64(3)}, r"value\['seed'\] is a numpy.int64"),
        ({"path": Path("a")}, "use plain numbers"),
        ({1: "a"}, "has the key 1"),
    ],
)
def test_canonical_refuses_what_json_cannot_hold(obj, words):
    with pytest.raises(ValueError, match=words):
        records.canonical(obj)


def test_digest_follows_the_content(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"abc")
    assert records.digest(file) == records.digest(b"abc")
    # the published test vector of SHA-256
    assert records.digest(b"abc").startswith("ba7816bf8f01cfea414140de5dae2223")
    before = records.digest(tmp_path)
    file.rename(tmp_path / "b.bin")
    assert records.digest(tmp_path) != before


def test_digest_of_tensors_counts_dtype_and_shape_and_sees_views():
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert (
        records.digest(x)
        == records.digest(x.numpy())
        == records.digest(x.T.contiguous().T)
    )
    others = [
        x.T,
        x.reshape(-1),
        x.to(torch.float64),
        x.to(torch.bfloat16),
        x + 1,
        x.sum(),
    ]
    assert len({records.digest(y) for y in [x, *others]}) == 7


def test_key_depends_on_step_version_and_determinants():
    keys = {
        records.key("train", 1, {"seed": 0}),
        records.key("train", 2, {"seed": 0}),
        records.key("merge", 1, {"seed": 0}),
        records.key("train", 1, {"seed": 1}),
    }
    assert len(keys) == 4 and all(len(k) == 16 for k in keys)


def test_cached_computes_once_and_says_from_what():
    calls = []

    def compute(folder):
        calls.append(folder)
        (folder / "x.txt").write_text("1")

    assert not records.finished("step", 1, {"a": 1})
    first = records.cached("step", 1, {"a": 1}, compute)
    assert records.finished("step", 1, {"a": 1})
    assert records.cached("step", 1, {"a": 1}, compute) == first
    assert records.cached("step", 1, {"a": 2}, compute) != first
    assert len(calls) == 2
    made_from = json.loads((first / "determinants.json").read_text())
    told = {"step": "step", "version": 1, "determinants": {"a": 1}}
    assert made_from.items() >= told.items() and made_from["seconds"] >= 0
    assert {p.name for p in first.parent.iterdir()} == {
        first.name,
        records.key("step", 1, {"a": 2}),
    }


def test_a_failed_computation_is_not_a_result():
    def fail(folder):
        (folder / "x.txt").write_text("half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        records.cached("step", 1, {}, fail)
    done = records.cached("step", 1, {}, lambda folder: (folder / "y.txt").touch())
    assert {p.name for p in done.iterdir()} == {"y.txt", "determinants.json"}


HALF_WAY = """
import os, signal, time
from helpers import store as records
def compute(folder):
    (folder / "x.txt").write_text("half")
    {death}
records.cached("step", 1, {{}}, compute)
"""


@pytest.mark.parametrize(
    "death", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_a_killed_computation_is_not_a_result_and_the_next_run_makes_it_whole(death):
    killed = subprocess.run(
        [sys.executable, "-c", HALF_WAY.format(death=death)], timeout=60
    )
    assert killed.returncode in (3, -signal.SIGKILL)
    done = records.store() / "step" / records.key("step", 1, {})
    assert (
        not done.exists() and len(list(done.parent.glob(f".{done.name}-*.part"))) == 1
    )
    assert (
        records.cached("step", 1, {}, lambda folder: (folder / "y.txt").touch()) == done
    )
    assert {p.name for p in done.iterdir()} == {"y.txt", "determinants.json"}
    assert list(done.parent.iterdir()) == [done]


def _slow(folder):
    (folder / "pid.txt").write_text(str(os.getpid()))
    time.sleep(0.2)


def test_two_processes_make_one_result():
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=records.cached, args=("step", 1, {}, _slow))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    folder = records.cached("step", 1, {}, _slow)
    assert int((folder / "pid.txt").read_text()) in [worker.pid for worker in workers]


def make(folder):
    (folder / "x.txt").write_text("right")


def cut_short(done, other):
    (done / "x.txt").write_text("ri")


def emptied(done, other):
    (done / "x.txt").write_text("")


def swapped(done, other):
    shutil.rmtree(done)
    shutil.copytree(other, done)


def a_file_more(done, other):
    (done / "y.txt").write_text("stray")


def unsealed(done, other):
    (done / "determinants.json").unlink()


@pytest.mark.parametrize("damage", [cut_short, emptied, swapped, a_file_more, unsealed])
def test_a_damaged_result_is_noticed_and_computed_again(damage):
    done, other = (records.cached("step", 1, {"a": a}, make) for a in (1, 2))
    damage(done, other)
    assert not records.finished("step", 1, {"a": 1}) and records.finished(
        "step", 1, {"a": 2}
    )
    with pytest.warns(UserWarning, match="was damaged"):
        assert records.cached("step", 1, {"a": 1}, make) == done
    assert (done / "x.txt").read_text() == "right" and records.finished(
        "step", 1, {"a": 1}
    )
    assert sorted(done.parent.iterdir()) == sorted([done, other])


def test_the_first_writer_wins_and_the_work_of_the_second_is_dropped():
    def second(folder):
        done = records.cached(
            "step", 1, {}, lambda folder: (folder / "first.txt").touch()
        )
        (folder / "second.txt").touch()
        assert done.exists()

    done = records.cached("step", 1, {}, second)
    assert {p.name for p in done.iterdir()} == {"first.txt", "determinants.json"}
    assert list(done.parent.iterdir()) == [done]


def test_leftovers_of_another_host_are_kept():
    done = records.place("step", 1, {})
    mine, theirs = (
        done.with_name(f".{done.name}-{host}-999999999-0.part") for host in HOSTS
    )
    for part in (mine, theirs):
        part.mkdir(parents=True)
    records.cached("step", 1, {}, make)
    assert not mine.exists() and theirs.exists()


HOSTS = platform.node(), "elsewhere"


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "is full"), (errno.EROFS, "is read-only")]
)
def test_a_store_that_cannot_be_written_is_named_in_a_sentence(number, words):
    def fail(folder):
        (folder / "x.txt").write_text("half")
        raise OSError(number, "no")

    with pytest.raises(
        OSError, match=f"store {words}: free space there or name another folder"
    ):
        records.cached("step", 1, {}, fail)
    assert list((records.store() / "step").iterdir()) == []


def test_what_cannot_be_read_is_no_fault_of_the_store():
    def fail(folder):
        raise PermissionError(errno.EACCES, "no", "/somewhere/else")

    with pytest.raises(PermissionError, match="/somewhere/else"):
        records.cached("step", 1, {}, fail)


def test_a_full_disk_in_the_middle_of_a_result_leaves_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no small file system can be mounted here")
    try:
        monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(folder))
        tensors = {"x": torch.zeros(2**18)}
        with pytest.raises(OSError, match="small is full: free space"):
            records.cached(
                "big", 1, {}, lambda f: save_file(tensors, f / "x.safetensors")
            )
        assert list((folder / "big").iterdir()) == []
        assert records.cached("small", 1, {}, make).exists()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_atomic_write_leaves_the_old_file_when_the_body_fails(tmp_path):
    path = tmp_path / "new" / "table.csv.gz"
    with records.atomic_write(path) as part:
        assert part.suffixes == path.suffixes  # writers choose the format by the suffix
        part.write_text("old")
    with pytest.raises(RuntimeError), records.atomic_write(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "log.jsonl"
    assert records.read_jsonl(path) == []
    rows = [{"b": 1, "a": "ä\u2028"}, {"a": None}]
    for row in rows:
        records.append_jsonl(path, row)
    assert records.read_jsonl(path) == rows
