"""Advice on models: prompts, search and verdict put together, with what a person needs to act.

The content is one `Advice`; `report` shows it as text, JSON and a page.
"""

import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import pandas as pd
import yaml
from tqdm import tqdm

from helpers.advise import choices, inputs, predict
from helpers.advise.inputs import Panel
from helpers.advise.merges import Merge, alone
from helpers.advise.search import Search, propose
from helpers.advise.trial import references, trial
from helpers.merge import plan


class Advice(NamedTuple):
    """Everything that is told.

    models: `choices.decide`. merges: a dict per proposal (verdict, models, rule, weights, scale,
    prompts wanted, command, mergekit). cells: victim, partner, kept, low, high, rise, cause of
    every pair under LA. trials: the same of every trial. pairs, explained, studies: `predict`.
    """

    base: str
    sources: dict[str, str]
    keep: float
    prompts: dict[str, int]
    models: pd.DataFrame
    merges: list[dict]
    cells: pd.DataFrame
    trials: pd.DataFrame
    pairs: pd.DataFrame
    explained: pd.DataFrame
    studies: pd.DataFrame
    minutes: float
    limits: list[str]


def advise(
    base: str,
    models: Mapping[str, str],
    prompts: Mapping[str, Sequence[inputs.Prompt]],
    keep: float = 0.9,
    budget: float = 10,
    notes: Sequence[str] = (),
    **settings,
) -> Advice:
    """Advice on models (label -> folder, adapter, hub id or embedded name) of one base.

    prompts: of each model (`inputs.read_prompts`). keep: retention asked of every model. budget:
    minutes of search. notes: limits to tell beside those that are seen here. settings: device,
    dtype, tokens (`inputs.open_panel`). Raises ValueError, before any pass, for anything that
    cannot be advised on.
    """
    check(keep, budget)
    started = time.monotonic()
    panel = inputs.open_panel(base, models, prompts, **settings)
    chosen = {x: choices.split(len(panel.inputs[x])) for x in models}
    _say_costs(panel, keep, budget, chosen)
    for label in tqdm(panel.labels, desc="own answers", unit="model", disable=None):
        references(panel, label)
    with tqdm(desc="trial merges", unit="trial", disable=None) as bar:
        search = Search(partial(_measure, panel, chosen, 0, bar), keep, 60 * budget)
        proposals = propose(panel.labels, search)
        cells = pair_cells(search)
        unmoved = [x for x in panel.labels if not search.failing(alone(x, 0.0))]
        judged = choices.verdicts(proposals, search, partial(_measure, panel, chosen, 1, bar))
    pairs, explained = predict.explain(panel)
    rows = [_merge_row(i, verdict, base, models) for i, verdict in enumerate(judged, 1)]
    return Advice(
        base=base,
        sources=dict(models),
        keep=keep,
        prompts={x: len(panel.inputs[x]) for x in models},
        models=choices.decide(panel.labels, judged, search),
        merges=rows,
        cells=cells,
        trials=trial_table(search),
        pairs=pairs,
        explained=explained,
        studies=predict.verdicts(),
        minutes=(time.monotonic() - started) / 60,
        limits=[*notes, *limits_of(panel, prompts, search, unmoved)],
    )


def check(keep: float, budget: float) -> None:
    """Raise ValueError for a threshold or a budget that is none."""
    if not 0 < keep < 1:
        raise ValueError(f"keep is a share between 0 and 1, as 0.9, not {keep}")
    if not budget > 0:
        raise ValueError(f"the budget is in minutes, above 0, not {budget}")


def _measure(panel: Panel, chosen: Mapping, which: int, bar: tqdm, merge: Merge) -> pd.DataFrame:
    """A trial on the prompts that choose (0) or that judge (1)."""
    parts = {model: chosen[model][which] for model in merge.models}
    rows = trial(panel, merge, parts)
    bar.update()
    return rows


def _say_costs(panel: Panel, keep: float, budget: float, chosen: Mapping[str, tuple]) -> None:
    """On stderr, before the search: what it may take, and whether the prompts can suffice."""
    n = len(panel.labels)
    parameters = sum(p.numel() * p.element_size() for p in panel.model.parameters())
    fewest = min(len(panel.inputs[x][chosen[x][1]]) for x in panel.labels)
    print(
        f"{n} models, {n * (n - 1) // 2} pairs: at most {budget:g} minutes of trial merges beside "
        f"the models' own answers, about {2 * parameters / 1e9:.1f} GB of memory",
        file=sys.stderr,
    )
    needed = choices.prompts_needed(1.0, keep, choices.ALPHA * choices.FIRST)
    if fewest < needed:
        print(
            f"{fewest} prompts are left to judge by: to be sure of {keep:.0%}, {needed} are needed "
            f"though every answer is kept, so give {needed + needed // 3} or a lower --keep",
            file=sys.stderr,
        )


# --- tables --------------------------------------------------------------------------------------


