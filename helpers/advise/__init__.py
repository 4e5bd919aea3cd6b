"""Which models to merge, measured: trial merges on prompts without labels, search, verdict, report.

Read in this order: prompts, panel, merges, answers, trials, search, choices, advice, report.
explain only explains; validate holds trials to measured merges.
"""

from helpers.lazy import door

_NAMES = {
    "advice": ["Advice", "advise"],
    "command": ["main"],
    "merges": ["Merge", "retention"],
    "panel": [
        "Panel",
        "folder_of",
        "labels_of",
        "open_panel",
        "panel_of",
        "trial_prompts",
    ],
    "prompts": ["prompts_of"],
    "report": ["page", "sentence", "text", "write_page"],
    "trials": ["references", "trial", "try_pairs"],
}
__getattr__, __all__ = door(__name__, _NAMES)
