"""Tasks by tasks: matrices that are read at 5 tasks and still say something at 96."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.cluster import hierarchy

from helpers.figures.looks import BLACK, GREY, look

ALL_WRITTEN = 8  # tasks up to which every value is written
LARGE_WRITTEN = 20  # tasks up to which the large values are written
FRAMED = 40  # tasks up to which cells are framed
DARK = 0.45  # luminance below which text is white


def task_size(n: int) -> float:
    """Inches of a matrix's side for n tasks."""
    return min(max(1.5 + 0.42 * n, 4.0), 16.0)


def clustered(table: pd.DataFrame) -> list[str]:
    """Tasks ordered so that those with like rows and columns stand together.

    Average linkage of Euclidean distances; an undefined cell counts as the mean of all.
    """
    values = table.to_numpy(float)
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

    NaN off the diagonal is hatched (undefined, not zero); the diagonal is blank. Cells true in
    `marked` are framed. `label` names the quantity and its unit. Above ALL_WRITTEN tasks only
    values as large as `large` are written, above LARGE_WRITTEN none.
    """
    values = table.to_numpy(dtype=float)
    n = max(values.shape)
    own = np.array(table.index)[:, None] == np.array(table.columns)
    undefined = np.isnan(values)
    seen = np.where(own, np.nan, values)
    image = ax.imshow(seen, cmap=cmap, vmin=limits[0], vmax=limits[1])
    _frame(ax, undefined & ~own, hatch="////", edgecolor=GREY, lw=0)
    if marked is not None and n <= FRAMED:
        _frame(ax, marked.to_numpy(bool) & ~own, edgecolor=BLACK, lw=1.6)
    if n <= ALL_WRITTEN:
        _write(ax, seen, fmt, image)
    elif n <= LARGE_WRITTEN:
        _write(ax, np.where(np.abs(seen) >= large, seen, np.nan), fmt, image)
    if colorbar:
        ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8)
    _name(ax, table)


def _frame(ax: Axes, where: NDArray, **kind: object) -> None:
    for i, j in np.argwhere(where):
        corner = (j - 0.46, i - 0.46)
        ax.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, **kind))


def _write(ax: Axes, values: NDArray, fmt: str, image: AxesImage) -> None:
    for i, j in np.argwhere(~np.isnan(values)):
        red, green, blue, _ = image.cmap(image.norm(values[i, j]))
        luminance = 0.3 * red + 0.6 * green + 0.1 * blue
        ax.text(
            j,
            i,
            format(values[i, j], fmt),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if luminance < DARK else BLACK,
        )


def _name(ax: Axes, table: pd.DataFrame) -> None:
    """The tasks beside the rows and below the columns, smaller where there are more."""
    size = min(max(10 - len(table) / 12, 4), 9)
    ax.set_xticks(range(table.shape[1]), table.columns, rotation=90, fontsize=size)
    ax.set_yticks(range(table.shape[0]), table.index, fontsize=size)
    ax.grid(False)


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
