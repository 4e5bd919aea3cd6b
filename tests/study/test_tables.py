"""The reader of a study's tables, matrices of pairs, and the schema that frames are held to."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from helpers.study import schema
from helpers.study.losses import false_alarm_rate
from helpers.study.tables import Pairs, Study

TASKS = ["a", "b", "c"]


def merge_rows():
    """Pairs of a, b, c: linear; ties, norm-matched too; slerp, whose merges are linear's."""
    rows = []
    for tasks in (("a", "b"), ("a", "c"), ("b", "c")):
        name = "".join(tasks)
        rows += [
            (f"{name}-linear", tasks, "linear", "default", None),
            (f"{name}-ties", tasks, "ties", "default", None),
            (f"{name}-slerp", tasks, "slerp", "default", f"{name}-linear"),
            (f"{name}-ties-norm", tasks, "ties", "norm", None),
        ]
    rows.append(("abc-linear", ("a", "b", "c"), "linear", "default", None))
    frame = pd.DataFrame(rows, columns=["merge", "tasks", "rule", "arm", "same_as"])
    return frame.assign(n=frame.tasks.map(len), seed=0)


def filled(name, frame):
    """The frame with the schema's other columns, undefined."""
    columns = schema.of(name).columns
    for column, of in columns.items():
        if (
            column not in frame
            and column not in schema.of(name).optional
            and "*" not in column
        ):
            empty = {"bool": pd.array([pd.NA] * len(frame), "boolean"), "int": 0}
            frame[column] = empty.get(of.type, np.nan if of.type == "float" else None)
    return frame


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "little"
    merges = merge_rows()
    rows = [
        (m.merge, task, 0.1 * i + 0.01 * j)
        for i, m in enumerate(merges.itertuples())
        for j, task in enumerate(m.tasks)
    ]
    losses = pd.DataFrame(rows, columns=["merge", "task", "score"])
    losses["score"] /= losses["score"].max()
    losses["loss"] = 100 * (losses["score"] - 1)
    losses = losses.assign(specialist=1.0, dilution=-10.0, dose_ingredient=0.5, nll=1.0)
    losses["nll_specialist"] = 0.5
    tasks = pd.DataFrame({"task": [*TASKS, "d"], "family": ["x", "x", "y", "y"]})
    tasks = tasks.assign(prompt="bare", kept=[True, True, True, False])
    doses = pd.DataFrame({"task": np.repeat(TASKS, 2), "dose": [0.0, 1.0] * 3})
    doses = doses.assign(score=[0.0, 1.0] * 3, nll=[2.0, 0.5] * 3)
    frames = {"merges": merges, "losses": losses, "tasks": tasks, "doses": doses}
    for name, frame in frames.items():
        schema.write(folder, name, filled(name, frame))
    return folder


# --- pairs -------------------------------------------------------------------------------------


def test_pairs_know_their_tasks_and_direction():
    cells = pd.DataFrame(
        {"victim": ["a", "b", "a"], "partner": ["b", "a", "c"], "x": [1, 2, 3]}
    )
    pairs = Pairs.from_table(cells, "x")
    assert pairs.tasks == ("a", "b", "c") and pairs.directed
    assert pairs.of("a", "b") == 1 and pairs.of("b", "a") == 2
    assert np.isnan(pairs.of("c", "a")) and np.isnan(np.diag(pairs.values)).all()
    assert pairs.symmetric().of("b", "a") == 1.5
    assert np.isnan(pairs.symmetric().of("a", "c"))  # one direction is undefined
    turned = pairs.select(["c", "a"])
    assert turned.of("a", "c") == 3 and turned.values.shape == (2, 2)
    assert pairs.to_frame().loc["a", "c"] == 3


