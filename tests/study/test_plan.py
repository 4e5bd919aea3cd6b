"""The plan: groups that are drawn, visits that add up, and what they cost."""

import subprocess
import sys

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.merge import RULES
from helpers.study import costs, design, groups, plan

LABELS = list("abcdefg")


def test_a_sample_of_groups_is_seeded_and_grows():
    assert (
        groups.draw(LABELS, 2, 21) == groups.draw(LABELS, 2, 99) == groups.pairs(LABELS)
    )
    few, more = (groups.draw(LABELS, 4, n, seed=3) for n in (5, 9))
    assert len(few) == 5 and set(few) < set(more)
    assert all(list(group) == sorted(set(group)) for group in more)
    assert few != groups.draw(LABELS, 4, 5, seed=4)


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 8), st.integers(20, 40))
def test_each_task_has_k_partners_that_are_no_relatives(seed, k, n):
    tasks = [f"t{i}" for i in range(n)]
    families = {x: f"f{i // 3}" for i, x in enumerate(tasks)}
    drawn = groups.partners(tasks, k, families, seed)
    assert len(set(drawn)) == len(drawn)
    assert not any(families[a] == families[b] for a, b in drawn)
    count = pd.Series([x for pair in drawn for x in pair]).value_counts()
    assert count.min() == k and count.max() <= k + 2 and len(count) == n
    assert count.sum() <= n * k + 4  # one too many only where no other is left


def test_more_partners_add_pairs_to_the_same_draw_and_given_pairs_count():
    tasks = [f"t{i}" for i in range(24)]
    families = {x: x for x in tasks}
    few, more = (set(groups.partners(tasks, k, families, 5)) for k in (3, 5))
    assert few < more and groups.partners(tasks, 3, families, 6) != sorted(few)
    first = groups.partners(tasks[:12], 4, families)
    rest = groups.partners(tasks, 4, families, given=first)
    assert not set(first) & set(rest)
    count = pd.Series([x for pair in first + rest for x in pair]).value_counts()
    assert count.min() == 4 and count[tasks[:12]].sum() <= 4 * 12 + 2


def test_too_few_strangers_are_refused():
    families = dict(zip("abcd", "xxxy", strict=True))
    with pytest.raises(ValueError, match="fewer than 2 partners of other families"):
        groups.partners("abcd", 2, families)
    assert groups.relatives("abcd", families) == [("a", "b"), ("a", "c"), ("b", "c")]


def test_swaps_put_one_newcomer_in_the_place_of_each_member():
    group = ("b", "d", "g")
    swaps = groups.swaps(LABELS, [group], seed=3)
    assert list(swaps["leaves"]) == list(group) and set(swaps["tasks"]) == {group}
    (enters,) = set(swaps["enters"])
    assert enters in "acef" and swaps.equals(groups.swaps(LABELS, [group], seed=3))
    for row in swaps.itertuples():
        assert row.swapped == tuple(sorted({*group, enters} - {row.leaves}))
    assert (
        len({groups.swaps(LABELS, [group], seed)["enters"][0] for seed in range(20)})
        > 1
    )
    with pytest.raises(ValueError, match="no newcomer"):
        groups.swaps(LABELS, [LABELS])


def test_plans_add_up_and_visit_each_model_once():
    first = plan.doses("ab", [0.5, 1.0]) + plan.doses("ab", [1.0], probed="abc")
    assert len(first) == 4
    whole = [row for row in first if row.options == {"dose": 1.0}]
    (one,) = (row for row in whole if row.tasks == ("a",))
    assert one.scored == ("a",) and one.probed == ("a", "b", "c")
    assert len(first + first) == 4
    assert len(plan.doses("a", [1.0]) + plan.doses("a", [1.0], split="dev")) == 2


def test_a_plan_without_visits_answers_as_any_other():
    none = plan.solos(plan.merges(["ab"], ["linear"]))
    assert len(none) == 0 and len(none.kinds("solo").kinds("solo")) == 0
    assert len(none + none) == 0 and none.cost(UNITS, SIZES).empty


