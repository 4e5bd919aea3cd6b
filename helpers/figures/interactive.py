"""The playground: two tasks, a rule, a scale or a dose; scores, dose curves and answers at once.

One piece of HTML with its data inside: a notebook shows it in a frame, a run's result page as its
first screen. Nothing is computed and nothing fetched when a reader chooses.
"""

import html
import json
from pathlib import Path
from typing import Any, Protocol

import jinja2
import pandas as pd

from helpers.figures.looks import look

PROMPTS = 4  # prompts of a task that are shown
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=False
)


class Study(Protocol):
    """What is asked of a study's tables (study.tables.Study)."""

    name: str
    tasks: list[str]
    losses: pd.DataFrame
    doses: pd.DataFrame
    examples: pd.DataFrame

    def has(self, name: str) -> bool: ...

    def table(self, name: str) -> pd.DataFrame: ...


def contents(study: Study) -> dict[str, Any]:
    """What the playground shows of a study, as JSON types.

    Pairs only. Without a table of prompts and answers, examples are told by their number alone.
    """
    losses = study.losses[study.losses["n"] == 2]
    tasks = [task for task in study.tasks if task in set(losses["task"])]
    cells = _cells(study)
    prompts = _prompts(study, tasks)
    own = losses.drop_duplicates("task").set_index("task")
    merges = [_merge(rows, cells, prompts) for _, rows in losses.groupby("merge", sort=False)]
    return {
        "study": study.name,
        "tasks": tasks,
        "labels": {rule: look(rule)["label"] for rule in losses["rule"].unique()},
        "base": _rounded(own["base"]),
        "specialist": _rounded(own["specialist"]),
        "doses": {task: _curve(study.doses, task) for task in tasks},
        "prompts": {task: _asked(task, prompts[task], cells) for task in tasks},
        "merges": merges,
    }


def _cells(study: Study) -> dict[tuple[str, str], pd.DataFrame]:
    """Of each (merge, task): correct, kind and answer by example."""
    frame = study.examples
    if study.has("answers"):
        answers = study.table("answers")
        frame = frame.merge(answers, on=["merge", "task", "example"], how="left")
    columns = [name for name in ("correct", "kind", "answer") if name in frame]
    groups = frame.groupby(["merge", "task"], sort=False)
    return {name: rows.set_index("example")[columns] for name, rows in groups}


def _prompts(study: Study, tasks: list[str]) -> dict[str, pd.DataFrame]:
    """Of each task, the prompts that are shown: prompt and right answer by example."""
    if study.has("prompts"):
        table = study.table("prompts")
    else:
        table = study.examples.query("merge == 'base'")[["task", "example"]]
        table = table.assign(prompt="", right="")
    few = table.groupby("task", sort=False).head(PROMPTS)
    return {task: few[few["task"] == task].set_index("example") for task in tasks}


def _asked(task: str, prompts: pd.DataFrame, cells: dict) -> list[dict[str, Any]]:
    """Each prompt with the right answer, the base's and the specialist's."""
    base = _answers(cells.get(("base", task)), prompts)
    specialist = _answers(cells.get(("specialist", task)), prompts)
    asked = []
    for row, of_base, of_specialist in zip(prompts.itertuples(), base, specialist, strict=True):
        answers = {"base": of_base, "specialist": of_specialist}
        asked.append({"prompt": row.prompt, "right": row.right} | answers)
    return asked


def _merge(rows: pd.DataFrame, cells: dict, prompts: dict) -> dict[str, Any]:
    """One merge of two: scores, losses and answers of both tasks."""
    first = rows.iloc[0]
    seen = first["same_as"] if isinstance(first["same_as"], str) else first["merge"]
    by_task = rows.set_index("task")
    answers = {}
    for task in first["tasks"]:
        if task in prompts:
            answers[task] = _answers(cells.get((seen, task)), prompts[task])
    return {
        "tasks": list(first["tasks"]),
        "rule": first["rule"],
        "arm": first["arm"],
        "score": _rounded(by_task["score"]),
        "loss": _rounded(by_task["loss"], 1),
        "answers": answers,
    }


