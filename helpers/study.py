"""What happened to each merge? Visits: apply a delta to the base, read scores and states, restore.

A visit is keyed by the content of its delta, so equal merges under two names are visited once and a
killed run resumes where it was. Dose curves, controls, pairs and groups are all lists of visits.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from helpers import evaluate, hidden, merging, records, vectors
from helpers.tasks import SHOT_END, Task, encode_prompt, few_shot, load_tasks

VERSION = 1  # raised by hand whenever a visit records something else
BASE = "base"  # the digest of no delta

# The settings of an adapter that its task vector depends on.
SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")

Delta = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bench:
    """The live base model (fp32), its tasks and their specialists' folders, both by task label."""

    model: torch.nn.Module
    tokenizer: Any
    base: dict  # name and digest
    tasks: dict[str, Task]
    specialists: dict[str, Path]
    batch_size: int = 20

    def sources(self, labels: Iterable[str]) -> tuple[vectors.Source, list[vectors.Source]]:
        """The base and these specialists, open for streaming."""
        base = vectors.open_base(dict(self.model.named_parameters()))
        base = base._replace(base_digest=self.base["digest"])
        return base, [vectors.open_specialist(self.specialists[x], x) for x in labels]

    def rows(self, labels: Iterable[str]) -> list[vectors.Row]:
        """Their task vectors tensor by tensor, to pass over at will."""
        return vectors.views(*self.sources(labels))

    def parents(self, labels: Sequence[str]) -> dict:
        """What identifies a merge's parents: digests of the base and, in order, the specialists."""
        return {
            "base": self.base["digest"],
            "specialists": [[x, _contents(self.specialists[x])] for x in labels],
        }

    def machine(self) -> dict:
        """What rounding depends on beside the numbers."""
        return {
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
        }


def _contents(folder: Path) -> str:
    """Digest of what a specialist's task vector is made of: its tensors and their scaling."""
    weights = [records.digest(file) for file in sorted(folder.glob("*.safetensors"))]
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return records.digest([weights, {name: config.get(name) for name in SCALING}])


# --- one visit -------------------------------------------------------------------------------


