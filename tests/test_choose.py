"""Predictions that cover, choices that learn nothing from what they are tried on, known answers."""

import math
import shutil
from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from helpers.advise import choices as choose
from helpers.states import conflict
from helpers.stats import dyads as stats


def pair_frame(matrix, names="ABCDEFGHIJ", **columns):
    """The upper triangle of a symmetric matrix as rows task_a, task_b and further columns."""
    i, j = np.triu_indices(len(matrix), 1)
    ends = {"task_a": [names[k] for k in i], "task_b": [names[k] for k in j]}
    return pd.DataFrame(ends | {name: np.asarray(m)[i, j] for name, m in columns.items()})


def losses_of(cells):
    """A table of losses from {(group, method): {task: loss}}."""
    rows = [
        {"merge": f"{g}|{m}", "group": g, "n": g.count("+") + 1, "method": m, "task": task,
         "loss": loss, "same_as": "linear" if m == "slerp" else "", "base": 0.1}
        for (g, m), told in cells.items() for task, loss in told.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


# --- predictions ------------------------------------------------------------------------------


def test_a_pairs_loss_is_the_mean_of_its_two_tasks_of_each_distinct_rule():
    table = losses_of(
        {
            ("A+B", "linear"): {"A": -10.0, "B": -30.0},
            ("A+B", "slerp"): {"A": -10.0, "B": -30.0},
            ("A+C", "linear"): {"A": math.nan, "C": -30.0},
            ("A+B+C", "linear"): {"A": -90.0, "B": -90.0, "C": -90.0},
        }
    )
    (row,) = choose.pair_losses(table).to_dict("records")
    assert row == {"task_a": "A", "task_b": "B", "method": "linear", "loss": -20.0}
    measured = pd.DataFrame({"task_a": ["B"], "task_b": ["A"], "hidden_sim": [0.7]})
    assert choose.joined(measured, table)["hidden_sim"].tolist() == [0.7]  # listed the other way


def test_a_line_predicts_what_lies_on_it_and_says_how_far_outside_it_is_asked():
    x = np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0)))  # 1 to 5
    line = choose.fit(pair_frame(x, hidden_sim=x, loss=-10 - 20 * x))
    assert line[:2] == pytest.approx((-20, -10)) and line.error == pytest.approx(0, abs=1e-9)
    assert (line.tasks, line.low, line.high) == (6, 1, 5)
    told = choose.predict(line, [0.0, 3.0, 7.0])
    assert told["predicted"].tolist() == pytest.approx([-10, -70, -100])  # no loss below -100 %
    assert told["outside"].tolist() == pytest.approx([0.25, 0, 0.5])
    wide = choose.predict(line._replace(error=2.0), [1.0])
    reach = 2 * student.ppf(0.95, 4)
    assert wide[["low", "high"]].iloc[0].tolist() == pytest.approx([-30 - reach, -30 + reach])
    with pytest.raises(ValueError, match="2 measured pairs cannot calibrate"):
        choose.fit(pair_frame(x, hidden_sim=x, loss=x).head(2))


@pytest.mark.parametrize("n, share", [(6, 0.2), (9, 0.8)])
def test_prediction_intervals_cover_pairs_of_new_tasks(n, share):
    """Two tasks are set aside; the pair they make is covered at least as often as is claimed."""
    rng, hits = np.random.default_rng(n), []
    for _ in range(150):
        x, y = stats.simulate_pairs(n + 2, rng, share, r_task=0.5, r_pair=0.5)
        old = (slice(n), slice(n))
        line = choose.fit(pair_frame(x[old], hidden_sim=x[old], loss=-30 + 8 * y[old]))
        told = choose.predict(line, [x[n, n + 1]]).iloc[0]
        hits.append(told["low"] <= -30 + 8 * y[n, n + 1] <= told["high"])
    assert np.mean(hits) > 0.9 - 2 * math.sqrt(0.9 * 0.1 / 150)


