"""figures: how is it shown? One style, a look per method, save with caption and alt text.

A notebook calls `style(folder, notebook, parameters)` once; every `save` after it writes a PNG and
a JSON sidecar into that folder. The plots here are those that more than one notebook draws.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from helpers.store import revision

STYLE = Path(__file__).with_name("style.mplstyle")

# Okabe & Ito's palette, safe for the common colour-vision deficiencies. Colour never stands alone:
# each method has its own marker, and two methods that share a colour differ in it.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#777777"

LOOKS: dict[str, dict[str, str]] = {
    "linear": {"label": "LA", "color": BLUE, "marker": "o"},
    "task_arithmetic": {"label": "TA", "color": ORANGE, "marker": "s"},
    "ties": {"label": "TIES", "color": GREEN, "marker": "^"},
    "dare": {"label": "DARE", "color": PINK, "marker": "D"},
    "slerp": {"label": "SLERP", "color": AMBER, "marker": "v"},
    "task_slerp": {"label": "task SLERP", "color": AMBER, "marker": "<"},
    "dare_ties": {"label": "DARE-TIES", "color": PINK, "marker": "P"},
    "breadcrumbs": {"label": "breadcrumbs", "color": GREEN, "marker": "X"},
    "della": {"label": "DELLA", "color": GREEN, "marker": "d"},
    "iso_c": {"label": "Iso-C", "color": SKY, "marker": "p"},
    "tsv": {"label": "TSV", "color": AMBER, "marker": "h"},
    "chebyshev": {"label": "Chebyshev", "color": BLACK, "marker": "8"},
    "prism": {"label": "PRISM", "color": BLACK, "marker": ">"},
}

_active: dict[str, object] = {"folder": None, "notebook": None, "parameters": None}


def style(
    folder: Path | str | None = None,
    notebook: str | None = None,
    parameters: Mapping | None = None,
) -> None:
    """Apply the project's style and name the folder, notebook and parameters of later `save`s."""
    plt.style.use(STYLE)
    _active.update(
        folder=None if folder is None else Path(folder), notebook=notebook, parameters=parameters
    )


def look(method: str) -> dict[str, str]:
    """Label, colour and marker of a merge method, as keywords of `Axes.plot`."""
    return dict(LOOKS.get(method, {"label": method, "color": GREY, "marker": "."}))


def save(
    fig: Figure,
    name: str,
    caption: str,
    alt: str,
    folder: Path | str | None = None,
    notebook: str | None = None,
    parameters: Mapping | None = None,
    data: Mapping | None = None,
) -> Path:
    """Write `name`.png (200 dpi) and its sidecar `name`.json; return the PNG's path.

    `caption` names what intervals mean (what, level, n, resampling unit); `alt` says in words what
    the figure shows. `data` tells which run is shown (profile, key, device, date): it goes into the
    sidecar and as a grey line under the figure. The PNG holds no date and no software version, so
    the same figure gives the same bytes.
    Raises ValueError if the caption or alt text is empty or no folder is known.
    """
    folder = folder if folder is not None else _active["folder"]
    if folder is None:
        raise ValueError("No folder for figures: call figures.style(folder) first or pass folder=.")
    if not caption.strip() or not alt.strip():
        raise ValueError(f"Figure {name!r} needs a caption and an alt text.")
    if data:
        line = " · ".join(str(value) for value in data.values() if value not in (None, ""))
        fig.text(0, -0.01, line, ha="left", va="top", fontsize=7, color=GREY)
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Software": None})
    told = {
        "caption": " ".join(caption.split()),
        "alt": " ".join(alt.split()),
        "notebook": notebook or _active["notebook"],
        "parameters": dict(parameters or _active["parameters"] or {}),
        "data": dict(data or {}),
        "revision": revision(),
    }
    text = json.dumps(told, indent=1, ensure_ascii=False)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return path


def heat_map(
    ax: Axes,
    table: pd.DataFrame,
    label: str,
    marked: pd.DataFrame | None = None,
    fmt: str = "z.0f",
    limits: tuple[float, float] = (-100.0, 100.0),
    cmap: str = "RdBu",
    colorbar: bool = True,
) -> None:
    """Annotated heat map of a task-by-task table (rows: the task scored; columns: its partner).

    NaN off the diagonal is hatched (undefined, not zero); the diagonal is blank. Cells true in
    `marked` are framed. `label` names the quantity and its unit. Limits keep panels comparable.
    """
    values = table.to_numpy(dtype=float)
    own = np.array(table.index)[:, None] == np.array(table.columns)
    bold = np.zeros(values.shape, bool) if marked is None else marked.to_numpy() & ~own
    sns.heatmap(
        table.astype(float),
        ax=ax,
        mask=own | np.isnan(values),
        annot=True,
        fmt=fmt,
        annot_kws={"fontsize": 8},
        cmap=cmap,
        vmin=limits[0],
        vmax=limits[1],
        square=True,
        cbar=colorbar,
        cbar_kws={"label": label, "shrink": 0.8},
    )
    for i, j in np.argwhere(np.isnan(values) & ~own):
        hatched = {"fill": False, "hatch": "////", "edgecolor": GREY, "lw": 0}
        ax.add_patch(Rectangle((j, i), 1, 1, **hatched))
    for i, j in np.argwhere(bold):
        frame = {"fill": False, "edgecolor": "black", "lw": 1.6}
        ax.add_patch(Rectangle((j + 0.04, i + 0.04), 0.92, 0.92, **frame))
    ax.set_xticks(np.arange(len(table.columns)) + 0.5, table.columns, rotation=45, ha="right")
    ax.tick_params(axis="y", rotation=0)
    ax.grid(False)


