"""What goes with a merge's losses, without merging: explanation, never a reason to choose.

Distances of hidden states and cosines of task vectors stand beside what the committed studies say
of them: how many points of loss a choice by them saved.
"""

from itertools import combinations

import numpy as np
import pandas as pd

from helpers import store
from helpers.advise.merges import alone
from helpers.advise.panel import Panel
from helpers.advise.trials import applied
from helpers.merge import gram_matrix
from helpers.states import hidden_sim, prompt_states

STUDIES = store.ROOT / "data" / "results"
PROBES = 64  # prompts that every model reads
EXPLANATIONS = ("hidden distance", "sign conflict")  # criteria of choices.csv


def states(panel: Panel) -> np.ndarray:
    """Last-layer states (models, prompts, d) of every model at a few prompts of each."""
    count = max(2, PROBES // len(panel.labels))
    prompts = [ids for label in panel.labels for ids in panel.inputs[label][:count]]
    read = []
    for label in panel.labels:
        with applied(panel, alone(label, 1.0)):
            by_layer = prompt_states(panel.model, prompts, batch_size=panel.batch_size)
        read.append(by_layer[:, -1].double().numpy())
    return np.stack(read)


def pairs(panel: Panel) -> pd.DataFrame:
    """A row per pair: model_a, model_b, hidden_sim (arXiv:2603.09463), cosine of task vectors."""
    states_of = dict(zip(panel.labels, states(panel), strict=True))
    gram = sum(gram_matrix(row.taus) for row in panel.rows)
    norms = np.sqrt(gram.diagonal())
    cosines = gram / np.outer(norms, norms).clip(min=1e-30)
    rows = []
    for (i, a), (j, b) in combinations(enumerate(panel.labels), 2):
        distance = hidden_sim(states_of[a], states_of[b])
        rows.append(
            {
                "model_a": a,
                "model_b": b,
                "hidden_sim": distance,
                "cosine": cosines[i, j],
            }
        )
    return pd.DataFrame(rows)


def verdicts() -> pd.DataFrame:
    """What choosing a partner by EXPLANATIONS saved over chance in the largest committed study.

    Columns criterion, study, rule, gain, low, high (points of loss, 95 %), tasks.
    """
    tables = []
    for file in sorted(STUDIES.glob("*/choices.csv")):
        table = pd.read_csv(file).assign(study=file.parent.name)
        partner = (table["decision"] == "partner") & (table["rule"] == "linear")
        tables.append(table[partner & table["criterion"].isin(EXPLANATIONS)])
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    table = table.sort_values("tasks", ascending=False).drop_duplicates("criterion")
    table = table.rename(columns={"gain_low": "low", "gain_high": "high"})
    return table[["criterion", "study", "rule", "gain", "low", "high", "tasks"]]