def _answers(cell: pd.DataFrame | None, prompts: pd.DataFrame) -> list[list]:
    """[right or not, kind of failure, text] of each prompt; None where it was not recorded."""
    if cell is None:
        return [[None, None, None]] * len(prompts)
    rows = cell.reindex(prompts.index)
    rows = rows.reindex(columns=["correct", "kind", "answer"]).astype(object)
    return rows.where(rows.notna(), None).to_numpy().tolist()


def _curve(doses: pd.DataFrame, task: str) -> list[list[float]]:
    rows = doses[doses["task"] == task].sort_values("dose")
    return rows[["dose", "score"]].round(4).to_numpy().tolist()


def _rounded(values: pd.Series, digits: int = 4) -> dict[str, float | None]:
    rounded = values.round(digits).astype(object)
    return rounded.where(rounded.notna(), None).to_dict()


def playground(study: Study) -> str:
    """The playground of a study as a piece of HTML."""
    text = json.dumps(contents(study), ensure_ascii=False, allow_nan=False)
    safe = text.replace("<", "\\u003c")  # no answer may end the script
    return TEMPLATES.get_template("playground.html").render(data=safe)


def framed(piece: str, height: int = 860) -> str:
    """A piece of HTML in a frame of its own, as a notebook shows it."""
    page = f'<!doctype html><meta charset="utf-8"><body>{piece}</body>'
    inside = html.escape(page, quote=True)
    style = f"width:100%;height:{height}px;border:1px solid #ddd"
    return f'<iframe srcdoc="{inside}" style="{style}" title="playground"></iframe>'


# --- cards ---------------------------------------------------------------------------------------

CARD = ("task", "merged with", "rule", "prompt", "right answer", "base", "specialist", "merge")


def cards(study: Study, count: int = 3) -> pd.DataFrame:
    """The cells of pairs that lost most and least, each of another task, with one prompt answered.

    Columns as CARD, and the loss in percent; of each cell the first prompt of the fixed sample that
    its specialist answers rightly. Empty where a study keeps no answers.
    """
    if not (study.has("answers") and study.has("prompts")):
        return pd.DataFrame(columns=[*CARD, "loss (%)"])
    losses = study.losses.dropna(subset="loss").sort_values("loss")
    pairs = losses[(losses["n"] == 2) & (losses["arm"] == "default") & losses["same_as"].isna()]
    worst = pairs.drop_duplicates("task").head(count)
    best = pairs.iloc[::-1].drop_duplicates("task").head(count)
    cells = _cells(study)
    prompts = _prompts(study, study.tasks)
    rows = [_card(row, cells, prompts[row.task]) for row in pd.concat([worst, best]).itertuples()]
    return pd.DataFrame(row for row in rows if row)


def _card(row: Any, cells: dict, prompts: pd.DataFrame) -> dict[str, Any] | None:
    models = {name: cells[name, row.task] for name in ("base", "specialist")}
    models["merge"] = cells[row.merge, row.task]
    right = models["specialist"]["correct"].reindex(prompts.index)
    solved = right.index[right == 1]
    if not len(solved):
        return None
    (example, *_) = solved
    (partner,) = (task for task in row.tasks if task != row.task)
    asked = prompts.loc[example]
    about = [row.task, partner, look(row.rule)["label"], asked["prompt"], asked["right"]]
    answers = [models[name].loc[example, "answer"] or "(nothing)" for name in CARD[-3:]]
    return dict(zip(CARD, [*about, *answers], strict=True)) | {"loss (%)": round(row.loss)}


def cards_html(frame: pd.DataFrame) -> str:
    """Cards as a table that keeps the lines of a prompt; plain HTML, for any page."""
    shown = frame.copy()
    for column in frame.select_dtypes(exclude="number"):
        shown[column] = [html.escape(text).replace("\n", "<br>") for text in frame[column]]
    return shown.to_html(index=False, escape=False, border=0)
