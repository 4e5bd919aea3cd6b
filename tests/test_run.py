"""The runner on toy notebooks: what is asked is checked, what is seen is finished."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import nbformat
import pytest

from helpers import merge
from helpers import store as records
from helpers.__main__ import main
from helpers.run import chain as run
from helpers.run import page, publish
from helpers.study import assets

NOTEBOOKS = """
[[notebook]]
name = "01_make"
question = "How are the numbers made?"
needs = []
produces = ["numbers.csv"]
keeps = ["scratch.txt"]

[[notebook]]
name = "02_read"
question = "What do they add up to?"
needs = ["01_make"]
produces = []
"""

PROFILES = """
[demo]
about = "toy"
N = 3
RATE = 0.5
WORDS = ["a", "b"]
FAIL = ""
THREADS = 2

[tiny]
N = 1
"""

MAKE = [
    """
    N = 3  # how many numbers
    RATE: float = 0.5  # factor
    WORDS = ["a", "b"]
    FAIL = ""  # how to fail
    PROFILE = "demo"
    RESULTS = "data/runs/demo"
    """,
    """
    import json, os, time
    from pathlib import Path
    from helpers import merge
from helpers import store as records
    folder = Path.cwd() / RESULTS
    (folder / "numbers.csv").write_text("".join(f"{i * RATE}\\n" for i in range(N)))
    (folder / "scratch.txt").write_text("not for others")
    folder
    """,
    """
    if FAIL == "raise":
        raise RuntimeError("broken on purpose")
    if FAIL == "die":
        os._exit(9)
    if FAIL == "quit":
        raise SystemExit
    if FAIL == "sleep":
        time.sleep(60)
    """,
    """
    result = {"name": f"count of {PROFILE}", "value": N, "unit": "numbers", "n": N}
    if FAIL != "silent":
        records.write_record(folder / "record_01.json", [result])
    print("threads", os.environ["OMP_NUM_THREADS"], "words", WORDS, type(RATE).__name__)
    """,
]

READ = [
    """
    PROFILE = "demo"
    RESULTS = "data/runs/demo"
    """,
    """
    from pathlib import Path
    from helpers import merge
from helpers import store as records
    total = sum(map(float, (Path(RESULTS) / "numbers.csv").read_text().split()))
    result = {"name": "sum", "value": total, "unit": "1", "n": 3}
    records.write_record(Path(RESULTS) / "record_02.json", [result]) and None
    """,
]


def write(path, sources, tags=("parameters",)):
    cells = [nbformat.v4.new_markdown_cell(f"# {path.stem}")]
    for i, source in enumerate(sources):
        cells.append(nbformat.v4.new_code_cell(textwrap.dedent(source).strip()))
        if i < len(tags):
            cells[-1].metadata["tags"] = [tags[i]]
    for i, cell in enumerate(cells):
        cell.id = f"cell{i}"
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(book, path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two small notebooks, and nothing of the real one but the helpers."""
    for name in ("data", "notebooks"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "notebooks.toml").write_text(NOTEBOOKS)
    (tmp_path / "data" / "profiles.toml").write_text(PROFILES)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "README.md").write_text("\n".join(["# Toy", *publish.MARKS, "End"]))
    write(tmp_path / "notebooks" / "01_make.ipynb", MAKE)
    write(tmp_path / "notebooks" / "02_read.ipynb", READ)
    for module in (records, run, publish):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def stdout_of(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.text for c in cells for o in c.get("outputs", []) if o.get("name") == "stdout")


