"""Workers leave what a serial run leaves, fail as one would, and a killed one costs nothing."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pandas as pd
import psutil
import pytest
import tiny
import torch

from helpers import merge, store
from helpers.store import ROOT
from helpers.study import bench as benches
from helpers.study import plan, scores, specialists, visit
from helpers.study.bench import Bench
from helpers.study.executor import call_each, executor

ASKED = plan.base("abc") + plan.doses("abc", [0.5, 1.0], probed="abc")
ASKED += plan.merges(["ab", "abc"], ["linear", "ties"], [("ties", "norm")])
ASKED += plan.merges(["abc"], ["chebyshev"])
ASKED += plan.solos(ASKED)
RECIPE = specialists.Recipe(examples=6, epochs=1, batch_size=3, rank=4)
needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None,
    reason="Dask is an extra: .[cluster]",
)


@pytest.fixture(scope="module")
def untrained(tiny_base):
    toys = {name: tiny.toy(name, 6, ("0", "1")) for name in "abc"}
    return Bench(*benches.load_base(str(tiny_base)), toys, {})


@pytest.fixture
def bench(untrained, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "store"))
    return untrained


def trained(bench, pool=None) -> Bench:
    return replace(
        bench, specialists=visit.train(bench, dict.fromkeys("abc", RECIPE), pool)
    )


def table(visits) -> pd.DataFrame:
    frames = [x.examples.assign(key=x.key, same=x.same_as or "") for x in visits]
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def serial(untrained, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path_factory.mktemp("serial")))
        return table(visit.run(trained(untrained), ASKED))


def count_threads(bench):
    return torch.get_num_threads()


def refuse(bench, label):
    raise KeyError(f"nobody called {label}")


def die(bench):
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_leave_what_a_serial_run_leaves_and_say_where_one_is_killed(
    bench, serial, monkeypatch, capfd
):
    monkeypatch.setenv("OMP_DISPLAY_ENV", "TRUE")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    told = pytest.raises(
        RuntimeError, match="run the same command again, with fewer workers"
    )
    with told, executor(2) as pool:
        made = trained(bench, pool)
        with ThreadPoolExecutor(2) as here:  # two runs of one study at once
            runs = [here.submit(visit.run, made, ASKED, pool) for _ in range(2)]
        # what a call raises is raised
        with pytest.raises(KeyError, match="nobody called"):
            call_each(bench, refuse, [("a",), ("b",)], pool)
        call_each(bench, die, [()], pool)
    assert re.search(r"OMP_WAIT_POLICY ?= ?'PASSIVE'", capfd.readouterr().err)
    for run in runs:
        pd.testing.assert_frame_equal(table(run.result()), serial, atol=1e-6)
    assert not list(store.store().glob("*/.*"))

    def fail(*args, **kwargs):
        pytest.fail("computed again")

    for module, name in (
        (merge, "merge"),
        (scores, "score"),
        (specialists, "train_lora"),
    ):
        monkeypatch.setattr(module, name, fail)
    assert len(visit.run(trained(bench), ASKED)) == len(ASKED)


WAITING_POOL = """
import os, time
from helpers.study.executor import executor
if __name__ == "__main__":
    with executor(2) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING_POOL)
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        worker.wait(timeout=60)


def test_threads_of_one_process_visit_one_at_a_time(bench, serial):
    made = trained(bench)
    with ThreadPoolExecutor(3) as pool:
        found = table(visit.run(made, plan.merges(["ab", "abc"], ["linear"]), pool))
    expected = serial[serial["key"].isin(found["key"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected, atol=1e-6)


def test_one_worker_is_this_process():
    with executor(1) as pool:
        assert pool is None


def test_another_store_than_the_workers_is_told_in_a_sentence(
    bench, tmp_path, monkeypatch
):
    made = trained(bench)
    monkeypatch.setattr(visit, "call_each", lambda *a: [])
    with pytest.raises(RuntimeError, match="the workers filled another store"):
        visit.run(made, ASKED)


# --- a cluster -----------------------------------------------------------------------------------


def kill_once(bench, rows):
    """A visit whose worker is killed in the middle, the first time that it comes to a merge."""
    mark = store.store() / "killed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "cached", partial(logged, store.cached))
        if rows[0].kind == "merge" and not mark.exists():
            mark.touch()
            # one of its merges is finished, others are not
            visit.visit_group(bench, rows[:1])
            os.kill(os.getpid(), signal.SIGKILL)
        return visit.visit_group(bench, rows)


def logged(cached, step, version, determinants, compute, machine=None):
    """`store.cached`, with a line in a file for each result that was computed."""

    def compute_and_log(folder):
        compute(folder)
        with (store.store() / "computed").open("a") as file:
            file.write(f"{step} {store.key(step, version, determinants)}\n")

    return cached(step, version, determinants, compute_and_log, machine)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two Dask workers with a store of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path_factory.mktemp("cluster")))
        with executor(cluster="local:2") as pool:
            yield pool


@needs_dask
def test_a_worker_killed_in_the_middle_changes_nothing(
    untrained, serial, cluster, monkeypatch
):
    bench = trained(untrained, cluster)
    monkeypatch.setattr(visit, "visit_group", kill_once)
    found = visit.run(bench, ASKED, cluster)
    assert (store.store() / "killed").exists()
    pd.testing.assert_frame_equal(table(found), serial, atol=1e-6)
    computed = (store.store() / "computed").read_text().splitlines()
    # nothing finished was done again
    assert len(computed) == len(set(computed)) > len(ASKED)


def lose_scheduler(bench, label):
    """A call in whose middle the scheduler is lost."""
    (store.store() / "started").touch()
    time.sleep(10)


@needs_dask
def test_a_lost_scheduler_is_told_and_the_run_goes_on(untrained, serial, cluster):
    bench = trained(untrained, cluster)
    visit.run(bench, plan.doses("abc"), cluster)
    with ThreadPoolExecutor(1) as here:
        run = here.submit(call_each, bench, lose_scheduler, [("a",), ("b",)], cluster)
        while not (store.store() / "started").exists():
            time.sleep(0.1)
        cluster._client.cluster.close()
        with pytest.raises(RuntimeError, match="the cluster was lost"):
            run.result()
    pd.testing.assert_frame_equal(table(visit.run(bench, ASKED)), serial, atol=1e-6)


def test_a_cluster_without_dask_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    told = pytest.raises(ValueError, match=r"needs Dask, .*\.\[cluster\]")
    with told, executor(cluster="local:1"):
        pass


@pytest.mark.parametrize(("own", "workers", "each"), [(4, 2, 2), (2, 3, 1)])
def test_workers_here_share_the_threads_of_this_process(bench, own, workers, each):
    before = torch.get_num_threads()
    torch.set_num_threads(own)
    try:
        with executor(workers) as pool:
            counts = call_each(bench, count_threads, workers * [()], pool)
        assert set(counts) == {each} and torch.get_num_threads() == own
    finally:
        torch.set_num_threads(before)
