"""Tasks by tasks: matrices that are read at 5 tasks and still say something at 96."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.cluster import hierarchy

from helpers.figures.looks import BLACK, PALE, look

ALL_WRITTEN = 8  # tasks up to which every value is written
LARGE_WRITTEN = 20  # tasks up to which the large values are written
THICK = 40  # tasks up to which frames are thick


def task_size(n: int) -> float:
    """Inches of a matrix's side for n tasks."""
    return min(max(1.5 + 0.42 * n, 4.0), 16.0)


def clustered(table: pd.DataFrame) -> list[str]:
    """Tasks ordered so that those with like rows and columns stand together.

    Average linkage of Euclidean distances; an undefined cell counts as the mean of all. Where none
    is defined, their order is left as it is.
    """
    values = table.to_numpy(float)
    if np.isnan(values).all():
        return list(table.index)
    filled = np.where(np.isnan(values), np.nanmean(values), values)
    both_ways = np.hstack([filled, filled.T])
    tree = hierarchy.linkage(both_ways, "average", optimal_ordering=True)
    return [table.index[i] for i in hierarchy.leaves_list(tree)]


def heat_map(
    ax: Axes,
    table: pd.DataFrame,
    label: str,
    marked: pd.DataFrame | None = None,
    fmt: str = "z.0f",
    limits: tuple[float, float] = (-100.0, 100.0),
    cmap: str = "RdBu",
    colorbar: bool = True,
    large: float = 30.0,
) -> None:
    """Heat map of a task-by-task table (rows: the task scored; columns: its partner).

    Where there is no value (undefined, not zero), the diagonal too, a cell is pale grey. Cells true
    in `marked` are framed. `label` names the quantity and its unit. Above ALL_WRITTEN tasks only
    values as large as `large` are written, above LARGE_WRITTEN none.
    """
    n = max(table.shape)
    own = np.array(table.index)[:, None] == np.array(table.columns)
    shown = table.astype(float).mask(own)
    style = {
        "vmin": limits[0],
        "vmax": limits[1],
        "cmap": cmap,
        "square": True,
        "cbar": False,
    }
    names = {"xticklabels": 1, "yticklabels": 1}
    numbers = {"annot": _numbers(shown.to_numpy(), fmt, large), "fmt": ""}
    seaborn.heatmap(
        shown, annot_kws={"fontsize": 8}, ax=ax, **style, **names, **numbers
    )
    if colorbar:
        ax.figure.colorbar(ax.collections[0], ax=ax, label=label, shrink=0.8)
    ax.set_facecolor(PALE)
    if marked is not None:
        _frame(ax, marked.to_numpy(bool) & ~own, 1.6 if n <= THICK else 0.8)
    size = min(max(10 - n / 12, 4), 9)  # names are smaller where there are more
    ax.tick_params(labelsize=size)
    ax.grid(False)


def _numbers(values: NDArray, fmt: str, large: float) -> NDArray:
    """What is written in each cell: everything, large values only, or nothing."""
    n = max(values.shape)
    least = 0 if n <= ALL_WRITTEN else large if n <= LARGE_WRITTEN else np.inf
    written = [format(x, fmt) if abs(x) >= least else "" for x in values.flat]
    return np.array(written).reshape(values.shape)


def _frame(ax: Axes, where: NDArray, width: float) -> None:
    for i, j in np.argwhere(where):
        corner = (j + 0.04, i + 0.04)
        ax.add_patch(
            Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=BLACK, lw=width)
        )


def harm_maps(cells: pd.DataFrame, tasks: list[str]) -> Figure:
    """One heat map for each rule of the loss (%) of each victim (row) by partner (column).

    `cells` has the columns victim, partner, rule, loss and collapsed (framed where true); the order
    of the tasks is `tasks`.
    """
    rules = list(dict.fromkeys(cells["rule"]))
    columns = 1 if len(tasks) > LARGE_WRITTEN else 2
    rows = -(-len(rules) // columns)
    side = task_size(len(tasks))
    size = (columns * side, rows * side)
    fig, axes = plt.subplots(rows, columns, squeeze=False, figsize=size)
    for ax, rule in zip(axes.flat, rules, strict=False):
        of_rule = cells[cells["rule"] == rule].set_index(["victim", "partner"])
        loss = _square(of_rule["loss"], tasks)
        fell = _square(of_rule["collapsed"], tasks).astype("boolean")
        framed = fell.fillna(False).astype(bool)  # undefined: not for certain
        heat_map(ax, loss, "merging loss (%)", framed, colorbar=rule == rules[-1])
        ax.set_title(look(rule)["label"])
        ax.set(xlabel="merged with", ylabel="task scored")
    for ax in axes.flat[len(rules) :]:
        ax.remove()
    return fig


def _square(cells: pd.Series, tasks: list[str]) -> pd.DataFrame:
    return cells.unstack().reindex(index=tasks, columns=tasks)