def pair_maps(losses: pd.DataFrame, tasks: list[str]) -> Figure:
    """One heat map per method of the loss (%) of each task (row) merged with each other (column).

    `losses` has the columns group ("a+b"), task, method, loss and collapsed (framed where true).
    """
    partner = losses["group"].str.split("+").map(list)
    cells = losses.assign(
        partner=[
            next(other for other in pair if other != task)
            for pair, task in zip(partner, losses["task"], strict=True)
        ]
    ).set_index(["task", "partner"])
    methods = list(dict.fromkeys(losses["method"]))
    fig, axes = plt.subplots(-(-len(methods) // 2), 2, squeeze=False)
    fig.set_size_inches(9, 4.2 * len(axes))
    for ax, method in zip(axes.flat, methods, strict=False):
        mine = cells[cells["method"] == method][["loss", "collapsed"]]
        table, framed = (
            mine[name].unstack().reindex(index=tasks, columns=tasks) for name in mine.columns
        )
        bold = framed.astype("boolean").fillna(False).astype(bool)  # undefined: not for certain
        heat_map(ax, table, "merging loss (%)", bold, colorbar=method == methods[-1])
        ax.set_title(look(method)["label"])
        ax.set(xlabel="merged with", ylabel="task scored")
    for ax in axes.flat[len(methods) :]:
        ax.remove()
    return fig


# The parts of a loss: no colour of a method that is drawn beside them.
PARTS = {
    "loss": {"color": BLACK, "marker": "o", "lw": 2.5, "label": "merging loss"},
    "dilution": {"color": GREY, "marker": "x", "ls": "--", "label": "dilution"},
    "overlap": {"color": SKY, "marker": "s", "label": "overlap"},
    "interference": {"color": "#882255", "marker": "^", "label": "interference"},
}


def parts(ax: Axes, x: pd.Series, losses: pd.DataFrame) -> None:
    """A merging loss and the three parts that add up to it, against `x`; columns as in PARTS."""
    for name, how in PARTS.items():
        ax.plot(x, losses[name], **how)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set_ylabel("percentage points of the specialist's score")


def part_bars(ax: Axes, parts: pd.DataFrame) -> None:
    """What a loss loses alone and through partners, a pair of bars for each method.

    `parts` has the columns method, outcome ("alone" or "partners"), value, low, high: one arm of
    `findings.summary` for merges of two.
    """
    methods = list(dict.fromkeys(parts["method"]))
    looks = {"alone": ("#BBBBBB", "no partner needed"), "partners": (BLACK, "the partners")}
    for shift, (outcome, (color, label)) in zip((-0.2, 0.2), looks.items(), strict=True):
        mine = parts[parts["outcome"] == outcome].set_index("method").loc[methods]
        reach = np.stack([mine["value"] - mine["low"], mine["high"] - mine["value"]])
        at = np.arange(len(methods)) + shift
        ax.bar(at, mine["value"], 0.38, yerr=reach, ecolor=GREY, color=color, label=label)
    ax.set_xticks(range(len(methods)), [look(method)["label"] for method in methods])
    ax.axhline(0, color="black", lw=0.8)


def forest(ax: Axes, rows: pd.DataFrame, looks: Mapping[str, dict]) -> None:
    """One line per row of `rows` (its index names it): estimates and their intervals.

    `looks`: column of an estimate -> keywords of its mark; where `rows` has the columns NAME_low
    and NAME_high the interval is drawn. Undefined estimates leave their line empty.
    """
    at = np.arange(len(rows))
    for name, how in looks.items():
        ax.plot(rows[name], at, ls="none", **how)
        if f"{name}_low" in rows:
            ends = rows[f"{name}_low"], rows[f"{name}_high"]
            ax.hlines(at, *ends, color=how.get("color"), lw=1, alpha=0.6)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(at, rows.index, fontsize=7)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.legend(loc="lower right", fontsize=8)


def scatter(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    names: list[str] | None = None,
    **look_of_points: str,
) -> None:
    """Points with vertical intervals [low, high] (NaN: none) and optional names beside them."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if low is not None and high is not None:
        reach = np.stack([y - np.asarray(low, float), np.asarray(high, float) - y])
        ax.errorbar(
            x,
            y,
            np.nan_to_num(reach.clip(0)),
            fmt="none",
            lw=0.8,
            alpha=0.6,
            ecolor=look_of_points.get("color", GREY),
        )
    ax.plot(x, y, ls="none", **{"marker": "o", "color": BLUE, **look_of_points})
    for name, at_x, at_y in zip(names or [], x, y, strict=bool(names)):
        if np.isfinite(at_x) and np.isfinite(at_y):
            ax.annotate(name, (at_x, at_y), xytext=(4, 3), textcoords="offset points", fontsize=7)


def dose_curves(ax: Axes, doses: pd.DataFrame, score: str = "score") -> None:
    """Score of theta_0 + a tau_i against the dose a, one line per task.

    `doses` has the columns task, dose and `score`. The dashed line, dose 1/2, is where plain
    averaging of two models puts each task vector.
    """
    markers = "os^Dv<>pPX*hd8"
    for i, (task, curve) in enumerate(doses.groupby("task", sort=False)):
        curve = curve.sort_values("dose")
        ax.plot(curve["dose"], curve[score], marker=markers[i % len(markers)], label=task)
    ax.axvline(0.5, color=GREY, lw=0.8, ls="--")
    ax.set_xlabel("dose a of the task vector (share of fine-tuning applied)")
    ax.set_ylabel(score)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="task")
