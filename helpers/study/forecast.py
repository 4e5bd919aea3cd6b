"""What will a study cost? Counts of what 01 and 02 compute, times the unit costs of another study.

Arithmetic on a profile's parameters, so that the hours stand there before anything runs.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

# Rules whose merges are weighted sums, which the dose curves control: every other rule is also run
# alone (`merging.METHODS` tells it, after seconds of importing torch).
WEIGHTED = ("linear", "task_arithmetic", "chebyshev")
MATCHED = ("norm", "dose")  # arms whose scale each group finds anew: few share a run alone
SHOWN = 5  # a prompt with four solved examples before the question is five times as long


def unit_costs(folder: Path, parameters: dict[str, Any]) -> dict[str, float] | None:
    """CPU seconds that one of each thing took in a study, from its tables in `folder`.

    `parameters` are those that it was made with. train: an example in a training step; score: a
    test example under one model; probe: the states of one input; merge, solo: building a merge of
    two, and that of a rule run alone; dose: scaling a task vector. None if a table is missing.
    """
    files = [folder / f"{name}.csv" for name in ("specialists", "training", "costs")]
    if not all(file.exists() for file in files):
        return None
    trained, losses, spent = (pd.read_csv(file) for file in files)
    step = (trained.set_index("task")["cpu_seconds"] / losses.groupby("task").size()).mean()
    of = spent.set_index(["step", "models"])["cpu_seconds"]
    return {
        "train": step / parameters["BATCH_SIZE"],
        "score": of["scores", 0] / parameters["TEST_EXAMPLES"],
        "probe": of["states", 0] / parameters["PROBE_EXAMPLES"],
        "merge": of["merge", 2],
        "solo": of["solo", 1],
        "dose": of["dose", 1],
    }


def forecast(parameters: dict[str, Any], units: dict[str, float]) -> pd.DataFrame:
    """What notebooks 01 and 02 compute, and how many CPU hours that takes.

    `parameters` are those of a profile, `units` those of `unit_costs`. Columns notebook, step,
    count, cpu_hours; steps: specialists; screenings (dev examples of specialist and prompted base);
    references (base and specialists on everyone's probes, the prompted base on test examples);
    doses; merges; controls (a rule run alone); swaps.

    The counts are bounds: a task that fails screening is merged with none, a merge that coincides
    with another is not visited. Second tries at a task (MORE_EXAMPLES) and what is done for one
    pair or a few doses (SCALES, CHECKED_DOSES) are not counted.
    """
    n, batch = len(parameters["TASKS"]), parameters["BATCH_SIZE"]
    steps = math.ceil(parameters["TRAIN_EXAMPLES"] / batch) * parameters["EPOCHS"]
    screened = (1 + SHOWN) * parameters["DEV_EXAMPLES"] * units["score"]
    tested, probed = _readings(parameters, units)
    doses = n * len(parameters["DOSES"])
    rows = [
        ("01", "specialists", n, n * steps * batch * units["train"]),
        ("01", "screenings", n, n * screened),
        ("02", "references", n + 1, n * ((n + 1) * probed + SHOWN * tested)),
        ("02", "doses", doses, doses * (units["dose"] + tested)),
        ("02", "merges", *_of_merges(parameters, units)),
        ("02", "controls", *_of_controls(parameters, units)),
        ("02", "swaps", *_of_swaps(parameters, units)),
    ]
    table = pd.DataFrame(rows, columns=["notebook", "step", "count", "cpu_hours"])
    return table.assign(cpu_hours=table["cpu_hours"] / 3600)


def _readings(parameters: dict[str, Any], units: dict[str, float]) -> tuple[float, float]:
    """CPU seconds of one task's test scores, and of the states on its probes, under one model."""
    return (
        parameters["TEST_EXAMPLES"] * units["score"],
        parameters["PROBE_EXAMPLES"] * units["probe"],
    )


def _groups(parameters: dict[str, Any]) -> dict[int, int]:
    """How many groups of each size are merged at most."""
    n, most = len(parameters["TASKS"]), parameters["GROUPS_PER_SIZE"]
    larger = [size for size in parameters["GROUP_SIZES"] if 2 < size <= n]
    pairs = {2: min(parameters["PAIRS"], math.comb(n, 2))}
    return pairs | {size: min(most, math.comb(n, size)) for size in larger}


def _versions(parameters: dict[str, Any], size: int) -> list[tuple[str, str]]:
    """(rule, arm) of every merge of a group of this size."""
    rules = {*parameters["METHODS"], *(parameters["GROUP_METHODS"] if size > 2 else [])}
    arms = [(rule, arm) for rule, arm in parameters["ARMS"] if rule in rules]
    return [(rule, "default") for rule in rules] + arms


def _of_merges(parameters: dict[str, Any], units: dict[str, float]) -> tuple[int, float]:
    """How many merges, and their CPU seconds: built, scored, and states read but of arms."""
    tested, probed = _readings(parameters, units)
    merges, seconds = 0, 0.0
    for size, groups in _groups(parameters).items():
        versions = _versions(parameters, size)
        read = sum(arm == "default" for _, arm in versions)
        merges += groups * len(versions)
        # a merge passes over every member
        seconds += groups * size * len(versions) * (units["merge"] / 2 + tested)
        seconds += groups * size * read * probed
    return merges, seconds


def _of_controls(parameters: dict[str, Any], units: dict[str, float]) -> tuple[int, float]:
    """How many runs of a rule alone, and their CPU seconds: built and scored on one task."""
    n, (tested, _) = len(parameters["TASKS"]), _readings(parameters, units)
    controls, seconds = 0, 0.0
    for size, groups in _groups(parameters).items():
        cells = groups * size
        arms = [arm for rule, arm in _versions(parameters, size) if rule not in WEIGHTED]
        alone = sum(cells if arm in MATCHED else min(n, cells) for arm in arms)
        controls += alone
        seconds += alone * (size * units["solo"] / 2 + tested)
    return controls, seconds


def _of_swaps(parameters: dict[str, Any], units: dict[str, float]) -> tuple[int, float]:
    """How many merges the swaps add to those of `_of_merges`, and their CPU seconds."""
    size, groups = max(_groups(parameters).items())
    whole = min(parameters["SWAPS"], math.comb(len(parameters["TASKS"]), size))
    # the groups before any swap are the first that were merged, if by this rule
    before = {rule: groups for rule, _ in _versions(parameters, size)}
    rules = parameters["SWAP_METHODS"]
    swaps = sum(whole * size + max(whole - before.get(rule, 0), 0) for rule in rules)
    tested, _ = _readings(parameters, units)
    return swaps, swaps * size * (units["merge"] / 2 + tested)


def sentence(
    parameters: dict[str, Any], units: dict[str, float], notebooks: Collection[str]
) -> str:
    """The forecast in words, for these of the notebooks 01 and 02."""
    table = forecast(parameters, units)
    table = table[table["notebook"].isin(notebooks) & (table["count"] > 0)]
    each = ", ".join(f"{x.count} {x.step} {x.cpu_hours:.1f}" for x in table.itertuples(index=False))
    retried = "01" in notebooks and parameters["MORE_EXAMPLES"] > parameters["TRAIN_EXAMPLES"]
    return (
        f"Forecast for {' and '.join(notebooks)}: {table['cpu_hours'].sum():.1f} hours on one "
        f"thread{', second tries of training aside' if retried else ''} ({each}), if every task "
        "passes screening and at the model, the prompt lengths and the machine of the demo; what "
        "is finished already is not done again."
    )
