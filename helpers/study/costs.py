"""What will a plan cost? Its work in units that another study was measured in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

UNITS = ["cpu_seconds", "megabytes"]


def work(row: Any, sizes: Mapping[str, int]) -> dict[str, float]:
    """How much of each step of `unit_costs` a visit (`plan.Row`) takes."""
    if row.kind == "specialist":
        steps = row.options["examples"] * row.options["epochs"]
        return {"train": steps, "specialist": 1}
    # a prompt behind solved examples is as much longer
    shown = 1 + row.options.get("shots", 0)
    examples = len(row.scored) * sizes[row.split]
    members = row.options.get("n", len(row.tasks))  # a merge passes over every one
    return {
        row.kind: members,
        "scores": examples * shown,
        "states": len(row.probed) * sizes["probe"],
    }


def unit_costs(folder: Path, parameters: Mapping[str, Any]) -> pd.DataFrame | None:
    """CPU seconds and megabytes of one of each thing, from the tables of a study in `folder`.

    `parameters` are those that the study was made with. Index step: train (an example in a training
    step), specialist (its folder), scores (an example), states (a probe), dose, and merge and solo
    (a member). None if a table is missing.
    """
    files = [folder / f"{name}.csv" for name in ("specialists", "training", "costs")]
    if not all(file.exists() for file in files):
        return None
    trained, log, spent = (pd.read_csv(file) for file in files)
    # of an older study: no megabytes
    spent = spent.reindex(columns=["step", "models", *UNITS])
    each = spent.set_index(["step", "models"])[UNITS]
    steps = log.groupby("task").size()
    examples = steps * parameters["BATCH_SIZE"]
    seconds = trained.set_index("task")["cpu_seconds"] / examples
    parameters_mb = trained["trained_parameters"].mean() * 4 / 2**20  # fp32
    one = {
        "scores": parameters["TEST_EXAMPLES"],
        "states": parameters["PROBE_EXAMPLES"],
    }
    one |= {"merge": 2, "solo": 2, "dose": 1}
    units = {"train": [seconds.mean(), 0.0], "specialist": [0.0, parameters_mb]}
    for step, models in each.index[each.index.get_level_values("models") < 3]:
        units[step] = each.loc[(step, models)] / one[step]
    return pd.DataFrame(units, UNITS).T.fillna(0.0)


def scaled(units: pd.DataFrame, larger: float, faster: float = 1.0) -> pd.DataFrame:
    """Unit costs for a model of `larger` times the parameters, on a machine `faster` times as fast.

    Seconds grow with the parameters; adapters and states with width times depth, which is taken for
    the root of them.
    """
    return units * [larger / faster, larger**0.5]


def sentence(cost: pd.DataFrame, processor: str = "CPU") -> str:
    """A `Plan.cost` in words."""
    each = [
        f"{kind.visits} {kind.Index} {kind.minutes:.0f} min"
        for kind in cost.itertuples()
    ]
    total = cost.sum()
    return (
        f"{total.minutes:.0f} {processor} minutes and {total.gigabytes:.1f} GB in the store "
        f"({', '.join(each)})"
    )
