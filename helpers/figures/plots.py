"""The plots that more than one notebook draws."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from helpers.figures.looks import BLUE, GREY, PARTS

NAMED_CURVES = 20  # tasks up to which each curve is named at its end
NAME = (1.1, 0.11)  # inches that a name beside a point takes, across and up


def parts(ax: Axes, x: pd.Series, losses: pd.DataFrame) -> None:
    """A merging loss and the three parts that add up to it, against `x`; columns as in PARTS."""
    for name, how in PARTS.items():
        width = 2.5 if name == "loss" else 1.2
        ax.plot(x, losses[name], lw=width, **how)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set_ylabel("percentage points of the specialist's score")


def scatter(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    names: list[str] | None = None,
    **how: str,
) -> None:
    """Points with vertical intervals [low, high] (NaN: none) and optional names beside them.

    A name that would cover a lower one stands higher than its point.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    how = {"marker": "o", "color": BLUE, **how}
    if low is not None and high is not None:
        ax.vlines(x, low, high, how["color"], lw=0.8, alpha=0.6)
    ax.plot(x, y, ls="none", **how)
    if names:
        _label(ax, names, x, y)


def dose_curves(ax: Axes, doses: pd.DataFrame) -> None:
    """Score of theta_0 + a tau_i against the dose a, one line per task, named at its end.

    `doses` has the columns task, dose and score. The dashed line, dose 1/2, is where plain
    averaging of two models puts each task vector.
    """
    curves = doses.sort_values("dose").groupby("task", sort=False)
    for _, curve in curves:
        ax.plot(curve["dose"], curve["score"], marker="o", ms=3, lw=1)
    last = curves.tail(1)
    if len(last) <= NAMED_CURVES:
        x, y = last["dose"].to_numpy(float), last["score"].to_numpy(float)
        _label(ax, list(last["task"]), x, y)
    ax.axvline(0.5, color=GREY, lw=0.8, ls="--")
    ax.set_xlabel("dose a of the task vector (share of fine-tuning applied)")
    ax.set_ylabel("score")


def _uncovered(ax: Axes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Heights at which the names of points do not cover each other, from the lowest point up."""
    place, (across, up) = ax.get_position(), ax.figure.get_size_inches()
    width = NAME[0] / (across * place.width) * np.ptp(ax.get_xlim())
    height = NAME[1] / (up * place.height) * np.ptp(ax.get_ylim())
    heights = y.copy()
    order = np.argsort(y)
    for count, i in enumerate(order):
        for j in order[:count]:
            near = abs(x[i] - x[j]) <= width
            if near and abs(heights[i] - heights[j]) < height:
                heights[i] = heights[j] + height
    return heights


def _label(ax: Axes, names: list[str], x: np.ndarray, y: np.ndarray) -> None:
    """Names beside their points; "": none."""
    named = np.array([bool(name) for name in names]) & np.isfinite(x + y)
    names, x, y = np.array(names)[named], x[named], y[named]
    beside = {"xytext": (5, 0), "textcoords": "offset points", "annotation_clip": False}
    for name, *point in zip(names, x, _uncovered(ax, x, y), strict=True):
        ax.annotate(name, point, fontsize=7, va="center", **beside)
