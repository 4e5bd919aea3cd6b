"""How are specialists combined? Contracts of the rules, the merge, and a report of what it did.

A method is a rule (`helpers.rules`) with its contract, data that is checked before anything is
read. A merge applies the rule to every tensor that some specialist changed. Its report tells what
came out: how long the merged change is, which way it points, and how much of each specialist it
holds.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from helpers.merge import rules
from helpers.merge.vectors import Row, row_blocks

Rows = Sequence[Row] | Callable[[], Iterable[Row]]

# Contracts ---------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A merge with every choice resolved."""

    method: str
    labels: list[str]
    weights: list[float]
    seed: int
    scale: float
    options: dict[str, Any]
    cuts: list[rules.Cut] | None = None  # of the whole model, for ties with scope="model"
    grams: Mapping[str, Sequence[Tensor]] | None = None  # by tensor name, for regmean

    def choices(self) -> dict[str, Any]:
        """The plan without what is computed from the models' data."""
        return {k: v for k, v in self._asdict().items() if k not in ("cuts", "grams")}


State = Callable[[Row, Plan], tuple[dict[str, Any], dict[str, Any]]]


class Method(NamedTuple):
    """A merge rule and its contract. Options, ranges and defaults are in the rule's annotations."""

    rule: Callable[..., Tensor]
    fewest: int = 1  # models
    weight: Callable[[int], float] = lambda n: 1.0  # default weight of each of n models
    signed: bool = True  # whether a weight may be negative
    divides: bool = False  # whether the rule divides by the sum of the weights
    random: bool = False  # whether the rule drops entries at random, by the seed
    coefficients: Callable[[Sequence[float]], list[float]] | None = None  # of a plain weighted sum
    state: State = lambda row, plan: ({}, {})  # (arguments of the rule, notes) for one tensor
    memory: int = 4  # bytes held at the peak per entry of a tensor: the fp32 delta and scratch


def _ties_state(row: Row, plan: Plan):
    if plan.cuts is None:
        cuts = [rules.magnitude_cut(tau, plan.options["density"]) for tau in row.taus]
        return {"cuts": cuts}, {"tied": sum(cut.tied for cut in cuts)}
    tied = sum(
        int((tau[part].abs() == cut.threshold).sum())
        for tau, cut in zip(row.taus, plan.cuts, strict=True)
        for part, _ in row_blocks(tau.shape, tau.device)
    )
    return {"cuts": plan.cuts}, {"tied": tied}


def _dare_state(row: Row, plan: Plan):
    key = (plan.seed, plan.method, row.name)
    return {"seeds": [rules.stream_seed(*key, label) for label in plan.labels]}, {}


def _slerp_state(row: Row, plan: Plan):
    arc = rules.model_arc(row.taus, plan.weights, row.base)
    return {"base": row.base, "arc": arc}, {"lerp": arc.lerp, "slerp": arc.slerp}


def _task_slerp_state(row: Row, plan: Plan):
    arc = rules.task_arc(row.taus, plan.weights)
    return {"arc": arc}, {"lerp": arc.lerp, "slerp": arc.slerp}


def _regmean_state(row: Row, plan: Plan):
    grams = plan.grams.get(row.name)
    if grams is None:
        return {"grams": None}, {"fitted": False}
    size = row.base.shape[-1]
    for label, gram in zip(plan.labels, grams, strict=True):
        if gram.shape != (size, size) or not gram.isfinite().all():
            raise ValueError(f"{row.name}: {label} needs a finite Gram matrix {size} x {size}")
    return {"grams": grams}, {"fitted": True}


METHODS = {
    "linear": Method(
        rules.linear, divides=True, coefficients=lambda w: [x / math.fsum(w) for x in w]
    ),
    "task_arithmetic": Method(rules.task_arithmetic, coefficients=list),
    "slerp": Method(rules.slerp, 2, signed=False, divides=True, state=_slerp_state),
    "task_slerp": Method(rules.task_slerp, 2, signed=False, divides=True, state=_task_slerp_state),
    "ties": Method(rules.ties, state=_ties_state),
    "dare": Method(rules.dare, weight=lambda n: 1 / n, random=True, state=_dare_state),
    "dare_ties": Method(rules.dare_ties, random=True, state=_dare_state),
    "breadcrumbs": Method(rules.breadcrumbs),
    "iso_c": Method(rules.iso_c, memory=20),
    "tsv": Method(rules.tsv, memory=28),
    "regmean": Method(rules.regmean, signed=False, divides=True, state=_regmean_state),
}


