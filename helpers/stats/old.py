"""What notebooks 03 and 06 still use; new code takes `study.tables.Pairs` and `stats.effects`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

__all__ = ["Interval", "square", "task_bootstrap"]


class Interval(NamedTuple):
    """An estimate with its 95 % interval (or as stated) over n resampled units."""

    value: float
    low: float
    high: float
    n: int


def square(pairs: pd.DataFrame, column: str, tasks: Sequence[str] | None = None) -> pd.DataFrame:
    """Symmetric matrix of a pair quantity; `pairs` has columns task_a, task_b and `column`.

    `tasks` sets the order (default: as they come). Raises ValueError if a pair is listed twice.
    """
    flipped = pairs.rename(columns={"task_a": "task_b", "task_b": "task_a"})
    both = pd.concat([pairs, flipped])
    if both.duplicated(["task_a", "task_b"]).any():
        raise ValueError(f"a pair is listed twice (or a task with itself) in the table of {column}")
    tasks = tasks or list(dict.fromkeys(pairs[["task_a", "task_b"]].to_numpy().ravel()))
    return both.pivot(index="task_a", columns="task_b", values=column).loc[tasks, tasks]


def task_bootstrap(
    matrices: Sequence[ArrayLike],
    statistic: Callable[..., float],
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """`statistic(*vectors)` of the matrices' cells, 95 % percentile interval over tasks, n = tasks.

    Tasks are drawn with replacement; a pair counts as often as its two tasks were drawn together,
    a task with itself never. That doubles the pairs' own noise, so the interval errs on the wide
    side: of simulated 95 % intervals 97-99 % cover (6 to 14 tasks).
    """
    matrices = [np.asarray(m, float) for m in matrices]
    n, rng = len(matrices[0]), np.random.default_rng(seed)
    values = []
    for draw in range(draws + 1):
        chosen = rng.integers(n, size=n) if draw else np.arange(n)
        rows, columns = np.nonzero(chosen[:, None] != chosen)
        cells = np.stack([m[chosen[rows], chosen[columns]] for m in matrices])
        cells = cells[:, ~np.isnan(cells).any(0)]
        values.append(statistic(*cells) if cells.size else np.nan)  # one task alone has no pair
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high), n)
