"""Advice on models: prompts, search and verdict put together, with what a person needs to act.

The content is one `Advice`; `report` shows it as text, JSON and a page.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import pandas as pd
from tqdm import tqdm

from helpers.advise import choices, explain, recipes
from helpers.advise.merges import Merge, alone
from helpers.advise.panel import Panel, folder_of, open_panel
from helpers.advise.prompts import Prompt
from helpers.advise.search import Search, propose
from helpers.advise.trials import references, trial

CELL = ["victim", "partner", "kept", "low", "high", "rise", "dose", "prompts", "cause"]


class Advice(NamedTuple):
    """Everything that is told.

    models: `choices.decide`. merges: a dict per proposal (verdict, models, rule, weights, scale,
    prompts wanted, command, mergekit). cells: victim, partner, kept, low, high, rise, cause of
    every pair under LA. trials: the same of every trial. pairs, studies: `explain`. spent: whether
    the budget ended the search.
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
    studies: pd.DataFrame
    minutes: float
    spent: bool
    limits: list[str]


def advise(
    base: str,
    models: Mapping[str, str],
    prompts: Mapping[str, Sequence[Prompt]],
    keep: float = 0.9,
    budget: float = 10,
    notes: Sequence[str] = (),
    **settings,
) -> Advice:
    """Advice on models (label -> folder, adapter, hub id or embedded name) of one base.

    prompts: of each model. keep: retention asked of every model. budget: minutes of search. notes:
    limits to tell beside those that are seen here. settings: of `open_panel`, device to longest.
    Raises ValueError, before any pass, for anything that cannot be advised on.
    """
    _check(keep, budget, **settings)
    started = time.monotonic()
    panel = open_panel(base, models, prompts, **settings)
    parts = {x: choices.split(len(panel.inputs[x])) for x in models}
    _print_costs(panel, keep, budget)
    with tqdm(desc="trial merges", unit="trial", disable=None) as bar:
        search = Search(partial(_measure, panel, parts, 0, bar), keep, 60 * budget)
        proposals = propose(panel.labels, search)
        cells = pair_cells(search)
        judged = choices.verdicts(
            proposals, search, partial(_measure, panel, parts, 1, bar)
        )
    return Advice(
        base=base,
        sources=dict(models),
        keep=keep,
        prompts={x: len(panel.inputs[x]) for x in models},
        models=choices.decide(panel.labels, judged, search),
        merges=_merge_rows(judged, base, models),
        cells=cells,
        trials=trial_table(search),
        pairs=explain.pairs(panel),
        studies=explain.verdicts(),
        minutes=(time.monotonic() - started) / 60,
        spent=search.spent,
        limits=[*notes, *limits_of(panel, prompts, search)],
    )


def _check(keep: float, budget: float, tokens: int = 1, **_) -> None:
    """Raise ValueError for a threshold, a budget or a length of answers that is none."""
    if not 0 < keep < 1:
        raise ValueError(f"keep is a share between 0 and 1, as 0.9, not {keep}")
    if not budget > 0:
        raise ValueError(f"the budget is in minutes, above 0, not {budget}")
    if tokens < 1:
        raise ValueError(f"1 token or more of an answer must count, not {tokens}")


def _measure(
    panel: Panel, parts: Mapping, which: int, bar: tqdm, merge: Merge
) -> pd.DataFrame:
    """A trial on the prompts that choose (0) or that judge (1)."""
    chosen = {model: parts[model][which] for model in merge.models}
    rows = trial(panel, merge, chosen)
    bar.update()
    return rows


def _print_costs(panel: Panel, keep: float, budget: float) -> None:
    """On stderr, before the search: what it may take, and whether the prompts can suffice."""
    n = len(panel.labels)
    size = sum(p.numel() * p.element_size() for p in panel.model.parameters())
    print(
        f"{n} models, each pair of them: at most {budget:g} minutes of trial merges beside "
        f"the models' own answers, about {2 * size / 1e9:.1f} GB of memory",
        file=sys.stderr,
    )
    for sentence in _too_few(panel, keep):
        print(sentence, file=sys.stderr)


