"""The declared test once more, from examples and distances, by least squares written out here."""

import json
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from by_hand import least_squares
from scipy.stats import t

from helpers.store import ROOT

LEAST = {"tasks96": 48, "tasks32_gemma": 16}  # tasks of the first stage
WORDS = {"victim": "(as victim)", "partner": "(as partner)", "pair": "the pair"}
ORDERS = 2000


@pytest.fixture(scope="module", params=LEAST)
def folder(request):
    return ROOT / "data" / "results" / request.param


@pytest.fixture(scope="module")
def family(folder):
    frame = pd.read_csv(folder / "tasks.csv").query("kept")
    return dict(zip(frame["task"], frame["family"], strict=True))


@pytest.fixture(scope="module")
def lost(folder, family):
    """{(victim, partner): NLL of the specialist less that of the average}, of unrelated tasks."""
    merges = pd.read_csv(folder / "merges.csv").query("rule == 'linear' and n == 2")
    nll = (
        pd.read_csv(folder / "examples.csv.gz").groupby(["merge", "task"])["nll"].mean()
    )
    out = {}
    for row in merges.itertuples():
        for victim, partner in permutations(json.loads(row.tasks)):
            if family[victim] != family[partner]:
                out[victim, partner] = (
                    nll["specialist", victim] - nll[row.merge, victim]
                )
    return out


@pytest.fixture(scope="module")
def distance(folder, family):
    """{(task, task): hidden distance}, of unrelated tasks, merged or not; both ways round."""
    out = {}
    for row in pd.read_csv(folder / "pair_predictors.csv").itertuples():
        if family[row.task_a] != family[row.task_b]:
            out[row.task_a, row.task_b] = out[row.task_b, row.task_a] = row.hidden_sim
    return out


@pytest.fixture(scope="module")
def series(lost, distance):
    """The names of the tasks, and {estimand: (of the distance, of the loss)} in one order."""
    effects = least_squares(lost)
    far = least_squares(distance).rows
    both = {pair: (lost[pair] + lost[pair[::-1]]) / 2 for pair in lost}
    hurt = least_squares(both).left
    apart = least_squares({pair: distance[pair] for pair in both}).left
    names = list(far)
    x = np.array([far[name] for name in names])
    return names, {
        "victim": (x, np.array([effects.rows[name] for name in names])),
        "partner": (x, np.array([effects.columns[name] for name in names])),
        "pair": (np.array(list(apart.values())), np.array(list(hurt.values()))),
    }


@pytest.fixture(scope="module")
def verdicts(folder):
    frame = pd.read_csv(folder / "verdicts.csv")
    frame = frame[frame["claim"].str.startswith("hidden distance")]
    rows = {}
    for name, word in WORDS.items():
        (rows[name],) = (row for row in frame.itertuples() if word in row.claim)
    return rows


@pytest.mark.parametrize("estimand", WORDS)
def test_the_declared_correlations(estimand, series, verdicts):
    x, y = series[1][estimand]
    assert verdicts[estimand].estimate == pytest.approx(
        np.corrcoef(x, y)[0, 1], abs=1e-3
    )


def shuffled(names, family, rng):
    """Places of the tasks: tasks change places in a family, families of one size with another."""
    by_size = {}
    for name in dict.fromkeys(family[x] for x in names):
        members = [i for i, x in enumerate(names) if family[x] == name]
        by_size.setdefault(len(members), []).append(members)
    order = np.arange(len(names))
    for families in by_size.values():
        for here, there in zip(families, rng.permutation(len(families)), strict=True):
            order[here] = rng.permutation(families[there])
    return order


def studentised(x, y):
    products = (x - x.mean()) * (y - y.mean())
    return abs(products.sum()) / np.sqrt((products**2).sum())


@pytest.mark.parametrize("estimand", ["victim", "partner"])
def test_the_declared_permutation_test(estimand, folder, series, family):
    names, values = series
    x, y = values[estimand]
    rng = np.random.default_rng(1)
    here = studentised(x, y)
    there = [studentised(x[shuffled(names, family, rng)], y) for _ in range(ORDERS)]
    p = (1 + np.sum(there >= here)) / (1 + ORDERS)
    frame = pd.read_csv(folder / "predictors.csv")
    row = frame.query(
        "metric == 'hidden_sim' and rule == 'linear' and estimand == @estimand"
    )
    said = row["family_p"].item()
    assert abs(p - said) < 4 * np.sqrt(max(p * (1 - p), 1e-3) / ORDERS)


