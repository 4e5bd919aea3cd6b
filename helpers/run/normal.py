"""Executed notebooks as they are committed: nothing in them differs between two runs."""

import base64
import io
from typing import Any

import nbformat
from PIL import Image

LARGE = 200_000
"""Characters of a picture in a notebook, beyond which it is made lighter."""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT = ("tags", "jupyter")
WIDGET = "application/vnd.jupyter.widget-view+json"


def normalised(book: Any) -> Any:
    """An executed notebook without anything that differs between two runs of the same code.

    Kept: cells, tags, folding, outputs, and the language as JupyterLab writes it, so that opening a
    page does not modify it. Dropped: injected parameters, timings, papermill's and widgets'
    metadata, standard error (progress bars). Cells are counted 1..n.
    """
    cells, count = [], 0
    for cell in book.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            continue
        cell.metadata = {
            name: cell.metadata[name] for name in KEPT if cell.metadata.get(name)
        }
        if cell.cell_type == "code":
            count += bool(cell.source.strip())
            _normalise_code(cell, count)
        cells.append(cell)
    language = book.metadata.get("language_info", {"name": "python"})
    metadata = {"kernelspec": KERNEL, "language_info": language}
    form = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return nbformat.from_dict(form)


def _normalise_code(cell: Any, count: int) -> None:
    cell.execution_count = count if cell.source.strip() else None
    cell.outputs = [output for output in map(_stable, cell.outputs) if output]
    for output in cell.outputs:
        if output.output_type == "execute_result":
            output.execution_count = count


def _stable(output: Any) -> Any:
    """The output as it is committed, or None."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    data = output.get("data", {})
    if WIDGET in data:
        return None  # a widget shows nothing without its kernel
    if len(data.get("image/png", "")) > LARGE:
        data["image/png"] = _in_few_colours(data["image/png"])
    return output


def _in_few_colours(png: str) -> str:
    """A figure (base64) with a palette of its 256 main colours; one that has a palette stays."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    light = io.BytesIO()
    flat = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    flat.save(light, "PNG", optimize=True)
    return base64.b64encode(light.getvalue()).decode() + "\n"
