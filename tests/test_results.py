"""Committed results: tables equal what their own records give, and are described, without text."""

import json
import re
import tomllib
from fnmatch import fnmatchcase

import numpy as np
import pandas as pd
import pytest

from helpers import run
from helpers.run import findings
from helpers.store import ROOT
from helpers.study import losses as evaluate

RESULTS = ROOT / "data" / "results"
STUDIES = sorted(path.parent.name for path in RESULTS.glob("*/losses.csv"))
FOUND = [name for name in STUDIES if (RESULTS / name / "verdicts.csv").exists()]
SHARED = "Columns that several tables share"
ROWS = 120  # merges whose bootstrap is repeated; the other columns are compared in every row

each_study = pytest.mark.parametrize("study", STUDIES)
each_found = pytest.mark.parametrize("study", FOUND)


def table(study, name):
    return pd.read_csv(RESULTS / study / name, dtype={"example": str}, keep_default_na=True)


def setting(study, name):
    return run.all_profiles()[study][name]


def sample(frame):
    return frame.iloc[:: -(-len(frame) // ROWS)]


@pytest.fixture(scope="module")
def answers():
    """Per-example outcomes by study: (merge, task) -> rows in the order of the test split."""
    read = {study: table(study, "examples.csv.gz") for study in STUDIES}
    return {study: dict(list(rows.groupby(["merge", "task"]))) for study, rows in read.items()}


def visited(row):
    """The merge whose visit gave the row's scores: its own, or its twin's."""
    twin = row.same_as if isinstance(row.same_as, str) else row.method
    return row.merge.replace(f"|{row.method}", f"|{twin}", 1)


# --- recomputed ----------------------------------------------------------------------------------


@each_study
def test_scores_are_the_means_of_the_recorded_answers(study, answers):
    losses = table(study, "losses.csv")
    outcome = ["correct", "nll", "invalid"]
    means = {key: rows[outcome].mean() for key, rows in answers[study].items()}
    found = pd.DataFrame([means[visited(row), row.task] for row in losses.itertuples()])
    np.testing.assert_allclose(found["correct"], losses["score"])
    np.testing.assert_allclose(found["nll"], losses["nll"], atol=1e-5)  # recorded to five decimals
    np.testing.assert_allclose(found["invalid"], losses["invalid"])
    own = pd.DataFrame([means[f"specialist:{task}", task] for task in losses["task"]])
    np.testing.assert_allclose(own["correct"], losses["specialist"])
    np.testing.assert_allclose(own["nll"], losses["nll_specialist"], atol=1e-5)


@each_study
def test_losses_controls_and_parts_follow_from_scores_and_dose_curves(study):
    losses = table(study, "losses.csv")
    curves = dict(list(table(study, "doses.csv").groupby("task")))
    lost = evaluate.merging_loss(losses["score"], losses["specialist"])
    np.testing.assert_allclose(losses["loss"], lost)
    lost = evaluate.merging_loss(losses["score"], losses["specialist"], losses["chance"])
    np.testing.assert_allclose(losses["chance_corrected"], lost)
    for control, dose in (("control_ingredient", "dose_ingredient"), ("control_own", "dose_own")):
        read = [
            evaluate.read_dose(curves[x], at, "score")
            for x, at in losses[["task", dose]].itertuples(index=False)
        ]
        np.testing.assert_allclose(losses[control], read)
    at_a, at_c, solo = (
        [evaluate.merging_loss(*row) for row in losses[[x, "specialist"]].itertuples(index=False)]
        for x in ("control_ingredient", "control_own", "control_solo")
    )
    np.testing.assert_allclose(losses["dilution"], at_a)
    np.testing.assert_allclose(losses["overlap"], np.subtract(at_c, at_a), atol=1e-9)
    np.testing.assert_allclose(losses["interference"], losses["loss"] - at_c, atol=1e-9)
    np.testing.assert_allclose(losses["solo"], solo)
    without = np.where(losses["solo"].isna(), np.fmin(at_a, at_c), solo)
    assert (losses["floor"] == (without < -90)).all()


@each_study
def test_intervals_and_collapses_follow_from_the_recorded_answers(study, answers):
    losses, groups = table(study, "losses.csv"), table(study, "groups.csv")
    groups = groups if "arm" in groups else groups.assign(arm="default")
    seed, of = setting(study, "SEED"), answers[study]
    correct = {key: rows["correct"].to_numpy() for key, rows in of.items()}
    for row in sample(losses).itertuples():
        own = correct[f"specialist:{row.task}", row.task]
        span = evaluate.interval([(correct[visited(row), row.task], own)], seed=seed)
        np.testing.assert_allclose([row.loss_low, row.loss_high], span[1:3], err_msg=row.merge)
    for row in sample(groups).itertuples():
        name = f"{row.group}|{row.method}" + ("" if row.arm == "default" else f"|{row.arm}")
        cells = [(correct[name, x], correct[f"specialist:{x}", x]) for x in row.group.split("+")]
        span = evaluate.interval(cells, seed=seed)
        np.testing.assert_allclose([row.loss, row.low, row.high], span[:3], err_msg=name)
    flags = evaluate.collapsed(losses["loss"], losses["loss_high"])
    assert (pd.array(losses["collapsed"], dtype="boolean") == flags).all()
    flags = evaluate.collapsed(groups["loss"], groups["high"])
    assert (pd.array(groups["collapsed"], dtype="boolean") == flags).all()


@each_study
def test_swaps_start_from_measured_groups_and_each_has_one_newcomer(study):
    swaps = table(study, "swaps.csv")
    if swaps.empty:
        pytest.skip("this study swaps nothing")
    groups = table(study, "groups.csv").query("arm == 'default'")
    measured = groups.set_index(["method", "group"])["loss"]
    before = measured.reindex(pd.MultiIndex.from_frame(swaps[["method", "group"]])).to_numpy()
    known = ~np.isnan(before)  # the others were merged for their swaps alone
    assert known.any()
    np.testing.assert_allclose(swaps["before"][known], before[known])
    for (_, group), options in swaps.groupby(["method", "group"]):
        members = set(group.split("+"))
        (enters,) = set(options["enters"])
        assert list(options["leaves"]) == group.split("+") and enters not in members
        for row in options.itertuples():
            assert set(row.swapped.split("+")) == members - {row.leaves} | {enters}


@each_found
def test_findings_follow_from_the_tables(study):
    tables = findings.read(RESULTS / study)
    losses = findings.outcomes(tables["losses"], tables["doses"], tables["examples"])
    cells, known = findings.directed(losses), findings.metrics(tables)
    seed, permutations = setting(study, "SEED"), setting(study, "PERMUTATIONS")

    told = table(study, "summary.csv")
    again = findings.summary(losses, draws=1)
    columns = ["arm", "n", "method", "outcome", "value", "cells", "groups"]
    pd.testing.assert_frame_equal(told[columns], again[columns])

    loss = findings.matrix(cells, "loss", findings.distinct(losses))
    declared = table(study, "statistics.csv").query("family == 'declared'").set_index("metric")
    for metric in findings.PRIMARY:
        row = findings.association(known[metric], loss, permutations, seed)
        expected = declared.loc[metric, list(row)].astype(float).to_numpy()
        np.testing.assert_allclose(list(row.values()), expected, rtol=1e-6, err_msg=metric)

    effects = findings.effects(cells, "loss", "default", permutations, seed).set_index("effect")
    shown = table(study, "effects.csv").query("outcome == 'loss' and arm == 'default'")
    shown = shown.set_index("effect").loc[effects.index]
    tests = ["F", "p", "omega2"]
    pd.testing.assert_frame_equal(effects[tests], shown[tests], rtol=1e-6)
    shares = [name for name in ("share", "share_low", "share_high") if name in effects]
    pd.testing.assert_frame_equal(effects[shares], shown[shares], atol=0.002)


@each_found
def test_verdicts_follow_from_the_findings(study):
    names = ("summary", "effects", "statistics", "contests")
    found = findings.verdicts(
        findings.read(RESULTS / study)["groups"], *(table(study, f"{name}.csv") for name in names)
    )
    written = table(study, "verdicts.csv").fillna("")
    pd.testing.assert_frame_equal(written, found, check_dtype=False)


def test_agreement_follows_from_the_studies():
    if not FOUND:
        pytest.skip("no study's findings are committed yet")
    studies = {study: table(study, "statistics.csv") for study in FOUND}
    written = pd.read_csv(RESULTS / "agreement.csv")
    tasks = {study: set(table(study, "losses.csv")["task"]) for study in FOUND}
    pd.testing.assert_frame_equal(written, findings.agreement(studies, tasks), check_dtype=False)


# --- described -----------------------------------------------------------------------------------


def described():
    """{file or heading: names of its columns}; names may be patterns."""
    sections, heading = {}, None
    for line in (RESULTS / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
            sections[heading] = []
        elif line.startswith("| ") and heading and not re.match(r"\| (column|array|field) ", line):
            sections[heading] += [name.strip() for name in line.split("|")[1].split(",")]
    return sections


def columns_of(path):
    if path.suffix == ".npz":
        return np.load(path).files
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "manifest.json":
            return list(content)
        return list(content[0] if isinstance(content, list) else next(iter(content.values())))
    return list(pd.read_csv(path, nrows=0).columns)


def committed():
    """{section's name: all columns of the committed files of that name}."""
    found = {}
    for path in sorted(RESULTS.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            name = "record_NN.json" if path.name.startswith("record_") else path.name
            found.setdefault(name, set()).update(columns_of(path))
    return found


def test_every_column_of_every_table_is_described():
    known, missing = described(), []
    for name, columns in committed().items():
        names = [*known.get(name, []), *known[SHARED]]
        missing += [
            f"{name}: {column}"
            for column in sorted(columns)
            if not any(fnmatchcase(column, pattern) for pattern in names)
        ]
    assert not missing, "describe them in data/results/README.md"


def test_every_description_is_of_a_column_that_is_there():
    found = committed()
    every = set().union(*found.values())
    stale = [
        f"{name}: {pattern}"
        for name, patterns in described().items()
        for pattern in patterns
        if not any(
            fnmatchcase(c, pattern) for c in (every if name == SHARED else found.get(name, ()))
        )
    ]
    assert not stale, "take them out of data/results/README.md"


# --- no text -------------------------------------------------------------------------------------

NAME = re.compile(r"[\w.:|+/@-]*( \w+)?")  # of a task, merge, layer ("block 3"): no sentence
# words of ours: data/tasks.toml (held to it below), and helpers.findings, which reads no task
PROSE = ["reason", "claim", "paper", "here", "verdict", "n", "overturned_by", "rival"]


@each_study
def test_no_table_holds_text_of_a_task(study):
    listed = tomllib.loads((ROOT / "data" / "tasks.toml").read_text(encoding="utf-8"))
    reasons = {entry["reason"] for entry in listed.values()}
    assert set(table(study, "tasks.csv")["reason"].dropna()) <= reasons
    ids = table(study, "examples.csv.gz")["example"]
    assert ids.str.fullmatch(r"[0-9a-f]{12}").all()
    for path in sorted((RESULTS / study).glob("*.csv*")):
        words = pd.read_csv(path).select_dtypes(exclude=["number", "bool"])
        for column in words.columns.difference(PROSE):
            values = words[column].dropna().astype(str).unique()
            assert all(map(NAME.fullmatch, values)), f"{path.name}: {column}"
    for path in sorted((RESULTS / study).glob("*.npz")):
        with np.load(path) as arrays:
            kinds = {name: arrays[name] for name in arrays.files if arrays[name].dtype.kind == "U"}
        assert all(NAME.fullmatch(text) for values in kinds.values() for text in values.ravel())