# --- the request, checked before anything runs: these tests start no kernel -----------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dmeo"], "unknown profile 'dmeo'; did you mean demo?"),
        (["zzz"], "unknown profile 'zzz'; there are demo, tiny"),
        (["demo", "--only", "03"], "unknown notebook '03'"),
        (["demo", "--only", "02_raed"], "did you mean 02_read?"),
        (["demo", "-p", "RAET", "1"], "unknown parameter 'RAET'; did you mean RATE?"),
        (["demo", "-p", "rate", "1"], "unknown parameter 'rate'; did you mean RATE?"),
        (["demo", "--only", "02", "-p", "N", "4"], "unknown parameter 'N'"),
        (["demo", "-p", "N", "2.0"], "N takes an integer, as in 3; got 2.0"),
        (["demo", "-p", "N", "true"], "N takes an integer, as in 3; got True"),
        (["demo", "-p", "N", "many"], "N takes an integer, as in 3; got 'many'"),
        (["demo", "-p", "RATE", "fast"], "RATE takes a number"),
        (["demo", "-p", "WORDS", "a,b"], "WORDS takes a list"),
        (["demo", "-p", "WORDS", "['a', 3]"], "each of WORDS takes text, as in 'a'; got 3"),
        (["demo", "-p", "RATE", "1e999"], "is inf"),
        (["demo", "-p", "RESULTS", "data/results/demo"], "RESULTS may not lie in data/results"),
        (["demo", "-p", "RESULTS", "data/runs/../results"], "RESULTS may not lie in data/results"),
        (["demo", "-p", "PROFILE", "tiny"], "PROFILE is set by the runner"),
        (
            ["demo", "--only", "02"],
            "02_read reads what 01_make writes, and 01_make is not finished",
        ),
    ],
)
def test_bad_requests_are_one_sentence_and_exit_code_2(project, capsys, arguments, sentence):
    assert main(["run", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and sentence in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (project / "data" / "runs").exists()


def test_a_needed_notebook_that_was_run_otherwise_is_refused(project, monkeypatch):
    monkeypatch.setattr(run, "finished", lambda results: {"01_make": {"parameters": {"N": 3}}})
    step = run.plan("demo", ["02"], {})[0]
    for parameters in ({"N": 3, "PROFILE": "x"}, {}):
        run._check_needs([step._replace(parameters=parameters)], project)
    with pytest.raises(ValueError, match="01_make was run with N = 3, 02_read is asked for N = 4"):
        run._check_needs([step._replace(parameters={"N": 4})], project)


def test_a_model_edited_in_place_and_no_stray_file_changes_the_key(project):
    folder = project / "model"
    folder.mkdir()
    (folder / "weights").write_text("1")
    (step, _) = run.plan("demo", None, {"WORDS": ["model", "a"]})
    before, around = run._key(step, "", {}), run._surroundings()
    (project / "data" / ".DS_Store").write_text("x")
    assert (run._key(step, "", {}), run._surroundings()) == (before, around)
    (folder / "weights").write_text("22")
    assert run._key(step, "", {}) != before


def test_unknown_arguments_are_refused(project, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "demo", "--onyl", "02"])
    assert stop.value.code == 2 and "--onyl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("1e-3", 0.5, 1e-3),
        ("2", 0.5, 2),
        ("true", False, True),
        ("False", True, False),
        ("007", "base", "007"),
        ("true", "base", "true"),
        ("'a b'", "base", "a b"),
        ('["a", "c"]', ["a"], ["a", "c"]),
        ("-1", 3, -1),
    ],
)
def test_typed_text_is_read_after_the_default(text, default, value):
    parsed = run.parse(text, default)
    assert parsed == value and type(parsed) is type(value)


def test_values_take_the_type_of_the_default():
    assert run.conform("RATE", 2, 0.5) == 2.0 and type(run.conform("RATE", 2, 0.5)) is float
    assert run.conform("RATES", (1, 2.5), [0.5]) == [1.0, 2.5]
    for value, default in [(True, 0.5), (1, True), ("1", 1), (None, 1), ([1], 1)]:
        with pytest.raises(ValueError, match="X takes"):
            run.conform("X", value, default)


def test_a_profile_overrides_demo_and_parameters_override_a_profile(project):
    make, read = run.plan("tiny", None, {"RATE": 2})
    assert make.parameters["N"] == 1 and make.parameters["WORDS"] == ["a", "b"]
    assert make.parameters["RATE"] == 2.0 and type(make.parameters["RATE"]) is float
    assert read.parameters == {"PROFILE": "tiny, RATE = 2.0", "RESULTS": "data/runs/tiny"}
    assert run.plan("tiny", ["02"], {"RESULTS": "elsewhere"})[0].parameters == {
        "PROFILE": "tiny",
        "RESULTS": "elsewhere",
    }


