"""What else could explain a loss? Readings that look at neither states nor parameters.

A claim that some distance predicts merging loss has to beat these. Most are properties of one task:
what its own dose-response curve says that scaling costs it, what the base could do before, how long
training took. For a pair they are the mean of its two tasks. Some belong to pairs: how alike the
answers look, and the loss barrier between the two specialists, which needs models between them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers.states.batch import encode_answer
from helpers.study.losses import dose_loss, read_dose
from helpers.study.tasks import Task

PAIR = ["task_a", "task_b"]


class Rival(NamedTuple):
    """A rival as data: its meaning for a pair, which way it points, and what it needs."""

    meaning: str
    harmful: bool  # True: the larger, the more a merge is expected to lose
    data: str  # "none", "prompts" or "labels"
    passes: str  # forward passes of a model over one example
    gradients: bool = False
    merge: bool = False


# Those of single tasks are the mean of the pair's two.
RIVALS = {
    "dose_loss": Rival("loss (%) at half of the own vector", False, "labels", "examples x doses"),
    "dose_nll": Rival("rise of NLL at half of the own vector", True, "labels", "examples x doses"),
    "own_dose_loss_linear": Rival(
        "loss (%) at the own-direction dose of plain averaging", False, "labels", "examples x doses"
    ),
    "own_dose_loss_task_arithmetic": Rival(
        "loss (%) at the own-direction dose of the sum", False, "labels", "examples x doses"
    ),
    "base_score": Rival("few-shot score of the base", False, "labels", "examples"),
    "gain": Rival("score of the specialist less that of the base", True, "labels", "examples"),
    "base_nll": Rival("NLL of the answers under the base", True, "labels", "examples"),
    "nll_gain": Rival("what training took off the NLL", True, "labels", "examples"),
    "steps": Rival("steps of training", True, "none", "none"),
    "norm": Rival("norm of the task vector", True, "none", "none"),
    "base_distance": Rival("HiddenSim of base and specialist", True, "prompts", "probes"),
    "first_token_overlap": Rival("shared mass of first answer tokens", False, "labels", "none"),
    "answer_overlap": Rival("Jaccard index of the sets of answers", False, "labels", "none"),
    "length_ratio": Rival("shorter over longer mean answer", False, "labels", "none"),
    "same_format": Rival("both with options, or both without", False, "labels", "none"),
    "gradient_l2": Rival(
        "distance of the loss gradients at the base", True, "labels", "3 x examples", gradients=True
    ),
    "gradient_cosine": Rival(
        "cosine of the loss gradients at the base", False, "labels", "3 x examples", gradients=True
    ),
    "gradient_norm": Rival(
        "norm of the loss gradient at the base", True, "labels", "3 x examples", gradients=True
    ),
    "cross_nll": Rival("NLL of each specialist on the partner's task", True, "labels", "examples"),
    "barrier": Rival(
        "loss barrier between the specialists", True, "labels", "examples x merges", merge=True
    ),
    "linearity_gap": Rival(
        "states of the average away from the average of states",
        True,
        "prompts",
        "probes x merges",
        merge=True,
    ),
}


def needs(parameter: Iterable[str], states: Iterable[str]) -> pd.DataFrame:
    """What each metric must be given: of these of the parameters and of hidden states, and RIVALS.

    Columns data, forward passes, gradients, merge; indexed by metric.
    """
    rows = {name: ("none", "none", "no", "no") for name in parameter}
    rows |= {name: ("prompts", "probes", "no", "no") for name in states}
    yes = {True: "yes", False: "no"}
    for name, rival in RIVALS.items():
        rows[name] = rival.data, rival.passes, yes[rival.gradients], yes[rival.merge]
    columns = ["data", "forward passes", "gradients", "merge"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns)


def of_tasks(losses: pd.DataFrame, doses: pd.DataFrame, training: pd.DataFrame) -> pd.DataFrame:
    """One row per task (the index) from the study's tables losses, doses and training.

    dose_loss: merging loss (%) of the specialist at half of its own task vector, as plain averaging
    of a pair scales it, no partner involved: the null model; dose_nll: the same as a rise of the
    answers' negative log-likelihood (nats per token). base_score: few-shot score of the base; gain:
    specialist less base; base_nll: from bare prompts; nll_gain: base less specialist; steps of
    training.
    """
    known = losses.groupby("task").first()
    curves = dict(list(doses.groupby("task")))
    table = pd.DataFrame(index=known.index)
    table["dose_loss"] = [dose_loss(curves[task], 0.5) for task in table.index]
    table["dose_nll"] = [
        read_dose(curves[task], 0.5, "nll") - read_dose(curves[task], 1.0, "nll")
        for task in table.index
    ]
    table["base_score"] = known.base
    table["gain"] = known.specialist - known.base
    table["base_nll"] = known.nll_base
    table["nll_gain"] = known.nll_base - known.nll_specialist
    table["steps"] = training.groupby("task").step.max()
    return table


def means(tasks: pd.DataFrame) -> pd.DataFrame:
    """Every pair of tasks: columns task_a, task_b and the mean of its two rows of `tasks`."""
    pairs = pd.DataFrame(combinations(tasks.index, 2), columns=PAIR)
    both = [tasks.loc[pairs[side]].reset_index(drop=True) for side in PAIR]
    return pairs.join((both[0] + both[1]) / 2)


def dose_losses(pairs: pd.DataFrame, doses: pd.DataFrame, weight: float) -> pd.Series:
    """Mean loss (%) of each pair's tasks at their own-direction doses in weight (tau_a + tau_b).

    c_a = weight (1 + cos ||tau_b|| / ||tau_a||), likewise c_b: how far the sum takes each task
    along its own task vector. `pairs` has cosine, norm_a and norm_b; `weight` is 1/2 for plain
    averaging, 1 for task arithmetic. nan where a dose was not measured.
    """
    curves = dict(list(doses.groupby("task")))
    out = []
    for pair in pairs.itertuples():
        ratio = pair.norm_b / pair.norm_a
        reached = weight * (1 + pair.cosine * ratio), weight * (1 + pair.cosine / ratio)
        tasks = pair.task_a, pair.task_b
        out.append(np.mean([dose_loss(curves[t], c) for t, c in zip(tasks, reached, strict=True)]))
    return pd.Series(out, index=pairs.index)


def answer_formats(tasks: Mapping[str, Task], tokenizer) -> pd.DataFrame:
    """How alike the training answers of two tasks look, for every pair; nothing of it is learned.

    first_token_overlap: sum over tokens of min(p_a, p_b), p the distribution of the first token;
    answer_overlap: Jaccard index of the sets of different answers and options; length_ratio: mean
    number of tokens, shorter over longer; same_format: both are scored among options, or neither.
    """
    first, answers, length, options = {}, {}, {}, {}
    for label, task in tasks.items():
        rows = task.splits["train"]
        encoded = [encode_answer(tokenizer, row["answers"][0]) for row in rows]
        counts = Counter(ids[0] for ids in encoded)
        first[label] = {token: n / len(encoded) for token, n in counts.items()}
        texts = [text for row in rows for text in [*row["answers"], *row["options"]]]
        answers[label] = {" ".join(text.casefold().split()) for text in texts}
        length[label] = np.mean([len(ids) for ids in encoded])
        options[label] = any(row["options"] for row in rows)
    table = []
    for a, b in combinations(tasks, 2):
        shared = first[a].keys() & first[b].keys()
        lengths = sorted((length[a], length[b]))
        table.append(
            {
                "task_a": a,
                "task_b": b,
                "first_token_overlap": sum(min(first[a][t], first[b][t]) for t in shared),
                "answer_overlap": len(answers[a] & answers[b]) / len(answers[a] | answers[b]),
                "length_ratio": lengths[0] / lengths[1],
                "same_format": float(options[a] == options[b]),
            }
        )
    return pd.DataFrame(table)


def barrier(segment: pd.DataFrame, column: str = "nll") -> float:
    """Loss barrier on the segment between two models (Frankle et al. 2020), from points on it.

    max over alpha of L(alpha) - ((1 - alpha) L(0) + alpha L(1)), L the mean of `column` over the
    tasks. At least 0, the value at the ends. `segment` has one row for each task and alpha.

    Raises:
        ValueError: unless alpha 0 and 1 are there, and every task at every alpha.
    """
    loss = segment.pivot(index="alpha", columns="task", values=column)
    if not {0.0, 1.0} <= set(loss.index) or loss.isna().any(axis=None):
        raise ValueError("a barrier needs both ends, alpha 0 and 1, and every task at every alpha")
    mean = loss.mean(axis=1)
    alpha = mean.index.to_numpy()
    return float((mean - ((1 - alpha) * mean[0.0] + alpha * mean[1.0])).max())
