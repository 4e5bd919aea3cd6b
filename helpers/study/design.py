"""Which visits make a study? From the parameters of a profile to its groups and its plan."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from helpers.study import groups, plan
from helpers.study.groups import Group
from helpers.study.plan import Plan

# The parameters that decide what is visited, as profiles and notebook 02 call them.
PARAMETERS = (
    "RULES",
    "GROUP_RULES",
    "ARMS",
    "PAIRS",
    "PARTNERS",
    "STAGES",
    "RELATIVES",
    "CROSS",
    "GROUP_SIZES",
    "GROUPS_PER_SIZE",
    "GROUP_DOSE",
    "SWAPS",
    "SWAP_RULES",
    "GROUP_SEED",
    "DOSES",
    "SEED",
)


class Groups(NamedTuple):
    """What is merged: pairs, larger groups, and swaps of members (`groups.swaps`)."""

    pairs: list[Group]
    larger: list[Group]
    swaps: pd.DataFrame


def drawn(
    tasks: Sequence[str], families: Mapping[str, str], given: Mapping[str, Any]
) -> Groups:
    """The groups that the parameters `given` draw from these tasks.

    PARTNERS: each task with as many drawn partners of other families, with RELATIVES all pairs of
    one family too; else PAIRS pairs at most. They are drawn for the first tasks first, as many as
    each of STAGES says: more tasks add pairs and drop none. Raises ValueError where that cannot be.
    """
    seed = given["GROUP_SEED"]
    if given["PARTNERS"]:
        pairs = []
        for stage in [*(n for n in given["STAGES"] if n < len(tasks)), len(tasks)]:
            first = tasks[:stage]
            pairs += groups.partners(first, given["PARTNERS"], families, seed, pairs)
    else:
        pairs = groups.pairs(tasks, given["PAIRS"], seed)
    if given["RELATIVES"]:
        pairs = list(dict.fromkeys([*pairs, *groups.relatives(tasks, families)]))
    if not pairs:
        raise ValueError(
            "there is no pair to merge: name two tasks or more, and PAIRS or PARTNERS"
        )
    sizes = [size for size in given["GROUP_SIZES"] if 2 < size <= len(tasks)]
    larger = []
    for size in sizes:
        larger += groups.draw(tasks, size, given["GROUPS_PER_SIZE"], seed)
    whole = groups.draw(tasks, max([2, *sizes]), given["SWAPS"], seed)
    return Groups(pairs, larger, groups.swaps(tasks, whole, seed))


def visits(tasks: Iterable[str], chosen: Groups, given: Mapping[str, Any]) -> Plan:
    """Every visit of a study but `plan.solos`: base, doses, merges of pairs and groups, swaps.

    With CROSS specialists are scored on the tasks of their partners as well: what they say there
    tells whose answer a merge gives. With GROUP_DOSE every rule merges the larger groups at that
    dose, in no other arm. Raises ValueError for parameters that leave a study without
    what its losses are measured by.
    """
    tasks = list(tasks)
    rules, arms, seed = given["RULES"], given["ARMS"], given["SEED"]
    if "linear" not in rules or not {0.0, 1.0} <= set(given["DOSES"]):
        raise ValueError(
            "name linear among RULES, and 0 and 1 among DOSES: losses need these"
        )
    grouped = [*rules, *given["GROUP_RULES"]]
    if not {rule for rule, _ in arms} <= set(grouped):
        raise ValueError(f"ARMS names a rule that is not merged: {arms}")
    asked = plan.base(tasks, probed=tasks)
    asked += plan.doses(tasks, given["DOSES"])
    crossed = _partners(chosen) if given["CROSS"] else {}
    asked += plan.doses(tasks, probed=tasks, partners=crossed)
    asked += plan.merges(chosen.pairs, rules, arms, seed)
    if given["GROUP_DOSE"]:
        asked += plan.at_dose(chosen.larger, grouped, given["GROUP_DOSE"], seed)
    else:
        asked += plan.merges(chosen.larger, grouped, arms, seed)
    swapped = [*chosen.swaps["tasks"], *chosen.swaps["swapped"]]
    return asked + plan.merges(swapped, given["SWAP_RULES"], seed=seed, probe=False)


def _partners(chosen: Groups) -> dict[str, list[str]]:
    """By task, those that it shares a pair or a group with."""
    met: dict[str, list[str]] = {}
    for group in [*chosen.pairs, *chosen.larger]:
        for task in group:
            others = (x for x in group if x != task)
            met[task] = list(dict.fromkeys([*met.get(task, []), *others]))
    return met


def training(tasks: Iterable[str], examples: Mapping[str, int], epochs: int) -> Plan:
    """Specialists and the screening of each on dev, for `Plan.cost`: `visit.train` makes them."""
    tasks = tuple(tasks)
    rows = []
    for x in tasks:
        about = {"examples": examples[x], "epochs": epochs}
        rows.append(plan.Row("specialist", (x,), "train", options=about))
    return Plan.of(rows) + plan.screening(tasks)


def whole(parameters: Mapping[str, Any]) -> Plan:
    """All visits and trainings of a profile's parameters, for `Plan.cost`: as if all tasks passed.

    Each task counts as a family of its own; ready SPECIALISTS are trained on nothing.
    """
    tasks = parameters["TASKS"]
    chosen = drawn(tasks, dict(zip(tasks, tasks, strict=True)), parameters)
    trained_on = 0 if parameters.get("SPECIALISTS") else parameters["TRAIN_EXAMPLES"]
    examples = dict.fromkeys(tasks, trained_on)
    trained = training(tasks, examples, parameters["EPOCHS"])
    asked = visits(tasks, chosen, parameters)
    return trained + asked + plan.solos(asked)
