"""What did a merge do? How long the merged change is, which way it points, how much of each it has.

It adds up over tensors: each gives a record of inner products, from which all totals follow.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.merge.blocks import Block, products
from helpers.merge.plans import RULES, MergePlan

SKETCH = 251  # prime, so that no row length lines up with it


@dataclass(frozen=True)
class Report:
    """What a merge did. `per_tensor`: each tensor's size, inner products and the rule's notes.

    Over all merged tensors, with G_ij = <tau_i, tau_j>, b_i = <delta, tau_i>: effective_scale
    ||delta|| / mean_i ||tau_i||; cos_sum the cosine of delta and sum_i tau_i; kept the fraction of
    delta's entries that are not zero; tie_mass the mean fraction of a task vector's entries whose
    magnitude equals its TIES threshold; slerp how many steps were linear and spherical. ingredient
    a_i: the coefficient that the rule gives tau_i, or for rules that are no weighted sum pinv(G) b;
    rho2 = a'Ga / ||delta||^2, the share of delta in the span of the task vectors. own c_i = b_i /
    G_ii: how far the merge goes along tau_i, whoever moved it there (None if tau_i = 0).

    Where the merge was rounded to a file's grid, own is the dose in the file and asked the one
    before rounding; left <written, delta> / ||delta||^2, the share of the change that the file has
    along itself, and cos_written the cosine of the two.
    """

    plan: MergePlan
    per_tensor: list[dict[str, Any]]
    sketch: list[float]

    def _sum(self, key: str, start: Any = 0.0) -> Any:
        return sum((np.array(t[key]) for t in self.per_tensor if key in t), start=start)

    @property
    def gram(self) -> np.ndarray:
        n = len(self.plan.labels)
        return self._sum("gram", np.zeros((n, n)))

    @property
    def dots(self) -> np.ndarray:
        return self._sum("dots", np.zeros(len(self.plan.labels)))

    @property
    def norms(self) -> list[float]:
        return np.sqrt(self.gram.diagonal()).tolist()

    @property
    def norm(self) -> float:
        return float(np.sqrt(self._sum("norm2")))

    @property
    def effective_scale(self) -> float:
        return _ratio(self.norm, float(np.mean(self.norms)))

    @property
    def cos_sum(self) -> float:
        norm_of_sum = float(np.sqrt(max(self.gram.sum(), 0)))
        return _ratio(float(self.dots.sum()), self.norm * norm_of_sum)

    @property
    def kept(self) -> float:
        return _ratio(float(self._sum("nonzero")), float(self._sum("numel")))

    @property
    def tie_mass(self) -> float | None:
        if not any("tied" in t for t in self.per_tensor):
            return None
        entries = len(self.plan.labels) * float(self._sum("numel"))
        return _ratio(float(self._sum("tied")), entries)

    @property
    def plain(self) -> int:
        """How many tensors a rule on matrices gave the plain mean."""
        return sum("plain" in record for record in self.per_tensor)

    @property
    def slerp(self) -> dict[str, int]:
        return {key: int(self._sum(key)) for key in ("lerp", "slerp")}

    @property
    def ingredient(self) -> list[float]:
        coefficients = RULES[self.plan.rule].coefficients
        if coefficients and self.plan.is_uniform:
            given = coefficients(self.plan.weights)
            return [self.plan.scale * coefficient for coefficient in given]
        inverse = np.linalg.pinv(self.gram, rcond=1e-10, hermitian=True)
        return (inverse @ self.dots).tolist()

    @property
    def asked(self) -> list[float | None]:
        return own_doses(self.dots, self.gram.diagonal())

    @property
    def own(self) -> list[float | None]:
        if not self.is_rounded:
            return self.asked
        dots = self.dots.copy()
        for record in self.per_tensor:
            if "written" in record:
                dots += np.array(record["written"]["dots"]) - record["dots"]
        return own_doses(dots, self.gram.diagonal())

    @property
    def is_rounded(self) -> bool:
        return any("written" in record for record in self.per_tensor)

    def _written(self, key: str) -> float:
        """A sum over tensors; of those that no grid changes, of the delta itself."""
        return sum(t.get("written", {}).get(key, t["norm2"]) for t in self.per_tensor)

    @property
    def left(self) -> float:
        return _ratio(self._written("along"), self.norm**2)

    @property
    def cos_written(self) -> float:
        norm = float(np.sqrt(self._written("norm2")))
        return _ratio(self._written("along"), self.norm * norm)

    @property
    def rho2(self) -> float:
        a = np.array(self.ingredient)
        return _ratio(float(a @ self.gram @ a), self.norm**2)

    def scaled(self, factor: float) -> "Report":
        """The report of the same merge times a factor."""
        tensors = []
        for record in self.per_tensor:
            dots = [factor * x for x in record["dots"]]
            tensors.append(
                record | {"dots": dots, "norm2": factor**2 * record["norm2"]}
            )
        plan = self.plan._replace(scale=self.plan.scale * factor)
        return Report(plan, tensors, [factor * x for x in self.sketch])

    def as_row(self) -> dict[str, Any]:
        """The totals, flat: one row of a table of merges."""
        own = [dose for dose in self.own if dose is not None]
        rounded = {}
        if self.is_rounded:
            rounded = {"left": self.left, "cos_written": self.cos_written}
        steps = {f"{key}_steps": count for key, count in self.slerp.items()}
        return {
            "rule": self.plan.rule,
            "scale": self.plan.scale,
            "norm": self.norm,
            "effective_scale": self.effective_scale,
            "cos_sum": self.cos_sum,
            "kept": self.kept,
            "tie_mass": self.tie_mass,
            **steps,
            "ingredient_mean": float(np.mean(self.ingredient)),
            "own_mean": float(np.mean(own)) if own else None,
            "rho2": self.rho2,
            **rounded,
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        content = self.plan.choices()
        content |= {"per_tensor": self.per_tensor, "sketch": self.sketch}
        content |= self.as_row()
        content |= {"ingredient": self.ingredient, "own": self.own, "norms": self.norms}
        if self.is_rounded:
            content["asked"] = self.asked
        return content


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def own_doses(dots: np.ndarray, squares: np.ndarray) -> list[float | None]:
    """<x, tau_i> / ||tau_i||^2 from the products and the squares, None where tau_i = 0."""
    doses = []
    for dot, square in zip(dots, squares, strict=True):
        doses.append(float(dot / square) if square > 0 else None)
    return doses


def summary(plan: MergePlan, records: Iterable[dict[str, Any]]) -> Report:
    """The report of a merge from the records of its tensors."""
    records = list(records)
    sketches = [record.pop("sketch") for record in records] or [np.zeros(SKETCH)]
    sketch = np.sum(sketches, axis=0)
    return Report(plan._replace(cuts=None), records, sketch.tolist())


class Tally:
    """What is measured of one tensor's merge, a block after the other while it is in the cache."""

    def __init__(self, models: int):
        self.models = models
        self.numel = 0
        self.nonzero = 0
        self.products = np.zeros(())
        self.sketch = np.zeros(SKETCH)

    def add(self, stack: Tensor, at: Block) -> None:
        """stack: a block of the task vectors, of the delta and, on a coarse grid, of what the merge
        in the file differs by from the base.
        """
        delta = stack[self.models]
        self.numel += delta.numel()
        self.nonzero += _nonzero(delta)
        self.products = self.products + products(stack)
        self.sketch += np.roll(_sketch(delta), at.offset)

    def record(self, name: str, position: int) -> dict[str, Any]:
        """The numbers of the tensor that every total of the report is made of.

        position: of the tensor in the merge.
        """
        n, table = self.models, self.products
        numbers = {
            "name": name,
            "numel": self.numel,
            "gram": table[:n, :n].tolist(),
            "dots": table[n, :n].tolist(),
            "norm2": float(table[n, n]),
            "nonzero": self.nonzero,
            "sketch": np.roll(self.sketch, position),
        }
        if len(table) > n + 1:
            numbers["written"] = {
                "dots": table[n + 1, :n].tolist(),
                "along": float(table[n + 1, n]),
                "norm2": float(table[n + 1, n + 1]),
            }
        return numbers


