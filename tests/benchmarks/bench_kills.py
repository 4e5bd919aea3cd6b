"""The smoke chain killed at ten seeded moments: it goes on to the tables of an undisturbed run.

Run by hand (`python tests/benchmarks/bench_kills.py`, two and a half times the smoke chain). Each
run goes on where the last was killed, with all its processes at once. Prints a line for each kill;
fails where a table differs. `--kills 0 --cluster local:2` compares a cluster with a serial run.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from helpers import run
from helpers.store import ROOT

TABLES = (
    "losses.csv",
    "merges.csv",
    "doses.csv",
    "pairs.csv",
    "bound.csv",
    "verdicts.csv",
)


def start(folder: Path, *how: str) -> subprocess.Popen:
    """`run smoke` into a folder with a store of its own."""
    command = [sys.executable, "-m", "helpers", "run", "smoke", *how]
    command += ["-p", "RESULTS", str(folder / "results")]
    env = os.environ | {"MERGING_COLLAPSE_STORE": str(folder / "store")}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


def kill(runner: subprocess.Popen) -> None:
    """kill -9 of a run and of every process that it started."""
    processes = [psutil.Process(runner.pid)]
    processes += processes[0].children(recursive=True)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    runner.wait()


def check(folder: Path) -> list[str]:
    """The finished notebooks: each has all its files, and a page has all notebooks."""
    done = run.finished(folder / "results")
    for name in done:
        (book,) = (book for book in run.notebooks() if book.name == name)
        assert all((folder / "results" / file).exists() for file in book.files), name
    page = folder / "results" / "index.html"
    assert not page.exists() or len(done) == len(run.notebooks())
    return list(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="for the killed runs, as `run` has it"
    )
    options = parser.parse_args()
    how = ["--cluster", options.cluster] if options.cluster else []
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        begin = time.monotonic()
        assert start(whole).wait() == 0
        seconds = time.monotonic() - begin
        print(f"a whole run takes {seconds:.0f} s")
        moments = np.random.default_rng(options.seed).uniform(0, seconds, options.kills)
        # each run goes on where the last was killed
        for moment in moments / options.kills:
            runner = start(killed, *how)
            time.sleep(moment)
            kill(runner)
            print(
                f"killed after {moment:.0f} s: finished are {check(killed)}", flush=True
            )
        assert start(killed, *how).wait() == 0
        assert len(check(killed)) == len(run.notebooks())
        for name in TABLES:
            tables = [(x / "results" / name).read_text() for x in (whole, killed)]
            assert tables[0] == tables[1], f"{name} differs"
        print(
            f"after {options.kills} kills all of {', '.join(TABLES)} are those of the whole run"
        )


if __name__ == "__main__":
    main()