def test_a_profile_may_be_like_another(project):
    path = project / "data" / "profiles.toml"
    path.write_text(PROFILES + "RATE = 2.0\n[again]\nlike = 'tiny'\nN = 7\n")
    known = run.profiles()
    assert known["again"] == known["demo"] | {"N": 7, "RATE": 2.0}
    third = "[third]\nlike = 'again'\nN = 8\n"
    path.write_text(PROFILES + "RATE = 2.0\n[again]\nlike = 'tiny'\nN = 7\n" + third)
    assert run.profiles()["third"] == known["again"] | {"N": 8}
    path.write_text(PROFILES + "like = 'dem'\n")
    with pytest.raises(ValueError, match=r"'dem'; did you mean demo\?"):
        run.profiles()


def test_a_misspelt_name_in_a_profile_is_refused(project):
    path = project / "data" / "profiles.toml"
    path.write_text(PROFILES + "RATTE = 1.0\n")
    with pytest.raises(ValueError, match=r"in profile 'tiny': 'RATTE'; did you mean RATE\?"):
        run.plan("tiny", None, {})


@pytest.mark.parametrize(
    ("cells", "tags", "sentence"),
    [
        (["A = 1"], [], "0 cells tagged 'parameters'"),
        (["A = 1", "B = 1"], ["parameters"] * 2, "2 cells tagged 'parameters'"),
        (["A = 1\nB = A + 1"], ["parameters"], "line 2 of the parameters cell"),
        (["import os"], ["parameters"], "line 1 of the parameters cell"),
        (["A = B = 1"], ["parameters"], "line 1 of the parameters cell"),
    ],
)
def test_only_literals_may_be_declared(tmp_path, cells, tags, sentence):
    write(tmp_path / "x.ipynb", cells, tags)
    with pytest.raises(ValueError, match=sentence):
        run.declared(tmp_path / "x.ipynb")


def test_declared_reads_lists_annotations_and_second_equals_signs(tmp_path):
    write(tmp_path / "x.ipynb", ['A: int = -1  # a = b\nB = [\n    "x=1",\n]\nC = None\n'])
    assert run.declared(tmp_path / "x.ipynb") == {"A": -1, "B": ["x=1"], "C": None}


# --- the forecast ---------------------------------------------------------------------------------


def said(capsys, profile, only=None, parameters=None):
    run._say_plan(profile, run.plan(profile, only, parameters or {}))
    return capsys.readouterr().out


def test_a_profile_that_nobody_measured_gets_a_forecast(monkeypatch, capsys):
    minutes, known = {"demo": run.costs()["demo"]}, run.profiles()["loras"]
    monkeypatch.setattr(run, "costs", lambda: minutes)
    measured = said(capsys, "demo")
    assert "Expected: " in measured and "Forecast" not in measured
    both, first, second = (said(capsys, "loras", only) for only in (None, ["01"], ["02", "03"]))
    assert "Forecast for 01 and 02: " in both and "Expected" not in both
    assert f"({len(known['TASKS'])} specialists " in both and " merges " in both
    assert "Forecast for 01: " in first and "specialists" in first and "merges" not in first
    assert "Forecast for 02: " in second and "specialists" not in second and "merges" in second
    asked = {"GROUP_SIZES": [5], "SWAPS": 1}
    assert " 5 swaps " in said(capsys, "loras", ["02"], asked)
    twice = said(capsys, "loras", ["01"], {"MORE_EXAMPLES": known["TRAIN_EXAMPLES"] + 1})
    assert "second tries" in twice and "second tries" not in second
    assert "Forecast" not in said(capsys, "loras", ["03"])


def test_without_the_tables_of_the_demo_there_is_no_forecast(project, capsys):
    assert said(capsys, "tiny") == "Profile tiny: 01_make, 02_read\n"


# --- running --------------------------------------------------------------------------------------