def _too_few(panel: Panel, keep: float) -> list[str]:
    """One sentence if a model has too few prompts that judge to be in any safe merge."""
    judging = min(choices.left_to_judge(len(panel.inputs[x])) for x in panel.labels)
    needed, given = choices.to_be_sure(keep)
    if judging >= needed:
        return []
    return [
        f"{judging} prompts are left to judge by: to be sure of {100 * keep:.4g}%, {needed} are "
        f"needed though every answer is kept, so give {given} or more of each model, or lower keep"
    ]


# --- tables --------------------------------------------------------------------------------------


def pair_cells(search: Search) -> pd.DataFrame:
    """victim, partner, kept, low, high, rise, cause of every pair that was tried under LA."""
    averages = [m for m in search.trials if len(m.models) == 2 and m == Merge(m.models)]
    rows = []
    for merge in averages:
        failing = search.failing(merge)
        for row in search.trials[merge].to_dict("records"):
            victim = row.pop("model")
            (partner,) = set(merge.models) - {victim}
            cause = search.cause(merge, victim) if victim in failing else ""
            rows.append(row | {"victim": victim, "partner": partner, "cause": cause})
    return pd.DataFrame(rows, columns=CELL)


def trial_table(search: Search) -> pd.DataFrame:
    """Every trial of the search: models, rule, weights, scale, and a row for each model."""
    rows = []
    for merge, table in search.trials.items():
        rows += [merge._asdict() | row for row in table.to_dict("records")]
    return pd.DataFrame(rows)


def _merge_rows(
    judged: Sequence[choices.Verdict], base: str, sources: Mapping
) -> list[dict]:
    folders = {model: folder_of(source) for model, source in sources.items()}
    adapters = {
        x for x, folder in folders.items() if (folder / "adapter_config.json").is_file()
    }
    rows = []
    for number, verdict in enumerate(judged, 1):
        merge = verdict.merge
        row = {
            "verdict": verdict.verdict,
            **merge._asdict(),
            "more_prompts": verdict.more,
            "kept": verdict.table.to_dict("records"),
            "command": recipes.command(merge, base, sources, f"merged-{number}"),
            "mergekit": recipes.mergekit(merge, base, sources, adapters),
        }
        rows.append(row)
    return rows


# --- limits --------------------------------------------------------------------------------------


def limits_of(
    panel: Panel, prompts: Mapping[str, Sequence], search: Search
) -> list[str]:
    """What the advice cannot carry, in sentences."""
    out = _too_few(panel, search.keep)
    for model in panel.labels:
        dropped = len(prompts[model]) - len(panel.inputs[model])
        if dropped:
            out.append(f"{model}: {dropped} prompts are too long and were left out")
        cut = _cut_short(panel, model)
        if cut:
            out.append(
                f"{model}: {cut:.0%} of its answers count only to token {panel.tokens}"
            )
    unmoved = [model for model in panel.labels if not search.failing(alone(model, 0.0))]
    if unmoved:
        out.append(
            f"the base alone gives the answers of {', '.join(unmoved)} on these prompts: they do "
            "not show what these models have learned"
        )
    for a, b, count in collisions(panel):
        out.append(
            f"{a} and {b} answer {count} of the same prompts differently: no merge keeps both "
            "unless the prompt says which task it is"
        )
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
        prompts = map(tuple, panel.inputs[model])
        own = references(panel, model)["answer"]
        answers[model] = dict(zip(prompts, own, strict=True))
    out = []
    for a, b in combinations(answers, 2):
        shared = answers[a].keys() & answers[b].keys()
        differ = sum(answers[a][prompt] != answers[b][prompt] for prompt in shared)
        if differ:
            out.append((a, b, differ))
    return out