def visit(
    bench: Bench,
    digest: str,
    make: Callable[[], Delta],
    scored: Sequence[str],
    probed: Sequence[str] = (),
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Scores on the test examples of `scored` tasks, states on the probes of `probed` ones.

    `digest` identifies the delta and `make()` builds it, which happens only if something is not
    recorded yet. Returns the examples (column task and those of `evaluate.score`) and, by task, the
    states (probes, layers, d) at the last prompt token, fp32.
    """

    wanted = [_score_key(bench, digest, bench.tasks[x]) for x in scored]
    wanted += [_state_key(bench, digest, bench.tasks[x]) for x in probed]
    seen = all(records.finished(*key) for key in wanted)
    with nullcontext() if seen else vectors.applied(bench.model, make()):
        examples = [_scores(bench, digest, bench.tasks[x]).assign(task=x) for x in scored]
        states = {x: _states(bench, digest, bench.tasks[x]) for x in probed}
    return pd.concat(examples, ignore_index=True), states


def _score_key(
    bench: Bench, digest: str, task: Task, split: str = "test", shots: int = 0
) -> tuple[str, int, dict]:
    what = {"base": bench.base["digest"], "delta": digest, "task": task.name, "shots": shots}
    what |= {"split": task.digest(split), "evaluate": evaluate.VERSION} | bench.machine()
    if shots:
        what["shown"] = task.digest("train")
    return "scores", VERSION, what


def _scores(
    bench: Bench, digest: str, task: Task, split: str = "test", shots: int = 0
) -> pd.DataFrame:
    def compute(folder: Path) -> None:
        rows = few_shot(task, split, shots) if shots else task.splits[split]
        end = SHOT_END if shots else None
        frame = evaluate.score(
            bench.model, bench.tokenizer, rows, task.metric, bench.batch_size, end
        )
        frame.to_csv(folder / "examples.csv", index=False)

    folder = records.cached(*_score_key(bench, digest, task, split, shots), compute)
    return pd.read_csv(folder / "examples.csv", dtype={"id": str})


def _state_key(bench: Bench, digest: str, task: Task) -> tuple[str, int, dict]:
    what = {"base": bench.base["digest"], "delta": digest, "task": task.name}
    return "states", VERSION, what | {"probe": task.digest("probe")} | bench.machine()


def _states(bench: Bench, digest: str, task: Task) -> Tensor:
    def compute(folder: Path) -> None:
        prompts = [encode_prompt(bench.tokenizer, x) for x in task.splits["probe"]["prompt"]]
        states = hidden.prompt_states(bench.model, prompts, batch_size=bench.batch_size)
        save_file({"states": states}, folder / "states.safetensors")

    folder = records.cached(*_state_key(bench, digest, task), compute)
    return load_file(folder / "states.safetensors")["states"]


# --- what is visited -------------------------------------------------------------------------


def few_shot_base(bench: Bench, label: str, split: str = "test", shots: int = 4) -> pd.DataFrame:
    """Scores of the base behind `shots` solved training examples: what it can do untaught."""
    return _scores(bench, BASE, bench.tasks[label], split, shots)


def on_dev(bench: Bench, label: str) -> pd.DataFrame:
    """Scores of a specialist on its dev split: what screening and tuning may read."""
    record, make = delta_at(bench, label, 1.0)
    key = _score_key(bench, record["digest"], bench.tasks[label], "dev")
    with nullcontext() if records.finished(*key) else vectors.applied(bench.model, make()):
        return _scores(bench, record["digest"], bench.tasks[label], "dev")


def at_base(bench: Bench, probed: Sequence[str] = ()) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """The base model itself: scores on every task (bare prompts), states on the probed ones."""
    return visit(bench, BASE, dict, list(bench.tasks), probed)


def at_dose(
    bench: Bench, label: str, dose: float, probed: Sequence[str] = ()
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """theta_0 + dose * tau of one specialist, on its own task; dose 1 is the specialist."""
    record, make = delta_at(bench, label, dose)
    return visit(bench, record["digest"], make, [label], probed)


def delta_at(bench: Bench, label: str, dose: float) -> tuple[dict, Callable[[], Delta]]:
    """Record (its digest) and maker of dose * tau of one specialist."""
    what = bench.parents([label]) | bench.machine() | {"dose": dose}
    return _known("dose", what, lambda: (merging.dose(bench.rows([label]), 0, dose), {}))


def _known(
    step: str, what: dict, make: Callable[[], tuple[Delta, dict]]
) -> tuple[dict, Callable[[], Delta]]:
    """The record of a delta (its digest and what `make` tells of it), and a maker of the delta.

    The delta is built for the record only if no earlier run has left one, and never twice.
    """
    made: list[tuple[Delta, dict]] = []

    def once() -> tuple[Delta, dict]:
        if not made:
            made.append(make())
        return made[0]

    def compute(folder: Path) -> None:
        delta, told = once()
        record = told | {"digest": merging.delta_digest(delta)}
        (folder / "record.json").write_text(json.dumps(record, default=int), encoding="utf-8")

    folder = records.cached(step, VERSION, what, compute)
    return json.loads((folder / "record.json").read_text(encoding="utf-8")), lambda: once()[0]


def dose_curves(bench: Bench, doses: Iterable[float]) -> pd.DataFrame:
    """Dose-response of every specialist: columns task, dose, score, nll. Dose 0 is the base."""
    plan = [(label, dose) for label in bench.tasks for dose in doses]
    out = []
    for label, dose in tqdm(plan, desc="dose-response", unit="visit", mininterval=5):
        examples, _ = at_dose(bench, label, dose)
        mean = examples[["correct", "nll"]].mean()
        out.append({"task": label, "dose": dose, "score": mean["correct"], "nll": mean["nll"]})
    return pd.DataFrame(out)


@dataclass(frozen=True)
class Merged:
    """A merge that was visited. `report` is merging.Report.as_dict(); `examples` and `states` as
    `visit` gives them; `same_as` names the earlier method of the group with the same delta."""

    group: tuple[str, ...]
    method: str
    report: dict
    examples: pd.DataFrame
    states: dict[str, Tensor]
    same_as: str | None = None

    @property
    def name(self) -> str:
        return f"{'+'.join(self.group)}|{self.method}"


def merge_group(
    bench: Bench, group: Iterable[str], methods: Mapping[str, dict], seed: int = 0
) -> list[Merged]:
    """Merge the specialists of `group` by each method and visit every distinct delta once.

    `methods`: the name of each recipe -> {"method": …, options…}. Every member is scored on its
    test examples and probed; probes are pooled over the group.
    """
    group, done = tuple(group), []
    rows = bench.rows(group)
    for name, recipe in methods.items():

        def make(recipe: dict = recipe) -> tuple[Delta, dict]:
            delta, report = merging.merge(rows, labels=group, seed=seed, **recipe)
            return delta, report.as_dict()

        what = _merge_key(bench, group, group, recipe, seed)
        report, make_delta = _known("merge", what, make)
        twin = next((m for m in done if merging.same(m.report["sketch"], report["sketch"])), None)
        if twin:
            same_as = twin.same_as or twin.method
            done.append(Merged(group, name, report, twin.examples, twin.states, same_as))
        else:
            seen = visit(bench, report["digest"], make_delta, group, group)
            done.append(Merged(group, name, report, *seen))
    return done


def _merge_key(
    bench: Bench, parents: Sequence[str], labels: Sequence[str], recipe: Mapping, seed: int
) -> dict:
    """What identifies a merge; the recipe with its defaults filled in, as those may change."""
    planned = {name: value for name, value in recipe.items() if name != "match"}
    plan = merging.plan(labels=labels, seed=seed, **planned)._asdict()
    what = {"plan": plan, "match": recipe.get("match")}
    return bench.parents(parents) | bench.machine() | what


def at_solo(bench: Bench, label: str, n: int, recipe: dict, seed: int = 0) -> pd.DataFrame:
    """The method's own loss: its merge of `label` with n - 1 partners that changed nothing."""
    labels = [label, *(f"unchanged {i}" for i in range(1, n))]
    what = _merge_key(bench, [label], labels, recipe, seed)

    def make() -> tuple[Delta, dict]:
        rows = [
            vectors.Row(name, base, [tau] + [vectors.zero(tau.shape, tau.device)] * (n - 1))
            for name, base, (tau,) in bench.rows([label])
        ]
        return merging.merge(rows, labels=labels, seed=seed, **recipe)[0], {}

    record, make_delta = _known("solo", what, make)
    return visit(bench, record["digest"], make_delta, [label])[0]


# --- what was lost ---------------------------------------------------------------------------


def references(bench: Bench) -> pd.DataFrame:
    """What each task's losses are measured against; one row per task, on its test examples.

    specialist, nll_specialist: at dose 1; base: few-shot score of the base model; nll_base: from
    bare prompts; chance: score of the commonest training answer.
    """
    bare = at_base(bench)[0].groupby("task")["nll"].mean()
    rows = []
    for label, task in bench.tasks.items():
        own = at_dose(bench, label, 1.0)[0]
        rows.append(
            {
                "task": label,
                "specialist": own["correct"].mean(),
                "base": few_shot_base(bench, label)["correct"].mean(),
                "chance": evaluate.constant_answer(task),
                "nll_specialist": own["nll"].mean(),
                "nll_base": bare[label],
            }
        )
    return pd.DataFrame(rows)


def loss_table(
    bench: Bench,
    merged: Iterable[Merged],
    doses: pd.DataFrame,
    recipes: Mapping[str, dict],
    seed: int = 0,
) -> pd.DataFrame:
    """One row per merge and task: its losses, its controls, and the parts of its loss.

    With L the merging loss (%) and the control scores read off the task's dose-response curve in
    `doses`: dilution = L(a), a the ingredient dose; overlap = L(c) - L(a), c the own-direction
    dose; interference = L_total - L(c). control_solo, for rules that are no weighted sum, is the
    score of the same rule with partners that changed nothing, and solo its loss. floor: a control
    (solo where it was run, else one of the two doses) below -90 %, where a partner can do no more
    harm.
    """
    known = references(bench).set_index("task")
    curves = dict(list(doses.groupby("task")))
    rows = []
    for m in tqdm(list(merged), desc="losses", unit="merge", mininterval=5):
        for i, x in enumerate(m.group):
            there = m.examples.loc[m.examples["task"] == x, ["correct", "nll", "invalid"]].mean()
            own, base, chance = known.loc[x, ["specialist", "base", "chance"]]
            a, c = m.report["ingredient"][i], m.report["own"][i]
            at_a, at_c = (evaluate.read_dose(curves[x], dose, "score") for dose in (a, c))
            plain = merging.METHODS[m.report["method"]].coefficients is not None or m.same_as
            alone = np.nan
            if not plain:
                run = at_solo(bench, x, len(m.group), recipes[m.method], seed)
                alone = run["correct"].mean()
            lost = evaluate.losses(there["correct"], own, base, chance)
            diluted, reached, solo = (
                evaluate.merging_loss(score, own) for score in (at_a, at_c, alone)
            )
            controls = (diluted, reached) if plain else (solo,)
            rows.append(
                {
                    "merge": m.name,
                    "group": "+".join(m.group),
                    "n": len(m.group),
                    "method": m.method,
                    "arm": "default",
                    "task": x,
                    "score": there["correct"],
                    **known.loc[x],
                    **lost,
                    "nll": there["nll"],
                    "invalid": there["invalid"],
                    "dose_ingredient": a,
                    "dose_own": c,
                    "control_ingredient": at_a,
                    "control_own": at_c,
                    "control_solo": alone,
                    "solo": solo,
                    "dilution": diluted,
                    "overlap": reached - diluted,
                    "interference": lost["loss"] - reached,
                    "floor": any(loss < -90 for loss in controls),  # never where undefined
                    "same_as": m.same_as or "",
                }
            )
    return pd.DataFrame(rows)


# --- from one notebook to the next -----------------------------------------------------------


def save_bench(bench: Bench, settings: dict, file: Path) -> None:
    """Write what `open_bench` needs: `settings` of `tasks.load_tasks`, names and store folders."""
    content = {
        "base": bench.base,
        "settings": settings,
        "tasks": {label: task.name for label, task in bench.tasks.items()},
        "specialists": {
            label: folder.relative_to(records.store()).as_posix()
            for label, folder in bench.specialists.items()
        },
    }
    with records.atomic_write(file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def open_bench(file: Path, model, tokenizer, base: dict) -> Bench:
    """The bench that notebook 01 left, on a live base model.

    Raises ValueError if there is none, if it was made with another base, or if a specialist is no
    longer in the store.
    """
    if not file.is_file():
        raise ValueError(f"{file.name} is not in {file.parent}: run notebook 01 with this profile")
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["base"] != base:
        raise ValueError(
            f"the specialists of {file} were made from {content['base']['name']}, "
            f"not from {base['name']}: run notebook 01 with this model first"
        )
    specialists = {x: records.store() / path for x, path in content["specialists"].items()}
    lost = [label for label, folder in specialists.items() if not folder.is_dir()]
    if lost:
        raise ValueError(
            f"the specialists {', '.join(lost)} are gone from the store: delete {file.name} in "
            f"{file.parent.name} and run the same command again"
        )
    tasks = load_tasks(content["tasks"].values(), **content["settings"])
    return Bench(model, tokenizer, base, tasks, specialists)
