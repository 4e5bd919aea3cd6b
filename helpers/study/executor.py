"""Who does the work? Any `concurrent.futures.Executor`: processes here, or a Dask cluster.

Workers fill the store and hand back keys. Each loads the base once, on its device, and finds tasks
and specialists in the store: all that is sent is what to open and what to do.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    ProcessPoolExecutor,
    as_completed,
)
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from tqdm import tqdm

from helpers import store
from helpers.study import archives
from helpers.study.bench import Bench, load_base
from helpers.study.tasks import Task

RETRIES = 2  # how often a cluster tries a visit again whose worker was lost


@contextmanager
def executor(
    workers: int = 1,
    cluster: str | None = None,
) -> Iterator[Executor | None]:
    """What `visit.run` takes: None (this process), `workers` processes, or a Dask cluster.

    `cluster`: the address of a scheduler, its scheduler file, or "local:N", which starts N workers
    here. Each process holds a model; those here share this one's threads. Raises ValueError for a
    cluster where Dask is missing.
    """
    if cluster is not None:
        with _client(cluster) as client:
            count = len(client.scheduler_info()["workers"])
            print(f"Dask: {count} workers, {client.dashboard_link}")
            yield client.get_executor(pure=False, retries=RETRIES)
    elif workers > 1:
        # spawned, not forked: a fork would share locks and a GPU context with this process
        processes = ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent)
        with _sharing(workers), processes as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    else:
        yield None


def _end_with_parent() -> None:
    """A worker whose parent is killed ends: it would wait for work for ever, with its model."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


@contextmanager
def _sharing(workers: int) -> Iterator[None]:
    """This process, which only waits, has as many threads as each of its workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _client(cluster: str) -> Iterator[Any]:
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ValueError(
            "a cluster needs Dask, here and on its workers: "
            "python -m pip install -c requirements.txt -e '.[cluster]'"
        ) from error
    kind, _, count = cluster.partition(":")
    if kind == "local":
        # one visit at a time in a process: the base is changed in place
        with (
            _sharing(int(count)),
            LocalCluster(int(count), threads_per_worker=1) as here,
            Client(here) as client,
        ):
            yield client
    else:
        address = (
            {"scheduler_file": cluster}
            if Path(cluster).is_file()
            else {"address": cluster}
        )
        with Client(**address) as client:
            yield client


def call_each(
    bench: Bench,
    function: Callable,
    calls: Sequence[tuple],
    pool: Executor | None = None,
    desc: str | None = None,
) -> list:
    """[function(bench, *arguments) for arguments in calls], here or by the workers of `pool`.

    `function` is a module-level one whose result is small. Raises what a call raised first;
    RuntimeError, in a sentence, where workers were killed or the cluster was lost.
    """
    silent = desc is None or not calls
    bar = {"desc": desc, "total": len(calls), "mininterval": 5, "disable": silent}
    if pool is None or not calls:
        return [function(bench, *call) for call in tqdm(calls, **bar)]
    root, key = str(store.store().absolute()), _keep(bench)
    results = [None] * len(calls)
    pending: dict[Any, int] = {}
    try:
        for i, call in enumerate(calls):
            pending[pool.submit(_call, root, key, function, *call)] = i
        for done in tqdm(as_completed(pending), **bar):
            results[pending[done]] = done.result()
    except Exception as error:
        for future in pending:
            future.cancel()
        of_dask = type(error).__module__.startswith("distributed")
        if of_dask or isinstance(error, BrokenExecutor | CancelledError):
            raise RuntimeError(
                "a worker was killed or the cluster was lost, perhaps for want of memory: run the "
                "same command again, with fewer workers; what is finished is not done again"
            ) from error
        raise
    return results


# --- a bench in the store, and opened again by a worker -----------------------------------------

VERSION = 1  # raised by hand whenever what is kept of a bench changes


def _keep(bench: Bench) -> str:
    """What a worker needs to open the same bench, as a result of the store; its key."""
    about = _as_data(bench)

    def compute(folder: Path) -> None:
        content = about | {"tasks": {x: _rows(task) for x, task in bench.tasks.items()}}
        (folder / "bench.json").write_text(json.dumps(content), encoding="utf-8")

    return store.cached("bench", VERSION, about, compute).name


def _as_data(bench: Bench) -> dict[str, Any]:
    """A bench in names, digests, and folders of the store."""
    embedded = {entry["name"] for entry in archives.CATALOGUE["models"].values()}
    name = bench.base["name"]
    return {
        "model": name if name in embedded else bench.model.config.name_or_path,
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "device": bench.model.device.type,
        "threads": torch.get_num_threads(),
        "batch_size": bench.batch_size,
        "tasks": {
            label: [task.name, task.digest()] for label, task in bench.tasks.items()
        },
        "specialists": {
            label: _relative(folder) for label, folder in bench.specialists.items()
        },
    }


def _relative(folder: Path) -> str:
    """A folder as workers with another store path find it; a user's own as it is."""
    root = store.store()
    return (
        folder.relative_to(root).as_posix()
        if folder.is_relative_to(root)
        else str(folder)
    )


def _rows(task: Task) -> dict[str, Any]:
    """A task as JSON."""
    about = {field.name: getattr(task, field.name) for field in fields(task)}
    return about | {
        "splits": {split: rows.to_list() for split, rows in task.splits.items()}
    }


_alone = Lock()  # threads of one worker share its model, which a visit changes in place


def _call(root: str, key: str, function: Callable, *arguments: Any) -> Any:
    """Run by a worker: `function` on the bench of this key."""
    os.environ.setdefault("MERGING_COLLAPSE_STORE", root)
    with _alone:
        bench, threads = _opened(key)
        torch.set_num_threads(threads)
        return function(bench, *arguments)


# a bench for training, for screening, for visits; twins come and go
@lru_cache(maxsize=4)
def _opened(key: str) -> tuple[Bench, int]:
    file = store.store() / "bench" / key / "bench.json"
    opened = json.loads(file.read_text(encoding="utf-8"))
    base = _base(opened["model"], opened["dtype"], opened["device"])
    folders = {x: store.store() / path for x, path in opened["specialists"].items()}
    tasks = {x: _task(about) for x, about in opened["tasks"].items()}
    return Bench(*base, tasks, folders, opened["batch_size"]), opened["threads"]


_base = cache(load_base)


def _task(about: dict[str, Any]) -> Task:
    splits = {
        split: Dataset.from_list(rows) for split, rows in about.pop("splits").items()
    }
    return Task(splits=DatasetDict(splits), **about)
