"""How is it shown? One style, a look for each rule, plots that stay legible from 5 to 96 tasks."""

from helpers.figures.interactive import cards, cards_html, framed, playground
from helpers.figures.looks import BLACK, BLUE, GREY, LOOKS, ORANGE, SILVER, SKY, look
from helpers.figures.matrix import clustered, harm_maps, heat_map, task_size
from helpers.figures.plots import dose_curves, parts, scatter
from helpers.figures.save import save, style
