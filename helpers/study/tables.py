"""What do a study's tables say? The one reader: `Study(folder)`, and `Pairs` of its tasks.

Nothing else filters arms, joins losses with merges, or turns rows of pairs into a matrix. Reading
needs no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from helpers.study import losses as loss
from helpers.study import schema

# Matched arm -> the rule that has this scale by default, and so belongs to the arm.
REFERENCE = {"norm": "linear", "dose": "linear", "sum": "task_arithmetic"}
FROM_MERGES = ["merge", "tasks", "n", "rule", "arm", "seed", "same_as"]


@dataclass(frozen=True)
class Pairs:
    """A quantity of pairs of tasks: a matrix that carries its tasks' names.

    values: (n, n) float, nan where undefined; the diagonal always is. Directed: row = victim,
    column = partner; else symmetric.
    """

    values: NDArray
    tasks: tuple[str, ...]
    directed: bool = True

    def __post_init__(self) -> None:
        n = len(self.tasks)
        if self.values.shape != (n, n) or len(set(self.tasks)) < n:
            raise ValueError(f"needs {n} different tasks and a matrix of them")

    @classmethod
    def from_table(
        cls, frame: pd.DataFrame, column: str, tasks: Sequence[str] | None = None
    ) -> "Pairs":
        """From rows of victim and partner, or of task_a and task_b, and `column`.

        `tasks` sets order and choice (default: as they come). Raises ValueError for a pair that is
        listed twice, and for a task with itself.
        """
        directed = "victim" in frame
        names = ["victim", "partner"] if directed else ["task_a", "task_b"]
        cells = frame.set_index(names)[column].astype("Float64")
        if not directed:
            cells = pd.concat([cells, cells.swaplevel()])
        a, b = (cells.index.get_level_values(i) for i in (0, 1))
        wrong = cells.index[cells.index.duplicated() | (a == b)]
        if len(wrong):
            pair = ", ".join(wrong[0])
            raise ValueError(f"{column}: the pair {pair} is there twice, or is no pair")
        listed = dict.fromkeys(frame[names].to_numpy().ravel())
        tasks = tuple(tasks or listed)
        square = cells.unstack().reindex(index=tasks, columns=tasks)
        return cls(square.to_numpy(float, na_value=np.nan), tasks, directed)

    def of(self, a: str, b: str) -> float:
        """The value of a pair: of victim `a` with partner `b`."""
        return float(self.values[self.tasks.index(a), self.tasks.index(b)])

    def symmetric(self) -> "Pairs":
        """Mean of both directions; undefined where one is."""
        return Pairs((self.values + self.values.T) / 2, self.tasks, False)

    def select(self, tasks: Iterable[str]) -> "Pairs":
        """These tasks, in this order."""
        tasks = tuple(tasks)
        kept = [self.tasks.index(task) for task in tasks]
        return Pairs(self.values[np.ix_(kept, kept)], tasks, self.directed)

    def to_frame(self) -> pd.DataFrame:
        """Tasks by tasks, named as in a table."""
        names = ("victim", "partner") if self.directed else ("task_a", "task_b")
        rows, columns = (pd.Index(self.tasks, name=name) for name in names)
        return pd.DataFrame(self.values, rows, columns)


class Study:
    """The tables of one study: a folder of data/results, or of a run.

    Raises ValueError for a folder without losses, and for a table that breaks schema.toml.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        self._tables: dict[str, pd.DataFrame] = {}
        if not self.has("losses"):
            raise ValueError(
                f"{self.folder} holds no study: it has no losses.csv, which notebook 02 writes"
            )

    def __repr__(self) -> str:
        return f"Study({self.name}: {len(self.tasks)} tasks, {len(self.merges)} merges)"

    # --- tables ---

    def has(self, name: str) -> bool:
        """Whether the study has this table."""
        return (self.folder / schema.of(name).file).is_file()

    def table(self, name: str) -> pd.DataFrame:
        """A table as schema.toml describes it. Raises ValueError where there is none."""
        if name not in self._tables:
            self._tables[name] = schema.read(self.folder, name)
        return self._tables[name].copy()

    def joined(self, name: str) -> pd.DataFrame:
        """A table of merges with what each merge is: tasks, n, rule, arm, seed, same_as."""
        merges = self.merges[FROM_MERGES]
        return self.table(name).merge(
            merges, on="merge", how="left", validate="many_to_one"
        )

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that passed screening."""
        table = self.table("tasks")
        return list(table.loc[table.kept, "task"])

    @cached_property
    def families(self) -> dict[str, str]:
        """The family of each task."""
        table = self.table("tasks").set_index("task")
        return table.loc[self.tasks, "family"].to_dict()

    @cached_property
    def prompt(self) -> str:
        """How the tasks were asked: "bare", or "instructed" by a line in each prompt."""
        return " and ".join(self.table("tasks")["prompt"].unique())

    @cached_property
    def merges(self) -> pd.DataFrame:
        return self.table("merges")

    @cached_property
    def doses(self) -> pd.DataFrame:
        return self.table("doses")

    @cached_property
    def examples(self) -> pd.DataFrame:
        return self.table("examples")

    @cached_property
    def losses(self) -> pd.DataFrame:
        """One row per merge and task, with what the merge is, and `losses.outcomes`."""
        return loss.outcomes(self.joined("losses"), self.doses)

    @cached_property
    def false_alarms(self) -> pd.Series:
        """How often each task collapses in a merge that is as good as its specialist, at most."""
        own = self.examples[self.examples["merge"] == loss.SPECIALIST]
        chance = self.losses.groupby("task")["chance"].first()
        rates = {
            task: loss.false_alarm_rate(rows, chance[task])
            for task, rows in own.groupby("task")["correct"]
        }
        return pd.Series(rates)

    def by_cell(self) -> loss.Cells:
        """Examples of each (merge, task), copies included."""
        return loss.by_cell(self.merges, self.examples)

    def other_seeds(self) -> list["Study"]:
        """The same study from other training seeds: NAME_seed… beside it."""
        files = sorted(self.folder.parent.glob(f"{self.name}_seed*/losses.csv"))
        return [Study(file.parent) for file in files]

    # --- arms and rules ---

    @cached_property
    def scales(self) -> list[str]:
        """The arms that are a scale of whole rules: the default and the matched ones."""
        arms = dict.fromkeys(self.merges.arm)
        return [arm for arm in arms if arm == "default" or arm in REFERENCE]

    def in_arm(
        self, arm: str = "default", n: int | None = None, table: str = "losses"
    ) -> pd.DataFrame:
        """Rows of `losses` or `merges` in one arm, of merges of n.

        A matched arm includes the rule that the others are matched to (REFERENCE).
        """
        rows = getattr(self, table)
        rows = rows if n is None else rows[rows.n == n]
        chosen = rows[rows.arm == arm]
        rule = REFERENCE.get(arm)
        if rule is None or rule in set(chosen.rule):
            return chosen
        default = rows[(rows.arm == "default") & (rows.rule == rule)]
        same = default[default.tasks.isin(set(chosen.tasks))]
        return pd.concat([chosen, same.assign(arm=arm)], ignore_index=True)

    def distinct(self, arm: str = "default") -> list[str]:
        """The rules that are not, in every merge of two, a copy of another rule's merge."""
        merges = self.in_arm(arm, 2, "merges")
        copies = merges.same_as.notna().groupby(merges.rule, sort=False)
        always = copies.all()
        return list(always.index[~always])

    # --- pairs ---

    def cells(
        self, arm: str = "default", rules: Iterable[str] | None = None
    ) -> pd.DataFrame:
        """Directed cells of pairs, by default under the distinct rules: victim, partner, rule, …"""
        rules = self.distinct(arm) if rules is None else list(rules)
        losses = self.in_arm(arm, 2)
        return loss.directed(losses[losses.rule.isin(rules)])

    def outcome(
        self, column: str = "loss", rule: str = "mean", arm: str = "default"
    ) -> Pairs:
        """`column` of the cells by victim and partner; "mean": over the distinct rules.

        Undefined where it is under any of them.
        """
        rules = self.distinct(arm) if rule == "mean" else [rule]
        cells = self.cells(arm, rules)
        by_rule = []
        for name in rules:
            of_rule = cells[cells.rule == name]
            pairs = Pairs.from_table(of_rule, column, self.tasks)
            by_rule.append(pairs.values)
        return Pairs(np.mean(by_rule, axis=0), tuple(self.tasks))

    @cached_property
    def _pair_metrics(self) -> pd.DataFrame:
        """Numeric columns by pair; bound_…: means over the rules; …_a, …_b: their mean."""
        found = [
            self.table(name) for name in ("pair_predictors", "pairs") if self.has(name)
        ]
        pairs, *rest = [table.set_index(["task_a", "task_b"]) for table in found]
        for more in rest:
            pairs = pairs.combine_first(more)
        if self.has("bound"):
            pairs = pairs.join(self._bound_means(pairs.index))
        names = [name.removesuffix("_a") for name in pairs if name.endswith("_a")]
        for name in names:
            two = [f"{name}_a", f"{name}_b"]
            if two[1] in pairs:
                pairs[name] = pairs[two].mean(axis=1)
                pairs = pairs.drop(columns=two)
        limits = [name for name in pairs if name.endswith(("_low", "_high"))]
        return pairs.drop(columns=limits)

    def _bound_means(self, pairs: pd.MultiIndex) -> pd.DataFrame:
        """Means of bound.csv over the rules for each of these pairs, as bound_…"""
        bound = self.joined("bound")
        bound = bound[bound.n == 2]
        members = bound.tasks.map(frozenset)
        mean = bound.groupby(members).mean(numeric_only=True)
        mean = mean.drop(columns=["n", "seed"]).add_prefix("bound_")
        wanted = [frozenset(pair) for pair in pairs]
        return mean.reindex(wanted).set_axis(pairs)

    @cached_property
    def metrics(self) -> list[str]:
        """The pair metrics that vary and are defined for every pair that was measured."""
        table = self._pair_metrics
        varying = table.columns[table.nunique() > 1]
        return [name for name in varying if table[name].notna().all()]

    @cached_property
    def pair_metrics(self) -> list[str]:
        """All pair metrics, also those of merged pairs alone, such as cross_nll."""
        return list(self._pair_metrics)

    def metric(self, name: str) -> Pairs:
        """A metric of pairs.csv or, as bound_…, of bound.csv; symmetric."""
        if name not in self._pair_metrics:
            raise ValueError(f"{self.name} has no pair metric {name!r}")
        return Pairs.from_table(self._pair_metrics.reset_index(), name, self.tasks)

    @cached_property
    def task_metrics(self) -> pd.DataFrame:
        """The metrics of single tasks, of task_predictors.csv and task_metrics.csv, by task."""
        names = [name for name in ("task_predictors", "task_metrics") if self.has(name)]
        tables = [self.table(name).set_index("task") for name in names]
        return pd.concat(tables, axis=1).loc[self.tasks]
