"""A merge to try, and what its models kept in a trial. Needs no model."""

from typing import NamedTuple

import pandas as pd
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.9  # of the intervals that are shown


class Merge(NamedTuple):
    """A merge to try: which models, by which rule, at which weights (None: its own) and scale."""

    models: tuple[str, ...]
    rule: str = "linear"
    weights: tuple[float, ...] | None = None
    scale: float = 1.0


def alone(model: str, dose: float) -> Merge:
    """The base plus `dose` of one model's own task vector: no partner takes part."""
    return Merge((model,), "task_arithmetic", (dose,))


def retention(frame: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """One row per model of a trial: model, kept (share), rise, dose, prompts, low, high (Wilson's).

    frame: rows of a trial.
    """
    groups = frame.groupby("model", sort=False)
    table = groups[["kept", "rise", "dose"]].mean().reset_index()
    table["prompts"] = groups.size().to_numpy()
    count = table["kept"] * table["prompts"]
    table["low"], table["high"] = proportion_confint(
        count, table["prompts"], 1 - level, "wilson"
    )
    return table