def test_the_chain_runs_once_and_again_only_where_something_changed(project, capsys):
    results = run.run("demo", parameters={"RATE": 1})
    assert results == project / "data" / "runs" / "demo"
    assert json.loads((results / "record_02.json").read_text())[0]["value"] == 3.0
    text = stdout_of(results / "notebooks" / "01_make.ipynb")
    assert text == "threads 2 words ['a', 'b'] float\n"
    made, read = records.read_jsonl(results / "manifest.jsonl")
    assert made["status"] == read["status"] == "finished"
    assert made["parameters"]["RATE"] == 1.0 and made["peak_gb"] > 0.05
    assert set(made["outputs"]) == {"numbers.csv", "scratch.txt", "record_01.json"}
    assert made["outputs"]["numbers.csv"] == records.digest(results / "numbers.csv")
    assert made["versions"]["torch"] and "cores" in made["machine"]
    shown = (results / "index.html").read_text()
    assert "What do they add up to?" in shown and "count of demo, RATE = 1.0" in shown
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}

    capsys.readouterr()
    run.run("demo", parameters={"RATE": 1.0})
    assert "Nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in results.rglob("*")}

    # prose of the second notebook only: the first is left alone
    path = project / "notebooks" / "02_read.ipynb"
    path.write_text(path.read_text().replace("# 02_read", "# 02_read, again"))
    run.run("demo", parameters={"RATE": 1})
    rows = records.read_jsonl(results / "manifest.jsonl")
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
        ("silent", "01_make ran but did not write record_01.json"),
    ],
)
def test_a_notebook_that_does_not_end_is_not_finished(project, capsys, fail, sentence):
    assert main(["run", "demo", "-p", "FAIL", fail]) == 1
    assert f"error: {sentence}" in capsys.readouterr().err
    results = project / "data" / "runs" / "demo"
    assert run.finished(results) == {} and not (results / "index.html").exists()
    assert [p.name for p in (results / "notebooks").iterdir()] == ["01_make.part.ipynb"]
    (row,) = records.read_jsonl(results / "manifest.jsonl")
    assert row["status"] == "failed" and sentence in row["error"]


RUN_TOY = """
import sys
from pathlib import Path
from helpers.run import chain as run
run.ROOT = Path(sys.argv[1])
run.run("demo", parameters={"FAIL": sys.argv[2]})
"""


def test_a_killed_run_leaves_nothing_finished_and_only_one_may_run(project, capsys):
    run.run("tiny", parameters={"RESULTS": "data/runs/demo"})  # what an earlier run finished
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


# --- what is committed ----------------------------------------------------------------------------


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


SHOW = """
[[notebook]]
name = "00_show"
question = "What was found?"
needs = []
produces = []
"""


def test_refresh_writes_the_same_notebooks_and_tables_twice(project, monkeypatch):
    """The first notebook shows committed tables, which the first refresh has yet to write."""
    monkeypatch.setattr(publish, "write_manifest", lambda *_: None)  # a toy has no tasks
    parameters = "FINDINGS = 'data/results/demo'\nRESULTS = 'data/runs/demo'"
    body = READ[1].replace('(RESULTS) / "num', '(FINDINGS) / "num').replace("_02", "_00")
    write(project / "notebooks" / "00_show.ipynb", [parameters, body, "print(total)"])
    (project / "data" / "notebooks.toml").write_text(SHOW + NOTEBOOKS)
    (project / ".gitignore").write_text("data/runs/\n")
    git(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "toy")
    publish.refresh("demo")
    path = project / "notebooks" / "01_make.ipynb"
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4]
    assert [cell.source for cell in code] == [textwrap.dedent(source).strip() for source in MAKE]
    assert code[0].metadata == {"tags": ["parameters"]} and code[1].metadata == {}
    assert "papermill" not in path.read_text() and "iopub" not in path.read_text()
    tables = project / "data" / "results" / "demo"
    names = {"numbers.csv", "record_00.json", "record_01.json", "record_02.json"}
    assert {p.name for p in tables.iterdir()} == names
    minutes = json.loads((project / "data" / "results" / "minutes.json").read_text())
    assert set(minutes["demo"]["minutes"]) == {"00_show", "01_make", "02_read"}
    rows = run.finished(project / "data" / "runs" / "demo").values()
    assert {row["revision"] for row in rows} == {minutes["demo"]["revision"]}
    assert not minutes["demo"]["revision"].endswith("dirty")
    assert "[01_make](notebooks/01_make.ipynb) | How are the numbers made? | 0." in publish.readme()
    assert (project / "README.md").read_text() == publish.readme()

    with pytest.raises(ValueError, match=r"files are not committed"):
        publish.refresh("demo")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "refreshed")
    publish.refresh("demo", reuse=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True
    )
    assert changed.stdout == ""


