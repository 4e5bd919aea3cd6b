"""A room's door that loads names when they are asked for: who reads tables needs no torch."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def door(
    room: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package; `names` are public, by the module that has them."""
    homes = {name: module for module, listed in names.items() for name in listed}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"{room} has no {name!r}")
        return getattr(import_module(f"{room}.{homes[name]}"), name)

    return load, sorted(homes)
