"""Publishing: what is committed is the same on every run, and equal when it is computed again."""

import base64
import io
import json
import subprocess
import textwrap

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from toy import MAKE, NOTEBOOKS, READ, write

from helpers import run
from helpers.run import normal, publish, readme


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True
    )


SHOW = """
[[notebook]]
name = "00_show"
question = "What was found?"
needs = []
produces = []
"""


def test_refresh_writes_the_same_notebooks_and_tables_twice(project):
    """The first notebook shows committed tables, which the first refresh has yet to write."""
    parameters = "FINDINGS = 'data/results/demo'\nRESULTS = 'data/runs/demo'"
    body = (
        READ[1]
        .replace("RESULTS", "FINDINGS")
        .replace("OUT", "RESULTS")
        .replace("sum.", "seen.")
    )
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
    assert [cell.source for cell in code] == [
        textwrap.dedent(source).strip() for source in MAKE
    ]
    assert code[0].metadata == {"tags": ["parameters"]} and code[1].metadata == {}
    assert "papermill" not in path.read_text() and "iopub" not in path.read_text()
    tables = project / "data" / "results" / "demo"
    names = {"numbers.csv", "count.csv", "sum.csv", "manifest.json"}
    assert {p.name for p in tables.iterdir()} == names
    minutes = json.loads((project / "data" / "results" / "minutes.json").read_text())
    assert set(minutes["demo"]["minutes"]) == {"00_show", "01_make", "02_read"}
    rows = run.finished(project / "data" / "runs" / "demo").values()
    assert {row["revision"] for row in rows} == {minutes["demo"]["revision"]}
    assert not minutes["demo"]["revision"].endswith("dirty")
    assert (
        "[01_make](notebooks/01_make.ipynb) | How are the numbers made? | 0."
        in readme.readme()
    )
    assert (project / "README.md").read_text() == readme.readme()

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
    widget = {
        "application/vnd.jupyter.widget-view+json": {},
        "text/plain": "IntSlider()",
    }
    kept_metadata = {"tags": ["keep"], "jupyter": {"source_hidden": True}}
    cell = v4.new_code_cell(
        "x",
        execution_count=7,
        metadata={
            "tags": ["keep"],
            "jupyter": {"source_hidden": True},
            "papermill": {"duration": 1},
            "execution": {},
        },
        outputs=[
            v4.new_output("stream", name="stderr", text="10%"),
            v4.new_output("stream", name="stdout", text="2"),
            v4.new_output("display_data", data=widget),
            v4.new_output(
                "execute_result", data={"text/plain": "3"}, execution_count=7
            ),
        ],
    )
    injected = v4.new_code_cell("N = 1", metadata={"tags": ["injected-parameters"]})
    book = normal.normalised(
        v4.new_notebook(cells=[injected, cell], metadata={"widgets": {}})
    )
    (kept,) = book.cells
    assert kept.metadata == kept_metadata
    assert kept.execution_count == 1
    assert [output.output_type for output in kept.outputs] == [
        "stream",
        "execute_result",
    ]
    assert kept.outputs[1].execution_count == 1
    assert set(book.metadata) == {"kernelspec", "language_info"}


def test_a_study_is_computed_again_from_its_tables(project, capsys):
    tables = project / "data" / "results" / "demo"
    with pytest.raises(ValueError, match="no tables in data/results/demo"):
        publish.recompute("demo")
    with pytest.raises(ValueError, match="no notebook is finished in data/runs/demo"):
        publish.publish("demo")
    tables.mkdir(parents=True)
    (tables / "numbers.csv").write_text("2\n5\n")
    (tables / "sum.csv").write_text("sum\n7.0000000000001\n")
    out = publish.recompute("demo")
    assert "Equal to data/results/demo: sum.csv" in capsys.readouterr().out
    assert not (out / "numbers.csv").exists()  # what makes numbers is not run
    (tables / "numbers.csv").write_text("2\n6\n")
    with pytest.raises(ValueError, match="holds other values of sum.csv"):
        publish.recompute("demo")
    publish.recompute("demo", write=True)
    assert (tables / "sum.csv").read_text() == "sum\n8.0\n"


def test_the_readme_holds_the_numbers_that_it_names(project, monkeypatch):
    path = project / "README.md"
    findings = pd.DataFrame({"name": ["loss.linear"], "text": ["-29 %"]})
    monkeypatch.setattr(readme, "found", {"findings": findings}.get)
    path.write_text(
        "Lost <!-- loss.linear -->0<!-- / -->.\n<!-- table: notebooks -->\n<!-- / -->\n"
    )
    readme.write_readme()
    text = path.read_text()
    assert "Lost <!-- loss.linear -->-29 %<!-- / -->." in text
    assert (
        "| [01_make](notebooks/01_make.ipynb) | How are the numbers made? | – | – |"
        in text
    )
    assert readme.readme() == text
    path.write_text("<!-- loss.lniear -->0<!-- / -->")
    with pytest.raises(ValueError, match="names 'loss.lniear', which no table holds"):
        readme.readme()


def test_tables_agree_to_nine_digits(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0 + 1e-12), ("c", 1.001)):
        pd.DataFrame({"x": [value], "word": ["y"]}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    assert publish.same(tmp_path / "a.csv", tmp_path / "b.csv")
    assert not publish.same(tmp_path / "a.csv", tmp_path / "c.csv")
    assert not publish.same(tmp_path / "none.csv", tmp_path / "a.csv")


def test_a_large_picture_is_made_lighter_once():
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(0, 255, (200, 300, 3), np.uint8), 2, axis=0)
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, "PNG")
    data = {"image/png": base64.b64encode(whole.getvalue()).decode()}
    cell = new_code_cell("draw()", outputs=[new_output("display_data", data)])
    once = normal.normalised(new_notebook(cells=[cell]))
    light = once.cells[0].outputs[0].data["image/png"]
    assert len(light) < len(data["image/png"]) / 2
    seen = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(light))).convert("RGB"), int
    )
    assert seen.shape == pixels.shape and np.abs(seen - pixels).mean() < 25
    assert normal.normalised(once).cells[0].outputs[0].data["image/png"] == light