def test_normalised_drops_what_differs_between_runs():
    v4 = nbformat.v4
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "IntSlider()"}
    cell = v4.new_code_cell(
        "x",
        execution_count=7,
        metadata={"tags": ["keep"], "papermill": {"duration": 1}, "execution": {}},
        outputs=[
            v4.new_output("stream", name="stderr", text="10%"),
            v4.new_output("stream", name="stdout", text="2"),
            v4.new_output("display_data", data=widget),
            v4.new_output("execute_result", data={"text/plain": "3"}, execution_count=7),
        ],
    )
    injected = v4.new_code_cell("N = 1", metadata={"tags": ["injected-parameters"]})
    book = publish.normalised(v4.new_notebook(cells=[injected, cell], metadata={"widgets": {}}))
    (kept,) = book.cells
    assert kept.metadata == {"tags": ["keep"]} and kept.execution_count == 1
    assert [output.output_type for output in kept.outputs] == ["stream", "execute_result"]
    assert kept.outputs[1].execution_count == 1
    assert set(book.metadata) == {"kernelspec", "language_info"}


def test_the_page_shows_each_figure_with_its_words(tmp_path):
    (tmp_path / "figures").mkdir()
    told = {"caption": "Loss < 1", "alt": 'a "line"', "notebook": "01_make"}
    (tmp_path / "figures" / "loss.json").write_text(json.dumps(told))
    (tmp_path / "figures" / "loss.png").write_bytes(b"")
    other = told | {"notebook": "02_read", "caption": "not shown"}
    (tmp_path / "figures" / "other.json").write_text(json.dumps(other))
    result = {"name": "radius", "value": None, "unit": "1", "n": 2}
    bounded = {"name": "loss", "value": 0.123456, "unit": "1", "n": 2, "low": 0.1, "high": 0.2}
    records.write_record(
        tmp_path / "record_01.json", [result, bounded | {"interval": "95 %, bootstrap over pairs"}]
    )
    row = {
        "notebook": "01_make",
        "seconds": 90.0,
        "peak_gb": 1.25,
        "started": "2026",
        "revision": None,
    }
    row |= {"machine": "2 cores", "parameters": {"PROFILE": "demo"}}
    notebooks = [run.Notebook("01_make", "Why?", [], []), run.Notebook("02_read", "What?", [], [])]
    text = page.write_page(tmp_path, {"01_make": row}, notebooks).read_text()
    assert '<img src="figures/loss.png" alt="a &quot;line&quot;">' in text
    assert "Loss &lt; 1" in text and "not shown" not in text and "What?" not in text
    assert "<td>undefined</td>" in text
    assert "<td>0.1235</td>" in text and "0.1 to 0.2 (95 %, bootstrap over pairs)" in text
    shutil.rmtree(tmp_path / "figures")
    assert "<img" not in page.write_page(tmp_path, {"01_make": row}, notebooks).read_text()


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
    plan = run.plan("demo", None, {})
    steps = [step._replace(parameters=step.parameters | text) for step in plan]
    monkeypatch.setattr(run, "plan", lambda *_: steps)
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
    "error", [assets.AssetError, ValueError, FileNotFoundError, PermissionError]
)
def test_a_bad_merge_is_one_sentence_and_exit_code_2(monkeypatch, capsys, error):
    def refuse(argv, folder_of):
        raise error("there are no weights in x")

    monkeypatch.setattr(merge, "main", refuse)
    assert main(["merge"]) == 2
    assert capsys.readouterr().err == "error: there are no weights in x\n"


def test_the_machine_is_told_with_its_gpus(tmp_path):
    (tmp_path / "0000:01").mkdir()
    text = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 16\nDevice Minor: \t 0\n"
    (tmp_path / "0000:01" / "information").write_text(text)
    assert run._gpus(tmp_path) == ["NVIDIA H100 80GB HBM3"]
    assert run._gpus(tmp_path / "none") == []


def test_the_label_of_a_run_names_no_folder_of_this_machine(tmp_path):
    (step,) = run.plan("glue", ["01"], {"SOURCES": {"glue": str(tmp_path)}, "SEED": 3})
    told = step.parameters["PROFILE"]
    assert told == "glue, SEED = 3, SOURCES = {'glue': 'a local folder'}"
    assert step.parameters["SOURCES"] == {"glue": str(tmp_path)}
