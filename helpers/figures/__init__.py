"""How is it shown? One style, a look for each rule, plots that stay legible from 5 to 96 tasks."""

from helpers.figures.interactive import cards, cards_html, framed, playground
from helpers.figures.looks import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LOOKS,
    ORANGE,
    PARTS,
    PINK,
    SILVER,
    SKY,
    WINE,
    look,
)
from helpers.figures.matrix import clustered, harm_maps, heat_map, task_size
from helpers.figures.plots import dose_curves, parts, scatter
from helpers.figures.save import STYLE, save, style, words

__all__ = [
    "AMBER",
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "LOOKS",
    "ORANGE",
    "PARTS",
    "PINK",
    "SILVER",
    "SKY",
    "STYLE",
    "WINE",
    "cards",
    "cards_html",
    "clustered",
    "dose_curves",
    "framed",
    "harm_maps",
    "heat_map",
    "look",
    "playground",
    "parts",
    "save",
    "scatter",
    "style",
    "task_size",
    "words",
]
