"""What does a shared machine cost? A slice of 01, 02 and 03, alone and beside one busy process.

Run by hand on a quiet machine (`python tests/benchmarks/bench_time.py`, about 12 minutes on
two cores). Writes data/results/bench_time.csv. Each cell is a process with a store of its own: it
trains two specialists, merges them by two rules and scores the merges, reads states and compares
the task vectors. `spinning`: torch is loaded before OpenMP is told to wait passively.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

if "spinning" in sys.argv:
    os.environ.pop("OMP_WAIT_POLICY", None)
    import torch  # noqa: F401

import pandas as pd

from helpers.run import machine
from helpers.store import ROOT, write_table

TASKS = [
    "bigbench:linguistic_mappings/sentence_negation_json",
    "bigbench:linguistic_mappings/question_formation_json",
]
SIZES = (96, 16, 24, 24)  # train, dev, probe, test
CELLS = [  # waiting, threads, workers
    ("spinning", 2, 1),
    ("passive", 2, 1),
    ("passive", 1, 2),
]
PARTS = ["start", "01", "02", "03"]


def slice_of_study(threads: int, workers: int) -> dict[str, float]:
    """Seconds of each part: imports, model and workers; training; merges; states and vectors."""
    start = time.perf_counter()
    from dataclasses import replace

    import torch

    from helpers.states import PRIMARY, pair_metrics
    from helpers.study import plan, tasks, visit
    from helpers.study.bench import Bench, load_base
    from helpers.study.executor import call_each
    from helpers.study.specialists import Recipe

    torch.set_num_threads(threads)
    loaded = tasks.load_tasks(TASKS, sizes=SIZES)
    bench = Bench(*load_base("smollm2-135m-instruct"), loaded, {})
    labels, marks = list(loaded), [start]
    with visit.executor(workers) as pool:
        call_each(bench, pause, workers * [()], pool)
        marks.append(time.perf_counter())
        recipe = Recipe(examples=SIZES[0], epochs=1)
        bench = replace(
            bench, specialists=visit.train(bench, dict.fromkeys(labels, recipe), pool)
        )
        marks.append(time.perf_counter())
        merges = plan.merges([labels, labels[::-1]], ["linear", "ties"], probe=False)
        visit.run(bench, merges, pool)
        marks.append(time.perf_counter())
        visit.run(bench, plan.doses(labels, probed=labels), pool)
    assert set(PRIMARY) <= set(pair_metrics(bench.rows(labels), labels))
    marks.append(time.perf_counter())
    parts = zip(PARTS, marks, marks[1:], strict=False)
    return {part: end - begin for part, begin, end in parts}


def pause(bench) -> None:
    """A first call, so that every worker has loaded its model."""
    time.sleep(1)


@contextmanager
def busy(processes: int):
    """Beside so many processes that never wait."""
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def timed(waiting: str, threads: int, workers: int, beside: int) -> dict:
    """One cell in a process of its own."""
    load = os.getloadavg()[0]
    given = f"{waiting} {threads} {workers}".split()
    with tempfile.TemporaryDirectory() as folder, busy(beside):
        env = os.environ | {
            "MERGING_COLLAPSE_STORE": folder,
            "OMP_NUM_THREADS": str(threads),
        }
        env |= {"MKL_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--cell", *given]
        done = subprocess.run(
            command, env=env, check=True, capture_output=True, text=True
        )
    seconds = json.loads(done.stdout.splitlines()[-1])
    cell = {
        "waiting": waiting,
        "threads": threads,
        "workers": workers,
        "beside": beside,
    }
    return cell | seconds | {"seconds": sum(seconds.values()), "load": load}


def as_table(rows: list[dict]) -> pd.DataFrame:
    """The cells with their seconds relative to those alone."""
    table = pd.DataFrame(rows)
    alone = table["seconds"].where(table["beside"] == 0).ffill()
    return table.assign(ratio=table["seconds"] / alone, machine=machine()).round(3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cell", nargs=3, help="waiting, threads and workers of one slice"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="the least time of so many is given"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "data" / "results" / "bench_time.csv"
    )
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(slice_of_study(*map(int, options.cell[1:]))))
        return
    rows = []
    for cell in CELLS:
        for beside in (0, 1):
            tried = [timed(*cell, beside) for _ in range(options.repeats)]
            rows.append(min(tried, key=lambda row: row["seconds"]))
            print(rows[-1], flush=True)
            write_table(options.out, as_table(rows))


if __name__ == "__main__":
    main()
