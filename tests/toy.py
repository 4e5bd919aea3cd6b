"""A project of two small notebooks, for the tests of the runner."""

import sys
import textwrap

import nbformat

from helpers import store
from helpers.run import publish  # with it all of the room that knows the ROOT

NOTEBOOKS = """
[[notebook]]
name = "01_make"
question = "How are the numbers made?"
needs = []
produces = ["numbers.csv", "count.csv"]
keeps = ["scratch.txt"]

[[notebook]]
name = "02_read"
question = "What do they add up to?"
needs = ["01_make"]
produces = ["sum.csv"]
"""

README = """# Toy
<!-- table: notebooks -->
<!-- / -->
End
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
    import os, time
    from pathlib import Path
    from helpers import store
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
    if FAIL != "silent":
        (folder / "count.csv").write_text(f"{PROFILE},{N}\\n")
    print("threads", os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"])
    print("words", WORDS, type(RATE).__name__)
    """,
]

READ = [
    """
    PROFILE = "demo"
    RESULTS = "data/runs/demo"
    OUT = "data/runs/by-hand"
    """,
    """
    from pathlib import Path
    from helpers import store
    total = sum(map(float, (Path(RESULTS) / "numbers.csv").read_text().split()))
    (Path(OUT) / "sum.csv").write_text(f"sum\\n{total}\\n") and None
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
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    nbformat.write(book, path)


def make(folder, monkeypatch):
    """A project of two small notebooks, and nothing of the real one but the helpers."""
    for name in ("data", "notebooks"):
        (folder / name).mkdir()
    (folder / "data" / "notebooks.toml").write_text(NOTEBOOKS)
    (folder / "data" / "profiles.toml").write_text(PROFILES)
    (folder / "requirements.txt").touch()
    (folder / "README.md").write_text(README)
    write(folder / "notebooks" / "01_make.ipynb", MAKE)
    write(folder / "notebooks" / "02_read.ipynb", READ)
    room = publish.__package__
    modules = [module for name, module in sys.modules.items() if name.startswith(room)]
    for module in (store, *modules):
        if hasattr(module, "ROOT"):
            monkeypatch.setattr(module, "ROOT", folder)
    return folder


def in_process(step, part):
    """What `execute` does, in this process: the cells one after the other, from ROOT."""
    book = nbformat.read(step.notebook.path, as_version=4)
    scope = {}
    for cell in book.cells:
        if cell.cell_type == "code":
            exec(cell.source, scope)
            cell.execution_count = 1
        if "parameters" in cell.metadata.get("tags", []):
            scope |= step.parameters
    part.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, part)
