"""What is a result called? Keys of what was asked, never of what rounding made of it.

Two machines name the same merge alike. An arm at a matched scale and the weights of a smallest ball
are named, not resolved: their numbers come out of the machine.
"""

from typing import NamedTuple

from helpers import merge, store
from helpers.study import scores
from helpers.study.plan import MATCHED, Row

VERSION = 1  # raised by hand whenever a visit computes something else
CHEBYSHEV = "chebyshev"  # the rule of weights at the centre of the specialists' smallest ball


class Task(NamedTuple):
    """A task as keys know it: its name, and the digest of each split."""

    name: str
    train: str
    dev: str
    probe: str
    test: str


class Identity(NamedTuple):
    """What the keys of a bench's visits are made of; tasks and specialists by label."""

    base: str
    dtype: str
    encoder: bool
    tasks: dict[str, Task]
    specialists: dict[str, str]


Entry = tuple[str, int, dict]  # step, version and determinants, as `store.cached` takes them


def model_entry(
    row: Row,
    identity: Identity,
) -> Entry:
    """The entry of the model that a row visits: its report, under the model's key."""
    base = {"base": identity.base, "dtype": identity.dtype}
    if row.kind in ("base", "ability") or _is_base(row, identity):
        return "base", VERSION, base
    specialists = [[x, identity.specialists[x]] for x in row.tasks]
    about = base | {
        "specialists": specialists,
        "rule": row.rule,
        "arm": row.arm,
    }
    if row.kind == "dose":
        return "dose", VERSION, about | {"dose": row.options["dose"]}
    about |= {"seed": row.seed, "options": _options(row)}
    if row.rule == CHEBYSHEV:
        about["probes"] = [identity.tasks[x].probe for x in row.tasks]
    if row.kind == "solo" and row.arm in MATCHED:
        group = row.options["group"]
        about["group"] = [[x, identity.specialists[x]] for x in group]
    return row.kind, VERSION, about


def _is_base(
    row: Row,
    identity: Identity,
) -> bool:
    """Whether a dose of 0 is the base: an encoder still has the specialist's head."""
    return row.kind == "dose" and not row.options["dose"] and not identity.encoder


def _options(row: Row) -> dict:
    """The options of a merge, those with defaults filled in, as defaults may change."""
    n = row.options.get("n", len(row.tasks))
    rule = "linear" if row.rule == CHEBYSHEV else row.rule
    labels = [str(i) for i in range(n)]
    plan = merge.plan(rule, labels, **row.rule_options)
    options = plan.options | {"n": n, "scale": plan.scale}
    return options if row.rule == CHEBYSHEV else options | {"weights": plan.weights}


def model_key(
    row: Row,
    identity: Identity,
) -> str:
    """The key of the model that a row visits, as the tables call it."""
    return store.key(*model_entry(row, identity))


def score_entry(
    row: Row,
    label: str,
    identity: Identity,
) -> Entry:
    """The entry of the examples of one task under the model of a row."""
    what, task = _reading(row, label, identity)
    what |= {"scores": scores.VERSION, "split": getattr(task, row.split)}
    what["shots"] = row.options.get("shots", 0)
    probe = identity.encoder and row.kind in ("base", "ability")
    if what["shots"] or probe:
        what["shown"] = task.train
    if identity.encoder and not probe:
        what["head"] = identity.specialists[label]
    return "scores", VERSION, what


def state_entry(
    row: Row,
    label: str,
    identity: Identity,
) -> Entry:
    """The entry of the states of a row's model on the probes of one task."""
    what, task = _reading(row, label, identity)
    return "states", VERSION, what | {"probe": task.probe}


def _reading(
    row: Row,
    label: str,
    identity: Identity,
) -> tuple[dict, Task]:
    """What every entry of a row's model on one task is made of, and the task."""
    task = identity.tasks[label]
    return {"model": model_key(row, identity), "task": task.name}, task


def entries(
    row: Row,
    identity: Identity,
) -> list[str]:
    """Where in the store a visit leaves what it found: folders, relative to the store."""
    kept = [score_entry(row, x, identity) for x in row.scored]
    kept += [state_entry(row, x, identity) for x in row.probed]
    model = model_entry(row, identity)
    if model[0] != "base":
        kept.append(model)
    return [f"{step}/{store.key(step, *what)}" for step, *what in kept]
