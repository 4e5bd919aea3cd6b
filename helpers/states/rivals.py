"""What else could explain a loss? Readings that look at neither states nor parameters.

A claim that some distance predicts merging loss has to beat these. Most are properties of one task
(notebook 03a reads them off the study's tables); for a pair they are the mean of its two tasks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd


class Rival(NamedTuple):
    """A rival as data: its meaning for a pair, which way it points, and what it needs."""

    meaning: str
    harmful: bool  # True: the larger, the more a merge is expected to lose
    data: str  # "none", "prompts" or "labels"
    passes: str  # forward passes of a model over one example
    gradients: bool = False
    merge: bool = False


def _labels(
    meaning: str, harmful: bool, passes: str = "examples", **needs: bool
) -> Rival:
    return Rival(meaning, harmful, "labels", passes, **needs)


RIVALS = {
    "dose_loss": _labels(
        "loss (%) at half of the own vector", False, "examples x doses"
    ),
    "dose_nll": _labels(
        "rise of NLL at half of the own vector", True, "examples x doses"
    ),
    "own_dose_loss_linear": _labels(
        "loss (%) at the own-direction dose of plain averaging",
        False,
        "examples x doses",
    ),
    "own_dose_loss_task_arithmetic": _labels(
        "loss (%) at the own-direction dose of the sum", False, "examples x doses"
    ),
    "base_score": _labels("few-shot score of the base", False),
    "gain": _labels("score of the specialist less that of the base", True),
    "base_nll": _labels("NLL of the answers under the base", True),
    "nll_gain": _labels("what training took off the NLL", True),
    "steps": Rival("steps of training", True, "none", "none"),
    "norm": Rival("norm of the task vector", True, "none", "none"),
    "base_distance": Rival(
        "hidden distance of base and specialist", True, "prompts", "probes"
    ),
    "first_token_overlap": _labels("shared mass of first answer tokens", False, "none"),
    "answer_overlap": _labels("Jaccard index of the sets of answers", False, "none"),
    "length_ratio": _labels("shorter over longer mean answer", False, "none"),
    "same_format": _labels("both with options, or both without", False, "none"),
    "gradient_l2": _labels(
        "distance of the loss gradients at the base",
        True,
        "3 x examples",
        gradients=True,
    ),
    "gradient_cosine": _labels(
        "cosine of the loss gradients at the base",
        False,
        "3 x examples",
        gradients=True,
    ),
    "gradient_norm": _labels(
        "norm of the loss gradient at the base", True, "3 x examples", gradients=True
    ),
    "cross_nll": _labels("NLL of each specialist on the partner's task", True),
    "barrier": _labels(
        "loss barrier between the specialists", True, "examples x merges", merge=True
    ),
    "linearity_gap": Rival(
        "states of the average away from the average of states",
        True,
        "prompts",
        "probes x merges",
        merge=True,
    ),
}


def shared_mass(a: Sequence, b: Sequence) -> float:
    """sum over values of min(p_a, p_b), in [0, 1]: p the shares of the values of two samples."""
    p_a, p_b = (pd.Series(list(x)).value_counts(normalize=True) for x in (a, b))
    return float(np.minimum(*p_a.align(p_b, fill_value=0)).sum())


def jaccard(a: Sequence[str], b: Sequence[str]) -> float:
    """Texts that two sets share, over those in either; case and white space do not count."""
    a, b = ({" ".join(text.casefold().split()) for text in texts} for texts in (a, b))
    return len(a & b) / len(a | b)


def barrier(segment: pd.DataFrame) -> float:
    """Loss barrier on the segment between two models (Frankle et al. 2020), from points on it.

    max over alpha of L(alpha) - ((1 - alpha) L(0) + alpha L(1)), L the mean `nll` over the tasks.
    At least 0, the value at the ends. `segment` has one row for each task and alpha.

    Raises:
        ValueError: unless alpha 0 and 1 are there, and every task at every alpha.
    """
    loss = segment.pivot(index="alpha", columns="task", values="nll")
    if not {0.0, 1.0} <= set(loss.index) or loss.isna().any(axis=None):
        raise ValueError(
            "a barrier needs both ends, alpha 0 and 1, and every task at every alpha"
        )
    mean = loss.mean(axis=1)
    line = np.interp(mean.index, [0, 1], [mean[0.0], mean[1.0]])
    return float((mean - line).max())
