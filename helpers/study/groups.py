"""Which tasks meet? Groups drawn by a seed, in the order of the tasks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

Group = tuple[str, ...]


def draw(tasks: Sequence[str], size: int, count: int, seed: int = 0) -> list[Group]:
    """A seeded sample of `count` different groups of `size` tasks; all, if there are no more.

    A larger `count` adds groups to the same draw.
    """
    if math.comb(len(tasks), size) <= count:
        return list(combinations(tasks, size))
    rng = np.random.default_rng([seed, size])
    drawn = set()
    while len(drawn) < count:
        members = rng.choice(len(tasks), size, replace=False)
        drawn.add(tuple(sorted(members.tolist())))
    return [tuple(tasks[i] for i in group) for group in sorted(drawn)]


def pairs(tasks: Sequence[str], most: int | None = None, seed: int = 0) -> list[Group]:
    """All pairs, or a sample of `most`."""
    most = math.comb(len(tasks), 2) if most is None else most
    return draw(tasks, 2, most, seed)


def relatives(tasks: Sequence[str], families: Mapping[str, str]) -> list[Group]:
    """Every pair of tasks of one family."""
    return [(a, b) for a, b in combinations(tasks, 2) if families[a] == families[b]]


def partners(
    tasks: Sequence[str],
    k: int,
    families: Mapping[str, str],
    seed: int = 0,
    given: Iterable[Group] = (),
) -> list[Group]:
    """Pairs such that each task has k drawn partners of other families (a few have one more).

    The task with the fewest partners is paired next, with one of those that have the fewest; ties
    are drawn. So a larger k adds pairs to the same draw. `given` pairs exist already: they count,
    and are not returned. Raises ValueError where a task has fewer than k that are no relatives.
    """
    rng = np.random.default_rng(seed)
    met: dict[str, set[str]] = {x: set() for x in tasks}
    for a, b in given:
        met[a].add(b)
        met[b].add(a)
    drawn = []
    while min(map(len, met.values())) < k:
        a = _fewest(tasks, met, rng)
        strangers = [x for x in tasks if families[x] != families[a] and x not in met[a]]
        if not strangers:
            raise ValueError(
                f"{a} has fewer than {k} partners of other families: ask for fewer"
            )
        b = _fewest(strangers, met, rng)
        met[a].add(b)
        met[b].add(a)
        drawn.append((a, b))
    place = {x: i for i, x in enumerate(tasks)}
    ordered = [tuple(sorted(pair, key=place.get)) for pair in drawn]
    return sorted(ordered, key=lambda pair: [place[x] for x in pair])


def _fewest(
    tasks: Sequence[str], met: Mapping[str, set], rng: np.random.Generator
) -> str:
    """One of the tasks that have met the fewest others."""
    fewest = min(len(met[x]) for x in tasks)
    tied = [x for x in tasks if len(met[x]) == fewest]
    return tied[rng.integers(len(tied))]


def swaps(
    tasks: Sequence[str], groups: Iterable[Sequence[str]], seed: int = 0
) -> pd.DataFrame:
    """For each group, one drawn newcomer in the place of each member.

    Columns tasks (the group), leaves, enters, swapped (the new group). Raises ValueError for a
    group that leaves no task outside.
    """
    tasks = list(tasks)
    rows = []
    for group in groups:
        outside = [x for x in tasks if x not in group]
        if not outside:
            raise ValueError(
                f"a group of all {len(tasks)} tasks has no newcomer to swap in"
            )
        rng = np.random.default_rng([seed, *(tasks.index(x) for x in group)])
        enters = outside[rng.integers(len(outside))]
        for leaves in group:
            new = {*group, enters} - {leaves}
            swapped = tuple(x for x in tasks if x in new)
            rows.append((tuple(group), leaves, enters, swapped))
    return pd.DataFrame(rows, columns=["tasks", "leaves", "enters", "swapped"])
