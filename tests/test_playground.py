"""The playground: what it holds of a study, and that a reader's choice changes what is shown."""

import json
from types import SimpleNamespace

import browser
import pandas as pd
import pytest

from helpers import figures
from helpers.figures import interactive
from helpers.study.losses import directed

TASKS = ["add", "negate", "reverse"]


def study(answers=True):
    """Three tasks, two pairs: `negate` silences `add` under every rule, `reverse` harms nobody."""
    rows, examples, texts = [], [], []
    for number, (pair, rule) in enumerate(
        [
            (("add", "negate"), "linear"),
            (("add", "negate"), "ties"),
            (("add", "reverse"), "linear"),
        ]
    ):
        key = f"merge{number}"
        for task in pair:
            dead = task == "add" and "negate" in pair
            score = 0.0 if dead else 0.75
            row = {
                "merge": key,
                "task": task,
                "tasks": pair,
                "n": 2,
                "rule": rule,
                "arm": "default",
            }
            row |= {"same_as": None, "score": score, "specialist": 0.8, "base": 0.1}
            rows.append(row | {"loss": (score / 0.8 - 1) * 100})
            kind = "empty" if dead else "right"
            cell = {
                "merge": key,
                "task": task,
                "example": f"{task}1",
                "correct": 1.0 - dead,
            }
            examples.append(cell | {"kind": kind})
            texts.append({"merge": key, "task": task, "example": f"{task}1"})
            texts[-1]["answer"] = "" if dead else f"{rule} of {task} </script>"
    for task in TASKS:
        for model in ("base", "specialist"):
            cell = {"merge": model, "task": task, "example": f"{task}1"}
            examples.append(
                cell | {"correct": float(model == "specialist"), "kind": "other"}
            )
            texts.append(cell | {"answer": f"{model} says"})
    prompts = [{"task": task, "example": f"{task}1"} for task in TASKS]
    prompts = [row | {"prompt": f"Q: {row['task']}?", "right": "4"} for row in prompts]
    doses = [(task, dose, dose * 0.8) for task in TASKS for dose in (0.0, 0.5, 1.0)]
    tables = {"answers": pd.DataFrame(texts), "prompts": pd.DataFrame(prompts)}
    losses = pd.DataFrame(rows)
    return SimpleNamespace(
        name="toy",
        cells=lambda: directed(losses),
        tasks=TASKS,
        losses=losses,
        doses=pd.DataFrame(doses, columns=["task", "dose", "score"]),
        examples=pd.DataFrame(examples),
        has=lambda name: answers and name in tables,
        table=tables.__getitem__,
    )


def test_each_pair_and_rule_is_there_with_scores_and_answers():
    held = interactive.contents(study())
    assert held["tasks"] == TASKS and held["labels"] == {"linear": "LA", "ties": "TIES"}
    first, second, third = held["merges"]
    assert (
        first["score"] == {"add": 0.0, "negate": 0.75}
        and first["loss"]["add"] == -100.0
    )
    assert first["answers"]["add"] == [[0.0, "empty", ""]]
    assert second["rule"] == "ties" and third["tasks"] == ["add", "reverse"]
    (asked,) = held["prompts"]["add"]
    assert asked["prompt"] == "Q: add?" and asked["specialist"] == [
        1.0,
        "other",
        "specialist says",
    ]
    assert held["doses"]["add"] == [[0.0, 0.0], [0.5, 0.4], [1.0, 0.8]]


def test_a_copy_shows_the_answers_of_the_merge_that_it_equals():
    copied = study()
    losses = copied.losses
    losses.loc[losses["merge"] == "merge1", "same_as"] = "merge0"
    copied.examples = copied.examples[copied.examples["merge"] != "merge1"]
    assert interactive.contents(copied)["merges"][1]["answers"]["add"] == [
        [0.0, "empty", ""]
    ]


def test_without_answers_examples_are_right_or_wrong():
    held = interactive.contents(study(answers=False))
    assert held["merges"][0]["answers"]["add"] == [[0.0, "empty", None]]
    assert held["prompts"]["add"][0]["prompt"] == ""


def test_cards_show_who_lost_most_and_least_with_one_solved_prompt():
    frame = figures.cards(study(), count=1)
    worst, best = frame.to_dict("records")
    assert (worst["task"], worst["merged with"], worst["merge"]) == (
        "add",
        "negate",
        "(nothing)",
    )
    assert worst["specialist"] == "specialist says" and worst["right answer"] == "4"
    assert (worst["loss (%)"], best["loss (%)"]) == (-100, -6)
    text = figures.cards_html(frame.assign(prompt="<b>\nx"))
    assert "&lt;b&gt;<br>x" in text
    assert figures.cards(study(answers=False)).empty


def test_no_answer_ends_the_script():
    piece = figures.playground(study())
    script = piece.split('data-part="data">')[1].split("</script>")[0]
    assert json.loads(script) == interactive.contents(study())


needs_chromium = pytest.mark.skipif(
    not browser.CHROMIUM, reason="no Chromium is installed"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The playground of the toy study, in Chromium."""
    folder = tmp_path_factory.mktemp("page")
    file = folder / "index.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{figures.playground(study())}")
    with browser.Browser(folder / "profile") as opened:
        opened.open(file)
        yield opened


def choose(page, name, value):
    event = "change" if name != "dose" else "input"
    page.run(
        f"""(() => {{ const it = document.querySelector('[data-choice="{name}"]');
        it.value = '{value}'; it.dispatchEvent(new Event('{event}')); }})()"""
    )


def text(page, selector="section"):
    return page.run(f"document.querySelector({selector!r}).innerText")


def options(page, name):
    found = f"""document.querySelectorAll('[data-choice="{name}"] option')"""
    return page.run(f"[...{found}].map(o => o.value)")


@needs_chromium
def test_it_opens_on_the_worst_merge(page):
    assert "Merging loss: add -100 %, negate -6 %" in text(page)
    assert text(page, 'td[data-merge="add"]').startswith("(nothing)")


@needs_chromium
def test_choosing_two_tasks_changes_scores_and_answers(page):
    choose(page, "a", "add")
    assert options(page, "b") == ["negate", "reverse"]
    choose(page, "b", "reverse")
    assert "linear of add </script>" in text(page, 'td[data-merge="add"]')
    assert "Merging loss: add -6 %, reverse -6 %" in text(page)
    choose(page, "b", "negate")
    assert text(page, 'td[data-merge="add"]').startswith("(nothing)")
    assert options(page, "rule") == ["linear", "ties"]
    choose(page, "rule", "ties")
    assert "ties of negate" in text(page, 'td[data-merge="negate"]')


@needs_chromium
def test_the_dose_is_read_off_the_curve(page):
    choose(page, "dose", 0.75)
    assert "alone at dose 0.75: 60 % right" in text(page)
    choose(page, "dose", 0)
    assert "alone at dose 0: 0 % right" in text(page)


@needs_chromium
@pytest.mark.parametrize("width", [1200, 900])
def test_nothing_is_wider_than_the_window(page, tmp_path, width):
    page.picture(tmp_path / "page.png", width)
    assert page.run("document.documentElement.scrollWidth") <= width
