"""The experiment: tasks, specialists, visits of merges, what they lost, and the tables of it.

Names are loaded when they are asked for: what reads tables or makes a plan imports no torch. Read
in this order: archives, models, generators, sources, tasks, specialists (what is merged); plan,
groups, design, costs (which visits); identity, bench, deltas, readings, executor, visit (the
visits); scores, frames, geometry, losses, failures (what they found); schema, tables (what is
written and read).
"""

from importlib import import_module

_ROOMS = {
    "archives": [],
    "bench": ["Bench", "load_base", "open_bench", "save_bench", "twins"],
    "costs": ["unit_costs"],
    "deltas": [],
    "design": [],
    "executor": [],
    "failures": [],
    "frames": [],
    "geometry": [],
    "groups": [],
    "identity": [],
    "losses": ["merging_loss"],
    "models": [],
    "plan": ["Plan", "Row"],
    "readings": [],
    "schema": [],
    "scores": [],
    "specialists": ["Recipe"],
    "tables": ["Pairs", "Study"],
    "tasks": ["Task", "load_tasks"],
    "visit": ["Visit"],
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted([*_ROOMS, *_HOME])


def __getattr__(name: str):
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"helpers.study has no {name!r}")
