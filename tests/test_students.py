"""Student copies: the answers are gone, the checks are there and not yet satisfied."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers import run
from helpers.run import students
from helpers.store import ROOT

SOLVED = sorted(
    path
    for path in (ROOT / "notebooks").glob("*.ipynb")
    if '"solution"' in path.read_text(encoding="utf-8")
)


def test_a_solution_becomes_the_names_it_defines():
    solution = (
        "import math\nweights: list = [0.5]\na, b = 1, 2\n"
        "def area(r):\n    return math.pi * r"
    )
    cells = [
        new_code_cell(
            "x = 1", outputs=[new_output("stream", text="1")], execution_count=3
        ),
        new_code_cell(solution, metadata={"tags": ["solution"]}),
    ]
    plain, asked = students.student_copy(new_notebook(cells=cells)).cells
    assert (plain.source, plain.outputs, plain.execution_count) == ("x = 1", [], None)
    assert asked.source.splitlines()[1:] == [
        "weights = ...",
        "a = ...",
        "b = ...",
        "area = ...",
    ]
    assert cells[1].source == solution, "the original keeps its solution"


def test_a_page_that_is_only_read_keeps_its_outputs_but_the_solutions():
    output = new_output("stream", text="1")
    cells = [
        new_code_cell("x = 1", outputs=[output]),
        new_code_cell("y = x", outputs=[output], metadata={"tags": ["solution"]}),
    ]
    plain, asked = students.student_copy(
        new_notebook(cells=cells), only_read=True
    ).cells
    assert plain.outputs == [output]
    assert asked.outputs == [] and "y = ..." in asked.source


def test_there_are_exercises():
    assert len(SOLVED) >= 5


@pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
def test_no_copy_holds_an_answer_and_all_else_is_as_it_was(path):
    book = nbformat.read(path, as_version=4)
    copy = students.student_copy(book)
    for original, left in zip(book.cells, copy.cells, strict=True):
        if "solution" in original.metadata.get("tags", []):
            assert " = ..." in left.source and original.source not in left.source
        else:
            assert left.source == original.source
        assert not left.get("outputs")


def test_copies_are_written_for_all_notebooks(tmp_path):
    written = students.write_copies(tmp_path / "class")
    assert [p.name for p in written] == sorted(
        p.name for p in (ROOT / "notebooks").glob("*.ipynb")
    )
    shown = {path.stem for path in written if "outputs" in _keys(path)}
    assert {"01_finetune", "02_merge", "06_choose", "07_rerun"} <= shown
    assert not {"00_start_here", "04_bound", "05_statistics", "08_findings"} & shown


def _keys(path):
    cells = nbformat.read(path, as_version=4).cells
    return {key for cell in cells for key, value in cell.items() if value}


EVEN = {"is a whole number": lambda x: x == int(x), "is even": lambda x: x % 2 == 0}


@pytest.mark.parametrize("right", [4, -2, 6.0])
def test_any_right_answer_is_accepted(capsys, right):
    run.check(right, EVEN)
    assert capsys.readouterr().out == "right: 2 of 2\n"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (3, "1 of 2 hold; not yet: is even"),
        (float("nan"), "0 of 2 hold"),
        ("four", "0 of 2 hold"),
        (None, "0 of 2 hold"),
    ],
)
def test_a_wrong_answer_is_told_what_does_not_hold(wrong, told):
    with pytest.raises(AssertionError, match=told):
        run.check(wrong, EVEN)


@pytest.mark.parametrize("stub", [..., (2, ...)])
def test_a_stub_is_not_answered_yet(capsys, stub):
    run.check(stub, EVEN)
    assert capsys.readouterr().out == "not answered yet\n"
