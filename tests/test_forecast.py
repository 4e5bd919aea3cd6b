"""The forecast of a study's cost: counts that a hand can check, and never less for more."""

import pytest

from helpers import merge as merging
from helpers.study import forecast
from helpers.study import old as study

UNITS = {"train": 1.0, "score": 2.0, "probe": 3.0, "merge": 4.0, "solo": 6.0, "dose": 1.0}
ASKED = {
    "TASKS": ["a", "b", "c", "d"],
    "TRAIN_EXAMPLES": 20,
    "BATCH_SIZE": 8,
    "EPOCHS": 2,
    "DEV_EXAMPLES": 10,
    "TEST_EXAMPLES": 5,
    "PROBE_EXAMPLES": 2,
    "DOSES": [0.0, 0.5, 1.0],
    "METHODS": ["linear", "ties"],
    "GROUP_METHODS": ["chebyshev"],
    "ARMS": [["ties", "norm"], ["chebyshev", "sum"]],
    "PAIRS": 5,
    "GROUP_SIZES": [3, 9],
    "GROUPS_PER_SIZE": 2,
    "SWAPS": 3,
    "SWAP_METHODS": ["ties"],
}


def test_a_forecast_is_what_a_hand_counts():
    """A task's scores take 10 s, its states 6 s, a merge of n models 2n s, a rule alone 3n s."""
    table = forecast.forecast(ASKED, UNITS).set_index("step")
    seconds = {
        "specialists": (4, 4 * (3 * 2) * 8),  # three steps in each of two epochs
        "screenings": (4, 4 * 10 * (1 + 5) * 2),
        "references": (5, 4 * 5 * 6 + 4 * 5 * 10),
        "doses": (12, 12 * (1 + 10)),
        # five pairs by two rules and one arm, two triples by three and two; nothing is read of arms
        "merges": (15 + 10, 15 * (4 + 20) + 5 * 2 * 12 + 10 * (6 + 30) + 2 * 3 * 18),
        # TIES alone at its default once a task, at a matched scale once a task of a merge
        "controls": ((4 + 10) + (4 + 6), 14 * (6 + 10) + 10 * (9 + 10)),
        # three members of three triples leave, and one of the three was not merged before
        "swaps": (9 + 1, 10 * (6 + 30)),
    }
    assert dict(table["count"]) == {step: count for step, (count, _) in seconds.items()}
    asked = {step: cpu / 3600 for step, (_, cpu) in seconds.items()}
    assert dict(table["cpu_hours"]) == pytest.approx(asked)
    assert list(table["notebook"]) == ["01"] * 2 + ["02"] * 5


@pytest.mark.parametrize(
    "more",
    [
        {"PAIRS": 6},
        {"GROUPS_PER_SIZE": 3},
        {"GROUP_SIZES": [3, 4]},
        {"ARMS": [*ASKED["ARMS"], ["linear", "bfloat16"]]},
        {"METHODS": [*ASKED["METHODS"], "dare"]},
        {"SWAPS": 4},
        {"SWAP_METHODS": ["ties", "tsv"]},
        {"TASKS": ["a", "b", "c", "d", "e", "f", "g"]},
        {"DOSES": [*ASKED["DOSES"], 2.0]},
        {"EPOCHS": 3},
        *({f"{part}_EXAMPLES": 30} for part in ("TRAIN", "DEV", "TEST", "PROBE")),
    ],
    ids=lambda more: next(iter(more)),
)
def test_more_of_anything_costs_more(more):
    six = ASKED | {"TASKS": ["a", "b", "c", "d", "e", "f"]}
    less, hours = (forecast.forecast(x, UNITS)["cpu_hours"].sum() for x in (six, six | more))
    assert hours > less


def test_the_forecast_knows_the_rules_and_prompts_of_the_study():
    weighted = {name for name, rule in merging.METHODS.items() if rule.coefficients}
    assert {*forecast.WEIGHTED} == weighted | {
        "chebyshev"
    }  # a linear average with weights of its own
    assert {*forecast.MATCHED} < {*study.ARMS} and forecast.SHOWN == study.SHOTS + 1


def test_unit_costs_are_those_of_one_example(tmp_path):
    assert forecast.unit_costs(tmp_path, ASKED) is None
    (tmp_path / "specialists.csv").write_text("task,cpu_seconds\na,16\nb,64\n")
    (tmp_path / "training.csv").write_text("task,step,loss\nb,1,0\nb,2,0\na,1,0\n")
    costs = ["step,models,cpu_seconds", "dose,1,1", "merge,2,4", "merge,3,9", "scores,0,10"]
    (tmp_path / "costs.csv").write_text("\n".join([*costs, "solo,1,6", "states,0,6"]))
    expected = UNITS | {"train": (16 + 32) / 2 / 8}
    assert forecast.unit_costs(tmp_path, ASKED) == pytest.approx(expected)
