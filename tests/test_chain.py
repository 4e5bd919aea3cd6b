"""The whole chain on the smallest profile, with the real model and real tasks."""

import html

import pytest

from helpers import run
from helpers.store import read_jsonl, store

pytestmark = pytest.mark.chain


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of `smoke`, computed from nothing."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGING_COLLAPSE_STORE", str(folder / "store"))
        yield run.run("smoke", parameters={"RESULTS": str(folder / "results")})


def rerun(results, only=None, **parameters):
    """Run again into the same folder; the manifest rows that this adds."""
    before = read_jsonl(results / "manifest.jsonl")
    run.run("smoke", only, parameters={"RESULTS": str(results), **parameters})
    return read_jsonl(results / "manifest.jsonl")[len(before) :]


def test_every_notebook_finishes_and_leaves_its_results(results):
    finished = run.finished(results)
    assert list(finished) == [notebook.name for notebook in run.notebooks()]
    assert list((results / "figures").glob("*.png"))
    page = html.unescape((results / "index.html").read_text())
    assert all(notebook.question in page for notebook in run.notebooks())


def test_a_second_run_does_nothing(results):
    assert rerun(results) == []


def test_an_altered_parameter_recomputes_only_what_depends_on_it(results):
    """With fewer merge rules nothing is trained or visited anew; the notebook's tables follow."""
    steps = {path for path in store().glob("*/*") if path.is_dir()}
    (row,) = rerun(results, only=["02"], RULES=["linear"])
    assert row["notebook"] == "02_merge" and row["status"] == "finished"
    assert row["parameters"]["PROFILE"] == "smoke"
    assert {path for path in store().glob("*/*") if path.is_dir()} == steps
    assert "ties" not in (results / "losses.csv").read_text()
    # 07 reads 01 alone
    fresh = ["00_start_here", "01_finetune", "02_merge", "07_rerun"]
    assert list(run.finished(results)) == fresh