def test_pairs_of_undirected_rows_are_symmetric_and_listed_once():
    rows = pd.DataFrame({"task_a": ["a", "b"], "task_b": ["b", "c"], "x": [1.0, 2.0]})
    pairs = Pairs.from_table(rows, "x", tasks=["c", "b", "a"])
    assert pairs.of("a", "b") == pairs.of("b", "a") == 1 and not pairs.directed
    twice = pd.concat(
        [rows, rows.rename(columns={"task_a": "task_b", "task_b": "task_a"})]
    )
    with pytest.raises(ValueError, match="twice"):
        Pairs.from_table(twice, "x")
    with pytest.raises(ValueError, match="no pair"):
        Pairs.from_table(rows.assign(task_b="b"), "x")


# --- a study -----------------------------------------------------------------------------------


def test_a_study_answers_from_its_tables(folder):
    study = Study(folder)
    assert (
        study.tasks == TASKS and study.families["c"] == "y" and study.prompt == "bare"
    )
    assert study.scales == ["default", "norm"]
    assert len(study.losses) == 27 and study.losses.tasks[0] == ("a", "b")
    assert study.distinct() == ["linear", "ties"]  # slerp's merges are linear's
    # what ties was matched to belongs to it
    assert study.distinct("norm") == ["ties", "linear"]


def test_cells_and_outcomes_are_of_the_distinct_rules_of_an_arm(folder):
    study = Study(folder)
    cells = study.cells()
    assert set(cells.rule) == {"linear", "ties"} and set(cells.arm) == {"default"}
    assert len(cells) == 12 and (cells.victim != cells.partner).all()
    loss = cells.set_index(["rule", "victim", "partner"])["loss"]
    mean = study.outcome("loss")
    expected = (loss["linear", "c", "a"] + loss["ties", "c", "a"]) / 2
    assert mean.of("c", "a") == pytest.approx(expected)
    assert study.outcome("loss", "ties").of("c", "a") == loss["ties", "c", "a"]
    both = study.cells("norm")
    assert set(both.rule) == {"linear", "ties"} and set(both.arm) == {"norm"}
    norm = both[both.rule == "ties"].set_index(["victim", "partner"])["loss"]
    # the norm arm's own, not the default's
    assert norm["c", "a"] > loss["ties", "c", "a"]
    assert study.outcome("partners").of("a", "b") == pytest.approx(
        mean.of("a", "b") + 10
    )


def test_false_alarms_are_of_each_tasks_own_answers_and_chance(folder):
    for_a, for_b = [1.0] * 5 + [0.0] * 3, [1.0] * 8
    examples = pd.DataFrame({"task": ["a"] * 8 + ["b"] * 8, "correct": for_a + for_b})
    examples = examples.assign(merge="specialist", example=[*"01234567"] * 2)
    wrong = examples.assign(merge="ab-linear", correct=0.0)  # no business of theirs
    schema.write(folder, "examples", filled("examples", pd.concat([examples, wrong])))
    losses = schema.read(folder, "losses").assign(chance=0.25)
    schema.write(folder, "losses", losses)
    rates = Study(folder).false_alarms
    assert rates["a"] == false_alarm_rate(for_a, 0.25) > rates["b"] == 0


def test_an_outcome_is_undefined_where_it_is_under_any_rule(folder):
    table = pd.read_csv(folder / "losses.csv")
    table.loc[(table["merge"] == "ab-ties") & (table.task == "a"), "loss"] = np.nan
    table.to_csv(folder / "losses.csv", index=False)
    mean = Study(folder).outcome("loss")
    assert np.isnan(mean.of("a", "b")) and not np.isnan(mean.of("b", "a"))


def test_metrics_are_those_that_vary_and_are_defined(folder):
    # b with c was not measured
    rows = [("a", "b", 0.1, 1.0, 3.0), ("a", "c", 0.2, 2.0, 4.0)]
    columns = ["task_a", "task_b", "sign_change", "norm_a", "norm_b"]
    pairs = filled("pairs", pd.DataFrame(rows, columns=columns).assign(cosine=0.5))
    schema.write(
        folder, "pairs", pairs.assign(hidden_sim=[1.0, 2.0], hidden_sim_low=[0.5, 1.0])
    )
    study = Study(folder)
    assert set(study.metrics) == {"sign_change", "hidden_sim", "norm"}
    metric = study.metric("norm")
    assert metric.of("c", "a") == 3 and np.isnan(metric.of("b", "c"))
    with pytest.raises(ValueError, match="no pair metric 'hidden_sin'"):
        study.metric("hidden_sin")


