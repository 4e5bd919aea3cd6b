"""A figure is kept with its words: PNG, sidecar, and both on the page of a notebook."""

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from helpers.figures.looks import GREY
from helpers.store import revision

STYLE = Path(__file__).with_name("style.mplstyle")

_active: dict[str, object] = {"folder": None, "notebook": None, "parameters": None}


def style(
    folder: Path | str | None = None,
    notebook: str | None = None,
    parameters: Mapping | None = None,
) -> None:
    """Apply the project's style and name the folder, notebook and parameters of later `save`s."""
    plt.style.use(STYLE)
    _active.update(
        folder=folder and Path(folder), notebook=notebook, parameters=parameters
    )


def save(
    fig: Figure, name: str, caption: str, alt: str, data: Mapping | None = None
) -> Path:
    """Write `name`.png (200 dpi) and its sidecar `name`.json; return the PNG's path.

    `caption` names what intervals mean (what, level, n, resampling unit); `alt` says in words what
    the figure shows. `data` tells which run is shown (profile, key, device, date): it goes into the
    sidecar and as a grey line under the figure. The PNG holds no date and no software version, so
    the same figure gives the same bytes. In a notebook the figure is shown with its words below.
    Raises ValueError if the caption or alt text is empty or no folder is known.
    """
    folder = _active["folder"]
    if folder is None:
        raise ValueError("No folder for figures: call figures.style(folder) first.")
    caption, alt = " ".join(caption.split()), " ".join(alt.split())
    if not caption or not alt:
        raise ValueError(f"Figure {name!r} needs a caption and an alt text.")
    data = dict(data or {})
    _print_source(fig, data)
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Software": None})
    _write_sidecar(path.with_suffix(".json"), caption, alt, data)
    _show(fig, f"**Figure.** {caption}\n\n**In words.** {alt}")
    return path


def _print_source(fig: Figure, data: Mapping) -> None:
    """Which run is shown, as a grey line below the figure."""
    told = [str(value) for value in data.values() if value not in (None, "")]
    if told:
        fig.text(0, -0.01, " · ".join(told), va="top", fontsize=7, color=GREY)


def _write_sidecar(path: Path, caption: str, alt: str, data: Mapping) -> None:
    sidecar = {
        "caption": caption,
        "alt": alt,
        "notebook": _active["notebook"],
        "parameters": dict(_active["parameters"] or {}),
        "data": data,
        "revision": revision(),
    }
    text = json.dumps(sidecar, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _show(fig: Figure, text: str) -> None:
    """The figure and its words, where a notebook is running."""
    from IPython import get_ipython
    from IPython.display import Markdown, display

    if hasattr(get_ipython(), "kernel"):
        display(fig)
        display(Markdown(text))
        plt.close(fig)  # or the page would show it once more
