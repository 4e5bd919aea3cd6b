"""Where do the models' states lie? What notebooks 03 and 04 read of a study's visits."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from helpers.states import bound, squared_distances
from helpers.study.frames import BASE, Visits, of_kind, specialists
from helpers.study.visit import Visit


class Pool(NamedTuple):
    """States of base and specialists on the probes of all tasks.

    models: "base" and the tasks; owner (P,): the task of each probe; states (models, P, layers, d)
    at `layers` of those that were read.
    """

    models: list[str]
    owner: NDArray
    states: NDArray
    layers: slice = slice(None)

    def of(self, models: Sequence[str], probes: NDArray) -> NDArray:
        """States of these models on some of the probes, float64."""
        places = [self.models.index(name) for name in models]
        return np.float64(self.states[places][:, probes])


LAST = slice(-1, None)  # the layer that is kept of a study too large for all of them


def pooled(visits: Visits, tasks: Sequence[str], layers: slice = slice(None)) -> Pool:
    """The states, at some layers, that base and specialists left on everyone's probes."""
    (base,) = of_kind(visits, "base")
    own = specialists(visits)
    read = [base.states, *(own[task].states for task in tasks)]
    owner = np.repeat(list(tasks), [len(read[0][task]) for task in tasks])
    rows = [
        torch.cat([states[task][:, layers] for task in tasks]).numpy()
        for states in read
    ]
    return Pool([BASE, *tasks], owner, np.stack(rows), layers)


class Readout(NamedTuple):
    """What a decoder's output layer (C, d) makes of its specialists' states: of each probe the
    first answer's token, and how far a state may move until that changes."""

    weight: NDArray
    bias: NDArray
    top: NDArray
    rho: NDArray


def readout(pool: Pool, head: torch.nn.Module) -> Readout:
    """The first answers of each probe's own specialist.

    What a class does behind its head (a scale, a soft cap) keeps the order of its logits.
    """
    matrix = head.weight.detach().double().cpu().numpy()
    bias = np.zeros(len(matrix))
    if getattr(head, "bias", None) is not None:
        bias = head.bias.detach().double().cpu().numpy()
    places = [pool.models.index(task) for task in pool.owner]
    own = pool.states[places, np.arange(len(places)), -1]
    logits = own @ matrix.T + bias
    return Readout(
        matrix, bias, logits.argmax(1), bound.margin_radius(own, matrix, bias)
    )


def arrays(
    pool: Pool, layers: Sequence[str], answers: Readout | None
) -> dict[str, NDArray]:
    """geometry.npz: squared distances of all models, by probe and by task and layer."""
    d2 = squared_distances(np.float64(pool.states))
    tasks = pool.models[1:]
    by_task = [d2[:, :, pool.owner == task].mean(2) for task in tasks]
    return {
        "models": np.array(pool.models),
        "owner": pool.owner,
        "width": np.array(pool.states.shape[-1]),
        "rho": answers.rho if answers else np.full(len(pool.owner), np.nan),
        "d2x": np.float32(d2[..., -1]),
        "d2_layers": np.float32(by_task),
        "layers": np.array(layers),
    }


def distortion(
    visits: Visits, pool: Pool, answers: Readout | None = None
) -> pd.DataFrame:
    """||H - h||^2 of base and members on the members' probes, of every distinct default merge."""
    frames = []
    for visit in of_kind(visits, "merge"):
        if visit.same_as is None and visit.row.arm == "default" and visit.row.probed:
            rows = pd.DataFrame(_readings(visit, pool, answers))
            frames.append(rows.assign(merge=visit.key))
    table = pd.concat(frames, ignore_index=True)
    for name in ("flips", "certified"):  # of a decoder's own probes only
        table[name] = table.get(name, np.nan)
    # eight digits are enough
    return table.astype({"delta": "float32", "gap2": "float32"})


def _readings(visit: Visit, pool: Pool, answers: Readout | None) -> list[dict]:
    members = visit.row.tasks
    on = np.isin(pool.owner, members)
    # the pool's order of probes
    order = [task for task in pool.models if task in members]
    states = visit.states
    merged = (
        torch.cat([states[task][:, pool.layers] for task in order]).double().numpy()
    )
    weights = visit.report["ingredient"] if visit.row.weighted else None
    flipped = rho = None
    if answers:
        logits = merged[:, -1] @ answers.weight.T + answers.bias
        flipped = logits.argmax(1) != answers.top[on]
        rho = answers.rho[on]
    models = [BASE, *members]
    near = pool.of(models, on)
    return bound.readings(models, near, merged, pool.owner[on], weights, flipped, rho)
