"""Which model does a row of a plan visit? Its delta, and the report of the merge that made it."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers import merge, store
from helpers.states import bound
from helpers.study import readings
from helpers.study.bench import Bench
from helpers.study.identity import CHEBYSHEV
from helpers.study.plan import MATCHED, Row
from helpers.study.readings import Delta

Made = tuple[Callable[[], Delta], dict]  # what gives a delta, and the report


def model(bench: Bench, row: Row) -> tuple[dict, Callable[[], Delta]]:
    """The report of a row's model, and a maker of its delta, which is built at most once.

    The base's delta is empty; a dose has no report. Of a model in half precision, which may be too
    large for a dense delta, it is streamed: pairs of name and change, made anew at every call.
    """
    entry = bench.identity.model_entry(row)
    if entry[0] == "base":
        return {}, dict
    build = _dose if row.kind == "dose" else _merge
    if bench.model.dtype != torch.float32:
        build = _streamed

    @cache
    def once() -> Made:
        return build(bench, row)

    def compute(folder: Path) -> None:
        text = json.dumps(once()[1], default=int)
        (folder / "record.json").write_text(text, encoding="utf-8")

    file = store.cached(*entry, compute, readings.machine(bench)) / "record.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    return report, lambda: once()[0]()


def specialist(bench: Bench, label: str) -> Delta:
    """The task vector of a task's specialist, by tensor."""
    return merge.dose(bench.rows([label]), 0, 1.0)


def _dose(bench: Bench, row: Row) -> Made:
    delta = merge.dose(bench.rows(row.tasks), 0, row.options["dose"])
    return lambda: delta, {}


def _merge(bench: Bench, row: Row) -> Made:
    """A merge or solo. On a grid the delta of a merge leads from the base in fp32 to the rounded
    result; the report is that of the merge before rounding, but for the own-direction doses, which
    are those left on the grid.
    """
    vector_rows, labels = _padded(bench, row)
    delta, report = merge.merge(vector_rows, labels=labels, **recipe(bench, row))
    if row.kind == "solo":
        return lambda: delta, {}
    about = report.as_dict()
    if row.arm == "bfloat16":
        tensors = bench.sources([])[0].tensors
        delta, own = merge.rounded(tensors, vector_rows, delta, torch.bfloat16)
        about |= {"own": own}
    return lambda: delta, about


def _padded(bench: Bench, row: Row) -> tuple[list[merge.Row], list[str]]:
    """The rows of a merge or solo with their labels; a solo's partners have changed nothing."""
    n = row.options.get("n", len(row.tasks))
    more = n - len(row.tasks)
    labels = [*row.tasks, *(f"unchanged {i}" for i in range(1, more + 1))]
    rows = []
    for name, base, taus in bench.rows(row.tasks):
        unchanged = [merge.zero(base.shape, base.device)] * more
        rows.append(merge.Row(name, base, [*taus, *unchanged]))
    return rows, labels


def _streamed(bench: Bench, row: Row) -> Made:
    """A model in half precision, its change never held; the report is of what survives the cast."""
    rows, labels = _padded(bench, row)
    if row.kind == "dose":
        asked = {"rule": "task_arithmetic", "weights": [row.options["dose"]]}
    else:
        asked = recipe(bench, row)
    match = asked.pop("match", None)
    scale = asked.pop("scale", 1.0)
    chosen = merge.plan(labels=labels, scale=scale, **asked)
    if match:
        chosen = merge.matched(rows, chosen, match)
    grid = merge.Grid(bench.model.dtype)
    records = [x for _, _, x in merge.merge_tensors(rows, chosen, lambda name: grid)]

    def changes() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor, change, _ in merge.merge_tensors(rows, chosen):
            yield tensor.name, change

    about = merge.summary(chosen, records).as_dict() if row.kind == "merge" else {}
    return changes, about


def recipe(bench: Bench, row: Row) -> dict[str, Any]:
    """What `merge.merge` takes for a merge or solo: rule, seed, options, and a scale to match."""
    chosen = {"rule": row.rule, "seed": row.seed} | row.rule_options
    if row.arm.startswith("mask"):
        chosen["seed"] += int(row.arm.removeprefix("mask"))
    if row.arm in MATCHED:
        chosen |= _matched(bench, row)
    if "own_dose" in row.options:
        chosen |= {"match": "dose", "scale": row.options["own_dose"]}
    if row.rule == CHEBYSHEV:
        weights = chebyshev_weights(bench, row.tasks)
        chosen |= {"rule": "linear", "weights": weights}
    return chosen


def _matched(bench: Bench, row: Row) -> dict[str, Any]:
    """The scale of an arm: that of the group's linear average; alone, the one that this gave."""
    if row.kind == "solo":
        group = tuple(row.options["group"])
        merged = row._replace(kind="merge", tasks=group, options=row.rule_options)
        return {"scale": model(bench, merged)[0]["scale"]}
    linear = Row("merge", row.tasks, "linear", seed=row.seed)
    average = model(bench, linear)[0]
    scale = average["effective_scale" if row.arm == "norm" else "own_mean"]
    return {"match": row.arm, "scale": scale}


def chebyshev_weights(bench: Bench, group: Sequence[str]) -> list[float]:
    """Weights (sum 1) of the centre of the smallest ball around the specialists' states.

    Read on the probes of the group's own tasks, at the last layer. No label and no merge is needed;
    a pair's are 1/2.
    """
    states = []
    for x in group:
        row = Row("dose", (x,), "dose", options={"dose": 1.0}, probed=tuple(group))
        readings.read_all(bench, row, model(bench, row)[1])
        read = [readings.states(bench, row, y)[:, -1] for y in group]
        states.append(torch.cat(read).double().numpy())
    d2 = bound.squared_distances(np.stack(states))
    return bound.minimax(d2.mean(2)).weights.tolist()
