"""Keys: an edit re-runs the notebooks whose imports reach it, and no other."""

import pytest
from toy import write

from helpers import run
from helpers.run import keys

ROOMS = {
    "store.py": "",
    "figures/__init__.py": "from helpers.store import digest",
    "figures/style.mplstyle": "",
    "merge/__init__.py": "from helpers.merge.rules import ties",
    "merge/rules.py": "def ties(): pass",
    "states/__init__.py": "",
    "states/read.py": "def read():\n    from helpers.merge import rules",
    "study/__init__.py": "import helpers.states.read",
    "study/tasks.py": "TASKS = 'tasks.toml'",
    "stats/__init__.py": "import numpy",
    "run/__init__.py": "from helpers.study import tasks",
}


@pytest.fixture
def rooms(project, monkeypatch):
    """Rooms that import one another, and a notebook for each of three doors."""
    for name, source in ROOMS.items():
        path = project / "helpers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(keys, "HELPERS", project / "helpers")
    (project / "data" / "tasks.toml").touch()
    return project / "helpers"


def reached(source):
    return {
        path.relative_to(keys.HELPERS).parts[0] for path in keys.reached_files(source)
    }


def test_rooms_are_reached_through_imports_at_any_depth(rooms):
    assert reached("from helpers.stats import dyads") == {"stats"}
    assert reached("from helpers import figures, run") == {"figures", "store.py"}
    assert reached("import helpers.study.tasks") == {"study", "states", "merge"}
    assert reached("def late():\n    from helpers import merge") == {"merge"}
    assert reached("import torch") == set()


@pytest.mark.parametrize(
    ("edited", "reruns"),
    [
        ("merge/rules.py", {"study"}),
        ("stats/__init__.py", {"stats"}),
        ("run/__init__.py", set()),
        ("run/publish.py", set()),
        ("figures/style.mplstyle", {"figures"}),
        ("store.py", {"figures"}),
        ("../data/tasks.toml", {"study"}),
        ("../data/profiles.toml", set()),
        ("../data/.DS_Store", set()),
        ("../requirements.txt", {"study", "stats", "figures"}),
    ],
)
def test_an_edit_changes_the_keys_of_those_that_reach_it(
    rooms, project, edited, reruns
):
    books = {}
    for room in ("study", "stats", "figures"):
        write(
            project / "notebooks" / f"{room}.ipynb",
            [f"from helpers import run, {room}"],
        )
        books[room] = run.profiles.Notebook(room, "", [], [])
    before = {room: keys.code_key(book) for room, book in books.items()}
    path = rooms / edited
    path.write_text((path.read_text() if path.exists() else "") + "\n# edited\n")
    after = {room: keys.code_key(book) for room, book in books.items()}
    assert {room for room in books if after[room] != before[room]} == reruns


def test_how_work_is_shared_changes_no_key_and_a_model_edited_in_place_does(project):
    folder = project / "model"
    folder.mkdir()
    (folder / "weights").write_text("1")
    step, _ = run.steps("demo", None, {"WORDS": ["model", "a"]})
    before = keys.key(step, {})
    shared = step._replace(parameters=step.parameters | {"WORKERS": 8})
    assert keys.key(shared, {}) == before
    other = step._replace(parameters=step.parameters | {"N": 8})
    assert keys.key(other, {}) != before
    (folder / "weights").write_text("22")
    assert keys.key(step, {}) != before


def test_the_real_rooms_are_reached():
    """A page of statistics must not depend on the code that merges."""
    source = "from helpers.stats import dyads"
    assert {path.parent.name for path in keys.reached_files(source)} == {"stats"}