def _nonzero(delta: Tensor) -> int:
    """How many entries are not zero; on a CPU NumPy is six times as fast, if it counts booleans."""
    if delta.is_cuda:
        return int(torch.count_nonzero(delta))
    return int(np.count_nonzero(delta.numpy() != 0))


def _sketch(delta: Tensor) -> np.ndarray:
    """A linear summary, about as long as the tensor: entries summed by index modulo 251."""
    whole = delta.numel() // SKETCH * SKETCH
    rows = delta[:whole].view(-1, SKETCH)
    rest = delta[whole:]
    folded = rows.sum(0).double()
    folded[: len(rest)] += rest
    return folded.cpu().numpy()


# Are two merges the same? ------------------------------------------------------------------------


def same(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether merges with these sketches are one merge: relative difference below 1e-6."""
    difference = np.linalg.norm(np.subtract(a, b))
    return bool(difference <= 1e-6 * max(np.linalg.norm(a), np.linalg.norm(b)))


def delta_digest(delta: Mapping[str, Tensor]) -> str:
    """SHA-256 of a merged delta: names, shapes and bytes of its tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(delta):
        tensor = delta[name].detach().cpu().contiguous()
        about = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        content = tensor.view(-1).view(torch.uint8)
        digest.update(about.encode())
        digest.update(content.numpy())
    return digest.hexdigest()