def test_declared_predictors_count_before_other_readings_of_the_same_name(folder):
    ends = {"task_a": ["a", "a"], "task_b": ["b", "c"]}
    declared = filled("pair_predictors", pd.DataFrame(ends))
    schema.write(folder, "pair_predictors", declared.assign(cross_nll=[1.0, 2.0]))
    tasks = pd.DataFrame({"task": TASKS, "neutral_movement": [0.1, 0.2, 0.3]})
    schema.write(folder, "task_predictors", filled("task_predictors", tasks))
    assert Study(folder).metrics == ["cross_nll"]
    pairs = filled("pairs", pd.DataFrame(ends))
    schema.write(
        folder, "pairs", pairs.assign(cross_nll=[7.0, 8.0], barrier=[3.0, 4.0])
    )
    study = Study(folder)
    assert (
        study.metric("cross_nll").of("a", "c") == 2
        and study.metric("barrier").of("a", "c") == 4
    )
    assert study.task_metrics["neutral_movement"].to_dict() == {
        "a": 0.1,
        "b": 0.2,
        "c": 0.3,
    }


def test_a_folder_without_a_study_is_refused_in_a_sentence(tmp_path, folder):
    with pytest.raises(ValueError, match="holds no study"):
        Study(tmp_path)
    with pytest.raises(ValueError, match=r"has no twins\.csv"):
        Study(folder).table("twins")


# --- the schema --------------------------------------------------------------------------------


def test_a_table_comes_back_as_it_was_written(folder):
    merges = schema.read(folder, "merges")
    again = merge_rows()
    assert list(merges.tasks) == list(again.tasks)
    assert merges.same_as.isna().tolist() == again.same_as.isna().tolist()
    # a key of digits is no number
    digits = merges.head(1).assign(merge="1234567890123456")
    schema.write(folder, "merges", digits)
    assert schema.read(folder, "merges")["merge"][0] == "1234567890123456"


def test_an_empty_answer_is_silence_and_na_is_a_word(tmp_path):
    rows = pd.DataFrame(
        {"merge": "m", "task": "a", "example": ["1", "2"], "answer": ["", "NA"]}
    )
    schema.write(tmp_path, "answers", rows)
    assert schema.read(tmp_path, "answers").answer.tolist() == ["", "NA"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"score": 1.5}, r"losses\.csv: column score holds 1\.5"),
        ({"loss": "much"}, r"losses\.csv: column loss holds 'much', which is no float"),
        ({"lost": 1.0}, r"losses\.csv: column lost is not in .*schema\.toml"),
        ({"floor": 1.0}, r"losses\.csv: column floor holds 1\.0, which is no bool"),
    ],
)
def test_a_frame_that_breaks_the_schema_is_refused(folder, change, sentence):
    losses = schema.read(folder, "losses")
    with pytest.raises(ValueError, match=sentence):
        schema.write(folder, "losses", losses.assign(**change))


def test_a_missing_column_a_repeated_row_and_an_unknown_table_are_refused(folder):
    losses = schema.read(folder, "losses")
    with pytest.raises(ValueError, match=r"losses\.csv: column loss is missing"):
        schema.check("losses", losses.drop(columns="loss"))
    with pytest.raises(ValueError, match="is there twice"):
        schema.check("losses", pd.concat([losses, losses.head(1)]))
    with pytest.raises(ValueError, match="no table 'lost'"):
        schema.check("lost", losses)


def test_every_description_is_a_type_a_unit_and_a_meaning():
    types = {"name", "text", "list", "int", "float", "bool", "array", "object"}
    for name, table in schema.tables().items():
        for column, of in table.columns.items():
            assert of.type in types and of.meaning, f"{name}: {column}"
        assert set(table.key) | set(table.optional) <= set(table.columns), name


def test_reading_a_study_needs_no_torch():
    code = "import sys, helpers.study.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
