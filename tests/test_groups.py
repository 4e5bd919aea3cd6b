"""The declared test on groups of eight once more, from examples and distances, by loops."""

import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from helpers.store import ROOT

FOLDER = ROOT / "data" / "results" / "groups8_instructed"
ORDERS = 2000


@pytest.fixture(scope="module")
def family():
    frame = pd.read_csv(FOLDER / "tasks.csv").query("kept")
    return dict(zip(frame["task"], frame["family"], strict=True))


@pytest.fixture(scope="module")
def lost():
    """{group: mean NLL of its specialists less that of their average at half a dose}."""
    merges = pd.read_csv(FOLDER / "merges.csv")
    merges = merges.query("rule == 'linear' and n == 8 and arm == 'dose=0.5'")
    examples = pd.read_csv(FOLDER / "examples.csv.gz")
    nll = examples.groupby(["merge", "task"])["nll"].mean()
    out = {}
    for row in merges.itertuples():
        group = tuple(json.loads(row.tasks))
        cells = [nll["specialist", x] - nll[row.merge, x] for x in group]
        out[group] = np.mean(cells)
    return out


@pytest.fixture(scope="module")
def distance():
    out = {}
    for row in pd.read_csv(FOLDER / "pair_predictors.csv").itertuples():
        out[frozenset((row.task_a, row.task_b))] = row.hidden_sim
    return out


@pytest.fixture(scope="module")
def tested():
    frame = pd.read_csv(FOLDER / "groups.csv")
    rows = frame.query(
        "rule == 'linear' and outcome == 'nll_loss' and score == 'hidden_sim'"
    )
    return rows.squeeze()


def correlation(lost, distance, called=None):
    """r of MDS and loss over groups, with each task called by another's name."""
    called = called or {}
    mds = [
        np.mean(
            [
                distance[frozenset((called.get(a, a), called.get(b, b)))]
                for a, b in combinations(group, 2)
            ]
        )
        for group in lost
    ]
    return np.corrcoef(mds, list(lost.values()))[0, 1]


def test_as_many_groups_and_tasks_as_were_declared(lost, family, tested):
    assert len(lost) == 100 and {len(set(group)) for group in lost} == {8}
    assert set().union(*lost) == set(family)
    assert (tested["groups"], tested["tasks"]) == (len(lost), len(family))


def test_every_group_keeps_half_of_its_models():
    losses = pd.read_csv(FOLDER / "losses.csv")
    merges = pd.read_csv(FOLDER / "merges.csv").query("arm == 'dose=0.5'")
    own = losses[losses["merge"].isin(merges["merge"])].groupby("merge")["dose_own"]
    np.testing.assert_allclose(own.mean(), 0.5, rtol=1e-4)


def test_the_declared_correlation(lost, distance, tested):
    assert correlation(lost, distance) == pytest.approx(tested["r"], abs=1e-3)


def test_the_declared_exchange_of_names(lost, distance, family, tested):
    rng = np.random.default_rng(1)
    names = list(family)
    here = abs(tested["r"])
    there = [
        correlation(
            lost, distance, dict(zip(names, rng.permutation(names), strict=True))
        )
        for _ in range(ORDERS)
    ]
    p = (1 + np.sum(np.abs(there) >= here)) / (1 + ORDERS)
    error = np.sqrt(max(p * (1 - p), 1e-3) / ORDERS)
    assert abs(p - tested["p_tasks"]) < 4 * error
    wide = 4 * np.std(there) / np.sqrt(0.025 * ORDERS)
    assert np.quantile(there, [0.025, 0.975]) == pytest.approx(
        [tested["low_tasks"], tested["high_tasks"]], abs=wide
    )
