"""Which models to merge, measured: trial merges on prompts without labels, search, verdict, report.

Read in this order: inputs, merges, trial, search, choices, advice, report.
predict explains only; validate holds trials to measured merges.
"""

from importlib import import_module

_HOME = {
    "Advice": "advice",
    "Merge": "merges",
    "advise": "advice",
    "main": "report",
    "open_panel": "inputs",
    "page": "report",
    "references": "trial",
    "retention": "merges",
    "text": "report",
    "trial": "trial",
    "write_page": "report",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:  # torch is imported only by what runs a model
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"helpers.advise has no {name!r}")