def test_arms_follow_the_rules_that_are_there():
    rules = {"linear": {}, "ties": {"density": 0.5}}
    arms = [("ties", "norm"), ("linear", "sum"), ("iso_c", "norm")]
    made = plan.merges(["abc"], rules, arms, seed=2)
    assert [(row.rule, row.arm) for row in made] == [
        ("linear", "default"),
        ("ties", "default"),
        ("ties", "norm"),
        ("linear", "sum"),
    ]
    norm, summed = list(made)[2:]
    assert norm.options == {"density": 0.5} and summed.options == {"scale": 3.0}
    assert not norm.probed and all(row.probed for row in list(made)[:2])
    assert all(row.scored == tuple("abc") and row.seed == 2 for row in made)
    with pytest.raises(
        ValueError, match="unknown arm 'length': choose one of norm, dose, sum"
    ):
        plan.merges(["ab"], rules, [("ties", "length")])


def test_groups_of_one_size_share_a_rule_alone_unless_it_is_matched():
    arms = [("ties", "norm"), ("ties", "bfloat16")]
    made = plan.merges(["ab", "ac"], ["linear", "ties"], arms)
    alone = plan.solos(made)
    assert {row.rule for row in alone} == {"ties"}
    by_arm = pd.Series([row.arm for row in alone]).value_counts()
    assert by_arm.to_dict() == {"default": 3, "norm": 4, "bfloat16": 3}


def test_the_plan_knows_which_rules_are_weighted_sums():
    weighted = {rule for rule, contract in RULES.items() if contract.coefficients}
    assert {*plan.WEIGHTED} == weighted | {"chebyshev"}


def test_a_calibrated_merge_is_no_weighted_sum_and_is_tried_alone():
    arms = [("linear", "svc"), ("task_arithmetic", "lines")]
    made = plan.merges(["abcd"], ["linear", "task_arithmetic"], arms)
    assert [row.weighted for row in made] == [True, True, False, False]
    assert [row.options for row in made][2:] == [{"svc": 1.0}, {"lines": [0.25, 0.75]}]
    assert {(row.rule, row.arm) for row in plan.solos(made)} == {*arms}


UNITS = pd.DataFrame(
    {"cpu_seconds": [2.0, 0, 0.1, 0.5, 3, 4, 1], "megabytes": [0, 20.0, 0, 1, 0, 0, 0]},
    ["train", "specialist", "scores", "states", "merge", "solo", "dose"],
)
SIZES = {"test": 10, "dev": 20, "probe": 4}


def test_a_cost_is_what_a_hand_counts():
    asked = design.training("ab", {"a": 100, "b": 50}, epochs=2) + plan.doses(
        "ab", [0.5]
    )
    merged = plan.merges(["abc"], ["ties"])
    cost = (asked + merged + plan.solos(merged)).cost(UNITS, SIZES)
    assert cost["visits"].to_dict() == {
        "specialist": 2,
        "ability": 2,
        "dose": 4,
        "merge": 1,
        "solo": 3,
    }
    minutes = cost["minutes"] * 60
    assert minutes["specialist"] == pytest.approx(300 * 2)
    # behind four solved examples
    assert minutes["ability"] == pytest.approx(2 * 20 * 5 * 0.1)
    assert minutes["dose"] == pytest.approx(2 * (1 + 20 * 0.1) + 2 * (1 + 10 * 0.1))
    assert minutes["merge"] == pytest.approx(3 * 3 + 3 * 10 * 0.1 + 3 * 4 * 0.5)
    assert minutes["solo"] == pytest.approx(3 * (3 * 4 + 10 * 0.1))
    assert cost.loc["specialist", "gigabytes"] == pytest.approx(40 / 1024)
    assert cost.loc["merge", "gigabytes"] == pytest.approx(12 / 1024)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(2, 6))
def test_more_tasks_cost_more(n, m):
    few, more = (LABELS[: min(n, m)], LABELS[: max(n, m)])
    made = [
        plan.merges(groups.pairs(x), ["ties"]).cost(UNITS, SIZES) for x in (few, more)
    ]
    assert made[0]["minutes"].sum() <= made[1]["minutes"].sum()


def test_units_are_read_from_the_tables_of_a_study(tmp_path):
    parameters = {"BATCH_SIZE": 5, "TEST_EXAMPLES": 10, "PROBE_EXAMPLES": 4}
    assert costs.unit_costs(tmp_path, parameters) is None
    tables = {
        "specialists": "task,cpu_seconds,trained_parameters\na,20,1000\nb,40,1000\n",
        "training": "task,step,loss\na,1,1\na,2,1\nb,1,1\nb,2,1\n",
        "costs": "step,models,count,seconds,cpu_seconds,megabytes\nscores,0,9,2,1,0.5\n"
        "merge,2,3,9,8,1\nmerge,3,3,9,9,1\nsolo,1,2,9,6,1\n",
    }
    for name, text in tables.items():
        (tmp_path / f"{name}.csv").write_text(text)
    units = costs.unit_costs(tmp_path, parameters)["cpu_seconds"]
    assert units.to_dict() == {
        "train": 3,
        "specialist": 0,
        "scores": 0.1,
        "merge": 4,
        "solo": 3,
    }


