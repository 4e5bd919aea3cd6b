"""Requests: what is asked is checked before anything runs. These tests start no kernel."""

import pytest
from toy import PROFILES, write

from helpers import run
from helpers.__main__ import main
from helpers.run import profiles


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
        (
            ["demo", "-p", "WORDS", "['a', 3]"],
            "each of WORDS takes text, as in 'a'; got 3",
        ),
        (["demo", "-p", "RATE", "1e999"], "is inf"),
        (
            ["demo", "-p", "RESULTS", "data/results/demo"],
            "RESULTS may not lie in data/results",
        ),
        (
            ["demo", "-p", "RESULTS", "data/runs/../results"],
            "RESULTS may not lie in data/results",
        ),
        (["demo", "-p", "PROFILE", "tiny"], "PROFILE is set by the runner"),
        (
            ["demo", "--only", "02"],
            "02_read reads what 01_make writes, and 01_make is not finished",
        ),
    ],
)
def test_bad_requests_are_one_sentence_and_exit_code_2(
    project, capsys, arguments, sentence
):
    assert main(["run", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and sentence in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (project / "data" / "runs").exists()


def test_a_needed_notebook_that_was_run_otherwise_is_refused(project, monkeypatch):
    make, read = run.steps("demo", None, {})
    done = {"01_make": {"parameters": {"N": 3}}}
    monkeypatch.setattr(run.chain, "finished", lambda results: done)
    for parameters in ({"N": 3, "PROFILE": "x"}, {}):
        run.chain._check_needs([read._replace(parameters=parameters)], project)
    with pytest.raises(
        ValueError, match="01_make was run with N = 3, 02_read is asked for N = 4"
    ):
        run.chain._check_needs([read._replace(parameters={"N": 4})], project)


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
    parsed = profiles.parse(text, default)
    assert parsed == value and type(parsed) is type(value)


def test_values_take_the_type_of_the_default():
    assert (
        profiles.conform("RATE", 2, 0.5) == 2.0
        and type(profiles.conform("RATE", 2, 0.5)) is float
    )
    assert profiles.conform("RATES", (1, 2.5), [0.5]) == [1.0, 2.5]
    for value, default in [(True, 0.5), (1, True), ("1", 1), (None, 1), ([1], 1)]:
        with pytest.raises(ValueError, match="X takes"):
            profiles.conform("X", value, default)


def test_a_profile_overrides_demo_and_parameters_override_a_profile(project):
    make, read = run.steps("tiny", None, {"RATE": 2})
    assert make.parameters["N"] == 1 and make.parameters["WORDS"] == ["a", "b"]
    assert make.parameters["RATE"] == 2.0 and type(make.parameters["RATE"]) is float
    folder = "data/runs/tiny"
    assert read.parameters == {"PROFILE": "tiny", "RESULTS": folder, "OUT": folder}
    (step,) = run.steps("tiny", ["02"], {"RESULTS": "elsewhere"})
    assert step.parameters == {
        "PROFILE": "tiny",
        "RESULTS": "elsewhere",
        "OUT": "elsewhere",
    }


def test_another_seed_has_another_folder(monkeypatch):
    monkeypatch.setattr(profiles, "all_profiles", lambda: {"demo": {"SEED": 0}})
    assert (
        profiles.folder("demo", {})
        == profiles.folder("demo", {"SEED": 0})
        == "data/runs/demo"
    )
    assert profiles.folder("demo", {"SEED": 1}) == "data/runs/demo-seed1"
    assert profiles.folder("demo", {"SEED": 1, "RESULTS": "here"}) == "here"


def test_a_profile_may_be_like_another(project):
    path = project / "data" / "profiles.toml"
    path.write_text(PROFILES + "RATE = 2.0\n[again]\nlike = 'tiny'\nN = 7\n")
    known = run.all_profiles()
    assert known["again"] == known["demo"] | {"N": 7, "RATE": 2.0}
    third = "[third]\nlike = 'again'\nN = 8\n"
    path.write_text(PROFILES + "RATE = 2.0\n[again]\nlike = 'tiny'\nN = 7\n" + third)
    assert run.all_profiles()["third"] == known["again"] | {"N": 8}
    path.write_text(PROFILES + "like = 'dem'\n")
    with pytest.raises(ValueError, match=r"'dem'; did you mean demo\?"):
        run.all_profiles()


def test_a_profile_leaves_out_what_it_skips(project):
    path = project / "data" / "profiles.toml"
    path.write_text(PROFILES + "skip = ['01_make']\n[again]\nlike = 'tiny'\n")
    for profile in ("tiny", "again"):  # which is like it
        assert [step.notebook.name for step in run.steps(profile, None, {})] == [
            "02_read"
        ]
        assert len(run.steps(profile, ["01", "02"], {})) == 2  # unless it is asked for
    assert len(run.steps("demo", None, {})) == 2


@pytest.mark.parametrize("profile", profiles.all_profiles())
def test_a_profile_makes_what_its_notebooks_read(profile):
    plan = run.steps(profile, None, {})
    made = {step.notebook.name for step in plan}
    assert {need for step in plan for need in step.needs} <= made


def test_a_misspelt_name_in_a_profile_is_refused(project):
    path = project / "data" / "profiles.toml"
    path.write_text(PROFILES + "RATTE = 1.0\n")
    with pytest.raises(
        ValueError, match=r"in profile 'tiny': 'RATTE'; did you mean RATE\?"
    ):
        run.steps("tiny", None, {})


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
    write(
        tmp_path / "x.ipynb", ['A: int = -1  # a = b\nB = [\n    "x=1",\n]\nC = None\n']
    )
    assert run.declared(tmp_path / "x.ipynb") == {"A": -1, "B": ["x=1"], "C": None}


def test_a_parameter_carries_what_its_comment_says(tmp_path):
    cell = "SEED: int = 0  # of resampling\nTASKS = [  # candidates\n    'a',\n]\nN = 1"
    write(tmp_path / "x.ipynb", [cell])
    known = profiles.parameters(tmp_path / "x.ipynb")
    assert known["SEED"] == (0, "of resampling") and known["TASKS"] == (
        ["a"],
        "candidates",
    )
    assert known["N"].meaning == ""


def test_numbers_name_notebooks_with_letters_too(project):
    text = (project / "data" / "notebooks.toml").read_text()
    (project / "data" / "notebooks.toml").write_text(
        text.replace("02_read", "02a_read")
    )
    (project / "notebooks" / "02_read.ipynb").rename(
        project / "notebooks" / "02a_read.ipynb"
    )
    assert [book.name for book in profiles.chosen(["02a"])] == ["02a_read"]
    assert [book.name for book in profiles.chosen(["01_make", "02a_read"])] == [
        "01_make",
        "02a_read",
    ]


def test_the_list_shows_profiles_notebooks_and_parameters(project, capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "tiny" in printed and "What do they add up to?" in printed
    assert "how many numbers  [01]" in printed


def test_who_brings_models_needs_no_earlier_notebook(project):
    path = project / "data" / "notebooks.toml"
    path.write_text(path.read_text() + 'unless = "WORDS"\n')
    write(
        project / "notebooks" / "02_read.ipynb",
        ["WORDS = []\nRESULTS = 'data/runs/demo'"],
    )
    (project / "data" / "profiles.toml").write_text("[demo]\nN = 3\n")
    (step,) = run.steps("demo", ["02"], {})
    assert step.needs == ["01_make"]
    with pytest.raises(ValueError, match="01_make is not finished"):
        run.chain._check_needs([step], project)
    (own,) = run.steps("demo", ["02"], {"WORDS": ["model"]})
    assert own.needs == []
    run.chain._check_needs([own], project)
