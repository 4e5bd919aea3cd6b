"""The form of what is committed: notebooks as `refresh` writes them, figures, links, size."""

import json
import re
from urllib.parse import unquote

import nbformat
import pytest

from helpers import run
from helpers.run import normal, profiles, readme
from helpers.store import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PYTHON = sorted((ROOT / "helpers").rglob("*.py"))
FIGURES = sorted((ROOT / "figures").rglob("*.png"))
ABSOLUTE = re.compile(
    r"(?<![\w.:/>])/(?:home|root|Users|tmp|var|usr|opt|mnt|private)/[\w.-]+"
)
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)")
BY_HAND = re.compile(r"data/runs/[\w/-]+")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_figure = pytest.mark.parametrize("picture", FIGURES, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert cells, f"{path.name} has no code"
    return cells


def test_the_list_names_the_notebooks_that_are_there():
    names = [notebook.name for notebook in run.notebooks()]
    assert names, "no notebook is listed"
    assert names == [path.stem for path in NOTEBOOKS]
    for i, notebook in enumerate(run.notebooks()):
        assert set(notebook.needs) <= set(names[:i]), (
            f"{notebook.name} needs a later notebook"
        )


@each_notebook
def test_a_notebook_is_as_refresh_writes_it(path):
    book = read(path)
    nbformat.validate(book)
    assert (
        path.read_text(encoding="utf-8")
        == nbformat.writes(normal.normalised(book)) + "\n"
    )
    assert path.stat().st_size < 1_000_000


@each_notebook
def test_a_notebook_is_executed_without_an_error(path):
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert outputs, f"{path.name} is committed without outputs"
    assert not [output for output in outputs if output.output_type == "error"]


@each_notebook
def test_a_notebook_names_no_path_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert not ABSOLUTE.findall(text)
    assert not re.findall(r" at 0x[0-9a-f]{6,}", text), (
        "an object's address differs in every run"
    )


@each_notebook
def test_parameters_are_those_of_the_default_profile(path):
    demo = run.all_profiles()["demo"]
    parameters = profiles.parameters(path)
    own = {
        n: p.default for n, p in parameters.items() if n not in profiles.SET_BY_RUNNER
    }
    assert own == {name: demo.get(name, "not in profile demo") for name in own}
    assert all(name.isupper() for name in parameters)
    assert all(parameter.meaning for parameter in parameters.values())


@each_notebook
def test_a_notebook_opened_by_hand_leaves_committed_tables_alone(path):
    parameters = run.declared(path)
    written = parameters.get("OUT", parameters["RESULTS"])
    assert BY_HAND.fullmatch(written) or ("OUT" not in parameters and not written)
    if "OUT" in parameters:
        assert written.removeprefix("data/runs/") not in run.all_profiles()


def links(path):
    """Targets of the relative links in a Markdown file or in a notebook's Markdown cells."""
    if path.suffix == ".ipynb":
        text = "\n".join(
            cell.source for cell in read(path).cells if cell.cell_type == "markdown"
        )
    else:
        text = path.read_text(encoding="utf-8")
    targets = LINK.findall(text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [unquote(t.split("#")[0]) for t in targets if not re.match(r"\w+:|#", t)]


WRITTEN = [ROOT / "README.md", *(ROOT / "notebooks").glob("*.md"), *NOTEBOOKS]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    assert not [link for link in links(path) if not (path.parent / link).exists()]


def test_there_are_figures():
    assert FIGURES


@each_figure
def test_a_figure_has_words(picture):
    about = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
    assert len(about["caption"]) > 20 and len(about["alt"]) > 20
    assert about["notebook"] in [notebook.name for notebook in run.notebooks()]


def test_no_words_are_left_without_a_figure():
    sidecars = (ROOT / "figures").rglob("*.json")
    assert not [path for path in sidecars if not path.with_suffix(".png").exists()]


def test_the_readme_quotes_the_tables_as_they_are():
    stale = "README.md is stale: run `python -m helpers refresh --readme`"
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme.readme(), stale
