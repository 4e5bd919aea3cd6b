"""How do several processes share a study? They fill the store, and the notebook finds it all there.

Every result is a folder of the store, named by what it was made from, and no two processes compute
the same one (`records.cached`). So nothing has to be handed back: the workers make the calls that
the notebook is about to make, and drop what these return.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from tqdm import tqdm

from helpers.study import old as study

_bench: study.Bench  # of this process, if it is a worker


def fill(
    bench: study.Bench, model: tuple[str, str, str], calls: Sequence[tuple], jobs: int
) -> None:
    """Make each of `calls`, (function, *arguments) as function(bench, *arguments), in a process.

    Does nothing for fewer than two `jobs`: the notebook's own calls do the work. `model`: name,
    dtype and device, as `study.load_base` takes them. Each worker loads it anew and, on a CPU, has
    as many threads as this process: memory is that of `jobs` notebooks. The functions are
    module-level ones.

    Raises:
        Exception: what a call raised first. RuntimeError: a worker was killed.
    """
    if jobs < 2 or not calls:
        return
    threads = torch.get_num_threads() if model[-1] == "cpu" else 1  # no result depends on these
    about = bench.tasks, bench.specialists, threads
    # spawned, not forked: a fork would share locks and a GPU context with this process
    pool = ProcessPoolExecutor(min(jobs, len(calls)), get_context("spawn"), _start, (model, *about))
    try:
        pending = [pool.submit(_call, *call) for call in calls]
        for done in tqdm(as_completed(pending), "jobs", len(calls), mininterval=5):
            done.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed, perhaps for want of memory: run again with fewer JOBS; "
            "what is finished is not done again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(model: tuple[str, str, str], tasks: dict, specialists: dict, threads: int) -> None:
    global _bench
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - one bar is enough: the one of the parent
    torch.set_num_threads(threads)
    _bench = study.Bench(*study.load_base(*model), tasks, specialists)


def _call(function: Callable, *arguments) -> None:
    function(_bench, *arguments)
