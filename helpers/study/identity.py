"""What is a result called? Keys of what was asked, never of what rounding made of it.

Two machines name the same merge alike. An arm at a matched scale and the weights of a smallest ball
are named, not resolved: their numbers come out of the machine.
"""

from typing import NamedTuple

from helpers import merge, store
from helpers.study import scores
from helpers.study.plan import MATCHED, Row
from helpers.study.tasks import Task

VERSION = 1  # raised by hand whenever a visit computes something else
# the rule of weights at the centre of the specialists' smallest ball
CHEBYSHEV = "chebyshev"


# step, version and determinants, as `store.cached` takes them
Entry = tuple[str, int, dict]


class Identity(NamedTuple):
    """What the keys of a bench's visits are made of; tasks and specialists by label."""

    base: str
    dtype: str
    encoder: bool
    tasks: dict[str, Task]
    specialists: dict[str, str]

    def model_entry(self, row: Row) -> Entry:
        """The entry of the model that a row visits: its report, under the model's key."""
        base = {"base": self.base, "dtype": self.dtype}
        # an encoder has the specialist's head at a dose of 0, too
        untaught = row.kind == "dose" and not row.options["dose"] and not self.encoder
        if untaught or row.kind in ("base", "ability"):
            return "base", VERSION, base
        about = base | {"rule": row.rule, "arm": row.arm}
        about["specialists"] = [[x, self.specialists[x]] for x in row.tasks]
        if row.kind == "dose":
            return "dose", VERSION, about | {"dose": row.options["dose"]}
        about |= {"seed": row.seed, "options": _options(row)}
        if row.rule == CHEBYSHEV:
            about["probes"] = [self.tasks[x].digest("probe") for x in row.tasks]
        if row.kind == "solo" and row.arm in MATCHED:
            about["group"] = [[x, self.specialists[x]] for x in row.options["group"]]
        return row.kind, VERSION, about

    def model_key(self, row: Row) -> str:
        """The key of the model that a row visits, as the tables call it."""
        return store.key(*self.model_entry(row))

    def score_entry(self, row: Row, label: str) -> Entry:
        """The entry of the examples of one task under the model of a row."""
        task = self.tasks[label]
        what = {"model": self.model_key(row), "task": task.name}
        what |= {"scores": scores.VERSION, "split": task.digest(row.split)}
        what["shots"] = row.options.get("shots", 0)
        probe = self.encoder and row.kind in ("base", "ability")
        if what["shots"] or probe:
            what["shown"] = task.digest("train")
        if self.encoder and not probe:
            what["head"] = self.specialists[label]
        return "scores", VERSION, what

    def state_entry(self, row: Row, label: str) -> Entry:
        """The entry of the states of a row's model on the probes of one task."""
        task = self.tasks[label]
        what = {
            "model": self.model_key(row),
            "task": task.name,
            "probe": task.digest("probe"),
        }
        return "states", VERSION, what

    def entries(self, row: Row) -> list[str]:
        """Where in the store a visit leaves what it found: folders, relative to the store."""
        kept = [self.score_entry(row, x) for x in row.scored]
        kept += [self.state_entry(row, x) for x in row.probed]
        model = self.model_entry(row)
        if model[0] != "base":
            kept.append(model)
        return [f"{step}/{store.key(step, *what)}" for step, *what in kept]


def _options(row: Row) -> dict:
    """The options of a merge, those with defaults filled in, as defaults may change."""
    n = row.options.get("n", len(row.tasks))
    rule = "linear" if row.rule == CHEBYSHEV else row.rule
    labels = [str(i) for i in range(n)]
    plan = merge.plan(rule, labels, **row.rule_options)
    options = plan.options | {"n": n, "scale": plan.scale}
    return options if row.rule == CHEBYSHEV else options | {"weights": plan.weights}
