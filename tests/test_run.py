"""The runner on toy notebooks: what is seen is finished, what is finished is not run again."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest

from helpers import merge, run, store
from helpers.__main__ import main
from helpers.run import execute, page, profiles
from helpers.study import archives


def stdout_of(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(
        o.text for c in cells for o in c.get("outputs", []) if o.get("name") == "stdout"
    )


def test_the_chain_runs_once_and_again_only_where_something_changed(project, capsys):
    results = run.run("demo", parameters={"RATE": 1})
    assert results == project / "data" / "runs" / "demo"
    assert (results / "sum.csv").read_text() == "sum\n3.0\n"
    text = stdout_of(results / "notebooks" / "01_make.ipynb")
    assert text == "threads 2 PASSIVE\nwords ['a', 'b'] float\n"
    made, read = store.read_jsonl(results / "manifest.jsonl")
    assert made["status"] == read["status"] == "finished"
    assert made["parameters"]["RATE"] == 1.0 and made["peak_gb"] > 0.05
    assert set(made["outputs"]) == {"numbers.csv", "scratch.txt", "count.csv"}
    assert made["outputs"]["numbers.csv"] == store.digest(results / "numbers.csv")
    assert made["versions"]["torch"] and "cores" in made["machine"]
    shown = (results / "index.html").read_text()
    assert "What do they add up to?" in shown and "RATE = 1.0" in shown
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}

    capsys.readouterr()
    run.run("demo", parameters={"RATE": 1.0})
    assert "Nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in results.rglob("*")}

    # prose of the second notebook only: the first is left alone
    path = project / "notebooks" / "02_read.ipynb"
    path.write_text(path.read_text().replace("# 02_read", "# 02_read, again"))
    run.run("demo", parameters={"RATE": 1})
    rows = store.read_jsonl(results / "manifest.jsonl")
    assert [row["notebook"] for row in rows] == ["01_make", "02_read", "02_read"]

    # a table that was touched is made again
    (results / "numbers.csv").write_text("9\n")
    assert "01_make" not in run.finished(results)
    run.run("demo", only=["01"], parameters={"RATE": 1})
    assert (results / "numbers.csv").read_text() == "0.0\n1.0\n2.0\n"

    # and so is a file that is not published
    (results / "scratch.txt").unlink()
    assert "01_make" not in run.finished(results)
    assert not list(project.glob("kernel-*"))


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        (
            "raise",
            '01_make failed in In [4] (raise RuntimeError("broken on purpose")): RuntimeError',
        ),
        ("die", "01_make stopped: its kernel was killed"),
        ("quit", "01_make stopped before its end, at cell 6"),
        ("silent", "01_make ran but did not write count.csv"),
    ],
)
def test_a_notebook_that_does_not_end_is_not_finished(project, capsys, fail, sentence):
    assert main(["run", "demo", "-p", "FAIL", fail]) == 1
    assert f"error: {sentence}" in capsys.readouterr().err
    results = project / "data" / "runs" / "demo"
    assert run.finished(results) == {} and not (results / "index.html").exists()
    assert [p.name for p in (results / "notebooks").iterdir()] == ["01_make.part.ipynb"]
    (row,) = store.read_jsonl(results / "manifest.jsonl")
    assert row["status"] == "failed" and sentence in row["error"]


RUN_TOY = """
import sys
from pathlib import Path
from helpers.run import chain, execute, keys, profiles
for module in (chain, execute, keys, profiles):
    module.ROOT = Path(sys.argv[1])
