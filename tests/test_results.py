"""Committed tables: their numbers follow from the recorded answers, by other code than the study's.

Nothing of helpers computes here but the reader of tables: scores, losses, parts, intervals and
collapses are written out again.
"""

import re
import tomllib
from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.store import ROOT
from helpers.study import schema
from helpers.study.kinds import KINDS
from helpers.study.tables import Study

RESULTS = ROOT / "data" / "results"
STUDIES = sorted(path.parent.name for path in RESULTS.glob("*/losses.csv"))
ROWS = 120  # merges whose bootstrap is repeated; all else is compared in every row

each_study = pytest.mark.parametrize("name", STUDIES)


@pytest.fixture(scope="module")
def studies():
    return {name: Study(RESULTS / name) for name in STUDIES}


@pytest.fixture(scope="module")
def answers(studies):
    """By study: {(merge, task): correct, nll and invalid of its test examples}."""
    found = {}
    for name, study in studies.items():
        groups = study.examples.groupby(["merge", "task"])
        found[name] = {
            cell: rows[["correct", "nll", "invalid"]] for cell, rows in groups
        }
    return found


def visited(study):
    """Losses whose merge was scored example by example, `visit` naming the merge that was."""
    losses = study.joined("losses")
    losses["visit"] = losses["same_as"].fillna(losses["merge"])
    scored = set(study.examples["merge"])
    return losses[losses["visit"].isin(scored)]


def percent(score, specialist):
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = (np.asarray(score, float) / np.asarray(specialist, float) - 1) * 100
    return np.where(np.asarray(specialist, float) > 1e-9, loss, np.nan)


def bootstrap(pairs, seed, chance=0.0):
    """Loss of the mean over tasks, and its 95 % interval, from (merged, specialist) scores."""
    rng, drawn = np.random.default_rng(seed), []
    for merged, own in pairs:
        n = len(own)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=2000)
        drawn.append(percent(counts @ merged / n - chance, counts @ own / n - chance))
    values = [percent(m.mean() - chance, own.mean() - chance) for m, own in pairs]
    ends = np.nanquantile(np.mean(drawn, axis=0), [0.025, 0.975])
    return [np.mean(values), *ends]


