"""The numbers of the README once more, from the raw tables, by plain loops and least squares."""

import json
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from by_hand import least_squares

from helpers.store import ROOT

FOLDER = ROOT / "data" / "results" / "tasks14"
RULE = "linear"


@pytest.fixture(scope="module")
def headlines():
    """{name: first number} of what notebook 08 wrote down and the README quotes."""
    frame = pd.read_csv(FOLDER / "findings.csv", dtype=str, keep_default_na=False)
    texts = zip(frame["name"], frame["text"], strict=True)
    return {name: text.split()[0].strip("%") for name, text in texts}


@pytest.fixture(scope="module")
def cells():
    """{(victim, partner): row of losses.csv} of the pairs that were averaged and can be told."""
    merges = pd.read_csv(FOLDER / "merges.csv")
    chosen = merges[
        (merges["rule"] == RULE) & (merges["arm"] == "default") & (merges["n"] == 2)
    ]
    tasks = {row.merge: json.loads(row.tasks) for row in chosen.itertuples()}
    found = {}
    for row in pd.read_csv(FOLDER / "losses.csv").itertuples():
        if row.merge in tasks and not row.ambiguous:
            (partner,) = set(tasks[row.merge]) - {row.task}
            found[row.task, partner] = row
    return found


@pytest.fixture(scope="module")
def answers():
    """{(model, task): right or wrong, and NLL, of its test examples}."""
    frame = pd.read_csv(FOLDER / "examples.csv.gz")
    return {key: group for key, group in frame.groupby(["merge", "task"])}


@pytest.fixture(scope="module")
def lost(cells, answers):
    """{(victim, partner): loss in percent of what exceeds chance, from the examples}."""
    out = {}
    for (victim, partner), row in cells.items():
        merged = answers[row.merge, victim]["correct"].mean() - row.chance
        own = answers["specialist", victim]["correct"].mean() - row.chance
        out[victim, partner] = 100 * (merged / own - 1)
    return out


def of_pairs(column):
    """A column of pairs.csv by directed pair."""
    frame = pd.read_csv(FOLDER / "pairs.csv")
    both = {}
    for row in frame.itertuples():
        both[row.task_a, row.task_b] = both[row.task_b, row.task_a] = getattr(
            row, column
        )
    return both


def relatives():
    """Directed pairs of tasks of one family, which predictions leave out."""
    frame = pd.read_csv(FOLDER / "tasks.csv")
    family = dict(zip(frame["task"], frame["family"], strict=True))
    return {
        pair for pair in permutations(family, 2) if family[pair[0]] == family[pair[1]]
    }


def test_the_cells_are_those_of_all_pairs(headlines, cells):
    tasks = sorted({victim for victim, _ in cells})
    contradictory = set(permutations(["sentence_negation", "question_formation"]))
    assert set(cells) == set(permutations(tasks, 2)) - contradictory
    assert headlines["tasks"] == str(len(tasks)) and headlines["cells"] == str(
        len(cells)
    )
    assert headlines["collapsed"] == str(
        sum(row.collapsed_corrected for row in cells.values())
    )


def test_the_mean_loss(headlines, lost):
    assert headlines["loss"] == f"{np.mean(list(lost.values())):.0f}"


def test_what_a_task_loses_alone(headlines, cells):
    alone = [
        100
        * ((row.control_ingredient - row.chance) / (row.specialist - row.chance) - 1)
        for row in cells.values()
    ]
    assert headlines["alone"] == f"{np.mean(alone):.0f}"


def test_what_a_task_loses_beside_what_its_partners_lose(headlines, lost):
    effects = least_squares(lost)
    tasks = sorted(effects.rows)
    own = [effects.rows[task] for task in tasks]
    harm = [effects.columns[task] for task in tasks]
    assert headlines["contest"] == f"{np.corrcoef(own, harm)[0, 1]:.2f}"


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("hidden_pair", "hidden_sim"),
        ("sign_pair", "sign_change"),
        ("cross_pair", "cross_nll"),
    ],
)
def test_what_foretells_a_pair_beyond_its_tasks(
    name, column, headlines, cells, answers
):
    loss = {}
    for (victim, partner), row in cells.items():
        merged, own = answers[row.merge, victim], answers["specialist", victim]
        loss[victim, partner] = own["nll"].mean() - merged["nll"].mean()
    strangers = set(loss) - relatives()
    both = {(a, b): (loss[a, b] + loss[b, a]) / 2 for a, b in strangers}
    metric = of_pairs(column)
    far = least_squares({pair: metric[pair] for pair in both}).left
    hurt = least_squares(both).left
    r = np.corrcoef(list(far.values()), list(hurt.values()))[0, 1]
    assert float(headlines[name]) == pytest.approx(r, abs=0.0051)
