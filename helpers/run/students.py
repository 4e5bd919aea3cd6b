"""How does a class get the notebooks without the answers? Copies whose exercises are left to do.

The notebooks are written with their solutions, in cells tagged `solution`, so that exercise, answer
and check are run together and cannot drift apart.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

from helpers.run.profiles import parameters
from helpers.store import ROOT, atomic_write

INSTRUCTION = "# Your answer; the next cell checks it."


def student_copy(book: Any, only_read: bool = False) -> Any:
    """The notebook without outputs, each solution replaced by the names that it has to define.

    A page that is `only_read` keeps the outputs of all its cells but the solutions.
    """
    book = nbformat.from_dict(book)
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        solution = "solution" in cell.metadata.get("tags", [])
        if solution:
            cell.source = stub(cell.source)
        if solution or not only_read:
            cell.update(outputs=[], execution_count=None)
    return book


def stub(solution: str) -> str:
    """`name = ...` for every variable and function that a solution defines, in their order."""
    names: list[str] = []
    for statement in ast.parse(solution).body:
        names += _defined(statement)
    lines = [f"{name} = ..." for name in dict.fromkeys(names)]
    return "\n".join([INSTRUCTION, *lines])


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    else:
        return []
    nodes = [node for target in targets for node in ast.walk(target)]
    return [node.id for node in nodes if isinstance(node, ast.Name)]


def write_copies(folder: Path) -> list[Path]:
    """Student copies of all notebooks, written into `folder`.

    A class has no torch: it reads the pages that load a model.
    """
    written = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        with atomic_write(folder / path.name) as part:
            nbformat.write(student_copy(book, "MODEL" in parameters(path)), part)
        written.append(folder / path.name)
    return written


# --- checks --------------------------------------------------------------------------------------


def check(answer: Any, tests: dict[str, Callable[[Any], Any]]) -> None:
    """Say whether an answer holds: each test is a sentence and a function of the answer.

    A stub (`...`), or a tuple with one, is "not answered yet". Raises AssertionError that names the
    sentences which do not hold and how many do; a test that an answer cannot even be put to does
    not hold.
    """
    parts = answer if isinstance(answer, tuple) else (answer,)
    if any(part is ... for part in parts):
        print("not answered yet")
        return
    failed = [sentence for sentence, test in tests.items() if not _holds(test, answer)]
    count = f"{len(tests) - len(failed)} of {len(tests)}"
    assert not failed, f"{count} hold; not yet: {'; '.join(failed)}"
    print(f"right: {count}")


def _holds(test: Callable[[Any], Any], answer: Any) -> bool:
    try:
        return bool(test(answer))
    except Exception:  # whatever a wrong answer does to a test
        return False
