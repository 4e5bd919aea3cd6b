"""What happened to each model? Visits: apply a delta to the base, read scores and states, restore.

A visit is named by what was asked (`identity`), so a killed run resumes where it was, on any number
of workers. Of the merges of one group, those that are one model (by their sketches) are read once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from helpers import merge, store
from helpers.study import bench as benches
from helpers.study import deltas, readings, specialists
from helpers.study.executor import call_each
from helpers.study.executor import executor as executor
from helpers.study.identity import Identity
from helpers.study.plan import Plan, Row

# each may need those before it
PHASES = (("base", "ability", "dose"), ("merge",), ("solo",))


# --- all visits of a plan ---------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """A visited row of a plan. `key` names its model; `same_as` that of an equal earlier merge."""

    row: Row
    key: str
    same_as: str | None
    identity: Identity

    @cached_property
    def report(self) -> dict:
        """What the merge did (`merge.Report.as_dict`); of a dose and of the base nothing."""
        file = store.place(*self.identity.model_entry(self.row)) / "record.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @cached_property  # every table is made of them
    def examples(self) -> pd.DataFrame:
        """Scores of each example (`scores.score`), with the column task."""
        frames = []
        for x in self.row.scored:
            folder = store.place(*self.identity.score_entry(self.row, x))
            frames.append(readings.read_examples(folder).assign(task=x))
        return pd.concat(frames, ignore_index=True)

    @property
    def states(self) -> dict[str, Tensor]:
        """By task, states on its probes (probes, layers, d), fp32.

        At the last prompt token; of an encoder the mean over tokens.
        """
        found = {}
        for x in self.row.probed:
            folder = store.place(*self.identity.state_entry(self.row, x))
            found[x] = readings.read_states(folder)
        return found


def run(
    bench: benches.Bench,
    plan: Plan,
    pool: Executor | None = None,
    desc: str = "visits",
) -> list[Visit]:
    """Visit every row of a plan that the store does not hold; all its visits, in its order.

    `pool` is any `concurrent.futures.Executor` (`executor`); None does the work here. Progress is
    shown by groups. A run that was stopped goes on where it was. Raises ValueError, before any
    work, for a mask arm of a rule that drops nothing at random.
    """
    plan = plan.keyed(bench.identity)
    for row in plan.kinds("merge"):
        if row.arm.startswith("mask") and not merge.RULES[row.rule].random:
            raise ValueError(
                f"{row.rule} drops nothing at random: it has no arm {row.arm!r}"
            )
    same: dict[str, str | None] = {}
    for kinds in PHASES:
        units = [(rows,) for rows in _units(plan.kinds(*kinds))]
        for pairs in call_each(bench, visit_group, units, pool, desc):
            same |= pairs
    if not plan.done().all():
        raise RuntimeError(
            f"the workers filled another store than {store.store()}: start them with the same "
            "MERGING_COLLAPSE_STORE, on a folder that all hosts share"
        )
    rows = zip(plan, plan.frame["key"], strict=True)
    return [Visit(row, key, same[key], bench.identity) for row, key in rows]


def _units(plan: Plan) -> list[list[Row]]:
    """Rows by unit of work: those of one group at one seed; the base's, task by task."""
    units: dict[Any, list[Row]] = {}
    for row in plan:
        if row.kind == "base":
            for x in dict.fromkeys([*row.scored, *row.probed]):
                scored = (x,) if x in row.scored else ()
                probed = (x,) if x in row.probed else ()
                units["base", x, row.split] = [
                    row._replace(scored=scored, probed=probed)
                ]
        else:
            units.setdefault((row.tasks, row.seed), []).append(row)
    # the longest first: no worker is left alone with one at the end
    return sorted(units.values(), key=lambda rows: -sum(len(row.tasks) for row in rows))


def distinct(visits: Iterable[Visit]) -> Plan:
    """The rows of these visits without merges that equal an earlier one."""
    return Plan.of(visit.row for visit in visits if visit.same_as is None)


def train(
    bench: benches.Bench,
    recipes: Mapping[str, specialists.Recipe],
    pool: Executor | None = None,
) -> dict[str, Path]:
    """Folders of the specialists of these tasks, each trained once; here, or by the workers."""
    if pool is None:
        return {
            x: benches.train(bench, x, how, quiet=False) for x, how in recipes.items()
        }
    made = call_each(bench, _train, list(recipes.items()), pool, "training")
    return {x: store.store() / folder for x, folder in zip(recipes, made, strict=True)}


def _train(bench: benches.Bench, label: str, recipe: specialists.Recipe) -> str:
    folder = benches.train(bench, label, recipe)
    return folder.relative_to(store.store()).as_posix()


def costs(visits: Iterable[Visit]) -> pd.DataFrame:
    """What the results of these visits took to compute, whenever that was.

    A row for each step and number of specialists in it: step, models, count (of results), and the
    means of one: seconds, cpu_seconds, megabytes (in the store).
    """
    rows = []
    folders = {x for visit in visits for x in visit.identity.entries(visit.row)}
    for folder in sorted(folders):
        made = store.seal(store.store() / folder)
        files = (store.store() / folder).iterdir()
        size = sum(file.stat().st_size for file in files) / 2**20
        models = len(made["determinants"].get("specialists", []))
        rows.append((made["step"], models, made["seconds"], made["cpu_seconds"], size))
    names = ["step", "models", "seconds", "cpu_seconds", "megabytes"]
    groups = pd.DataFrame(rows, columns=names).groupby(["step", "models"])
    means = groups.mean().reset_index()
    means.insert(2, "count", groups.size().to_numpy())
    return means


# --- the visits of one group ------------------------------------------------------------------


def visit_group(bench: benches.Bench, rows: Sequence[Row]) -> dict[str, str | None]:
    """Leave in the store all that these rows of one group ask; {key: that of an equal earlier row}.

    Only what no earlier run has left is computed. The base is put back bit for bit.
    """
    seen: list[tuple[Row, str, list[float]]] = []
    same: dict[str, str | None] = {}
    for row in rows:
        key = bench.identity.model_key(row)
        report, make = deltas.model(bench, row)
        twin = None
        # its sketch is that before rounding
        if row.kind == "merge" and row.arm != "bfloat16":
            twin = next((x for x in seen if merge.same(x[2], report["sketch"])), None)
            if twin is None:
                seen.append((row, key, report["sketch"]))
        readings.read_all(bench, row, make, twin and twin[0])
        same[key] = twin and twin[1]
    return same
