"""Publishing: what the README says of a study comes from its tables; nothing is run for it."""

import base64
import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from helpers.run import chain as run
from helpers.run import publish
from helpers.study import assets, tasks


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one committed study and a notebook that shows it."""
    for module in (publish, run):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "REPRODUCED", tmp_path / "reproduced.csv")
    folder = tmp_path / "data" / "results" / "big"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text("\n".join(["# Toy", *publish.MARKS, "End"]))
    verdicts = {"claim": "|r| is small", "paper": "p > .05", "here": "|r| 0.1", "verdict": "open"}
    tables = {
        "verdicts": [verdicts | {"n": "16 tasks"}, verdicts | {"claim": "it falls", "n": np.nan}],
        "summary": [
            {"n": 2, "arm": "default", "method": "linear", "outcome": outcome, "value": value}
            | {"low": value - 1, "high": value + 1, "cells": 20}
            for outcome, value in (("loss", -30), ("alone", -10), ("partners", -20))
        ]
        + [{"n": 2, "arm": "default", "method": "linear", "outcome": "collapsed", "value": 0.25}
           | {"cells": 20}],
        "effects": [
            {"outcome": "loss", "arm": "default", "effect": effect, "share": share}
            | {"share_low": low, "share_high": low + 0.5}
            for effect, share, low in (("own", 0.5, 0.25), ("partner", 0.25, np.nan))
        ],
        "tasks": [{"kept": True}, {"kept": False}],
        "specialists": [{"folder": "specialist-x"}],
        "pairs": [{}, {}, {}],
        "merges": [{"x": 1}] * 7,
        "groups": [
            {"group": group, "n": 2, "method": method, "arm": arm, "loss": loss, "collapsed": hit}
            for method, arm in (("linear", "default"), ("linear", "sum"), ("dare", "default"))
            for group, loss, hit in (("a+b", -40, arm == "default"), ("a+c", -20, np.nan))
        ],
    }  # fmt: skip
    for name, rows in tables.items():
        frame = pd.DataFrame(rows if name != "pairs" else [{"x": 0}] * 3)
        frame.to_csv(folder / f"{name}.csv", index=False)
    told = [("merges below the floor", 0, 7), ("least slack delta_max / R^2", 1.5, 7)]
    rows = [dict(zip(("name", "value", "n"), row, strict=True)) for row in told]
    (folder / "record_04.json").write_text(json.dumps(rows))
    (folder / "record_05.json").write_text("[]")
    cell = {"size": "1M", "dtype": "float32", "method": "ties", "models": 4.0, "repeats": 3}
    cell |= {"torch": "2", "anonymous_gb": 0.25}
    cells = [cell | {"subject": "ours", "cpu_merge": 2}]
    cells += [cell | {"subject": "mergekit", "cpu_merge": 9}]
    cells += [cells[0] | {"size": "9M", "repeats": 1}]
    pd.DataFrame(cells).to_csv(folder.parent / "bench_merge.csv", index=False)
    teller = run.Notebook("05_tell", "What?", [], ["verdicts.csv"])
    monkeypatch.setattr(publish, "chain", lambda: [teller])
    monkeypatch.setattr(publish, "declared", lambda path: {"PROFILE": "big", "OUT": "data/runs/x"})
    return tmp_path


def test_the_readme_tells_the_study_that_the_notebook_shows(project):
    text = publish.readme()
    assert "profile `big`: specialists of 1 tasks on one base model, 3 pairs, 7 merges" in text
    assert r"| \|r\| is small | p > .05 | \|r\| 0.1 | **open** (needs 16 tasks) |" in text
    assert "| it falls | p > .05 |" in text and "nan" not in text
    assert "| big | LA | -30 [-31, -29] | -10 [-11, -9] | -20 [-21, -19] | 25% of 20 cell" in text
    assert "the task scored 50% [25%, 75%], its partner 25%." in text
    assert "| study | models | groups | LA | TA | TIES |" in text
    assert "| big | 2 | 2 | -30, 1 collapsed |  |  |" in text
    assert "passed screening: 1 of 2 in big.*" in text
    assert "0 of 7 merges lie below its floor; the nearest lies 1.50 times as high" in text
    assert "| ties of 4 | 1M float32 | 2.0 | 9.0 | 4.5 | 0.25 | 0.25 |" in text
    assert "| ties of 4 | 9M float32 | 2.0 |  |  | 0.25 |  |" in text  # mergekit was not run there
    assert "medians of 1 to 3 runs" in text and "Trained from" not in text
    publish.write_readme()
    assert (project / "README.md").read_text() == text == publish.readme()


def test_the_readme_tells_which_undeclared_metrics_survive_correction(project):
    span = {"between": 0.1, "between_low": -0.2, "between_high": 0.4, "between_p": 0.5}
    span |= {"specific": -0.62, "specific_low": -0.74, "specific_high": -0.46, "specific_p": 0.3}
    row = {"family": "exploratory", "outcome": "loss"} | span
    rows = [row | {"metric": "cross_nll", "specific_p": 0.011}, row | {"metric": "norm"}]
    rows += [row | {"metric": "gain", "specific_p": np.nan}]  # of single tasks: no test
    rows += [row | {"metric": "cross_nll", "outcome": "partners", "specific_p": 0.0001}]
    rows += [row | {"metric": "cosine", "family": "declared", "between_p": 0.0001}]
    path = project / "data" / "results" / "big" / "statistics.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    assert "in 0 of 5 tests of `big`." in publish.readme()
    rows[0]["specific_p"] = 0.005
    pd.DataFrame(rows).to_csv(path, index=False)
    text = publish.readme()
    assert (
        "Exploration, 3 further metrics: p < .05 after Holm's correction over all of them in 1 of 5"
        in text
    )
    assert "on the partner's task (pair-specific, p 0.025): r = big -0.62 [-0.74, -0.46]." in text


def test_the_readme_tells_what_other_training_seeds_said(project):
    rows = [("one", "two", 0.875, 4), ("one", "three", 0.75, 6), ("two", "three", 0.8, 5)]
    rows = pd.DataFrame(rows, columns=["first", "second", "raw", "spread"])
    loss = rows.assign(what="loss", method="mean", tasks=9, specific=0.5)
    alone = rows.assign(what="loss", method="linear", tasks=9, raw=0.1, specific=0.1)
    path = project / "data/results/big/repeats.csv"
    pd.concat([loss, alone]).to_csv(path, index=False)
    text = publish.readme()
    assert "Trained from 3 seeds on the same examples (9 tasks)" in text
    assert "r = 0.75 to 0.88, their pair-specific parts at r = 0.50; one pair" in text
    assert "trainings of 4 to 6 points." in text and "hidden distances correlate" not in text
    pd.concat([loss, rows.assign(what="hidden_sim")]).to_csv(path, index=False)
    assert "Their hidden distances correlate at r = 0.75 to 0.88." in publish.readme()


def test_the_readme_tells_what_other_draws_and_grids_said(project):
    assert "second draw" not in publish.readme()
    row = {"arm": "mask1", "method": "dare", "loss": -9.43, "difference": 0.25}
    row |= {"low": -0.5, "high": 1.0, "spread": 2.0, "r": 0.96}
    pd.DataFrame([row]).to_csv(project / "data/results/big/versions.csv", index=False)
    line = "| big | DARE, second draw | -9.4 | +0.2 [-0.5, 1.0] | 2.0 | 0.96 |"
    assert line in publish.readme()


def test_the_readme_tells_how_a_study_grows(project):
    assert "How it grows" not in publish.table()
    folder = project / "data/results/demo"
    folder.mkdir()
    trained = {"cpu_seconds": [50, 70], "peak_memory_mb": [1500, 2500]}
    pd.DataFrame(trained).to_csv(folder / "specialists.csv", index=False)
    steps = [("merge", 2, 3.0), ("merge", 3, 9.0), ("scores", 0, 2.0), ("states", 0, 1.5)]
    steps = pd.DataFrame(steps, columns=["step", "models", "cpu_seconds"]).assign(count=1000)
    steps.to_csv(folder / "costs.csv", index=False)
    merges = {"n": [2, 2, 2, 3], "arm": "default", "method": ["linear", "ties", "slerp", "dare"]}
    merges = pd.DataFrame(merges | {"same_as": [None, None, "linear", None]})
    merges.to_csv(folder / "merges.csv", index=False)
    text = publish.table()
    assert "took 60 CPU seconds, merging two 3.0" in text and "with 2 distinct methods" in text
    assert "20 CPU seconds a pair. From 7 tasks on" in text  # 2 (3 + 2 (2 + 1.5)); 1 + 2 * 60 / 20
    assert "| demo | 2 | 0.0 | 4000 | 4.3 | 2.5 |" in text  # 15.5 s, a thousand times
    (folder / "manifest.json").write_text(json.dumps({"runs": {"02": {"peak_gb": 3.21}}}))
    assert "| 4000 | 4.3 | 3.2 |" in publish.table()


def test_the_readme_tells_what_two_seeds_of_one_task_look_like(project):
    folder = project / "data/results/big"
    twins = {"task": ["a", "b"], "sign_change": [0.4, 0.5], "hidden_sim": 0.25, "loss": [1.0, -3.0]}
    pd.DataFrame(twins).to_csv(folder / "twins.csv", index=False)
    pairs = {"sign_change": [0.47, 0.49], "hidden_sim": [0.5, 0.75]}
    pd.DataFrame(pairs).to_csv(folder / "pairs.csv", index=False)
    text = publish.readme()
    assert "(mean of 2 tasks) disagree in sign on 45% of the coordinates" in text
    assert "different tasks on 47% to 49%" in text and "different tasks 0.50 to 0.75" in text
    assert "changes the score by -1 %" in text


def test_the_readme_tells_what_choices_were_worth(project):
    folder = project / "data/results/big"
    columns = ["study", "rule", "policy", "criterion", "gain", "gain_low", "gain_high", "regret"]
    mine = [
        ("big", "linear", "member", "MDS", 2.0, -1, 5, 3.0),
        ("big", "ties", "member", "MDS", 9, 9, 9, 9),
        ("big", "linear", "member", "random", 0.0, 0, 0, 4),
        ("big", "linear", "swap", "MDS", 6, 5, 7, 8.5),
        ("many", "ties", "member_of_8", "radius", -0.5, -1, 0, 2.0),
        ("many", "ties", "member_of_8", "MDS", 0.25, -1, 1, 1),
    ]
    pd.DataFrame(mine, columns=columns).to_csv(folder / "choices.csv", index=False)
    told = {"foretold": (-0.25, -0.5, 0.125), "skill": (-0.1, 0, 0), "coverage": (0.875, 0, 0)}
    rows = [
        {"name": f"{name}, own tasks, linear", "value": value, "low": low, "high": high}
        for name, (value, low, high) in told.items()
    ]
    (folder / "record_06.json").write_text(json.dumps(rows))
    swaps = {"group": ["a", "a", "b", "b"], "n": 8, "before": [-90, -90, -98, -98]}
    swaps = pd.DataFrame(swaps | {"after": [-99, -80, -97, -70], "method": "ties"})
    swaps = pd.concat([swaps, swaps.assign(method="linear", before=0)])
    many = project / "data/results/many"
    many.mkdir()
    swaps.to_csv(many / "swaps.csv", index=False)
    pd.DataFrame({"kept": [True] * 4}).to_csv(many / "tasks.csv", index=False)
    names = ["+".join(f"{x}{i}" for x in "abcdefgh") for i in range(10)]
    groups = {"group": names, "n": 8, "method": "ties", "loss": -np.arange(10.0), "collapsed": True}
    pd.DataFrame(groups | {"arm": "default"}).to_csv(many / "groups.csv", index=False)
    ranks = {"study": "many", "rule": "ties", "n": 8, "criterion": ["MDS", "radius"], "groups": 25}
    ranks = pd.DataFrame(ranks | {"spearman": [0.125, 0.9], "p": [0.25, 0.01]})
    ranks.to_csv(folder / "ranks.csv", index=False)
    text = publish.readme()
    assert "2 groups of 8 of many had lost -94 % by TIES before any swap, -75 % after their" in text
    assert "| who leaves a pair | who leaves, who enters | who leaves 8 (TIES, many) |" in text
    assert "| many | 8 | 10 |  |  | -4 [-" in text and "1 of 2 in big, 4 of 4 in many" in text
    assert "| MDS | +2.0 [-1.0, 5.0] | +6.0 [5.0, 7.0] | +0.2 [-1.0, 1.0] |" in text
    assert "| radius | abstains | abstains | -0.5 [-1.0, 0.0] |" in text
    assert "pair 3.0, who leaves, who enters 8.5, who leaves 8 (TIES, many) 1.0. The" in text
    assert "rank correlation -0.25 [-0.50, 0.12] and skill -0.10" in text and "88% of its" in text
    assert "mean loss with 0.12 by TIES (p 0.25, 25 groups of 8 in many)." in text


def test_without_a_study_the_readme_says_so_and_without_marks_it_is_refused(project):
    (project / "data" / "results" / "big" / "verdicts.csv").unlink()
    assert "None is published yet." in publish.readme()
    (project / "README.md").write_text("# Toy")
    with pytest.raises(ValueError, match="README.md needs the lines"):
        publish.readme()


def test_two_studies_are_set_side_by_side(project):
    other = project / "data" / "results" / "demo"  # a demonstration: no column of its own claims
    other.mkdir()
    (other / "verdicts.csv").write_text("claim\n")
    row = {"estimand": "specific", "metric": "hidden_sim", "study": "big", "n_tasks": 14}
    row |= {"r": -0.4, "low": -0.6, "high": -0.1}
    agreed = pd.DataFrame([row, row | {"metric": "cosine"}])
    agreed.to_csv(project / "data" / "results" / "agreement.csv", index=False)
    assert "| pair-specific | big | 14 | -0.40 [-0.60, -0.10] |" in publish.findings()


def test_the_claims_of_the_other_studies_stand_beside(project, monkeypatch):
    other = project / "data" / "results" / "small"
    other.mkdir()
    verdicts = pd.DataFrame(
        {"claim": ["it falls", "it stays"], "verdict": ["holds here", "cannot be told at this n"]}
    )
    verdicts.to_csv(other / "verdicts.csv", index=False)
    pd.DataFrame({"kept": [True, True, False]}).to_csv(other / "tasks.csv", index=False)
    groups = {"group": ["a+b", "a+b", "a+b+c"], "n": [2, 2, 3], "arm": "default"}
    groups = pd.DataFrame(groups | {"method": ["linear", "ties", "dare"]})
    groups.to_csv(other / "groups.csv", index=False)
    losses = {"n": 2, "method": ["linear", "linear", "ties"], "chance": [0.5, 0.0, 0.5]}
    losses |= {"specialist": [0.8, 0.9, 0.8], "chance_corrected": [-20, -40, -10]}
    pd.DataFrame(losses | {"arm": "default"}).to_csv(other / "losses.csv", index=False)
    monkeypatch.setattr(publish, "profiles", lambda: {"small": {"MODEL": "tiny", "SEED": 3}})
    text = "\n".join(publish._elsewhere({"small": other}))
    assert "| the same claims elsewhere | [small](data/results/small/verdicts.csv) |" in text
    assert "| it falls | holds |" in text and "| it stays | cannot be told |" in text
    assert (
        "small: tiny, training seed 3, 2 of 3 tasks passed screening, 1 pairs by LA, TIES" in text
    )
    assert "at chance a task would have lost 38 to 100 %" in text
    assert "of what exceeds chance pairs lost 10 to 30 % on average, by rule" in text
    assert publish._elsewhere({}) == []

    pd.DataFrame({"merge": list("xyz")}).to_csv(other / "merges.csv")
    taken = {"big": {"merges": 2, "cells": 8, "equal": 7}}
    (other / "manifest.json").write_text(json.dumps({"taken": taken}))
    told = "3 merges these have their scores from others' tables: 2 of big (of 8 scores there that"
    assert (
        f"by rule; of its {told} were made again 7 are equal).*"
        in publish._elsewhere({"small": other})[-2]
    )


def test_a_study_with_the_specialists_of_another_says_so(project):
    own = {"big": "xy", "big_rules": "xy", "few": "y", "fresh": "z"}
    for study, folders in own.items():
        folder = project / "data" / "results" / study
        folder.mkdir(exist_ok=True)
        pd.DataFrame({"folder": list(folders)}).to_csv(folder / "specialists.csv", index=False)
    told = [publish._lent(project / "data" / "results" / study) for study in own]
    assert told == ["", ", specialists of big", ", specialists of big", ""]


def test_merges_of_the_same_specialists_are_told_once(project):
    big = project / "data" / "results" / "big"
    other = shutil.copytree(big, big.parent / "big_rules")
    ties = pd.read_csv(big / "summary.csv").assign(method="ties")
    groups = pd.read_csv(big / "groups.csv").query("arm == 'default'").assign(method="ties")
    for name, more in {"summary": ties, "groups": groups}.items():
        pd.concat([pd.read_csv(other / f"{name}.csv"), more]).to_csv(other / f"{name}.csv")

    def told():
        rows = [row.split(" | ") for row in publish._loss_table({"big": big, "rules": other})]
        return [(row[0].strip("| "), row[1]) for row in rows if len(row) > 2][2:]

    assert told() == [("big", "LA"), ("rules", "TIES")]
    pd.DataFrame({"folder": ["trained-anew"]}).to_csv(other / "specialists.csv")
    assert told() == [("big", "LA"), ("rules", "LA"), ("rules", "TIES")]


def test_a_rerun_is_held_to_the_committed_scores(project, monkeypatch):
    sizes = {"TEST_EXAMPLES": 50, "DEV_EXAMPLES": 20}
    monkeypatch.setattr(publish, "profiles", lambda: {"big": sizes})
    monkeypatch.setattr(publish, "REPRODUCED", project / "reproduced.csv")
    losses = pd.DataFrame({"merge": ["a+b|linear"] * 2 + ["a+c|linear"] * 2, "task": list("abac")})
    losses["score"], losses["nll"] = [0.5, 0.8, 1.0, 0.0], 0.25
    losses.to_csv(project / "data" / "results" / "big" / "losses.csv", index=False)
    again = project / "again"
    again.mkdir()
    with pytest.raises(ValueError, match="no tasks.csv in .*again"):
        publish.compare("big", again)
    ran = {"status": "finished", "machine": "2 cores", "threads": 1, "started": "2026-01-02T03"}
    (again / "manifest.jsonl").write_text(json.dumps(ran | {"revision": "abc"}) + "\n")

    def rerun(*scores):
        # the second run has other merges as well: they are not compared
        more = pd.DataFrame({"merge": ["x+y|ties"], "task": ["x"], "score": [0.1], "nll": 9})
        both = pd.concat([losses.assign(score=scores, nll=[0.25, 0.25, 0.25, 0.2503]), more])
        both.to_csv(again / "losses.csv", index=False)
        return publish.compare("big", again)

    told = rerun(0.5, 0.6, 1.0, 0.04)  # 0.2 is 2.2 standard errors
    assert told[["tasks", "cells", "equal", "beyond"]].tolist() == [3, 4, 2, 0]
    assert told[["largest", "largest_nll"]].tolist() == pytest.approx([0.2, 0.0003])
    with pytest.raises(ValueError, match="1 of 4 scores lie more than three standard errors"):
        rerun(0.5, 0.8, 0.7, 0.0)  # 0.3 is 4.6 standard errors
    assert len(pd.read_csv(publish.REPRODUCED)) == 2
    first = publish._reproduced_table()[-2]
    assert first.startswith("| big: merges, 3 tasks | 4 | 2 | 0 | 0.0003 | 2026-01-02 | 2 cores, 1")
    losses.assign(merge="z").to_csv(again / "losses.csv", index=False)
    with pytest.raises(ValueError, match="have no score in common"):
        publish.compare("big", again)

    (again / "losses.csv").unlink()  # a run that has merged nothing yet
    own = pd.DataFrame({"task": ["a", "b"], "base": 0.0, "specialist": [0.5, 1.0]})
    own.to_csv(project / "data" / "results" / "big" / "tasks.csv", index=False)
    own.assign(specialist=[0.55, 1.0]).to_csv(again / "tasks.csv", index=False)
    told = publish.compare("big", again)
    assert told[["scored", "tasks", "cells", "equal"]].tolist() == ["base and specialists", 2, 4, 3]
    (again / publish.TAKEN).write_text('{"big": {"merges": 4}}')
    with pytest.raises(ValueError, match="took scores from committed tables"):
        publish.compare("big", again)


def test_a_manifest_names_what_a_study_was_made_of_but_no_path(project, monkeypatch):
    rows = [{"id": i, "prompt": i, "answers": ["x"], "options": []} for i in "abcd"]
    splits = DatasetDict({part: Dataset.from_list(rows) for part in tasks.SPLITS})
    asked = {}
    monkeypatch.setattr(
        tasks,
        "load_tasks",
        lambda names, **settings: (
            asked.update(settings) or {"sst2": tasks.Task("glue:sst2", "exact_match", splits)}
        ),
    )
    monkeypatch.setattr(assets, "base_info", lambda name: {"name": name, "digest": "d"})
    sizes = {f"{part}_EXAMPLES": n for n, part in enumerate(("MORE", "DEV", "PROBE", "TEST"))}
    folder = project / "glue"
    folder.mkdir()
    settings = {"MODEL": "tiny", "TASKS": ["glue:sst2"], "SPLIT_SEED": 7} | sizes
    settings |= {"SOURCES": {"glue": "nyu-mll/glue"}}
    monkeypatch.setattr(publish, "profiles", lambda: {"big": settings})
    ran = dict.fromkeys(publish.RUN_FIELDS, "told") | {
        "parameters": {"SOURCES": {"glue": str(folder)}}
    }
    monkeypatch.setattr(publish, "finished", lambda results: {"01_x": ran | {"key": "secret"}})

    publish.write_manifest("big", project)
    text = (project / "data" / "results" / "big" / "manifest.json").read_text()
    told = json.loads(text)
    assert told["parameters"]["SOURCES"]["glue"].startswith("a local folder, sha256 ")
    assert str(project) not in text and "secret" not in text
    assert told["tasks"]["sst2"]["probe"] == list("abcd")
    assert set(told["tasks"]["sst2"]["splits"]) == set(tasks.SPLITS)
    assert asked == {"sizes": [0, 1, 2, 3], "seed": 7, "sources": {"glue": str(folder)}}
    assert told["base"]["digest"] == "d" and told["runs"]["01_x"]["machine"] == "told"

    assert told["taken"] == {}
    # it went on from a committed part
    (project / publish.TAKEN).write_text('{"small": {"merges": 3}}')
    publish.write_manifest("big", project)

    publish.write_manifest("big")  # nothing ran: what was known of earlier runs is kept
    told = json.loads((project / "data" / "results" / "big" / "manifest.json").read_text())
    assert told["taken"] == {"small": {"merges": 3}}
    assert told["parameters"]["SOURCES"] == {"glue": "nyu-mll/glue"} and "01_x" in told["runs"]


def test_only_a_finished_run_is_published_and_only_committed_tables_recomputed(
    project, monkeypatch
):
    monkeypatch.setattr(publish, "profiles", lambda: {"big": {}})
    with pytest.raises(ValueError, match="no notebook is finished in data/runs/big"):
        publish.publish("big")
    with pytest.raises(ValueError, match="unknown profile"):
        publish.publish("bgi")
    with pytest.raises(ValueError, match="no tables in data/results/small"):
        publish.recompute("small")


def test_tables_agree_to_nine_digits(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0 + 1e-12), ("c", 1.001)):
        pd.DataFrame({"x": [value], "word": ["y"]}).to_csv(tmp_path / f"{name}.csv", index=False)
    for name, share in (("d", 0.500), ("e", 0.501), ("f", 0.51)):
        pd.DataFrame({"x": [1.0], "share": share}).to_csv(tmp_path / f"{name}.csv", index=False)
    assert publish._same(tmp_path / "d.csv", tmp_path / "e.csv")  # where a search ends
    assert not publish._same(tmp_path / "d.csv", tmp_path / "f.csv")
    assert publish._same(tmp_path / "a.csv", tmp_path / "b.csv")
    assert not publish._same(tmp_path / "a.csv", tmp_path / "c.csv")
    assert not publish._same(tmp_path / "none.csv", tmp_path / "a.csv")


def test_a_large_picture_is_made_lighter_once():
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(0, 255, (200, 300, 3), np.uint8), 2, axis=0)
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, "PNG")
    data = {"image/png": base64.b64encode(whole.getvalue()).decode()}
    cell = new_code_cell("draw()", outputs=[new_output("display_data", data)])
    once = publish.normalised(new_notebook(cells=[cell]))
    light = once.cells[0].outputs[0].data["image/png"]
    assert len(light) < len(data["image/png"]) / 2
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(light))).convert("RGB"), int)
    assert seen.shape == pixels.shape and np.abs(seen - pixels).mean() < 25
    assert publish.normalised(once).cells[0].outputs[0].data["image/png"] == light
