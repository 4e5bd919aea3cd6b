"""Which models to merge, measured: trial merges on prompts without labels, search, verdict, report.

Read in this order: inputs, merges, trial, search, choices, advice, report.
predict explains only; validate holds trials to measured merges.
"""

from helpers.lazy import door

_NAMES = {
    "advice": ["Advice", "advise"],
    "inputs": ["open_panel"],
    "merges": ["Merge", "retention"],
    "report": ["main", "page", "text", "write_page"],
    "trial": ["references", "trial"],
}
__getattr__, __all__ = door(__name__, _NAMES)
