"""What do the rules that interpolate along an arc compute? SLERP, of models and of task vectors.

Same form as in `rules`. An arc is found once from inner products, and is then a weighted sum.
"""

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from helpers.merge.blocks import Kernel, Lazy, Taus, blockwise, gram_matrix
from helpers.merge.rules import Weights, add_up, task_arithmetic

SLERP_THRESHOLD = 0.9995  # mergekit's: above this |cosine| the interpolation is linear


class Arc(NamedTuple):
    """Where an interpolation ends, on_base * theta_0 + sum_i on_taus[i] * tau_i, and its steps."""

    on_base: float
    on_taus: list[float]
    steps: dict[str, int]  # how many were linear, how many spherical


def spherical(gram: np.ndarray, weights: Weights) -> tuple[np.ndarray, int]:
    """Coefficients of the iterated spherical interpolation of n points; number of linear steps.

    gram: (n, n) inner products of the points. Point i is reached from the interpolation of those
    before it at t = w_i / (w_1 + .. + w_i).
    """
    coefficients = np.eye(len(weights))[0]
    total = weights[0]
    linear_steps = 0
    for i in range(1, len(weights)):
        total += weights[i]
        t = weights[i] / total if total else 0.0
        # of opposite points: 0 or below
        square = max(coefficients @ gram @ coefficients, 0.0)
        lengths = math.sqrt(square), math.sqrt(gram[i, i])
        cosine = 0.0
        if min(lengths) > 1e-8:
            cosine = coefficients @ gram[i] / (lengths[0] * lengths[1])
        linear_steps += abs(cosine) > SLERP_THRESHOLD
        before, after = _step(cosine, t)
        coefficients = before * coefficients
        coefficients[i] = after
    return coefficients, int(linear_steps)


def _step(cosine: float, t: float) -> tuple[float, float]:
    """What a and b are multiplied by at t of the way: (sin((1-t) angle), sin(t angle)) / sin(angle)
    with the angle between their directions, (1-t, t) where |cos| > 0.9995 (Shoemake 1985; threshold
    and raw points as mergekit).
    """
    if abs(cosine) > SLERP_THRESHOLD:
        return 1 - t, t
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


def model_arc(taus: Taus, weights: Weights, base: Tensor | Lazy) -> Arc:
    """The arc between the models theta_0 + tau_i."""
    n = len(taus)
    models = np.hstack([np.ones((n, 1)), np.eye(n)])
    products = gram_matrix([base, *taus])
    coefficients, lerp = spherical(models @ products @ models.T, weights)
    steps = {"lerp": lerp, "slerp": n - 1 - lerp}
    on_base = float(coefficients.sum()) - 1 if steps["slerp"] else 0.0
    return Arc(on_base, coefficients.tolist(), steps)


def task_arc(taus: Taus, weights: Weights) -> Arc:
    """The arc between the task vectors."""
    coefficients, lerp = spherical(gram_matrix(taus), weights)
    return Arc(
        0.0, coefficients.tolist(), {"lerp": lerp, "slerp": len(taus) - 1 - lerp}
    )


@blockwise
def slerp(taus: Taus, weights: Weights, *, base: Tensor | Lazy, arc: Arc) -> Kernel:
    """Spherical interpolation of the models themselves, tensor by tensor, flattened (`spherical`).

    Two models by definition (t = w_2 / (w_1 + w_2)); more are taken one after the other. Where the
    models are close (|cos| > 0.9995) it is the weighted mean, by the very sum that `linear` takes.

    arc: `model_arc` of these models.
    """
    if arc.on_base == 0:
        return task_arithmetic.kernel(taus, arc.on_taus)
    coefficients = [*arc.on_taus, arc.on_base]
    return lambda blocks, at: add_up([*blocks, base[at.rows]], coefficients)


@blockwise
def task_slerp(taus: Taus, weights: Weights, *, arc: Arc) -> Kernel:
    """Spherical interpolation of each tensor's task vectors (mergekit's nuslerp with a base).

    arc: `task_arc` of these task vectors.
    """
    return task_arithmetic.kernel(taus, arc.on_taus)
