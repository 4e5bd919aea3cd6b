"""All pairs of models in one table, on all probes, some of them, or random halves of them."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from helpers.states.measures import MEASURES


def pair_table(
    states: NDArray,
    labels: Sequence[str],
    probe_task: ArrayLike | None = None,
    base: NDArray | None = None,
    kls: NDArray | None = None,
    layer: int = -1,
    measures: Sequence[str] = tuple(MEASURES),
    others: bool = False,
) -> pd.DataFrame:
    """All measures of all pairs of models: columns task_a, task_b and one per measure.

    Args:
        states: (models, n_probes, layers, d); `labels` their tasks.
        probe_task: the task that each probe belongs to: a pair is then judged on the probes of its
            own two tasks (the primary reading). None: on all probes.
        base: (n_probes, layers, d) states of the base; without it `change_cosine` is left out.
        kls: from `logit_kls`, for the last layer; without it `logit_kl` is left out.
        layer: which layer.
        others: judge each pair on the probes of all tasks but its own two.

    Raises:
        ValueError: as many labels as models; a pair without probes; an unknown measure.
    """
    _check(states, labels, probe_task, measures, others)
    possible = {"states": True, "base": base is not None, "logits": kls is not None}
    chosen = [name for name in measures if possible[MEASURES[name].needs]]
    rows = []
    for (i, task_a), (j, task_b) in combinations(enumerate(labels), 2):
        probes = np.full(states.shape[1], True)
        if probe_task is not None:
            probes = np.isin(probe_task, (task_a, task_b), invert=others)
        pair = states[i, probes, layer], states[j, probes, layer]
        row = {"task_a": task_a, "task_b": task_b}
        for name in chosen:
            measure = MEASURES[name]
            if measure.needs == "logits":
                row[name] = kls[i, j, probes].mean()
            else:
                more = [base[probes, layer]] if measure.needs == "base" else []
                row[name] = measure.function(*pair, *more)
        rows.append(row)
    return pd.DataFrame(rows)


def _check(states, labels, probe_task, measures, others) -> None:
    if len(states) != len(labels):
        raise ValueError(f"{len(labels)} labels for the states of {len(states)} models")
    unknown = set(measures) - set(MEASURES)
    if unknown:
        raise ValueError(
            f"unknown measures {sorted(unknown)}: choose from {list(MEASURES)}"
        )
    if probe_task is not None:
        without = set(labels) - set(probe_task)
        if without:
            raise ValueError(f"no probe belongs to {sorted(without)}")
    if others and (probe_task is None or len(set(probe_task)) < 3):
        raise ValueError(
            "probes of other tasks need `probe_task` and three tasks or more"
        )


def half_samples(
    states: NDArray,
    labels: Sequence[str],
    probe_task: ArrayLike,
    base: NDArray | None = None,
    kls: NDArray | None = None,
    draws: int = 100,
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """`pair_table` on random halves of every task's probes, `draws` times: a column draw more.

    The delete-half jackknife (Shao and Wu 1989): a half drawn without replacement varies around the
    full sample as that does around the truth (for a mean: 1 / (n/2) - 1 / n = 1 / n). A bootstrap
    would repeat probes, which RSA, CKA and nearest neighbours would take for agreement.
    """
    rng = np.random.default_rng(seed)
    probe_task = np.asarray(probe_task)
    tables = []
    for draw in range(draws):
        mixed = [rng.permutation(np.flatnonzero(probe_task == task)) for task in labels]
        half = np.concatenate([probes[: len(probes) // 2] for probes in mixed])
        table = pair_table(
            states[:, half],
            labels,
            probe_task[half],
            None if base is None else base[half],
            None if kls is None else kls[:, :, half],
            **options,
        )
        tables.append(table.assign(draw=draw))
    return pd.concat(tables, ignore_index=True)


def mds(distances: ArrayLike) -> float:
    """Merging Difficulty Score of a group: the mean of the distances of its pairs, (pairs,).

    High means hard to merge (arXiv:2603.09463, which calls it reciprocal and leaves the formula
    open). ValueError if a pair of the group has no distance.
    """
    distances = np.asarray(distances, dtype=np.float64)
    if not len(distances) or np.isnan(distances).any():
        raise ValueError(
            "a Merging Difficulty Score needs the distance of every pair of the group"
        )
    return float(distances.mean())