def test_a_held_out_prediction_sees_neither_of_its_tasks():
    x, y = stats.simulate_pairs(8, np.random.default_rng(0))
    table = pair_frame(x, hidden_sim=x, loss=-30 + 5 * y)
    before = choose.held_out(table)
    touched = table["task_a"].eq("A") | table["task_b"].eq("A")
    after = choose.held_out(table.assign(loss=table["loss"].where(~touched, -99)))
    for name in ("predicted", "low", "high"):
        assert before.loc[touched, name].tolist() == after.loc[touched, name].tolist()
    assert not np.allclose(before.loc[~touched, "predicted"], after.loc[~touched, "predicted"])
    assert set(before["covered"]) <= {0.0, 1.0}
    same = pair_frame(x, hidden_sim=x, loss=-30 - 5 * x)
    assert choose.skill(choose.held_out(same)) == pytest.approx(1)
    assert choose.skill(before.assign(predicted=before["mean"])) == 0
    few = choose.held_out(table[~table["task_b"].isin(list("DEFGH"))])  # A, B, C
    assert few[["predicted", "covered"]].isna().all(axis=None) and math.isnan(choose.skill(few))


# --- swaps and subsets --------------------------------------------------------------------------

# Four tasks on a line; D lies far from all. Every unit of distance costs 10 points, and the pair
# A+B is hurt by 5 more than its distance says.
PLACE = {"A": 0.0, "B": 1.0, "C": 2.0, "D": 5.0}
LOSS = {
    f"{a}+{b}": -10 * (PLACE[b] - PLACE[a]) - 5 * (a + b == "AB")
    for a, b in combinations("ABCD", 2)
}
DISTANCES = pd.DataFrame(
    [
        {"task_a": a, "task_b": b, "hidden_sim": PLACE[b] - PLACE[a]}
        for a, b in combinations("ABCD", 2)
    ]
)
GROUPS = pd.DataFrame(
    [{"group": g, "n": 2, "method": "linear", "loss": x} for g, x in LOSS.items()]
)
MDS = {"MDS": lambda held: choose.by_pair(DISTANCES, -DISTANCES["hidden_sim"], np.mean)}
RANDOM = {"random": lambda held: lambda group: 0.0}


def test_every_swap_between_measured_groups_is_known():
    table = choose.swaps(GROUPS)
    assert len(table) == 6 * 2 * 2  # each pair, each member, each of two outside tasks
    told = table.set_index(["group", "leaves", "enters"]).loc[("A+D", "D", "C")]
    assert (told["swapped"], told["before"], told["after"], told["change"]) == ("A+C", -50, -20, 30)
    assert choose.swaps(GROUPS.assign(loss=math.nan)).empty
    triples = pd.DataFrame({"group": ["A+B+C", "B+C+D", "D+E+F"], "n": 3, "method": "ties"})
    assert choose.swaps(triples.assign(loss=[-1.0, -4.0, -9.0]))["change"].tolist() == [-3, 3]


def test_the_swap_test_by_hand():
    rows = choose.swap_test(choose.swaps(GROUPS), MDS | RANDOM)
    told = rows.set_index(["group", "criterion", "policy"])
    # A+D loses 50. Without D: A+B -15, A+C -20, a gain of 32.5 on average; without A: 10 and 20.
    mds = told.loc["A+D", "MDS"]
    assert mds.loc["member"].tolist() == pytest.approx([32.5, 32.5 - 23.75, 0, 1])
    # Of all swaps MDS thinks A+B the closest (-15, change 35); the best is the same.
    assert mds.loc["swap"].tolist() == pytest.approx([35, 35 - (35 + 30 + 10 + 20) / 4, 0, 1])
    assert told.loc[("A+D", "random", "member")].tolist() == pytest.approx([23.75, 0, 8.75, 1])
    # From B+C (-10) nothing is better; MDS ties A+B and stays blind to its 5 points.
    swap = told.loc[("B+C", "MDS", "swap")]
    assert (swap["outcome"], swap["regret"], swap["hit"]) == (-5, 0, 0)
    gains = choose.summary(rows, ["criterion", "policy"], draws=50).set_index(
        ["criterion", "policy"]
    )
    assert gains.loc[("random", "swap"), "gain"] == 0 and gains.loc[("MDS", "swap"), "gain"] > 0


