"""How do task vectors disagree? Every metric is a ratio of sums over coordinates.

So the sums of each tensor are kept (`pair_sums`), and layers, tensor kinds and whole models are the
same ratios of added-up sums.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers.merge import Row
from helpers.states.sums import pair_sums

SQUARES = ["square_a", "square_b"]
WHERE = ["tensor", "kind", "layer", "task_a", "task_b"]


class Metric(NamedTuple):
    """A metric as data: its meaning for two flattened task vectors a and b, its formula on sums."""

    meaning: str
    formula: Callable[[pd.DataFrame], pd.Series]
    # True: larger is more conflict; False: agreement; None: neither
    harmful: bool | None = None


def _distance2(s: pd.DataFrame) -> pd.Series:
    return s.square_a + s.square_b - 2 * s.inner


def _subspaces(side: str, meaning: str) -> dict[str, Metric]:
    """How much of their leading singular directions two task vectors share, and by chance."""
    return {
        f"{side}_overlap": Metric(
            meaning, lambda s: s[f"{side}_shared"] / s.directions
        ),
        f"{side}_chance": Metric(
            "the same for random subspaces",
            lambda s: s[f"{side}_expected"] / s.directions,
        ),
    }


# The first four are the study's primary readings of the metrics of arXiv:2603.09463, which gives
# them in words; the others are its sensitivity family and its rivals.
METRICS = {
    "sign_change": Metric(
        "share of coordinates with a b < 0", lambda s: s.opposite / s.coordinates, True
    ),
    "magnitude_change": Metric(
        "sum |a - b| / sum (|a| + |b|)",
        lambda s: s.l1_difference / (s.l1_a + s.l1_b),
        True,
    ),
    "conflict_magnitude": Metric(
        "share of sum (|a| + |b|) on coordinates with a b < 0",
        lambda s: s.opposite_mass / (s.l1_a + s.l1_b),
        True,
    ),
    "cosine": Metric(
        "<a, b> / (||a|| ||b||)",
        lambda s: s.inner / np.sqrt(s.square_a * s.square_b),
        False,
    ),
    "cosine_tensors": Metric(
        "mean of the cosines of single tensors", lambda s: s.cosines / s.tensors, False
    ),
    "magnitude_gap": Metric(
        "sum ||a| - |b|| / sum max(|a|, |b|)",
        lambda s: 2 * s.l1_gap / (s.l1_a + s.l1_b + s.l1_gap),
        True,
    ),
    "relative_gap": Metric(
        "mean over coordinates of ||a| - |b|| / max(|a|, |b|)",
        lambda s: s.relative_gaps / s.coordinates,
        True,
    ),
    "conflict_min": Metric(
        "share of sum min(|a|, |b|) on coordinates with a b < 0",
        lambda s: (s.l1_difference - s.l1_gap) / (s.l1_a + s.l1_b - s.l1_gap),
        True,
    ),
    "norm_ratio": Metric(
        "smaller norm / larger norm",
        lambda s: np.sqrt(s[SQUARES].min(axis=1) / s[SQUARES].max(axis=1)),
    ),
    "top_overlap": Metric(
        "shared part of the largest coordinates of each tensor",
        lambda s: 2 * s.top_shared / (s.top_a + s.top_b),
    ),
    "top_chance": Metric(
        "the same for sets drawn independently",
        lambda s: 2 * s.top_expected / (s.top_a + s.top_b),
    ),
    **_subspaces(
        "left", "||U_a' U_b||_F^2 / r, leading left singular vectors (output space)"
    ),
    **_subspaces(
        "right", "||V_a' V_b||_F^2 / r, leading right singular vectors (input space)"
    ),
    "variance": Metric(
        "variance of (a, b), mean over coordinates: PRISM (arXiv:2610.03199), raw",
        lambda s: _distance2(s) / (4 * s.coordinates),
        True,
    ),
    "variance_share": Metric(
        "PRISM relative to the mean square: 0 equal, 1/2 orthogonal, 1 opposite",
        lambda s: _distance2(s) / (2 * (s.square_a + s.square_b)),
        True,
    ),
    "norm_a": Metric("||a||", lambda s: np.sqrt(s.square_a)),
    "norm_b": Metric("||b||", lambda s: np.sqrt(s.square_b)),
}
PRIMARY = tuple(METRICS)[:4]


def pair_metrics(rows: Iterable[Row], labels: Sequence[str]) -> pd.DataFrame:
    """All METRICS of all pairs of models in one pass over `rows`; arguments as of `pair_sums`."""
    return metrics(pair_sums(rows, labels))


def metrics(sums: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """METRICS of every pair; `by` = "layer", "kind" or "tensor" tells those apart, too.

    A ratio with nothing below the line (a zero task vector, no low-rank matrix) is NaN.
    """
    added = [column for column in sums if column not in WHERE]
    total = sums.groupby(["task_a", "task_b", *by], sort=False)[added].sum()
    values = {name: metric.formula(total) for name, metric in METRICS.items()}
    return pd.DataFrame(values).reset_index()


def group_variance(
    pairs: pd.DataFrame, members: Sequence[str], relative: bool = False
) -> float:
    """PRISM's interference score of n task vectors, from the table of their pairs.

    Variance across the models, mean over coordinates: sum_i ||tau_i - mean||^2 / (n d), which is
    sum_{i<j} ||tau_i - tau_j||^2 / (n^2 d). `relative` divides it by the mean square coordinate: 0
    if all are equal, 1 - 1/n if they are orthogonal, at most 1. The summary of arXiv:2610.03199
    leaves the normalisation open; its 5 destructive and 15 harmless merges split at 1.9e-3.

    Raises:
        ValueError: unless every pair of members is there once.
    """
    n = len(members)
    count = n * (n - 1) // 2
    inside = pairs[pairs.task_a.isin(members) & pairs.task_b.isin(members)]
    if n < 2 or len(inside) != count:
        raise ValueError(f"{n} members have {count} pairs, but {len(inside)} are given")
    if not relative:
        return float(4 / n**2 * inside.variance.sum())
    square = inside.norm_a**2 + inside.norm_b**2  # every model counts in n - 1 pairs
    spread = (inside.variance_share * square).sum()
    return float(2 * (n - 1) / n * spread / square.sum())
