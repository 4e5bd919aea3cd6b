"""How does a study grow? Plans of the paper's size and beyond, on 1 to 512 simulated workers.

Run by hand (`python tests/benchmarks/bench_growth.py`, about 5 minutes; `--only paper`). Writes
data/results/bench_growth.csv. Unit costs are those that the demo was measured at; workers sleep, in
a Dask scheduler that has as many tasks to hand out as the study would have. Time is shortened so
that a cell takes SECONDS; what the scheduler itself takes is not, and is added to the hours.
"""

import argparse
import heapq
import os
import pickle
import time
from concurrent.futures import wait
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from distributed import Client, LocalCluster

from helpers.run import all_profiles, costs
from helpers.store import ROOT, write_table
from helpers.study import costs as study_costs
from helpers.study import design, groups, plan, visit
from helpers.study.design import Groups

WORKERS = (1, 8, 64, 512)
SECONDS = 10.0  # of a simulated cell, without the scheduler's own
NO_SWAPS = pd.DataFrame(columns=["tasks", "swapped"])
DEMO = all_profiles()["demo"]
FILES = {"specialist": 6}  # of a result in the store; others have two
NAMES = [f"t{i}" for i in range(1000)]
PHASES = (("specialist",), *visit.PHASES)


class Work(NamedTuple):
    """Units of work by phase, in CPU seconds, and what they send and leave."""

    name: str
    adapters: int
    merges: int
    phases: list[list[float]]
    sent_mb: float
    store_gb: float
    files: int


def visits(tasks: list[str], chosen: Groups, near: bool = False) -> plan.Plan:
    """All of a study; `near`: specialists read only their own and their partners' probes."""
    asked = design.visits(tasks, chosen, DEMO | {"GROUP_RULES": []})
    if near:
        rows = [
            row._replace(probed=row.scored) if row.kind == "dose" else row
            for row in asked
        ]
        asked = plan.Plan.of(rows)
    examples = dict.fromkeys(tasks, DEMO["TRAIN_EXAMPLES"])
    trained = design.training(tasks, examples, DEMO["EPOCHS"])
    return trained + asked + plan.solos(asked)


def work(name: str, asked: plan.Plan, bases: int = 1) -> Work:
    """What a plan asks of its workers, on so many bases."""
    units = study_costs.unit_costs(ROOT / "data" / "results" / "demo", DEMO)
    sizes = {
        part: DEMO[f"{part.upper()}_EXAMPLES"] for part in ("dev", "probe", "test")
    }
    sizes["train"] = 0
    total = asked.cost(units, sizes)
    phases, sent, files = [], 0, 0
    for kinds in PHASES:
        jobs = visit._units(asked.kinds(*kinds))
        phases.append(
            bases * [seconds(rows, units["cpu_seconds"], sizes) for rows in jobs]
        )
        sent += sum(len(pickle.dumps([tuple(row) for row in rows])) for rows in jobs)
    for row in asked:
        files += FILES.get(row.kind, 2 * (1 + len(row.scored) + len(row.probed)))
    kinds = asked.frame["kind"].value_counts()
    about = (
        kinds["specialist"] * bases,
        kinds["merge"] * bases,
        phases,
        bases * sent / 2**20,
    )
    return Work(name, *about, bases * total["gigabytes"].sum(), bases * files)


def seconds(rows: list, each: pd.Series, sizes: dict) -> float:
    """CPU seconds of a unit of work."""
    total = 0.0
    for row in rows:
        amounts = study_costs.work(row, sizes)
        total += sum(each.get(step, 0.0) * amount for step, amount in amounts.items())
    return total


def makespan(phases: list[list[float]], workers: int) -> float:
    """Seconds until workers have done all, each taking the next; a phase waits for the last."""
    total = 0.0
    for jobs in phases:
        ends = [0.0] * workers
        for job in jobs:
            heapq.heapreplace(ends, ends[0] + job)
        total += max(ends)
    return total


def simulated(phases: list[list[float]], workers: int, scale: float) -> float:
    """Seconds of the same on a Dask scheduler, whose workers sleep `scale` of each job."""
    processes = min(workers, 16)
    about = {"n_workers": processes, "threads_per_worker": workers // processes}
    with (
        LocalCluster(**about, processes=False, dashboard_address=":0") as here,
        Client(here) as client,
    ):
        pool = client.get_executor(pure=False)
        start = time.perf_counter()
        for jobs in phases:
            wait([pool.submit(time.sleep, scale * job) for job in jobs])
        return time.perf_counter() - start


def row(study: Work, workers: int) -> dict:
    """One cell of the table."""
    ideal, cpu = makespan(study.phases, workers), sum(map(sum, study.phases))
    scale = SECONDS / ideal
    load = os.getloadavg()[0]
    overhead = max(simulated(study.phases, workers, scale) - SECONDS, 0.0)
    hours = (ideal + overhead) / 3600
    return {
        **about(study),
        "workers": workers,
        "how": "simulated",
        "cpu_hours": cpu / 3600,
        "hours": hours,
        "efficiency": cpu / 3600 / workers / hours,
        "scheduler_seconds": overhead,
        "load": load,
    }


def about(study: Work) -> dict:
    """What does not depend on the number of workers."""
    counts = {"study": study.name, "adapters": study.adapters, "merges": study.merges}
    counts["units"] = sum(map(len, study.phases))
    return counts | {
        "sent_mb": study.sent_mb,
        "store_gb": study.store_gb,
        "files": study.files,
    }


def measured(study: Work) -> dict:
    """The demo as it ran: one process, two threads; notebooks 01 and 02 with all their cells."""
    minutes = costs()["demo"]["minutes"]
    hours = (minutes["01_finetune"] + minutes["02_merge"]) / 60
    return {**about(study), "workers": 1, "how": "measured", "hours": hours}


def demo() -> Work:
    """The committed study, to hold the simulation to what was measured."""
    tasks = DEMO["TASKS"]
    chosen = design.drawn(tasks, dict(zip(tasks, tasks, strict=True)), DEMO)
    return work("demo", visits(tasks, chosen))


def paper() -> Work:
    """64 adapters of each of five bases, in groups of eight."""
    chosen = Groups([], groups.draw(NAMES[:64], 8, 25), NO_SWAPS)
    return work("64 adapters, 25 groups of 8, 5 bases", visits(NAMES[:64], chosen), 5)


def many() -> Work:
    """A thousand adapters, each in eight pairs."""
    pairs = groups.partners(NAMES, 8, dict(zip(NAMES, NAMES, strict=True)))
    asked = visits(NAMES, Groups(pairs, [], NO_SWAPS), near=True)
    return work("1,000 adapters, 8 partners each", asked)


STUDIES = {"demo": demo, "paper": paper, "many": many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(STUDIES))
    parser.add_argument(
        "--out", type=Path, default=ROOT / "data" / "results" / "bench_growth.csv"
    )
    options = parser.parse_args()
    rows = []
    for name in options.only:
        study = STUDIES[name]()
        rows += [row(study, workers) for workers in WORKERS]
        rows += [measured(study)] if name == "demo" else []
        table = pd.DataFrame(rows).round(4)
        print(table.to_string(index=False), flush=True)
        write_table(options.out, table)


if __name__ == "__main__":
    main()