chain.run("demo", parameters={"FAIL": sys.argv[2]})
"""


def test_a_killed_run_leaves_nothing_finished_and_only_one_may_run(project, capsys):
    # what an earlier run finished
    run.run("tiny", parameters={"RESULTS": "data/runs/demo"})
    results = project / "data" / "runs" / "demo"
    runner = subprocess.Popen([sys.executable, "-c", RUN_TOY, str(project), "sleep"])
    part = results / "notebooks" / "01_make.part.ipynb"
    while not part.exists():
        time.sleep(0.1)
        assert runner.poll() is None
    with pytest.raises(ValueError, match="another run is writing"):
        run.run("demo")
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    assert run.finished(results) == {} and not (results / "index.html").exists()
    assert [p.name for p in (results / "notebooks").iterdir()] == ["01_make.part.ipynb"]
    run.run("demo")
    assert set(run.finished(results)) == {"01_make", "02_read"} and not part.exists()


def test_a_page_that_only_reads_tables_takes_the_committed_ones(
    project, capsys, monkeypatch
):
    tables = project / "data" / "results" / "demo"
    tables.mkdir(parents=True)
    (tables / "numbers.csv").write_text("2\n5\n")
    results = run.run("demo", ["02"])
    assert (results / "sum.csv").read_text() == "sum\n7.0\n"
    assert (
        "02_read reads the committed tables in data/results/demo"
        in capsys.readouterr().out
    )
    run.run("demo", ["02"])
    assert "Nothing to do" in capsys.readouterr().out
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # a user's own setting is kept
    run.run("demo")  # now there is a run of its own to read
    assert (results / "sum.csv").read_text() == "sum\n1.5\n"
    assert "threads 2 ACTIVE" in stdout_of(results / "notebooks" / "01_make.ipynb")


def test_the_page_shows_each_figure_with_its_words_and_the_verdicts(tmp_path):
    (tmp_path / "figures").mkdir()
    words = {"caption": "Loss < 1", "alt": 'a "line"', "notebook": "01_make"}
    (tmp_path / "figures" / "02_pair_losses.json").write_text(json.dumps(words))
    (tmp_path / "figures" / "02_pair_losses.png").write_bytes(b"")
    other = words | {"notebook": "02_read", "caption": "not shown"}
    (tmp_path / "figures" / "other.json").write_text(json.dumps(other))
    claim = {"claim": "it <falls>", "paper": "yes", "here": "no", "verdict": "open"}
    pd.DataFrame([claim]).to_csv(tmp_path / "verdicts.csv", index=False)
    row = {"notebook": "01_make", "seconds": 90.0, "peak_gb": 1.25, "started": "2026"}
    row |= {"revision": None, "machine": "2 cores", "parameters": {"PROFILE": "demo"}}
    books = [
        profiles.Notebook(name, f"{name}?", [], []) for name in ("01_make", "02_read")
    ]
    text = page.write_page(tmp_path, {"01_make": row}, books).read_text()
    assert 'src="figures/02_pair_losses.png" alt="a &#34;line&#34;"' in text
    assert "Loss &lt; 1" in text and "not shown" not in text and "02_read?" not in text
    assert text.index("Who harms whom?") < text.index("it &lt;falls&gt;")


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"MODEL": "no-such-model"}, "there is no model 'no-such-model'"),
        ({"MODEL": "{folder}"}, "has no weights"),
        ({"TASKS": ["glue:colla"]}, "unknown GLUE task 'colla'"),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_first_notebook(
    project, monkeypatch, parameters, told
):
    (project / "config.json").write_text("{}")
    text = json.loads(json.dumps(parameters).replace("{folder}", str(project)))
    plan = run.steps("demo", None, {})
    steps = [step._replace(parameters=step.parameters | text) for step in plan]
    monkeypatch.setattr(run.chain, "steps", lambda *_: steps)
    with pytest.raises(ValueError, match=told):
        run.run("demo")
    assert not (project / "data" / "runs" / "demo" / "manifest.jsonl").exists()


# --- the command line -----------------------------------------------------------------------------


def test_merge_gets_its_arguments_as_they_were_typed(monkeypatch):
    seen = []
    monkeypatch.setattr(merge, "main", lambda argv, folder_of: seen.append(argv))
    typed = ["--method", "ties", "--models", "a", "b", "--out", "c", "-p", "--help"]
    assert main(["merge", *typed]) == 0
    assert seen == [typed]


@pytest.mark.parametrize(
    "error", [archives.AssetError, ValueError, FileNotFoundError, PermissionError]
)
def test_a_bad_merge_is_one_sentence_and_exit_code_2(monkeypatch, capsys, error):
    def refuse(argv, folder_of):
        raise error("there are no weights in x")

    monkeypatch.setattr(merge, "main", refuse)
    assert main(["merge"]) == 2
    assert capsys.readouterr().err == "error: there are no weights in x\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "helpers", "list"]
    listing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listing.stdout.close()
    assert listing.stderr.read() == b""


def test_the_machine_is_told_with_its_gpus(tmp_path):
    (tmp_path / "0000:01").mkdir()
    text = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 16\nDevice Minor: \t 0\n"
    (tmp_path / "0000:01" / "information").write_text(text)
    assert execute._gpus(tmp_path) == ["NVIDIA H100 80GB HBM3"]
    assert execute._gpus(tmp_path / "none") == []


def test_tables_of_another_run_are_not_read(project):
    """What a page uses where it is there, is taken away where it is out of date."""
    listed = project / "data" / "notebooks.toml"
    uses = 'needs = []\nuses = ["01_make"]'
    listed.write_text(listed.read_text().replace('needs = ["01_make"]', uses))
    results = run.run("demo")
    assert (results / "sum.csv").read_text() == "sum\n1.5\n"
    (results / "notebooks" / "01_make.ipynb").unlink()
    with pytest.raises(execute.NotebookFailed, match="02_read failed"):
        run.run("demo", only=["02"])
    assert not (results / "numbers.csv").exists()
