"""From visits to tables: what a study's frames are made of, before losses are taken of them."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from helpers.study import schema, scores
from helpers.study.kinds import failure_kinds
from helpers.study.losses import SPECIALIST
from helpers.study.plan import Plan, solos
from helpers.study.tasks import Task
from helpers.study.visit import Visit

Visits = Sequence[Visit]
Tasks = Mapping[str, Task]
BASE = "base"  # what examples.csv.gz calls the base
REPORTED = [
    "effective_scale",
    "cos_sum",
    "kept",
    "tie_mass",
    "rho2",
    "lerp_steps",
    "slerp_steps",
]
# share of contradictory prompts above which a pair's loss is no incompatibility
AMBIGUOUS = 0.05
KEPT_ANSWERS = 3  # of each task under each model
READ = ["correct", "nll", "invalid"]


def of_kind(visits: Visits, *kinds: str) -> list[Visit]:
    """The visits of these kinds, of test examples."""
    return [x for x in visits if x.row.kind in kinds and x.row.split == "test"]


def merges(visits: Visits) -> pd.DataFrame:
    """One row for each merge: what it is, and what its report says."""
    rows = []
    for visit in of_kind(visits, "merge"):
        row = visit.row
        about = {
            "merge": visit.key,
            "tasks": row.tasks,
            "n": len(row.tasks),
            "rule": row.rule,
        }
        about |= {"arm": row.arm, "seed": row.seed, "same_as": visit.same_as}
        rows.append(about | {name: visit.report[name] for name in REPORTED})
    numbers = dict.fromkeys(REPORTED, float)  # None where a rule has no such number
    return pd.DataFrame(rows).astype(numbers)


def doses(visits: Visits) -> pd.DataFrame:
    """Dose-response of every specialist: task, dose, score, nll. Dose 0 is the base."""
    rows = []
    for visit in of_kind(visits, "dose"):
        (task,) = visit.row.tasks
        rows.append((task, visit.row.options["dose"], *_means(visit, task)))
    return pd.DataFrame(rows, columns=["task", "dose", "score", "nll"])


def _own(visit: Visit, task: str) -> pd.DataFrame:
    examples = visit.examples
    return examples[examples["task"] == task]


def _means(visit: Visit, task: str) -> tuple[float, float]:
    """Mean score and NLL of a task's examples under the visited model."""
    own = _own(visit, task)
    return own["correct"].mean(), own["nll"].mean()


def specialists(visits: Visits) -> dict[str, Visit]:
    """The visit of each task's specialist, by task."""
    whole = (x for x in of_kind(visits, "dose") if x.row.options["dose"] == 1)
    return {visit.row.tasks[0]: visit for visit in whole}


def references(visits: Visits, tasks: Tasks) -> pd.DataFrame:
    """What each task's losses are measured against; one row per task, on its test examples.

    specialist, nll_specialist: at dose 1; base: behind solved examples; nll_base: of the base from
    bare prompts (of an encoder: of its linear probe); chance: score of the commonest answer.
    """
    (base,) = of_kind(visits, "base")
    bare = base.examples.groupby("task")["nll"].mean()
    able = {visit.row.tasks[0]: visit for visit in of_kind(visits, "ability")}
    rows = []
    for task, visit in specialists(visits).items():
        score, nll = _means(visit, task)
        untaught, _ = _means(able[task], task)
        chance = scores.constant_answer(tasks[task])
        rows.append((task, score, untaught, chance, nll, bare[task]))
    columns = ["task", "specialist", "base", "chance", "nll_specialist", "nll_base"]
    return pd.DataFrame(rows, columns=columns)


def screening(visits: Visits, tasks: Tasks) -> pd.DataFrame:
    """Dev scores by which a task is kept: of the commonest answer, the base and the specialist."""
    dev = [x for x in visits if x.row.split == "dev"]
    score = {(x.row.kind, *x.row.tasks): x.examples["correct"].mean() for x in dev}
    rows = []
    for kind, task in score:
        if kind == "dose":
            chance = scores.constant_answer(tasks[task], "dev")
            base = score["ability", task]
            rows.append((task, chance, base, score["dose", task]))
    return pd.DataFrame(rows, columns=["task", "chance", "base", "specialist"])


