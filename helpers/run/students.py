"""How does a class get the notebooks without the answers? Copies in which solutions are left to do.

The notebooks are written with their solutions, in cells tagged `solution`, so that exercise, answer
and check are run together and cannot drift apart.
"""

import ast
from pathlib import Path
from typing import Any

import nbformat

from helpers.store import ROOT, atomic_write


def student_copy(book: Any) -> Any:
    """The notebook without outputs, each solution replaced by the names that it has to define."""
    book = nbformat.from_dict(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
            if "solution" in cell.metadata.get("tags", []):
                cell.source = _to_do(cell.source)
    return book


def _to_do(solution: str) -> str:
    """`name = ...` for every variable and function that the solution defines, in their order."""
    names: dict[str, None] = {}
    for statement in ast.parse(solution).body:
        if isinstance(statement, ast.FunctionDef):
            names[statement.name] = None
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = getattr(statement, "targets", None) or [statement.target]
            named = (node for target in targets for node in ast.walk(target))
            names |= {node.id: None for node in named if isinstance(node, ast.Name)}
    return "\n".join(
        ["# Your answer; the next cell checks it.", *(f"{name} = ..." for name in names)]
    )


def write_copies(folder: Path) -> list[Path]:
    """Student copies of all notebooks, written into `folder`."""
    written = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        with atomic_write(folder / path.name) as part:
            nbformat.write(student_copy(nbformat.read(path, as_version=4)), part)
        written.append(folder / path.name)
    return written