def test_the_subset_test_by_hand():
    known = DISTANCES.assign(loss=list(LOSS.values()))
    rows = choose.subset_test(known, MDS | RANDOM, pool=4, keep=3).set_index("criterion")
    # Worst pairs: ABC -20, ABD -50, ACD -50, BCD -40: MDS takes ABC, the best.
    assert rows.loc["MDS", ["outcome", "gain", "regret", "hit"]].tolist() == [-20, 20, 0, 1]
    assert rows.loc["random", ["outcome", "gain", "regret", "hit"]].tolist() == [-40, 0, 20, 0.25]
    with pytest.raises(ValueError, match="not 4 of 4"):
        choose.subset_test(known, MDS, pool=4, keep=4)


def test_how_well_scores_follow_the_losses_of_measured_groups():
    table = choose.follows(GROUPS, MDS | RANDOM).set_index("criterion")
    assert list(table.index) == ["MDS"]  # a score that does not vary ranks nothing
    distance, loss = DISTANCES["hidden_sim"], GROUPS["loss"]
    assert table.loc["MDS", "spearman"] == pytest.approx((-distance).corr(loss, "spearman"))
    assert choose.follows(GROUPS.head(2), MDS).empty and math.isnan(table.loc["MDS", "p"])


def test_scores_that_differ_by_rounding_alone_are_ties():
    named = {frozenset(group.split("+")): i for i, group in enumerate(GROUPS["group"])}

    def scores(noise):
        return {"few values": lambda held: lambda members: named[frozenset(members)] // 3 - noise()}

    rng = np.random.default_rng(0)
    for groups in (GROUPS, GROUPS[::-1]):
        (tied,) = choose.follows(groups, scores(lambda: 0.0))["spearman"]
        (near,) = choose.follows(groups, scores(lambda: rng.normal(scale=1e-13)))["spearman"]
        assert near == tied


def test_ranks_of_groups_are_tested_by_giving_the_tasks_other_names():
    """The exact p of all 24 relabellings of four tasks, and nominal false positives of triples."""
    names = [dict(zip("ABCD", order, strict=True)) for order in permutations("ABCD")]
    apart = [[PLACE[f[a]] - PLACE[f[b]] for a, b in combinations("ABCD", 2)] for f in names]
    found = [pd.Series(np.abs(x)).corr(pd.Series(LOSS.values()), "spearman") for x in apart]
    exact = np.mean(np.abs(found) >= np.abs(found[0]) - 1e-12)
    (p,) = choose.follows(GROUPS, MDS, relabellings=2000)["p"]
    assert p == pytest.approx(exact, abs=0.03)

    rng, few = np.random.default_rng(0), list(combinations("ABCDEFGH", 3))[::4]
    told = []
    for _ in range(100):  # losses and scores both go by the task, and have nothing to do with
        hurt, score = (dict(zip("ABCDEFGH", rng.normal(size=8), strict=True)) for _ in range(2))
        loss = [sum(map(hurt.get, triple)) for triple in few]
        groups = pd.DataFrame({"group": ["+".join(triple) for triple in few], "n": 3, "loss": loss})
        by = {"score": lambda held, of=score: lambda group: sum(map(of.get, group))}
        told += choose.follows(groups, by, relabellings=39)["p"].tolist()
    assert 0.005 <= np.mean(np.array(told) <= 0.05) <= 0.12


def test_criteria_point_as_claimed_and_learn_nothing_from_held_out_tasks():
    names = list("ABCDEFG")
    place = np.array([0.0, 1.0, 2.2, 3.1, 4.7, 5.2, 6.6])
    apart = np.abs(np.subtract.outer(place, place))
    rng = np.random.default_rng(0)
    pairs = pair_frame(apart, hidden_sim=apart).assign(
        **{name: rng.normal(size=21) for name in conflict.PRIMARY}
    )
    cells = {}
    for a, b, x in zip(pairs["task_a"], pairs["task_b"], pairs["hidden_sim"], strict=True):
        cells[f"{a}+{b}", "linear"] = {a: -5 * x, b: -5 * x}
    losses = losses_of(cells)
    doses = pd.DataFrame(
        [(x, dose, score) for k, x in enumerate(names)
         for dose, score in ((0.0, 0.0), (0.5, 0.8 - 0.1 * k), (1.0, 0.8))],
        columns=["task", "dose", "score"],
    )  # fmt: skip
    d2 = pd.DataFrame(apart**2, names, names)
    made = choose.criteria(pairs, losses, doses, d2, "linear")
    near, far = ("A", "B"), ("A", "G")
    for name in ("MDS", "radius", "dilution", "advisor"):
        score = made[name](frozenset("AB"))
        assert score(near) > score(far), name
    assert made["radius"](frozenset())(far) == pytest.approx(-(6.6**2) / 4)
    assert made["dilution"](frozenset())(near) == pytest.approx(100 * (0.75 / 0.8 - 1))
    assert made["advisor"](frozenset())(far) == pytest.approx(-33)

    spoiled = losses.assign(loss=losses["loss"].where(~losses["group"].str.contains("A"), 0.0))
    again = choose.criteria(pairs, spoiled, doses, d2, "linear")
    for name in made:
        assert made[name](frozenset("A"))(far) == again[name](frozenset("A"))(far), name
    assert math.isnan(made["advisor"](frozenset("ABCDE"))(far))  # one pair is left to learn from
    nothing = {"none": lambda held: lambda group: math.nan}
    rows = choose.swap_test(choose.swaps(GROUPS), RANDOM | nothing)
    assert set(rows["criterion"]) == {"random"}  # who cannot score abstains
    asked = []
    for hold in (False, True):
        by = {"all": lambda held: asked.append(held) or (lambda group: 0.0)}
        choose.swap_test(choose.swaps(GROUPS).query("group == 'A+B'"), by, hold_newcomers=hold)
    assert asked == [frozenset("AB"), frozenset("ABCD")]


def test_intervals_over_tasks_are_wider_than_over_groups_that_share_them():
    worth = dict(zip("ABCDEFGH", np.arange(8.0), strict=True))
    table = pd.DataFrame([(f"{a}+{b}", worth[a] + worth[b]) for a, b in combinations(worth, 2)])
    found = choose.over_tasks(table.set_axis(["group", "gain"], axis=1), "gain")
    assert found.value == 7 and found.n == 8
    naive = table[1].std() / math.sqrt(len(table)) * 2 * 1.96
    assert found.high - found.low > 1.5 * naive
    alone = choose.over_tasks(table.set_axis(["group", "gain"], axis=1).head(1), "gain")
    assert alone.value == 1 and math.isnan(alone.low) and math.isnan(alone.high)


def test_intervals_over_tasks_cover_also_where_a_large_group_never_holds_all_drawn_tasks():
    """Gains that come from tasks and from the group: 95 % intervals cover at least nine in ten."""
    rng, hits = np.random.default_rng(0), []
    for _ in range(60):
        of_task = rng.normal(size=16)
        drawn = [sorted(rng.choice(16, 8, replace=False)) for _ in range(12)]
        gain = [of_task[g].mean() + rng.normal(0, 0.35) for g in drawn]
        names = ["+".join(f"t{i:02d}" for i in g) for g in drawn]
        found = choose.over_tasks(pd.DataFrame({"group": names, "gain": gain}), "gain", 300)
        hits.append(found.low <= 0 <= found.high)
    assert np.mean(hits) >= 0.9


# --- committed studies ---------------------------------------------------------------------------


def test_a_study_is_read_with_the_distances_of_its_models(study):
    pd.DataFrame({"task": ["A"], "dose": [1.0]}).to_csv(study / "doses.csv", index=False)
    d2x = np.arange(8.0).reshape(2, 2, 2)
    np.savez(study / "geometry.npz", models=np.array(["base", "A"]), d2x=d2x)
    pairs, losses, doses, groups, d2 = choose.read_study(study)
    assert {"task_a", "hidden_sim_pool"} <= set(pairs) and {"method", "loss"} <= set(losses)
    assert list(doses) == ["task", "dose"] and {"group", "n"} <= set(groups)
    assert d2.loc["base", "A"] == d2x[0, 1].mean() and list(d2) == ["base", "A"]


@pytest.fixture
def study(tmp_path):
    """A folder of tables as notebook 02 and 03 leave them: six tasks, three rules."""
    x, y = stats.simulate_pairs(6, np.random.default_rng(1))
    pairs = pair_frame(x, hidden_sim_pool=x)
    cells = {
        (f"{a}+{b}", method): {a: loss - 30, b: loss - 30}
        for a, b, loss in pair_frame(y, loss=y).itertuples(index=False)
        for method in ("linear", "ties", "dare")
    }
    groups = pd.DataFrame(
        [("A+B", 2, "linear", -20.0), ("A+B", 2, "ties", -30.0), ("C+D+E", 3, "linear", -60.0),
         ("C+D+E", 3, "ties", -50.0), ("C+D+E", 3, "dare", -1.0)],
        columns=["group", "n", "method", "loss"],
    )  # fmt: skip
    trained = pd.DataFrame({"task": list("ABCDEF"), "folder": list("abcdef")})
    tables = {"pairs": pairs, "losses": losses_of(cells), "groups": groups, "specialists": trained}
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    return tmp_path


def test_committed_studies_without_the_tasks_that_are_advised_on(study):
    known = choose.known_merges([study], without=["A"])
    assert "A" not in {*known.pairs["task_a"], *known.pairs["task_b"]}
    assert known.groups["n"].tolist() == [3, 3, 3] and known.distance == "hidden_sim_pool"
    asked = pd.DataFrame({"task_a": ["x"], "task_b": ["y"], "distance": [0.3]})
    told = choose.expected_losses(asked, known)
    assert told["method"].tolist() == ["linear", "ties"]  # those that mergekit gives as well
    mine = known.pairs[known.pairs["method"] == "linear"]
    line = choose.fit(mine, "hidden_sim_pool")
    assert told["predicted"][0] == pytest.approx(line.intercept + 0.3 * line.slope)
    assert choose.expected_losses(asked, choose.known_merges([study], without="ABCD")).empty
    with pytest.raises(ValueError, match="there is no study"):
        choose.known_merges([])


def test_a_merge_that_two_studies_made_counts_once(study, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    shutil.copytree(study, again, dirs_exist_ok=True)
    once, twice = choose.known_merges([study]), choose.known_merges([study, again])
    assert len(twice.pairs) == len(once.pairs) and len(twice.groups) == len(once.groups)
    trained = pd.read_csv(again / "specialists.csv")
    trained.assign(folder=trained["folder"] + " of another seed").to_csv(
        again / "specialists.csv", index=False
    )
    twice = choose.known_merges([study, again])
    assert len(twice.pairs) == 2 * len(once.pairs) and len(twice.groups) == 2 * len(once.groups)


def test_the_rule_that_lost_least_at_the_nearest_size(study):
    groups = choose.known_merges([study]).groups
    assert [choose.best_rule(groups, n) for n in (2, 3, 8)] == ["linear", "ties", "ties"]
    assert choose.best_rule(groups[:0], 2) == "linear"


def test_the_best_subset_is_found_by_search():
    worth = {name: float(k % 7) for k, name in enumerate("ABCDEFGHIJKLMNOPQRSTUVWX")}
    score = lambda group: sum(worth[x] for x in group)  # noqa: E731
    assert choose.best_subset("ABCDEFG", 3, score) == ("E", "F", "G")
    many = choose.best_subset(list(worth), 12, score)  # too many subsets: one leaves at a time
    assert sum(worth[x] for x in many) == sum(sorted(worth.values())[-12:])
    with pytest.raises(ValueError, match="keep between 2 and 3"):
        choose.best_subset("ABC", 4, score)