def pair_cells(search: Search) -> pd.DataFrame:
    """victim, partner, kept, low, high, rise, cause of every pair that was tried under LA."""
    rows = []
    for merge in [m for m in search.trials if m == Merge(m.models) and len(m.models) == 2]:
        failing = search.failing(merge)
        for row in search.trials[merge].to_dict("records"):
            victim = row.pop("model")
            (partner,) = set(merge.models) - {victim}
            cause = search.cause(merge, victim) if victim in failing else ""
            rows.append({"victim": victim, "partner": partner, **row, "cause": cause})
    columns = ["victim", "partner", "kept", "low", "high", "rise", "dose", "prompts", "cause"]
    return pd.DataFrame(rows, columns=columns)


def trial_table(search: Search) -> pd.DataFrame:
    """Every trial of the search: models, rule, weights, scale, and a row for each model."""
    rows = []
    for merge, table in search.trials.items():
        about = {"models": list(merge.models), "rule": merge.rule, "scale": merge.scale}
        about["weights"] = None if merge.weights is None else list(merge.weights)
        rows += [about | row for row in table.to_dict("records")]
    return pd.DataFrame(rows)


def _merge_row(number: int, verdict: choices.Verdict, base: str, sources: Mapping) -> dict:
    merge = verdict.merge
    return {
        "verdict": verdict.verdict,
        "models": list(merge.models),
        "rule": merge.rule,
        "weights": merge.weights and list(merge.weights),
        "scale": merge.scale,
        "more_prompts": verdict.more,
        "kept": verdict.table.to_dict("records"),
        "command": merge_command(merge, base, sources, f"merged-{number}"),
        "mergekit": mergekit_yaml(merge, base, sources),
    }


def merge_command(merge: Merge, base: str, sources: Mapping[str, str], out: str) -> str:
    """The command line that makes the merge."""
    words = ["python", "-m", "helpers", "merge", "--method", merge.rule, "--base", base]
    words += ["--models", *(sources[model] for model in merge.models)]
    if merge.weights is not None:
        words += ["--weights", *map(str, merge.weights)]
    if merge.scale != 1:
        words += ["--scale", str(merge.scale)]
    return shlex.join([*words, "--out", out])


def mergekit_yaml(merge: Merge, base: str, sources: Mapping[str, str]) -> str:
    """The same merge as a mergekit configuration.

    Averaging is stated as task arithmetic at weights of sum 1: the same model, and mergekit's
    `linear` would take the base for one more.
    """
    chosen = plan(merge.rule, merge.models, merge.weights)
    average = merge.rule == "linear"
    total = math.fsum(chosen.weights) if average else 1.0
    models = []
    for model, weight in zip(merge.models, chosen.weights, strict=True):
        source = sources[model]
        if (inputs.folder_of(source) / "adapter_config.json").is_file():
            source = f"{base}+{source}"
        models.append({"model": source, "parameters": {"weight": weight / total}})
    shared: dict[str, float | bool] = {"lambda": merge.scale}
    if merge.rule == "ties":
        shared["density"] = chosen.options["density"]
        shared["normalize"] = chosen.options["combine"] == "mean"
    config = {
        "merge_method": "task_arithmetic" if average else merge.rule,
        "base_model": base,
        "models": models,
        "parameters": shared,
    }
    return yaml.safe_dump(config, sort_keys=False)


# --- limits --------------------------------------------------------------------------------------


def limits_of(
    panel: Panel,
    prompts: Mapping[str, Sequence],
    search: Search,
    unmoved: Sequence[str],
) -> list[str]:
    """What the advice cannot carry, in sentences."""
    out = []
    for model in panel.labels:
        dropped = len(prompts[model]) - len(panel.inputs[model])
        if dropped:
            out.append(f"{model}: {dropped} prompts are too long and were left out")
        cut = _cut_short(panel, model)
        if cut:
            out.append(f"{model}: {cut:.0%} of its answers count only to token {panel.tokens}")
    if unmoved:
        out.append(
            f"the base alone gives the answers of {', '.join(unmoved)} on these prompts: they do "
            "not show what these models have learned"
        )
    out += [_collision(*pair) for pair in collisions(panel)]
    if search.spent:
        out.append("the budget ended the search: the same command goes on where it stopped")
    out.append(
        "a model's own answers are the reference, right or wrong; prompts should be drawn like "
        "those that the merge will meet"
    )
    return out


def _cut_short(panel: Panel, model: str) -> float:
    """Share of a model's answers that have no end within `panel.tokens`."""
    if panel.encoder:
        return 0.0
    answers = references(panel, model)["answer"]
    return float((answers.map(len) >= panel.tokens).mean())


def collisions(panel: Panel) -> list[tuple[str, str, int]]:
    """Pairs of models that share prompts and answer them differently: (a, b, how many)."""
    answers = {}
    for model in panel.labels if not panel.encoder else ():
        own = references(panel, model)["answer"].map(tuple)
        answers[model] = dict(zip(map(tuple, panel.inputs[model]), own, strict=True))
    out = []
    for a, b in combinations(answers, 2):
        shared = answers[a].keys() & answers[b].keys()
        differ = sum(answers[a][prompt] != answers[b][prompt] for prompt in shared)
        if differ:
            out.append((a, b, differ))
    return out


def _collision(a: str, b: str, count: int) -> str:
    return (
        f"{a} and {b} answer {count} of the same prompts differently: no merge keeps both unless "
        "the prompt says which task it is"
    )
