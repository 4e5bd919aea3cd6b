"""What goes with a merge's losses, without merging: explanation, never a reason to choose.

Distances of hidden states, agreement of task vectors and the radius of a group are told beside
what the committed studies say of them: how many points of loss a choice by them saved.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import store
from helpers.advise.inputs import Panel
from helpers.advise.merges import alone
from helpers.advise.trial import applied
from helpers.merge import gram_matrix
from helpers.states import hidden_sim, minimax, prompt_states, squared_distances

STUDIES = store.ROOT / "data" / "results"
PROBES = 64  # prompts that every model reads
EXPLANATIONS = ("hidden distance", "sign conflict")  # criteria of choices.csv


def states(panel: Panel) -> np.ndarray:
    """Last-layer states (models, prompts, d) of every model at a few prompts of each."""
    count = max(2, PROBES // len(panel.labels))
    prompts = [ids for label in panel.labels for ids in panel.inputs[label][:count]]
    how = "mean" if panel.encoder else "last"
    read = []
    for label in panel.labels:
        with applied(panel, alone(label, 1.0)):
            at = prompt_states(panel.model, prompts, how, panel.batch_size)
        read.append(at[:, -1].double().numpy())
    return np.stack(read)


def explain(panel: Panel) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables: a row per pair (hidden_sim, cosine) and a row per model (mds, radius_share).

    hidden_sim, mds: arXiv:2603.09463. cosine: of the task vectors. radius_share: weight of the
    model in the least ball around all states; 0 means that it lies among the others.
    """
    at, labels = states(panel), panel.labels
    gram = sum(gram_matrix(row.taus) for row in panel.rows)
    norms = np.sqrt(gram.diagonal())
    rows = []
    for i, j in combinations(range(len(labels)), 2):
        row = {"task_a": labels[i], "task_b": labels[j]}
        row["hidden_sim"] = hidden_sim(at[i], at[j])
        row["cosine"] = gram[i, j] / (norms[i] * norms[j] or 1.0)
        rows.append(row)
    pairs = pd.DataFrame(rows)
    d2 = squared_distances(at).mean(-1)
    models = pd.DataFrame({"model": labels, "mds": _mean_by_model(pairs, labels)})
    models["radius_share"] = minimax(d2).weights
    return pairs, models


def _mean_by_model(pairs: pd.DataFrame, labels: Sequence[str]) -> list[float]:
    ends = pairs[["task_a", "task_b"]]
    return [pairs["hidden_sim"][ends.eq(label).any(axis=1)].mean() for label in labels]


def verdicts(studies: Path = STUDIES) -> pd.DataFrame:
    """What choosing a partner by EXPLANATIONS saved over chance in the largest committed study.

    Columns criterion, study, rule, gain, low, high (points of loss, 95 %), tasks.
    """
    tables = []
    for file in sorted(studies.glob("*/choices.csv")):
        table = pd.read_csv(file).assign(study=file.parent.name)
        wanted = table["criterion"].isin(EXPLANATIONS) & (table["decision"] == "partner")
        tables.append(table[wanted & (table["rule"] == "linear")])
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True).sort_values("tasks", ascending=False)
    table = table.drop_duplicates("criterion")
    table = table.rename(columns={"gain_low": "low", "gain_high": "high"})
    return table[["criterion", "study", "rule", "gain", "low", "high", "tasks"]]
