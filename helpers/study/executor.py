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
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
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
    here. Each process holds a model. Raises ValueError for a cluster where Dask is missing.
    """
    if cluster is not None:
        with _client(cluster) as client:
            print(
                f"Dask: {len(client.scheduler_info()['workers'])} workers, {client.dashboard_link}"
            )
            yield client.get_executor(pure=False, retries=RETRIES)
    elif workers > 1:
        # spawned, not forked: a fork would share locks and a GPU context with this process
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    else:
        yield None


@contextmanager
def _client(cluster: str) -> Iterator[Any]:
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ValueError(
            "a cluster needs Dask: python -m pip install -e '.[cluster]' here and on its workers"
        ) from error
    kind, _, count = cluster.partition(":")
    if kind == "local":
        # one visit at a time in a process: the base is changed in place
        with LocalCluster(int(count), threads_per_worker=1) as here, Client(here) as client:
            yield client
    else:
        address = {"scheduler_file": cluster} if Path(cluster).is_file() else {"address": cluster}
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
    bar = {
        "desc": desc,
        "total": len(calls),
        "mininterval": 5,
        "disable": silent,
    }
    if pool is None or not calls:
        return [function(bench, *call) for call in tqdm(calls, **bar)]
    opened = _as_data(bench)
    results = [None] * len(calls)
    pending: dict[Any, int] = {}
    try:
        for i, call in enumerate(calls):
            pending[pool.submit(_call, opened, function, *call)] = i
        for done in tqdm(as_completed(pending), **bar):
            results[pending[done]] = done.result()
    except Exception as error:
        for future in pending:
            future.cancel()
        if _is_loss(error):
            raise RuntimeError(
                "a worker was killed or the cluster was lost, perhaps for want of memory: run the "
                "same command again, with fewer workers; what is finished is not done again"
            ) from error
        raise
    return results


def _is_loss(error: Exception) -> bool:
    """Whether the work failed for want of those who do it."""
    of_dask = type(error).__module__.startswith("distributed")
    return of_dask or isinstance(error, BrokenExecutor | CancelledError)


# --- a bench as data, and opened again by a worker ----------------------------------------------


def _as_data(bench: Bench) -> dict[str, Any]:
    """What a worker needs to open the same bench: names, and folders of the store."""
    embedded = {entry["name"] for entry in archives.CATALOGUE["models"].values()}
    name = bench.base["name"]
    folders = {label: _relative(folder) for label, folder in bench.specialists.items()}
    return {
        "store": str(store.store().absolute()),
        "model": name if name in embedded else bench.model.config.name_or_path,
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "device": bench.model.device.type,
        "threads": torch.get_num_threads(),
        "batch_size": bench.batch_size,
        "tasks": _keep_tasks(bench.tasks).name,
        "specialists": folders,
    }


def _relative(folder: Path) -> str:
    """A folder as workers with another store path find it; a user's own as it is."""
    root = store.store()
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)


def _keep_tasks(tasks: dict[str, Task]) -> Path:
    """The tasks as a result of the store."""

    def compute(folder: Path) -> None:
        content = {}
        for label, task in tasks.items():
            about = {field.name: getattr(task, field.name) for field in fields(task)}
            splits = {split: rows.to_list() for split, rows in task.splits.items()}
            content[label] = about | {"splits": splits}
        (folder / "tasks.json").write_text(json.dumps(content), encoding="utf-8")

    digests = {label: [task.name, task.digest()] for label, task in tasks.items()}
    return store.cached("tasks", 1, digests, compute)


_alone = Lock()  # threads of one worker share its model, which a visit changes in place


def _call(opened: dict[str, Any], function: Callable, *arguments: Any) -> Any:
    """Run by a worker."""
    os.environ.setdefault("MERGING_COLLAPSE_STORE", opened["store"])
    with _alone:
        torch.set_num_threads(opened["threads"])
        return function(_opened(json.dumps(opened)), *arguments)


@cache
def _opened(text: str) -> Bench:
    opened = json.loads(text)
    base = _base(opened["model"], opened["dtype"], opened["device"])
    folders = {x: store.store() / path for x, path in opened["specialists"].items()}
    return Bench(*base, _tasks(opened["tasks"]), folders, opened["batch_size"])


@cache
def _base(
    model: str,
    dtype: str,
    device: str,
) -> tuple[Any, Any, dict]:
    return load_base(model, dtype, device)


@cache
def _tasks(key: str) -> dict[str, Task]:
    file = store.store() / "tasks" / key / "tasks.json"
    tasks = {}
    for label, about in json.loads(file.read_text(encoding="utf-8")).items():
        splits = {split: Dataset.from_list(rows) for split, rows in about.pop("splits").items()}
        tasks[label] = Task(splits=DatasetDict(splits), **about)
    return tasks