def sample(frame):
    return frame.iloc[:: -(-len(frame) // ROWS)]


# --- recomputed ----------------------------------------------------------------------------------


@each_study
def test_scores_are_the_means_of_the_recorded_answers(name, studies, answers):
    losses, of = visited(studies[name]), answers[name]
    # the others lie on one scale line
    assert len(losses) > 0.95 * len(studies[name].losses)
    means = {cell: rows.mean() for cell, rows in of.items()}
    rows = zip(losses["visit"], losses["task"], strict=True)
    merged = pd.DataFrame([means[cell] for cell in rows])
    # grades are kept to five decimals, as NLL is
    grades = 1e-5 if name == "graded" else 0
    np.testing.assert_allclose(merged["correct"], losses["score"], atol=grades)
    np.testing.assert_allclose(merged["nll"], losses["nll"], atol=1e-5)
    np.testing.assert_allclose(merged["invalid"], losses["invalid"])
    own = pd.DataFrame([means["specialist", task] for task in losses["task"]])
    np.testing.assert_allclose(own["correct"], losses["specialist"], atol=grades)
    np.testing.assert_allclose(own["nll"], losses["nll_specialist"], atol=1e-5)


@each_study
def test_losses_controls_and_parts_follow_from_scores_and_dose_curves(name, studies):
    losses = studies[name].table("losses")
    own, chance = losses["specialist"], losses["chance"]
    above = percent(losses["score"] - chance, own - chance)
    np.testing.assert_allclose(losses["loss"], percent(losses["score"], own))
    np.testing.assert_allclose(losses["chance_corrected"], above)
    curves = dict(list(studies[name].doses.sort_values("dose").groupby("task")))
    for kind in ("ingredient", "own"):
        read = [
            np.interp(dose, curves[task]["dose"], curves[task]["score"], np.nan, np.nan)
            for task, dose in zip(losses["task"], losses[f"dose_{kind}"], strict=True)
        ]
        np.testing.assert_allclose(losses[f"control_{kind}"], read)
    at_a, at_c = (
        percent(losses[f"control_{kind}"], own) for kind in ("ingredient", "own")
    )
    solo = percent(losses["control_solo"], own)
    np.testing.assert_allclose(losses["dilution"], at_a)
    np.testing.assert_allclose(losses["overlap"], at_c - at_a, atol=1e-9)
    np.testing.assert_allclose(losses["interference"], losses["loss"] - at_c, atol=1e-9)
    np.testing.assert_allclose(losses["solo"], solo)
    without = np.where(np.isnan(solo), np.fmin(at_a, at_c), solo)
    assert (losses["floor"] == (without < -90)).all()


@each_study
def test_intervals_and_collapses_follow_from_the_recorded_answers(
    name, studies, answers
):
    study, of = studies[name], answers[name]
    (seed,) = study.merges["seed"].unique()
    correct = {cell: rows["correct"].to_numpy() for cell, rows in of.items()}
    losses = visited(study)
    for row in sample(losses).itertuples():
        pair = [(correct[row.visit, row.task], correct["specialist", row.task])]
        plain = bootstrap(pair, seed)
        np.testing.assert_allclose([row.loss_low, row.loss_high], plain[1:], atol=1e-9)
        if row.specialist > row.chance:
            above = bootstrap(pair, seed, row.chance)
            np.testing.assert_allclose(
                [row.corrected_low, row.corrected_high], above[1:]
            )
    fell = (losses["loss"] < -30) & (losses["loss_high"] < -10)
    assert (losses["collapsed"] == fell).all()
    fell = (losses["chance_corrected"] < -30) & (losses["corrected_high"] < -10)
    assert (losses["collapsed_corrected"].fillna(False) == fell).all()

    merges = study.merges.assign(
        visit=study.merges["same_as"].fillna(study.merges["merge"])
    )
    merges = merges[merges["visit"].isin(losses["visit"])]
    for row in sample(merges).itertuples():
        pairs = [
            (correct[row.visit, task], correct["specialist", task])
            for task in row.tasks
        ]
        span = bootstrap(pairs, seed)
        np.testing.assert_allclose(
            [row.loss, row.loss_low, row.loss_high], span, atol=1e-9
        )
    fell = (merges["loss"] < -30) & (merges["loss_high"] < -10)
    assert (merges["collapsed"] == fell).all()


@each_study
def test_a_copy_is_of_an_earlier_merge_of_its_group_and_scores_alike(name, studies):
    merges = studies[name].merges
    place = {merge: i for i, merge in enumerate(merges["merge"])}
    groups = dict(zip(merges["merge"], merges["tasks"], strict=True))
    scores = studies[name].table("losses").set_index(["merge", "task"])["score"]
    for row in merges.dropna(subset="same_as").itertuples():
        assert (
            place[row.same_as] < place[row.merge] and groups[row.same_as] == row.tasks
        )
        for task in row.tasks:
            assert scores[row.merge, task] == scores[row.same_as, task]
    assert merges["merge"].str.fullmatch("[0-9a-f]{16}").all()


@each_study
def test_swaps_start_from_measured_groups_and_each_has_one_newcomer(name, studies):
    study = studies[name]
    if not study.has("swaps") or study.table("swaps").empty:
        pytest.skip("this study swaps nothing")
    swaps = study.table("swaps")
    losses = study.in_arm(table="merges").set_index(["rule", "tasks"])["loss"]
    starts = swaps.drop_duplicates(["rule", "tasks"])
    measured = [losses.get((row.rule, row.tasks)) for row in starts.itertuples()]
    # others were merged for their swaps alone
    assert any(loss is not None for loss in measured)
    for loss, before in zip(measured, starts["before"], strict=True):
        assert loss is None or before == pytest.approx(loss)
    for (_, tasks), options in swaps.groupby(["rule", "tasks"]):
        (enters,) = set(options["enters"])
        assert list(options["leaves"]) == list(tasks) and enters not in tasks
        for row in options.itertuples():
            assert set(row.swapped) == set(tasks) - {row.leaves} | {enters}


# --- described -----------------------------------------------------------------------------------

# of studies that swap nobody, train no task twice, or merge by one rule
MAY_BE_EMPTY = {"swaps.csv", "twins.csv", "contrasts.csv"}
KNOWN = {table.file: name for name, table in schema.tables().items()}


@each_study
def test_every_table_is_as_the_schema_describes_it(name, studies):
    for path in sorted((RESULTS / name).iterdir()):
        assert path.name in KNOWN, f"{path.name} is in no schema"
        if ".csv" in path.suffixes:
            empty = studies[name].table(KNOWN[path.name]).empty
            assert not empty or path.name in MAY_BE_EMPTY, f"{path.name} is empty"
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                assert set(arrays.files) == set(schema.of("geometry").columns)


def test_the_page_of_the_tables_is_the_schema():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == schema.page()


def test_every_description_is_of_a_column_that_some_study_may_hold():
    found = defaultdict(set)
    for path in RESULTS.rglob("*.csv*"):
        names = schema.of(KNOWN[path.name]).columns
        for column in pd.read_csv(path, nrows=0).columns:
            found[path.name] |= {name for name in names if fnmatchcase(column, name)}
    for file, patterns in found.items():
        table = schema.of(KNOWN[file])
        stale = set(table.columns) - patterns - set(table.optional)
        assert not stale, f"{file} holds no {', '.join(sorted(stale))}"


@each_study
def test_the_prompts_are_said_to_be_bare_where_they_were(name, studies):
    assert studies[name].prompt in ("bare", "instructed")
    assert set(studies[name].table("tasks")["family"].isna()) == {False}


# --- no text -------------------------------------------------------------------------------------

# of a task, merge, layer ("block 3"): no sentence
NAME = re.compile(r"[\w.:|/@=-]*( \w+)?")
OWN_WORDS = {
    ("examples.csv.gz", "kind"): KINDS,
    ("choices.csv", "criterion"): ("trial, NLL",),
}
TEXTS = {"answers"}  # BIG-bench's own words stand here, and in no other table


@each_study
def test_no_other_table_holds_text_of_a_task(name, studies):
    study: Study = studies[name]
    listed = tomllib.loads((ROOT / "data" / "tasks.toml").read_text(encoding="utf-8"))
    reasons = {entry["reason"] for entry in listed.values()}
    assert set(study.table("tasks")["reason"]) - {""} <= reasons
    assert study.examples["example"].str.fullmatch(r"[0-9a-f]{12}").all()
    for path in sorted((RESULTS / name).glob("*.csv*")):
        table = KNOWN[path.name]
        if table not in TEXTS:
            names_only(path, study.table(table), schema.of(table))
    for path in sorted((RESULTS / name).glob("*.npz")):
        with np.load(path) as arrays:
            kinds = [arrays[x] for x in arrays.files if arrays[x].dtype.kind == "U"]
        assert all(NAME.fullmatch(text) for values in kinds for text in values.ravel())


def names_only(path: Path, frame: pd.DataFrame, table: schema.Table) -> None:
    """Assert that no column but our own texts holds a sentence."""
    for column in frame:
        kind = table.columns[table.pattern(column)].type
        if kind in ("name", "list"):
            values = frame[column].dropna()
            names = values.explode() if kind == "list" else values
            allowed = OWN_WORDS.get((table.file, column), ())
            strange = [
                x for x in names.unique() if x not in allowed and not NAME.fullmatch(x)
            ]
            assert not strange, f"{path.name}: {column}"
