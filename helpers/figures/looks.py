"""The same colour and marker for a rule everywhere.

Okabe & Ito's palette, safe for the common colour-vision deficiencies. Colour never stands alone:
each rule has its own marker, and two rules that share a colour differ in it.
"""

BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PINK = "#CC79A7"
AMBER = "#E69F00"
SKY = "#56B4E9"
WINE = "#882255"
BLACK = "#000000"
GREY = "#777777"
PALE = "#E6E6E6"  # no value
SILVER = "#BBBBBB"


def _look(label: str, color: str, marker: str) -> dict[str, str]:
    return {"label": label, "color": color, "marker": marker}


LOOKS = {
    "linear": _look("LA", BLUE, "o"),
    "task_arithmetic": _look("TA", ORANGE, "s"),
    "ties": _look("TIES", GREEN, "^"),
    "dare": _look("DARE", PINK, "D"),
    "slerp": _look("SLERP", AMBER, "v"),
    "task_slerp": _look("task SLERP", AMBER, "<"),
    "dare_ties": _look("DARE-TIES", PINK, "P"),
    "breadcrumbs": _look("breadcrumbs", GREEN, "X"),
    "iso_c": _look("Iso-C", SKY, "p"),
    "tsv": _look("TSV", AMBER, "h"),
    "chebyshev": _look("Chebyshev", BLACK, "8"),
}

# Parts of a loss: no colour of a rule that is drawn beside them.
PARTS = {
    "loss": _look("merging loss", BLACK, "o"),
    "dilution": _look("dilution", GREY, "x"),
    "overlap": _look("overlap", SKY, "s"),
    "interference": _look("interference", WINE, "^"),
}


def look(rule: str) -> dict[str, str]:
    """Label, colour and marker of a merge rule, as keywords of `Axes.plot`."""
    unknown = _look(rule, GREY, ".")
    return dict(LOOKS.get(rule, unknown))