def options_of(method: str) -> dict[str, inspect.Parameter]:
    """The options of a method that a caller may set, from its rule's annotations."""
    parameters = inspect.signature(METHODS[method].rule).parameters
    stated = (Annotated, Literal)
    return {name: p for name, p in parameters.items() if get_origin(p.annotation) in stated}


def check_method(
    method: str, n_models: int, weights: Sequence[float] | None, options: Mapping[str, Any]
) -> tuple[list[float], dict[str, Any]]:
    """Weights and options, defaults filled in; ValueError for a wrong one, before any reading."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    contract, known = METHODS[method], options_of(method)
    if n_models < contract.fewest:
        raise ValueError(f"{method} needs at least {contract.fewest} models, not {n_models}")
    for name in options.keys() - known.keys():
        raise ValueError(f"{method} has no option {name!r}: it has {', '.join(known) or 'none'}")
    for name, value in options.items():
        _check_option(method, name, value, known[name].annotation)
    weights = (
        [contract.weight(n_models)] * n_models if weights is None else list(map(float, weights))
    )
    if len(weights) != n_models:
        raise ValueError(f"{method} got {len(weights)} weights for {n_models} models")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, not {weights}")
    if not contract.signed and min(weights) < 0:
        raise ValueError(f"the weights of {method} must not be negative, not {weights}")
    if contract.divides and math.fsum(weights) == 0:
        raise ValueError(f"the weights of {method} must not sum to zero")
    return weights, {name: p.default for name, p in known.items()} | dict(options)


def _check_option(method: str, name: str, value: Any, annotation: Any) -> None:
    if get_origin(annotation) is Literal:
        right, kind = value in get_args(annotation), f"one of {get_args(annotation)}"
    else:
        low, high = get_args(annotation)[1]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right, kind = number and low <= value <= high, f"a number from {low:g} to {high:g}"
    if not right:
        raise ValueError(f"{name} of {method} must be {kind}, not {value!r}")


# The report --------------------------------------------------------------------------------------

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
    """

    plan: Plan
    per_tensor: list[dict[str, Any]]
    sketch: list[float]

    def _sum(self, key: str, start: Any = 0.0) -> Any:
        return sum((np.array(t[key]) for t in self.per_tensor if key in t), start=start)

    @property
    def gram(self) -> np.ndarray:
        return self._sum("gram", np.zeros((len(self.plan.labels),) * 2))

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
        return _ratio(float(self.dots.sum()), self.norm * float(np.sqrt(max(self.gram.sum(), 0))))

    @property
    def kept(self) -> float:
        return _ratio(float(self._sum("nonzero")), float(self._sum("numel")))

    @property
    def tie_mass(self) -> float | None:
        if not any("tied" in t for t in self.per_tensor):
            return None
        return _ratio(float(self._sum("tied")), len(self.plan.labels) * float(self._sum("numel")))

    @property
    def slerp(self) -> dict[str, int]:
        return {key: int(self._sum(key)) for key in ("lerp", "slerp")}

    @property
    def ingredient(self) -> list[float]:
        coefficients = METHODS[self.plan.method].coefficients
        if coefficients:
            return [self.plan.scale * c for c in coefficients(self.plan.weights)]
        return (np.linalg.pinv(self.gram, rcond=1e-10, hermitian=True) @ self.dots).tolist()

    @property
    def own(self) -> list[float | None]:
        return _own_doses(self.dots, self.gram.diagonal())

    @property
    def rho2(self) -> float:
        a = np.array(self.ingredient)
        return _ratio(float(a @ self.gram @ a), self.norm**2)

    def scaled(self, factor: float) -> "Report":
        """The report of the same merge times a factor."""
        powers = {"dots": 1, "norm2": 2}
        tensors = [
            t | {key: (np.array(t[key]) * factor**power).tolist() for key, power in powers.items()}
            for t in self.per_tensor
        ]
        sketch = [factor * x for x in self.sketch]
        return Report(self.plan._replace(scale=self.plan.scale * factor), tensors, sketch)

    def by_tensor(self) -> list[dict[str, Any]]:
        """The totals of `as_row` for each tensor apart, with its name and size."""
        return [
            {"name": t["name"], "numel": t["numel"]} | replace(self, per_tensor=[t]).as_row()
            for t in self.per_tensor
        ]

    def as_row(self) -> dict[str, Any]:
        """The totals, flat: one row of a table of merges."""
        own = [c for c in self.own if c is not None]
        return {
            "method": self.plan.method,
            "scale": self.plan.scale,
            "norm": self.norm,
            "effective_scale": self.effective_scale,
            "cos_sum": self.cos_sum,
            "kept": self.kept,
            "tie_mass": self.tie_mass,
            **{f"{key}_steps": count for key, count in self.slerp.items()},
            "ingredient_mean": float(np.mean(self.ingredient)),
            "own_mean": float(np.mean(own)) if own else None,
            "rho2": self.rho2,
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        data = {"per_tensor": self.per_tensor, "sketch": self.sketch}
        totals = {"ingredient": self.ingredient, "own": self.own, "norms": self.norms}
        return self.plan.choices() | data | self.as_row() | totals


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def _own_doses(dots: np.ndarray, squares: np.ndarray) -> list[float | None]:
    return [float(b / g) if g > 0 else None for b, g in zip(dots, squares, strict=True)]


def _check_finite(name: str, labels: Sequence[str], squares: np.ndarray) -> None:
    for label, square in zip(labels, squares, strict=True):
        if not np.isfinite(square):
            raise ValueError(f"{name}: {label} holds NaN or infinite values")


def _record(row: Row, delta: Tensor, products: np.ndarray) -> dict[str, Any]:
    """The numbers of one tensor that every total of the report is made of."""
    return {
        "name": row.name,
        "numel": delta.numel(),
        "gram": products[:-1, :-1].tolist(),
        "dots": products[-1, :-1].tolist(),
        "norm2": float(products[-1, -1]),
        "nonzero": _nonzero(delta),
    }


def _nonzero(delta: Tensor) -> int:
    """How many entries are not zero; on a CPU torch takes six times as long to count as NumPy."""
    counted = torch.count_nonzero(delta) if delta.is_cuda else np.count_nonzero(delta.numpy())
    return int(counted)


def _sketch(delta: Tensor) -> np.ndarray:
    """A linear summary of one tensor, about as long as it: entries summed by index modulo 251."""
    whole = delta.numel() // SKETCH * SKETCH
    flat = delta.reshape(-1)
    folded = flat[:whole].view(-1, SKETCH).sum(0).double()
    folded[: delta.numel() - whole] += flat[whole:]
    return folded.cpu().numpy()


def same(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether merges with these sketches are one merge: relative difference below 1e-6."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return bool(np.linalg.norm(a - b) <= 1e-6 * max(np.linalg.norm(a), np.linalg.norm(b)))


def delta_digest(delta: Mapping[str, Tensor]) -> str:
    """SHA-256 of a merged delta: names, shapes and bytes of its tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(delta):
        tensor = delta[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# The merge ---------------------------------------------------------------------------------------

MATCHES = ("norm", "dose")


def plan(
    method: str,
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    scale: float = 1.0,
    grams: Mapping[str, Sequence[Tensor]] | None = None,
    **options: Any,
) -> Plan:
    """A merge with every choice resolved and checked (`check_method`), before anything is read."""
    if len(set(labels)) != len(labels):
        raise ValueError(f"models must have different labels, not {list(labels)}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    weights, options = check_method(method, len(labels), weights, options)
    if (grams is None) == (method == "regmean"):
        raise ValueError("regmean, and no other method, needs the Gram matrices of its layers")
    for name, matrices in (grams or {}).items():
        if len(matrices) != len(labels):
            raise ValueError(f"{name} has {len(matrices)} Gram matrices for {len(labels)} models")
    return Plan(method, list(labels), weights, seed, float(scale), options, grams=grams)


def merge_tensors(rows: Rows, chosen: Plan) -> Iterator[tuple[Row, Tensor, dict[str, Any]]]:
    """(row, merged delta times the plan's scale, record for the report) of one tensor at a time."""
    passes = _passes(rows)
    if chosen.options.get("scope") == "model":
        cuts = rules.model_cuts(passes, len(chosen.labels), chosen.options["density"])
        chosen = chosen._replace(cuts=cuts)
    for position, row in enumerate(passes()):
        yield _merge_tensor(row, chosen, position)  # no name here holds on to a tensor given away


def _passes(rows: Rows) -> Callable[[], Iterable[Row]]:
    if isinstance(rows, Iterator):
        raise ValueError("rows must be a list or a function that gives them anew, not an iterator")
    return rows if callable(rows) else lambda: rows


def _merge_tensor(row: Row, chosen: Plan, position: int) -> tuple[Row, Tensor, dict[str, Any]]:
    if len(row.taus) != len(chosen.labels):
        raise ValueError(f"{row.name}: {len(row.taus)} models for {len(chosen.labels)} labels")
    contract = METHODS[chosen.method]
    if not hasattr(contract.rule, "kernel"):  # linear algebra stops at NaN without naming it
        _check_finite(row.name, chosen.labels, rules.gram_matrix(row.taus).diagonal())
    arguments, notes = contract.state(row, chosen)
    options = chosen.options | arguments
    delta, products = rules.with_products(contract.rule, row.taus, chosen.weights, **options)
    _check_finite(row.name, [*chosen.labels, "the merge"], products.diagonal())
    if chosen.scale != 1:
        delta.mul_(chosen.scale)
        products[-1] *= chosen.scale
        products[:, -1] *= chosen.scale
    record = _record(row, delta, products) | notes
    return row, delta, record | {"sketch": np.roll(_sketch(delta), position)}


def summary(chosen: Plan, records: Iterable[dict[str, Any]]) -> Report:
    """The report of a merge from the records of its tensors."""
    records = list(records)
    sketch = np.sum([record.pop("sketch") for record in records] or [np.zeros(SKETCH)], axis=0)
    return Report(Plan(**chosen.choices()), records, sketch.tolist())


def merge(
    rows: Rows,
    method: str,
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    scale: float = 1.0,
    match: str | None = None,
    grams: Mapping[str, Sequence[Tensor]] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Report]:
    """The merged delta by tensor name (fp32; the merged model is base + delta) and the report.

    rows: a list of rows (`vectors.views`), or a function that gives them anew, as some rules need
    more than one pass. labels: one per model, in the rows' order. match: one factor for the whole
    model that makes ||delta|| = scale * mean_i ||tau_i|| ("norm") or mean_i c_i = scale ("dose").
    grams: for regmean, by tensor name, one per model (`hidden.input_grams` of each on its own
    inputs). Raises ValueError for a choice that the method's contract does not allow and for NaN or
    infinite values.
    """
    chosen = plan(method, labels, weights, seed, scale, grams, **options)
    check_match(match)
    delta, records = {}, []
    for row, change, record in merge_tensors(rows, chosen):
        delta[row.name] = change
        records.append(record)
    report = summary(chosen, records)
    if match is not None:
        factor = match_factor(report, match)
        report = report.scaled(factor)
        for change in delta.values():
            change.mul_(factor)
    return delta, report


def matched(rows: Rows, chosen: Plan, match: str) -> Plan:
    """The plan at the scale that `match` asks for (`merge`), from a pass that keeps no delta."""
    records = map(itemgetter(2), merge_tensors(rows, chosen))
    return chosen._replace(scale=chosen.scale * match_factor(summary(chosen, records), match))


def check_match(match: str | None) -> None:
    """Raise ValueError unless `match` is one that `merge` knows, or None."""
    if match not in (None, *MATCHES):
        raise ValueError(f"match must be one of {', '.join(MATCHES)}, not {match!r}")


def match_factor(report: Report, match: str) -> float:
    """The factor that brings a merge to `match` (`merge`); ValueError if there is none."""
    now = report.effective_scale if match == "norm" else report.as_row()["own_mean"]
    if not now or now < 0:
        raise ValueError(f"{report.plan.method} cannot be matched by {match}: its {match} is {now}")
    return report.plan.scale / now


def dose(rows: Rows, i: int, a: float) -> dict[str, Tensor]:
    """The delta a * tau_i: model i alone at dose a."""
    return {row.name: rules.task_arithmetic([row.taus[i]], [a]) for row in _passes(rows)()}


def rounded(
    base: Mapping[str, Tensor],
    rows: Rows,
    delta: Mapping[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, Tensor], list[float]]:
    """What is left of a merge on a coarse grid: base on the grid, result rounded to it again.

    Returns the change from the fp32 base to that result, by name (tensors that stay are left out),
    and the dose realised for each model, <result - base on the grid, tau_i> / ||tau_i||^2, to set
    beside `Report.own`.
    """
    changes, grids = {}, {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            continue
        full = tensor.detach().float()
        if name in delta:  # the model may live on a GPU and the merge have been streamed on the CPU
            full = full.to(delta[name].device)
        grid = full.to(dtype).float()
        result = (grid + delta[name]).to(dtype).float() if name in delta else grid
        if not torch.equal(result, full):
            changes[name] = result - full
        if name in delta:
            grids[name] = result - grid
    products = sum(rules.gram_matrix([*row.taus, grids[row.name]]) for row in _passes(rows)())
    return changes, _own_doses(products[-1, :-1], products.diagonal()[:-1])