def cells(visits: Visits, collisions: pd.DataFrame) -> pd.DataFrame:
    """One row for each merge and task: what was read of it, its doses, and its rule alone.

    merge, task, score, nll, invalid, dose_ingredient, dose_own; control_solo and nll_solo where the
    rule has a solo (`Row.has_solo`) and is no copy of one that has none: `losses.loss_table` takes
    them from here. ambiguous: the merge holds a task that collides with this one in more than a few
    prompts (`tasks.collisions`).
    """
    collisions = collisions[collisions["share"] >= AMBIGUOUS]
    ends = zip(collisions["task_a"], collisions["task_b"], strict=True)
    colliding = set(map(frozenset, ends))
    alone = {x.row.model: x for x in of_kind(visits, "solo")}
    rows = []
    for visit in of_kind(visits, "merge"):
        means = (
            visit.examples.groupby("task")[READ]
            .mean()
            .rename(columns={"correct": "score"})
        )
        for i, task in enumerate(visit.row.tasks):
            row = {"merge": visit.key, "task": task} | means.loc[task].to_dict()
            row["dose_ingredient"] = visit.report["ingredient"][i]
            row["dose_own"] = visit.report["own"][i]
            row |= _control(visit, task, alone)
            row["ambiguous"] = any({task, x} in colliding for x in visit.row.tasks)
            rows.append(row)
    return pd.DataFrame(rows)


def _control(visit: Visit, task: str, alone: Mapping[str, Visit]) -> dict[str, float]:
    """What the rule of a merge leaves of a task by itself."""
    names = ["control_solo", "nll_solo"]
    if not visit.row.has_solo or visit.same_as:
        return dict.fromkeys(names, float("nan"))
    wanted = {row.tasks[0]: row for row in solos(Plan.of([visit.row]))}
    return dict(zip(names, _means(alone[wanted[task].model], task), strict=True))


def examples(visits: Visits, tasks: Tasks) -> pd.DataFrame:
    """One row for each test example under each distinct merge, each specialist and the base.

    A decoder's answers are there, and `kind` says how they are wrong: beside what the merge's other
    specialists and the base say to the same prompt (`kinds.failure_kinds`).
    """
    own, bases = specialists(visits), of_kind(visits, "base")
    said = {}  # by (specialist or base, task): its examples
    for name, visit in [*own.items(), *((BASE, visit) for visit in bases)]:
        said |= {(name, task): frame for task, frame in visit.examples.groupby("task")}
    models = [
        (visit.key, visit)
        for visit in of_kind(visits, "merge")
        if visit.same_as is None
    ]
    models += [(SPECIALIST, visit) for visit in own.values()]
    frames = []
    for name, visit in models:
        for task in visit.row.tasks:
            frame = _own(visit, task).assign(merge=name)
            if "answer" in frame:
                others = [(x, task) for x in visit.row.tasks if x != task]
                partners = [said[x] for x in others if x in said]
                rows = tasks[task].splits["test"]
                frame["kind"] = failure_kinds(
                    frame, rows, partners, said.get((BASE, task))
                )
            frames.append(frame)
    frames += [visit.examples.assign(merge=BASE) for visit in bases]
    table = pd.concat(frames, ignore_index=True).rename(columns={"id": "example"})
    columns = {*schema.of("examples").columns, "answer"}
    return table[[name for name in table if name in columns]].round(5)


def answers(table: pd.DataFrame) -> pd.DataFrame:
    """The answers to the first examples of each task under each model, of `examples`.

    Empty for an encoder, which answers nothing but labels.
    """
    names = ["merge", "task", "example", "answer"]
    if "answer" not in table:
        return pd.DataFrame(columns=names)
    first = table.groupby(["merge", "task"], sort=False).head(KEPT_ANSWERS)
    return first[names].reset_index(drop=True)


def prompts(answers: pd.DataFrame, tasks: Tasks) -> pd.DataFrame:
    """The test prompts behind `answers`, with the first accepted answer of each."""
    asked = answers[["task", "example"]].drop_duplicates(ignore_index=True)
    rows = {
        (x, row["id"]): row for x, task in tasks.items() for row in task.splits["test"]
    }
    found = [rows[key] for key in asked.itertuples(index=False, name=None)]
    right = [row["answers"][0] for row in found]
    return asked.assign(prompt=[row["prompt"] for row in found], right=right)


def swap_losses(
    drawn: pd.DataFrame, merged: pd.DataFrame, rules: Iterable[str]
) -> pd.DataFrame:
    """The mean loss of each group before and after every swap of `groups.swaps`, by rule.

    `merged` has a row per merge: tasks, rule, arm, loss.
    """
    default = merged[merged["arm"] == "default"]
    loss = default.set_index(["rule", "tasks"])["loss"].to_dict()
    tables = []
    for rule in rules:
        table = drawn.assign(rule=rule, n=drawn["tasks"].map(len))
        table["before"] = [loss[rule, group] for group in drawn["tasks"]]
        table["after"] = [loss[rule, group] for group in drawn["swapped"]]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
