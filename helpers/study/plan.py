"""Which models are visited? A plan is a table: one row a visit. Builders make plans, which add up.

What it costs, what is finished and what is left are questions to that table. Nothing here needs
torch.

    plan = base(tasks) + doses(tasks, [0, 0.5, 1]) + merges(pairs(tasks), ["linear", "ties"])
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from helpers import store
from helpers.study import costs
from helpers.study.groups import Group

# Rules whose merges are weighted sums of task vectors: dose curves tell what they lose alone.
WEIGHTED = ("linear", "task_arithmetic", "chebyshev")
MATCHED = ("norm", "dose")  # arms at the scale of the group's linear average
# arms that change what the rule gave: no weighted sum any more
CALIBRATED = ("svc", "lines")
ARMS = (*MATCHED, "sum", "mask1", "mask2", "bfloat16", *CALIBRATED)
SHOTS = 4  # solved examples before a prompt of the untaught base


class Row(NamedTuple):
    """One visit: the model of `tasks`, `rule`, `arm`, `seed` and `options`, and what is read of it.

    kind: "base", "ability" (the base behind solved examples; an encoder: a linear probe), "dose"
    (one task vector, scaled), "merge", or "solo" (a rule whose partners changed nothing). Scored
    are the examples of `split` of the tasks `scored`; states are read on the probes of `probed`.
    """

    kind: str
    tasks: Group
    rule: str
    arm: str = "default"
    seed: int = 0
    options: Mapping[str, Any] = {}
    scored: Group = ()
    probed: Group = ()
    split: str = "test"

    @property
    def rule_options(self) -> dict[str, Any]:
        """The options that its rule takes: not whom a solo does without, nor a scale to find."""
        about = ("n", "group", "own_dose")
        return {name: x for name, x in self.options.items() if name not in about}

    @property
    def weighted(self) -> bool:
        """Whether the merge is a weighted sum of task vectors."""
        return self.rule in WEIGHTED and self.arm not in CALIBRATED

    @property
    def has_solo(self) -> bool:
        """Whether its rule is run without partners too: what is alone there no dose curve tells.

        Not at a dose that is asked for: each group would have solos of its own.
        """
        return not self.weighted and "own_dose" not in self.options

    @property
    def model(self) -> str:
        """What is visited, and on which split: rows that agree are one visit."""
        options = store.canonical(dict(self.options))
        return f"{self.kind} {self.tasks} {self.rule} {self.arm} {self.seed} {options} {self.split}"


@dataclass(frozen=True)
class Plan:
    """A table of visits (`Row`), each model once. Plans add up."""

    frame: pd.DataFrame

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Plan":
        """A plan of these rows; rows of one model are one visit, which reads all they ask."""
        visits: dict[str, Row] = {}
        for row in rows:
            other = visits.get(row.model, row)
            scored = tuple(dict.fromkeys([*other.scored, *row.scored]))
            probed = tuple(dict.fromkeys([*other.probed, *row.probed]))
            visits[row.model] = other._replace(scored=scored, probed=probed)
        return cls(pd.DataFrame(visits.values(), columns=Row._fields))

    def __iter__(self) -> Iterator[Row]:
        for values in self.frame[list(Row._fields)].itertuples(index=False, name=None):
            yield Row(*values)

    def __len__(self) -> int:
        return len(self.frame)

    def __add__(self, other: "Plan") -> "Plan":
        return Plan.of([*self, *other])

    def kinds(self, *kinds: str) -> "Plan":
        """The visits of these kinds."""
        return Plan(self.frame[self.frame["kind"].isin(kinds)])

    # --- questions ---

    def keyed(self, identity: Any) -> "Plan":
        """With columns key (the model's name, 16 hex digits) and entries (what the store gets).

        `identity` is what keys are made of: `Bench.identity`.
        """
        key = [identity.model_key(row) for row in self]
        return Plan(
            self.frame.assign(key=key, entries=[identity.entries(row) for row in self])
        )

    def done(self) -> pd.Series:
        """Of a keyed plan: whether the store holds all that a visit leaves."""
        folder = store.store()
        kept = [
            all((folder / name).is_dir() for name in names)
            for names in self.frame["entries"]
        ]
        return pd.Series(kept, self.frame.index, dtype=bool)

    def left(self) -> "Plan":
        """Of a keyed plan: the visits that are not done."""
        return Plan(self.frame[~self.done()])

    def cost(self, units: pd.DataFrame, sizes: Mapping[str, int]) -> pd.DataFrame:
        """Visits, CPU minutes and gigabytes in the store, by kind.

        `units` are those of `unit_costs`, `sizes` examples of each split. A bound: a task that
        fails screening is merged with none, and a merge that equals another is not read again.
        """
        works = pd.DataFrame([costs.work(row, sizes) for row in self], self.frame.index)
        works = works.reindex(columns=units.index).fillna(0.0)
        cost = works @ units[["cpu_seconds", "megabytes"]]
        kinds = cost.groupby(self.frame["kind"], sort=False)
        table = kinds.size().rename("visits").to_frame()
        table["minutes"] = kinds["cpu_seconds"].sum() / 60
        table["gigabytes"] = kinds["megabytes"].sum() / 1024
        return table


# --- builders --------------------------------------------------------------------------------


def base(tasks: Iterable[str], probed: Iterable[str] = ()) -> Plan:
    """The base as it is (an encoder's linear probe), and behind solved examples."""
    tasks = tuple(tasks)
    bare = Row("base", (), "base", scored=tasks, probed=tuple(probed))
    return Plan.of([bare]) + abilities(tasks)


def abilities(tasks: Iterable[str], split: str = "test") -> Plan:
    """What the base can do untaught, by task: behind SHOTS solved training examples."""
    shown = Row("ability", (), "base", options={"shots": SHOTS}, split=split)
    return Plan.of(shown._replace(tasks=(x,), scored=(x,)) for x in tasks)


def doses(
    tasks: Iterable[str],
    at: Iterable[float] = (1.0,),
    probed: Iterable[str] = (),
    split: str = "test",
    partners: Mapping[str, Iterable[str]] | None = None,
) -> Plan:
    """theta_0 + dose * tau of each specialist on its own task; dose 1 is the specialist itself.

    `probed`: whose probes are read; `partners`: other tasks on which a specialist is scored too.
    """
    others = partners or {}
    rows = []
    for x in tasks:
        scored = (x, *others.get(x, ()))
        own = Row(
            "dose",
            (x,),
            "dose",
            scored=scored,
            probed=tuple(probed),
            split=split,
        )
        rows += [own._replace(options={"dose": float(dose)}) for dose in at]
    return Plan.of(rows)


def merges(
    groups: Iterable[Sequence[str]],
    rules: Iterable[str] | Mapping[str, Mapping[str, Any]],
    arms: Iterable[tuple[str, str]] = (),
    seed: int = 0,
    probe: bool = True,
) -> Plan:
    """Every group by every rule, then by the (rule, arm) of `arms` whose rule is among `rules`.

    A mapping gives a rule its options. With `probe`, and at default scale only, states are read on
    the probes of the members. Raises ValueError for an unknown arm.
    """
    rules = rules if isinstance(rules, Mapping) else dict.fromkeys(rules, {})
    rows = []
    for group in map(tuple, groups):
        probed = group if probe else ()
        of_group = Row("merge", group, "", seed=seed, scored=group)
        for rule, options in rules.items():
            rows.append(of_group._replace(rule=rule, options=options, probed=probed))
        for rule, arm in arms:
            if rule in rules:
                options = dict(rules[rule]) | in_arm(arm, len(group))
                rows.append(of_group._replace(rule=rule, arm=arm, options=options))
    return Plan.of(rows)


def at_dose(
    groups: Iterable[Sequence[str]], rules: Iterable[str], dose: float, seed: int = 0
) -> Plan:
    """Every group by every rule, scaled so that its models keep `dose` of themselves on average.

    That is their mean own-direction dose (`merge.Report.own`). So in these arms, "dose=0.5", …,
    sizes of groups and rules differ by what partners do and not by dilution.
    """
    rows = []
    for group in map(tuple, groups):
        row = Row("merge", group, "", f"dose={dose:g}", seed, scored=group)
        rows += [
            row._replace(rule=rule, options={"own_dose": float(dose)}) for rule in rules
        ]
    return Plan.of(rows)


def in_arm(arm: str, n: int) -> dict[str, Any]:
    """The options that an arm of a rule adds for n models; ValueError for an unknown arm.

    Another scale, so that rules differ in direction alone: "norm" (as long as the group's linear
    average), "dose" (mean own-direction dose as the linear average), "sum" (n times itself, the
    total weight of task arithmetic). Of a rule that drops entries at random: its next draws
    ("mask1", "mask2"). Base and result rounded to a grid: "bfloat16". Calibrated singular values:
    "svc". Scaled by depth, from 1/n in the first layer to 1 in the last (LiNeS): "lines".
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: choose one of {', '.join(ARMS)}")
    first = 1 / n
    added = {
        "sum": {"scale": float(n)},
        "svc": {"svc": 1.0},
        "lines": {"lines": [first, 1 - first]},
    }
    return added.get(arm, {})


def scale_line(group: Sequence[str], scales: Iterable[float], seed: int = 0) -> Plan:
    """theta_0 + s * (sum of the task vectors) at each scale s: arms "scale=0.25", …"""
    group = tuple(group)
    summed = Row("merge", group, "task_arithmetic", seed=seed, scored=group)
    return Plan.of(
        summed._replace(arm=f"scale={scale:g}", options={"scale": float(scale)})
        for scale in scales
    )


def solos(plan: Plan) -> Plan:
    """The controls of the merges in `plan` that have one (`Row.has_solo`): each rule, no partner.

    The partners of a task changed nothing, so groups of one size share a run; not at a matched
    scale, which is that of the group.
    """
    rows = []
    for row in plan.kinds("merge"):
        if not row.has_solo:
            continue
        about = dict(row.options) | {"n": len(row.tasks)}
        if row.arm in MATCHED:
            about["group"] = list(row.tasks)
        for x in row.tasks:
            rows.append(Row("solo", (x,), row.rule, row.arm, row.seed, about, (x,)))
    return Plan.of(rows)


def screening(tasks: Iterable[str]) -> Plan:
    """What screening asks of tasks: dev scores of the specialist and of the untaught base."""
    tasks = tuple(tasks)
    return abilities(tasks, "dev") + doses(tasks, [1.0], split="dev")
