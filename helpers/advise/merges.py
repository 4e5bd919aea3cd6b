"""A merge to try, and what its models kept in a trial. Needs no model."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm

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
    table["low"], table["high"] = wilson(table["kept"], table["prompts"], level)
    return table


def wilson(share, n, level: float = LEVEL) -> tuple:
    """Wilson's (1927) score interval of a share of n independent prompts."""
    z = norm.ppf(0.5 + level / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = share * (1 - share) / n + z**2 / (4 * n**2)
    half = z * np.sqrt(spread) / (1 + z**2 / n)
    return centre - half, centre + half
