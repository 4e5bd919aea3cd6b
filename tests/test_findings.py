"""Findings: cells, parts, matched arms, associations and verdicts, on tables with known answers."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from helpers.run import findings
from helpers.stats import dyads as stats

TASKS = ["addition", "plural", "negation", "dates", "lists", "tense"]


def study(rng, distance, harm, tasks=TASKS):
    """Tables of a study whose loss is -30 - 40 * `harm` of the pair, without floor or twins."""
    losses, pairs, groups, examples = [], [], [], []
    for a, b in combinations(range(len(tasks)), 2):
        group = f"{tasks[a]}+{tasks[b]}"
        row = {"task_a": tasks[a], "task_b": tasks[b], "hidden_sim": distance[a, b]}
        row |= {name: rng.random() for name in findings.PRIMARY[1:]}
        pairs.append(row | {"norm_a": 1.0 + a, "norm_b": 1.0 + b, "hidden_sim_low": 0, "flat": 1.0})
        for method, shift in (("linear", 0.0), ("ties", -5.0)):
            cells = []
            for i, j in ((a, b), (b, a)):
                loss = -30 - 40 * harm[i, j] + shift + rng.normal(0, 0.5)
                plain = {
                    "dilution": -10.0,
                    "overlap": 1.0,
                    "interference": loss + 9,
                    "solo": np.nan,
                }
                drops = {"dilution": -4.0, "overlap": 0.0, "interference": loss + 4, "solo": -8.0}
                row = plain if method == "linear" else drops
                row |= {"merge": f"{group}|{method}", "group": group, "n": 2, "method": method}
                row |= {"task": tasks[i], "loss": loss, "nll": 0.5, "nll_specialist": 0.1}
                row |= {"dose_ingredient": 0.5, "invalid": np.nan, "specialist": 0.8, "base": 0.1}
                losses.append(row | {"floor": False, "same_as": "", "collapsed": loss < -50})
                cells.append(loss)
            mean = np.mean(cells)
            told = {"group": group, "n": 2, "method": method, "loss": mean, "arm": "default"}
            groups.append(told | {"low": mean - 8, "high": mean + 8, "collapsed": mean < -45})
    doses = [(task, dose, 0.4 - 0.3 * dose) for task in tasks for dose in (0.0, 1.0)]
    for task in tasks:
        examples.append((f"specialist:{task}", task, 1.0, np.nan))
    return {
        "losses": pd.DataFrame(losses),
        "pairs": pd.DataFrame(pairs),
        "groups": pd.DataFrame(groups),
        "doses": pd.DataFrame(doses, columns=["task", "dose", "nll"]),
        "examples": pd.DataFrame(examples, columns=["merge", "task", "correct", "invalid"]),
    }


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def tables(rng):
    distance = rng.random((6, 6))
    distance = distance + distance.T
    found = study(rng, distance, distance)
    found["losses"] = findings.outcomes(
        found["losses"].assign(arm="default"), found["doses"], found["examples"]
    )
    return found


def test_the_parts_of_a_loss_and_of_the_nll_add_up(tables):
    losses = tables["losses"]
    np.testing.assert_allclose(losses["alone"] + losses["partners"], losses["loss"])
    plain, drops = (losses[losses["method"] == name] for name in ("linear", "ties"))
    assert (plain["alone"] == -10).all() and (drops["alone"] == -8).all()
    np.testing.assert_allclose(losses["nll_loss"], -0.4)
    np.testing.assert_allclose(plain["nll_alone"], 0.1 - 0.25)  # the curve at dose 1/2
    assert drops["nll_alone"].isna().all()  # its solo run's NLL is not in these tables
    with_nll = drops.assign(nll_solo=0.3).drop(columns="alone")
    again = findings.outcomes(with_nll, tables["doses"], tables["examples"])
    np.testing.assert_allclose(again["nll_alone"], -0.2)


def test_format_loss_counts_invalid_answers_beyond_the_specialists(tables):
    losses = tables["losses"].iloc[:1].assign(invalid=0.5, specialist=0.8, loss=-70.0)
    own = pd.DataFrame({"merge": [f"specialist:{losses['task'].iloc[0]}"] * 2, "correct": 1.0})
    own = own.assign(task=losses["task"].iloc[0], invalid=[0.0, 0.2])
    found = findings.outcomes(losses, tables["doses"], own).iloc[0]
    assert found["format_loss"] == pytest.approx(-100 * (0.5 - 0.1) / 0.8)
    assert found["format_loss"] + found["knowledge_loss"] == pytest.approx(-70)


def test_cells_know_their_partner_and_a_twin_is_no_method(tables):
    losses = tables["losses"]
    cells = findings.directed(losses)
    first = cells.iloc[0]
    assert {first["task"], first["partner"]} == set(first["group"].split("+"))
    twins = losses[losses["method"] == "linear"].assign(method="slerp", same_as="linear")
    assert findings.distinct(pd.concat([losses, twins])) == ["linear", "ties"]
    table = findings.matrix(cells, "loss", ["linear", "ties"])
    both = cells.groupby(["task", "partner"])["loss"].mean()
    assert table.loc["plural", "dates"] == pytest.approx(both["plural", "dates"])
    assert np.isnan(np.diag(table)).all()


def test_a_matched_arm_holds_the_rule_that_it_is_matched_to(tmp_path, tables):
    losses = tables["losses"].drop(columns="arm")
    assert set(findings._with_references(losses)["arm"]) == {"default"}
    norm = losses[losses["method"] == "ties"].assign(arm="norm")
    found = findings._with_references(pd.concat([losses.assign(arm="default"), norm]))
    assert findings.distinct(found, "norm") == ["ties", "linear"]
    assert (found["arm"] == "norm").sum() == 2 * len(norm)


def test_metrics_are_the_columns_that_vary_and_belong_to_the_pair(tables):
    found = findings.metrics(tables)
    assert set(found) == {*findings.PRIMARY, "norm"}
    assert found["norm"].loc["addition", "plural"] == 1.5
    bound = tables["groups"][["group", "n", "method"]].assign(r2=np.arange(30.0))
    again = findings.metrics(tables | {"bound": bound})
    assert again["bound_r2"].loc["addition", "plural"] == 0.5  # mean over two methods


def test_the_summary_counts_floor_cells_and_leaves_them_out_of_the_parts(tables):
    losses = tables["losses"].copy()
    losses.loc[losses["task"] == "dates", "floor"] = True
    told = findings.summary(losses, draws=50).set_index(["method", "outcome"])
    assert told.loc[("linear", "floor"), "value"] == pytest.approx(1 / 6)
    assert told.loc[("linear", "loss"), "cells"] == 30
    assert told.loc[("linear", "partners"), "cells"] == 25
    row = told.loc[("ties", "loss")]
    assert row["low"] <= row["value"] <= row["high"]


def test_effects_find_pair_and_method_and_need_defined_cells(tables):
    cells = findings.directed(tables["losses"])
    found = findings.effects(cells, "loss", "default", 199).set_index("effect")
    assert {"pair", "method", "own", "partner", "residual", "task", "side"} == set(found.index)
    assert found.loc[["pair", "method"], "p"].max() <= 0.02 and found["n_tasks"].eq(6).all()
    holes = cells.assign(loss=cells["loss"].mask(cells["task"] == "dates"))
    assert findings.effects(holes, "loss", "default", 19)["n_tasks"].eq(5).all()
    assert findings.effects(cells.assign(loss=np.nan), "loss", "default", 19).empty


def test_a_metric_that_makes_the_loss_is_found_and_the_others_are_not(tables):
    cells, known = findings.directed(tables["losses"]), findings.metrics(tables)
    related = findings.associations(cells, known, 719)
    declared = related[related["family"] == "declared"].set_index("metric")
    assert declared.loc["hidden_sim", ["between", "specific", "raw"]].max() < -0.99
    assert declared.loc["hidden_sim", "specific_p_holm"] < 0.05
    assert declared["specific_p_holm"].drop("hidden_sim").min() > 0.05
    assert related.loc[related["family"] != "declared", "between_p_holm"].isna().all()
    assert {"method", "outcome", "exploratory"} < set(related["family"])
    assert set(related.loc[related["family"] == "exploratory", "metric"]) == {"norm"}
    p = declared[["between_p", "specific_p"]].to_numpy().ravel()
    holm = declared[["between_p_holm", "specific_p_holm"]].to_numpy().ravel()
    assert holm[p.argmin()] == pytest.approx(min(1, 10 * p.min()))


def test_undeclared_metrics_are_corrected_over_all_of_their_tests():
    row = {"family": "exploratory", "outcome": "loss", "between_p": 0.2, "specific_p": 0.01}
    row |= {f"{x}{end}": 0.5 for x in ("between", "specific") for end in ("", "_low", "_high")}
    others = {"outcome": "partners", "specific_p": 1e-9}, {"family": "method", "specific_p": 1e-9}
    rows = [row | {"metric": "a"}, row | {"metric": "norm", "specific_p": np.nan}]
    related = pd.DataFrame([*rows, *(row | {"metric": "b"} | other for other in others)])
    told = findings.explored(related)
    assert told[["metric", "estimand"]].to_numpy().tolist() == [
        ["a", "specific"],
        ["a", "between"],
        ["norm", "between"],
    ]
    assert told["p_holm"].tolist() == pytest.approx([0.03, 0.4, 0.4])
    assert findings.explored(related[related["family"] == "method"]).empty


def test_a_raw_correlation_between_tasks_is_no_property_of_the_pair(rng):
    spread = np.linspace(0, 1, 6)
    of_tasks = np.add.outer(spread, spread)
    noise = np.triu(rng.random((6, 6)), 1) * 0.2
    found = study(rng, of_tasks + noise + noise.T, of_tasks)
    losses = findings.outcomes(
        found["losses"].assign(arm="default"), found["doses"], found["examples"]
    )
    cells = findings.directed(losses)
    loss = findings.matrix(cells, "loss", ["linear", "ties"])
    row = findings.association(findings.metrics(found)["hidden_sim"], loss, 719)
    assert row["raw"] < -0.9 and row["between"] < -0.95
    assert abs(row["specific"]) < 0.75 and row["specific_p"] > 0.05


def test_partial_correlation_vanishes_when_the_rival_is_the_metric(tables):
    cells, known = findings.directed(tables["losses"]), findings.metrics(tables)
    loss = findings.matrix(cells, "loss", ["linear", "ties"])
    given = {"itself": known["hidden_sim"], "norm": known["norm"]}
    found = findings.partial(known["hidden_sim"], loss, given, 99, 0).set_index("rival")
    assert np.isnan(found.loc["itself", "given"]) and found.loc["norm", "given"] < -0.99
    assert found.loc["itself", "r"] < -0.99 and "all of them" in found.index


def test_contests_put_the_metric_that_makes_the_loss_ahead(tables):
    cells, known = findings.directed(tables["losses"]), findings.metrics(tables)
    loss = findings.matrix(cells, "loss", ["linear", "ties"])
    found = findings.contests(known, loss, 100, 0).set_index(["estimand", "rival"])
    assert (found.loc["specific", "hidden"] > found.loc["specific", "other"]).all()
    assert (found.loc["specific", "p_holm"] < 0.05).all() and (found.loc["raw", "low"] > 0).all()


def test_what_repeats_from_seed_to_seed_is_the_tasks_doing(rng):
    """Both runs lose by one harm and half a point of noise; their distances are unrelated."""
    harm = rng.random((6, 6))
    harm = harm + harm.T
    distances = [d + d.T for d in rng.random((2, 6, 6))]
    runs = [study(rng, d, harm) for d in distances]
    for run in runs:
        run["losses"]["arm"] = "default"
    runs[1]["losses"] = runs[1]["losses"][~runs[1]["losses"]["group"].str.contains("tense")]
    runs[1]["pairs"] = runs[1]["pairs"][runs[1]["pairs"]["task_b"] != "tense"]
    runs.append({name: table for name, table in runs[1].items() if name != "pairs"})
    noise = rng.normal(0, 0.01, len(runs[1]["losses"]))
    runs[2]["losses"] = runs[1]["losses"].assign(loss=runs[1]["losses"]["loss"] + noise)
    told = findings.repeated(dict(zip(["one", "two", "scored"], runs, strict=True)))
    assert list(told.columns) == findings.REPEATED
    assert not told.loc[told["second"] == "scored", "what"].isin(findings.PRIMARY).any()
    same = told[(told["first"] == "two") & (told["second"] == "scored")]
    assert np.allclose(same[["raw", "between", "specific"]], 1, atol=1e-4)
    assert np.allclose(same["spread"], 0, atol=0.05)
    told = told[(told["first"] == "one") & (told["second"] == "two")]
    told = told.set_index(["what", "method"])
    assert list(told.loc["loss"].index) == ["mean", "linear", "ties"]
    assert (told["tasks"] == 5).all()
    assert (told.loc["loss", ["raw", "specific"]] > 0.99).all(axis=None)
    # a pair is the mean of two cells, so half a point of noise becomes 0.35
    assert told.loc[("loss", "linear"), "spread"] == pytest.approx(0.35, rel=0.5)
    assert told.loc[("hidden_sim", ""), "raw"] < 0.9
    assert told.loc[("loss", "ties"), "mean"] == pytest.approx(
        told.loc[("loss", "linear"), "mean"] - 5, abs=0.5
    )


def test_verdicts_follow_the_plan(tables):
    cells, known = findings.directed(tables["losses"]), findings.metrics(tables)
    losses, groups = tables["losses"], tables["groups"]
    told = findings.summary(losses, 100)
    effects = pd.concat([findings.effects(cells, x, "default", 199) for x in ("loss", "partners")])
    related = findings.associations(cells, known, 719)
    contest = findings.contests(known, findings.matrix(cells, "loss", ["linear", "ties"]), 50, 0)
    found = findings.verdicts(groups, told, effects, related, contest).set_index("claim")
    assert found.loc["collapse under every method", "verdict"] == findings.HOLDS
    assert found.loc["the method does not matter", "verdict"] == findings.FAILS
    assert found.loc["the pair matters", "verdict"] == findings.HOLDS
    pair = [claim for claim in found.index if "the pair that lies farther" in claim]
    assert found.loc[pair, "verdict"].tolist() == [findings.HOLDS]
    conflict = [claim for claim in found.index if claim.startswith("parameter conflict")]
    assert found.loc[conflict, "verdict"].tolist() == [findings.OPEN]
    assert found.loc[conflict, "n"].tolist() == ["16 tasks, were r = 0"]
    assert (found.loc[found["verdict"] != findings.OPEN, "n"] == "").all()

    spared = groups.assign(low=-20.0, collapsed=False)
    again = findings.verdicts(spared, told, effects, related, contest)
    assert again["verdict"].iloc[0] == findings.FAILS
    beside = findings.beside_paper(groups, related)
    assert "p < .001" in beside.loc["hidden distance, every method but DARE", "here"]


@pytest.mark.parametrize(("shown", "refuted", "word"), [
    (True, False, findings.HOLDS), (False, True, findings.FAILS), (False, False, findings.OPEN),
])  # fmt: skip
def test_what_is_neither_shown_nor_refuted_is_open(shown, refuted, word):
    assert findings.verdict(shown, refuted) == word


def test_the_tasks_that_exclude_an_effect_do_so_and_fewer_do_not():
    n = findings.tasks_for_no_effect(4)

    def high(tasks):
        pairs = tasks * (tasks - 1) // 2
        return stats.partial_omega2(1, 3, (pairs - 1) * 3, pairs * 4).high

    assert high(n) < findings.SMALL <= high(n - 1)


def test_agreement_pools_studies_of_five_tasks_or_more_that_share_no_pair(tables):
    cells, known = findings.directed(tables["losses"]), findings.metrics(tables)
    one = findings.associations(cells, known, 19)
    other = one.assign(specific=one["specific"] * 0.5, between=one["between"] * 0.5)
    tasks = {"a": {"t1", "t2", "t3"}, "b": {"t3", "t4"}, "c": {"t5"}}  # a and b have no common pair
    found = findings.agreement({"a": one, "b": other, "c": one.assign(n_tasks=4)}, tasks)
    mine = found[(found["metric"] == "hidden_sim") & (found["estimand"] == "specific")]
    assert mine["study"].tolist() == ["a", "b", "c", "pooled"]
    pooled = mine.iloc[-1]
    assert pooled["n_tasks"] == 12
    assert min(mine["r"][:2]) < pooled["r"] < max(mine["r"][:2])
    assert findings.apart(tasks | {"d": {"t1", "t2"}}) == ["a", "b", "c"]
    for studies, names in (({"a": one}, {"a"}), ({"a": one, "b": other}, {"a", "b"})):
        shared = dict.fromkeys(names, {"t1", "t2"})
        assert "pooled" not in set(findings.agreement(studies, shared)["study"])


def with_versions(losses):
    """The linear merges again on a grid, where every cell loses ten points more at half the dose,
    and by another draw, which changes the cells by one point up or down."""
    losses = losses.assign(dose_own=0.5)
    linear = losses[losses["method"] == "linear"]
    grid = linear.assign(arm="bfloat16", loss=linear["loss"] - 10, dose_own=0.25)
    drawn = linear.assign(arm="mask1", loss=linear["loss"] + np.tile([1, 1, -1, -1], 8)[:30])
    return pd.concat([losses, grid, drawn], ignore_index=True)


def test_other_versions_of_a_rule_are_held_against_its_default(tables):
    losses = with_versions(tables["losses"])
    assert findings.scales(losses) == ["default"]
    told = findings.versions(findings.directed(losses), 200).set_index(["arm", "method"])
    grid, drawn = told.loc["bfloat16", "linear"], told.loc["mask1", "linear"]
    assert grid[["difference", "low", "high"]].to_numpy() == pytest.approx([-10] * 3)
    assert grid[["dose", "dose_there", "spread", "r"]].to_numpy() == pytest.approx(
        [0.5, 0.25, 0, 1]
    )
    # each pair moved by one point, eight of fifteen up: variance of the differences / 2
    assert drawn["difference"] == pytest.approx(1 / 15) and drawn["pairs"] == 15
    assert drawn["spread"] == pytest.approx(np.std([1] * 8 + [-1] * 7, ddof=1) / np.sqrt(2))
    assert drawn["low"] < 1 / 15 < drawn["high"]


def test_a_study_without_versions_has_an_empty_table_of_them(tables):
    told = findings.versions(findings.directed(tables["losses"].assign(dose_own=0.5)))
    assert told.empty and "spread" in told


def test_versions_take_no_part_in_verdicts_and_associations(tables):
    """A draw or a grid is no scale: the claims are those of the study without them."""
    found = []
    for losses in (tables["losses"], with_versions(tables["losses"])):
        cells, known = findings.directed(losses), findings.metrics(tables)
        groups = tables["groups"]
        if "mask1" in set(losses["arm"]):
            groups = pd.concat([groups, groups.assign(arm="mask1", collapsed=True, low=-99.0)])
        told = findings.summary(losses, 50)
        effects = [findings.effects(cells, "loss", arm, 99) for arm in dict.fromkeys(cells["arm"])]
        related = findings.associations(cells, known, 99)
        contest = findings.contests(known, findings.matrix(cells, "loss", ["linear"]), 50, 0)
        found.append(findings.verdicts(groups, told, pd.concat(effects), related, contest))
    pd.testing.assert_frame_equal(*found)