def test_a_plan_needs_no_torch():
    code = "import sys; from helpers.study import plan, groups; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_study_is_planned_from_the_parameters_of_a_profile():
    given = {
        "RULES": ["linear", "ties"],
        "GROUP_RULES": ["chebyshev"],
        "ARMS": [["ties", "norm"]],
    }
    given |= {"PAIRS": 4, "PARTNERS": 0, "STAGES": [], "RELATIVES": True, "CROSS": True}
    given |= {"GROUP_SIZES": [3, 9], "SEED": 1}
    given |= {
        "GROUPS_PER_SIZE": 2,
        "GROUP_DOSE": 0.0,
        "SWAPS": 1,
        "SWAP_RULES": ["linear"],
        "GROUP_SEED": 0,
    }
    given |= {
        "DOSES": [0.0, 0.5, 1.0],
        "TASKS": LABELS,
        "TRAIN_EXAMPLES": 10,
        "EPOCHS": 1,
    }
    families = dict.fromkeys(LABELS, "f") | {x: "g" for x in "ab"}
    drawn = design.drawn(LABELS, families, given)
    assert ("a", "b") in drawn.pairs and len(drawn.larger) == 2
    asked = design.visits(LABELS, drawn, given)
    merged = asked.kinds("merge").frame
    of_pairs = merged[merged["tasks"].map(len) == 2]
    assert len(of_pairs) == 3 * len(drawn.pairs)
    assert set(of_pairs["rule"]) == {"linear", "ties"} and set(merged["seed"]) == {1}
    assert {*drawn.swaps["swapped"]} < set(merged["tasks"])
    assert len(asked.kinds("dose")) == 21 and len(asked.kinds("base")) == 1
    whole = (row for row in asked if row.options == {"dose": 1.0})
    assert {"a", "b"} <= set(next(x for x in whole if x.tasks == ("a",)).scored)
    dosed = design.visits(LABELS, drawn, given | {"GROUP_DOSE": 0.5})
    swaps = {*drawn.swaps["tasks"], *drawn.swaps["swapped"]}
    groups_of_three = [x for x in dosed if x.tasks in {*drawn.larger} - swaps]
    assert groups_of_three
    assert {x.rule for x in groups_of_three} == {"linear", "ties", "chebyshev"}
    assert {x.arm for x in groups_of_three} == {"dose=0.5"}
    assert all(x.rule_options == {} for x in groups_of_three)
    assert not plan.solos(plan.Plan.of(groups_of_three)).frame.size
    alone = design.visits(LABELS, drawn, given | {"CROSS": False})
    assert all(len(row.scored) == 1 for row in alone.kinds("dose"))
    cost = design.whole(given).cost(UNITS, SIZES)
    assert set(cost.index) == {"specialist", "ability", "dose", "base", "merge", "solo"}
    with pytest.raises(ValueError, match="name linear among RULES"):
        design.visits(LABELS, drawn, given | {"RULES": ["ties"]})
    with pytest.raises(ValueError, match="ARMS names a rule that is not merged"):
        design.visits(LABELS, drawn, given | {"ARMS": [["tsv", "norm"]]})
    with pytest.raises(ValueError, match="there is no pair"):
        design.drawn(LABELS[:1], families, given | {"SWAPS": 0})
    partners = design.drawn(
        LABELS, families, given | {"PARTNERS": 1, "RELATIVES": False}
    )
    assert all(families[a] != families[b] for a, b in partners.pairs)


def test_a_later_stage_adds_pairs_and_drops_none():
    tasks = [f"t{i}" for i in range(12)]
    families = dict(zip(tasks, tasks, strict=True))
    given = {"PARTNERS": 3, "STAGES": [6, 9], "RELATIVES": False, "GROUP_SEED": 0}
    given |= {"GROUP_SIZES": [], "GROUPS_PER_SIZE": 1, "SWAPS": 0}
    stages = [set(design.drawn(tasks[:n], families, given).pairs) for n in (6, 9, 12)]
    assert stages[0] < stages[1] < stages[2]
    for pairs, n in zip(stages, (6, 9, 12), strict=True):
        met = pd.Series([x for pair in pairs for x in pair]).value_counts()
        assert len(met) == n and met.min() >= 3
