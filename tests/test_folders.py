"""A profile's name selects its tables; a folder of another profile is refused."""

import json

import pytest

from helpers.run import folders


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    return tmp_path


def finish(folder, profile):
    """A folder in which the runner has finished a notebook of this profile."""
    folder.mkdir(parents=True)
    row = {"notebook": "01_make", "parameters": {"PROFILE": profile}}
    (folder / "manifest.jsonl").write_text(json.dumps(row) + "\n")


def test_the_name_alone_selects_the_folder(root):
    assert folders.study_folder("demo") == root / "data/results/demo"
    finish(root / "data/runs/demo", "demo")
    assert folders.study_folder("demo", "", "runs") == root / "data/runs/demo"
    assert folders.study_folder("demo", "data/runs/new") == root / "data/runs/new"


def test_tables_of_another_profile_are_refused(root):
    finish(root / "data/runs/mine", "smoke")
    with pytest.raises(ValueError, match="holds the profile 'smoke', not 'demo'"):
        folders.study_folder("demo", "data/runs/mine")
    with pytest.raises(ValueError, match="holds the profile 'tasks14', not 'demo'"):
        folders.study_folder("demo", "data/results/tasks14")
