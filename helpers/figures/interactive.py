"""The playground: two tasks, a rule, a scale or a dose; scores, dose curves and answers at once.

One piece of HTML with its data inside: a notebook shows it in a frame, a run's result page as its
first screen. Nothing is computed and nothing fetched when a reader chooses.
"""

import html
import json
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from helpers.figures.looks import look

PROMPTS = 4  # prompts of a task that are shown
KEY = ["merge", "task", "example"]
UNKNOWN = [None, None, None]  # an answer that was not recorded
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=False
)


def contents(study: Any) -> dict[str, Any]:
    """What the playground shows of a study (`study.tables.Study`), as JSON types.

    Pairs only. Without a table of prompts and answers, examples are told by their number alone.
    """
    losses = study.losses[study.losses["n"] == 2]
    tasks = [task for task in study.tasks if task in set(losses["task"])]
    prompts = _prompts(study, tasks)
    answers = _answers(study, prompts)
    own = losses.drop_duplicates("task").set_index("task")
    return {
        "study": study.name,
        "tasks": tasks,
        "labels": {rule: look(rule)["label"] for rule in losses["rule"].unique()},
        "base": _numbers(own["base"], 4),
        "specialist": _numbers(own["specialist"], 4),
        "doses": {task: _curve(study.doses, task) for task in tasks},
        "prompts": {task: _answered(task, prompts[task], answers) for task in tasks},
        "merges": _merges(losses, prompts, answers),
    }


def _prompts(study: Any, tasks: list[str]) -> dict[str, pd.DataFrame]:
    """Of each task, the prompts that are shown: prompt and right answer by example."""
    if study.has("prompts"):
        table = study.table("prompts")
    else:
        table = study.examples.query("merge == 'base'")[["task", "example"]]
        table = table.assign(prompt="", right="")
    few = table.groupby("task", sort=False).head(PROMPTS)
    return {task: few[few["task"] == task].set_index("example") for task in tasks}


def _answers(study: Any, prompts: dict[str, pd.DataFrame]) -> dict[tuple, list]:
    """[right or not, kind of failure, text] by merge, task and example, of these prompts."""
    shown = {example for table in prompts.values() for example in table.index}
    frame = study.examples[study.examples["example"].isin(shown)]
    if study.has("answers"):
        answers = study.table("answers")
        frame = frame.merge(answers, on=KEY, how="left")
    columns = frame.reindex(columns=["correct", "kind", "answer"]).astype(object)
    rows = columns.where(columns.notna(), None).to_numpy().tolist()
    keys = frame[KEY].itertuples(index=False, name=None)
    return dict(zip(keys, rows, strict=True))


def _answered(task: str, prompts: pd.DataFrame, answers: dict) -> list[dict[str, Any]]:
    """Each prompt with the right answer, the base's and the specialist's."""
    cards = []
    for row in prompts.itertuples():
        card = {"prompt": row.prompt, "right": row.right}
        for model in ("base", "specialist"):
            card[model] = answers.get((model, task, row.Index), UNKNOWN)
        cards.append(card)
    return cards


def _merges(losses: pd.DataFrame, prompts: dict, answers: dict) -> list[dict[str, Any]]:
    """Every merge of two: scores, losses and answers of both tasks; a copy has its model's."""
    merges = []
    for name, rows in losses.groupby("merge", sort=False):
        first = rows.iloc[0]
        model = first["same_as"] if isinstance(first["same_as"], str) else name
        of_task = rows.set_index("task")
        said = {}
        for task in of_task.index:
            examples = prompts[task].index if task in prompts else []
            said[task] = [answers.get((model, task, x), UNKNOWN) for x in examples]
        merge = {
            "tasks": list(first["tasks"]),
            "rule": first["rule"],
            "arm": first["arm"],
        }
        merge["score"] = _numbers(of_task["score"], 4)
        merge["loss"] = _numbers(of_task["loss"], 2)
        merge["answers"] = said
        merges.append(merge)
    return merges


def _numbers(values: pd.Series, digits: int) -> dict[str, float | None]:
    """By task, rounded; None where undefined."""
    rounded = values.round(digits)
    return rounded.astype(object).where(rounded.notna(), None).to_dict()


def _curve(doses: pd.DataFrame, task: str) -> list[list[float]]:
    rows = doses[doses["task"] == task].sort_values("dose")
    return rows[["dose", "score"]].round(4).to_numpy().tolist()


def playground(study: Any) -> str:
    """The playground of a study as a piece of HTML."""
    text = json.dumps(contents(study), ensure_ascii=False, allow_nan=False)
    safe = text.replace("<", "\\u003c")  # no answer may end the script
    return TEMPLATES.get_template("playground.html").render(data=safe)


def framed(piece: str) -> str:
    """A piece of HTML in a frame of its own, as a notebook shows it."""
    page = f'<!doctype html><meta charset="utf-8"><body>{piece}</body>'
    inside = html.escape(page, quote=True)
    style = "width:100%;height:860px;border:1px solid #ddd"
    return f'<iframe srcdoc="{inside}" style="{style}" title="playground"></iframe>'


# --- cards ---------------------------------------------------------------------------------------

CARD = (
    "task",
    "merged with",
    "rule",
    "prompt",
    "right answer",
    "base",
    "specialist",
    "merge",
)


def cards(study: Any, count: int = 3) -> pd.DataFrame:
    """The cells of pairs that lost most and least, each of another task, with one prompt answered.

    Columns as CARD, and the loss in percent; of each cell the first prompt of the fixed sample that
    its specialist answers rightly. Empty where a study keeps no answers.
    """
    if not (study.has("answers") and study.has("prompts")):
        return pd.DataFrame(columns=[*CARD, "loss (%)"])
    cells = study.cells().dropna(subset="loss").sort_values("loss", kind="stable")
    cells = cells[cells["same_as"].isna()]
    worst = cells.drop_duplicates("victim").head(count)
    best = cells.iloc[::-1].drop_duplicates("victim").head(count)
    prompts = _prompts(study, study.tasks)
    answers = _answers(study, prompts)
    extremes = pd.concat([worst, best]).itertuples()
    rows = [_card(cell, prompts[cell.victim], answers) for cell in extremes]
    return pd.DataFrame(row for row in rows if row)


def _card(cell: Any, prompts: pd.DataFrame, answers: dict) -> dict[str, Any] | None:
    """The first prompt that the specialist answers rightly, and what base and merge answer."""
    for prompt in prompts.itertuples():
        models = ("base", "specialist", cell.merge)
        answered = [answers[model, cell.victim, prompt.Index] for model in models]
        correct, _, _ = answered[1]
        if correct == 1:
            about = [cell.victim, cell.partner, look(cell.rule)["label"]]
            texts = [text or "(nothing)" for _, _, text in answered]
            row = [*about, prompt.prompt, prompt.right, *texts]
            return dict(zip(CARD, row, strict=True)) | {"loss (%)": round(cell.loss)}
    return None


def cards_html(frame: pd.DataFrame) -> str:
    """Cards as a table that keeps the lines of a prompt; plain HTML, for any page."""
    shown = frame.copy()
    for column in frame.select_dtypes(exclude="number"):
        texts = [html.escape(text).replace("\n", "<br>") for text in frame[column]]
        # long names may break
        shown[column] = [text.replace("_", "_<wbr>") for text in texts]
    table = shown.to_html(index=False, escape=False, border=0, justify="left")
    # notebooks align cells to the right, as for numbers
    return table.replace("<td>", '<td style="text-align: left; vertical-align: top">')