def test_the_declared_exchange_of_pairs(folder, lost, distance, family):
    names = sorted({task for pair in lost for task in pair})
    place = {task: i for i, task in enumerate(names)}
    pairs = [pair for pair in lost if pair[0] < pair[1]]
    first, second = np.array([[place[a], place[b]] for a, b in pairs]).T
    columns = np.eye(len(names))[first] + np.eye(len(names))[second]
    project = np.eye(len(pairs)) - columns @ np.linalg.pinv(columns)
    y = project @ [(lost[a, b] + lost[b, a]) / 2 for a, b in pairs]
    far = np.array([[distance.get((a, b), np.nan) for b in names] for a in names])

    def statistic(order):
        return studentised(project @ far[order[first], order[second]], y)

    rng = np.random.default_rng(1)
    there = [statistic(shuffled(names, family, rng)) for _ in range(ORDERS)]
    p = (1 + np.sum(there >= statistic(np.arange(len(names))))) / (1 + ORDERS)
    frame = pd.read_csv(folder / "predictors.csv")
    row = frame.query(
        "metric == 'hidden_sim' and rule == 'linear' and estimand == 'pair'"
    )
    said = row["family_p"].item()
    assert abs(p - said) < 4 * np.sqrt(max(p * (1 - p), 1e-3) / ORDERS)


@pytest.mark.parametrize("estimand", ["victim", "partner"])
def test_the_intervals_over_families(estimand, series, family, verdicts):
    """Delete-a-family jackknife on Fisher's z, groups weighted as Busing et al. (1999) do."""
    names, values = series
    x, y = values[estimand]
    labels = np.array([family[name] for name in names])
    z = np.arctanh(np.corrcoef(x, y)[0, 1])
    pseudo, shares = [], []
    for label in sorted(set(labels)):
        kept = labels != label
        without = np.arctanh(np.corrcoef(x[kept], y[kept])[0, 1])
        share = 1 - kept.mean()  # of the tasks, left out
        pseudo.append((z - (1 - share) * without) / share)
        shares.append(share)
    pseudo, shares = np.array(pseudo), np.array(shares)
    centre = shares @ pseudo
    error = np.sqrt(np.mean((pseudo - centre) ** 2 * shares / (1 - shares)))
    reach = t.ppf(0.975, len(pseudo) - 1) * error
    row = verdicts[estimand]
    ends = [row.family_low, row.family_high]
    assert ends == pytest.approx(np.tanh([z - reach, z + reach]), abs=1e-3)


def corrected(values):
    """Holm's p, step by step."""
    out, least = {}, 0
    for place, name in enumerate(sorted(values, key=values.get)):
        least = max(least, min(1, values[name] * (len(values) - place)))
        out[name] = least
    return out


@pytest.mark.parametrize("unit", ["p", "family_p"])
def test_the_verdicts_rest_on_corrected_p(unit, folder, verdicts):
    frame = pd.read_csv(folder / "predictors.csv")
    rows = frame.query("metric == 'hidden_sim' and rule == 'linear'").set_index(
        "estimand"
    )
    assert {
        name: getattr(row, unit) for name, row in verdicts.items()
    } == pytest.approx(corrected(rows[unit].to_dict()), abs=1e-5)


def test_a_verdict_holds_where_both_p_are_small_and_nothing_overturns_it(verdicts):
    for row in verdicts.values():
        stands = {str(row.without_one_task), str(row.without_one_family)} == {"0"}
        small = max(row.p, row.family_p) < 0.05
        assert (row.verdict == "holds") == (small and stands)


def test_as_many_tasks_and_pairs_as_were_declared(folder, family, lost):
    assert len(family) >= LEAST[folder.name]
    met = pd.Series([victim for victim, _ in lost]).value_counts()
    assert len(met) == len(family) and met.min() >= 8
    assert max(pd.Series(family.values()).value_counts()) <= 3
