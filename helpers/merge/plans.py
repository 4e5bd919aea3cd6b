"""Which choices does a merge have? Each rule's contract as data, and a plan checked against it."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from torch import Tensor

from helpers.merge import rules, spectral, spherical
from helpers.merge.blocks import stacked
from helpers.merge.selection import Cut, stream_seed
from helpers.merge.vectors import Row


class MergePlan(NamedTuple):
    """A merge with every choice resolved and checked: `plan` makes it."""

    rule: str
    labels: list[str]
    weights: list[float]
    seed: int
    scale: float
    options: dict[str, Any]
    # calibrate the singular values of the merge: alpha (`spectral.svc`)
    svc: float | None = None
    # scale by depth: alpha + beta * depth (LiNeS)
    lines: tuple[float, float] | None = None
    cuts: list[Cut] | None = None  # of the whole model, for ties with scope="model"
    entries: int | None = None  # of the whole model, changed or not, for these cuts
    at_tensor: Callable[[str], tuple[list[float], dict[str, Any]]] | None = None
    # weights and options by tensor name, where they differ
    depths: dict[str, float] | None = None  # of each tensor, for lines

    def choices(self) -> dict[str, Any]:
        """The plan without what is computed from the models' data."""
        stated = self._fields[: self._fields.index("cuts")]
        chosen = {name: getattr(self, name) for name in stated}
        return {name: x for name, x in chosen.items() if x is not None}

    @property
    def is_uniform(self) -> bool:
        """Whether every tensor is merged with the same numbers."""
        return self.at_tensor is None and self.lines is None and self.svc is None

    def at(self, name: str) -> "MergePlan":
        """The plan of one tensor."""
        local = self
        if self.at_tensor is not None:
            weights, options = self.at_tensor(name)
            weights, options = check_rule(self.rule, len(self.labels), weights, options)
            local = local._replace(weights=weights, options=options)
        if self.lines is not None:
            alpha, beta = self.lines
            factor = alpha + beta * self.depths[name]
            local = local._replace(scale=self.scale * factor)
        return local


State = Callable[[Row, MergePlan], tuple[dict[str, Any], dict[str, Any]]]


class Contract(NamedTuple):
    """A merge rule and its contract. Options, ranges and defaults are in the rule's annotations."""

    formula: Callable[..., Tensor]
    fewest: int = 1  # models
    weight: Callable[[int], float] = lambda n: 1.0  # default weight of each of n models
    signed: bool = True  # whether a weight may be negative
    divides: bool = False  # whether the rule divides by the sum of the weights
    random: bool = False  # whether the rule drops entries at random, by the seed
    # of a plain weighted sum
    coefficients: Callable[[Sequence[float]], list[float]] | None = None
    # (arguments of the rule, notes) for one tensor
    state: State = lambda row, plan: ({}, {})
    # bytes held at the peak per entry of a tensor: the fp32 delta and scratch
    memory: int = 4


# What a rule is given for one tensor, and what the report notes of it ----------------------------


def _ties_state(row: Row, plan: MergePlan):
    if plan.cuts is None:
        cuts = rules.tensor_cuts(row.taus, plan.options["density"])
        return {"cuts": cuts}, {"tied": sum(cut.tied for cut in cuts)}
    tied = 0
    for tau, cut in zip(row.taus, plan.cuts, strict=True):
        for _, (block,) in stacked([tau]):
            tied += int((block.abs_() == cut.threshold).sum())
    return {"cuts": plan.cuts}, {"tied": tied}


def _dare_state(row: Row, plan: MergePlan):
    seeds = [
        stream_seed(plan.seed, plan.rule, row.name, label) for label in plan.labels
    ]
    return {"seeds": seeds}, {}


def _slerp_state(row: Row, plan: MergePlan):
    arc = spherical.model_arc(row.taus, plan.weights, row.base)
    return {"base": row.base, "arc": arc}, arc.steps


def _task_slerp_state(row: Row, plan: MergePlan):
    arc = spherical.task_arc(row.taus, plan.weights)
    return {"arc": arc}, arc.steps


def _spectral_state(row: Row, plan: MergePlan):
    shape = row.taus[0].shape
    stacked = len(shape) == 3 and "experts" in row.name
    plain = len(shape) != 2 and not stacked
    return {"stacked": stacked}, {"plain": True} if plain else {}


_averaging = partial(Contract, signed=False, divides=True)
_on_spectra = partial(Contract, state=_spectral_state, memory=28)
RULES = {
    "linear": Contract(rules.linear, divides=True, coefficients=rules.shares),
    "task_arithmetic": Contract(rules.task_arithmetic, coefficients=list),
    "slerp": _averaging(spherical.slerp, fewest=2, state=_slerp_state),
    "task_slerp": _averaging(spherical.task_slerp, fewest=2, state=_task_slerp_state),
    "ties": Contract(rules.ties, state=_ties_state),
    "dare": Contract(
        rules.dare, weight=lambda n: 1 / n, random=True, state=_dare_state
    ),
    "dare_ties": Contract(rules.dare_ties, random=True, state=_dare_state),
    "breadcrumbs": Contract(rules.breadcrumbs),
    "iso_c": _on_spectra(spectral.iso_c, memory=20),
    "iso_cts": _on_spectra(spectral.iso_cts),
    "tsv": _on_spectra(spectral.tsv),
    "actmerge": _on_spectra(spectral.actmerge, signed=False, divides=True),
}


# The check ---------------------------------------------------------------------------------------


def plan(
    rule: str,
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    scale: float = 1.0,
    svc: float | None = None,
    lines: Sequence[float] | None = None,
    **options: Any,
) -> MergePlan:
    """A merge with every choice resolved and checked (`check_rule`), before anything is read.

    svc: alpha of singular value calibration after the rule (2602.05536). lines: alpha and beta of
    layer scaling, alpha + beta * depth, the depth from 0 to 1 (LiNeS, Wang et al. 2024, eq. 3).
    """
    if len(set(labels)) != len(labels):
        raise ValueError(f"models must have different labels, not {list(labels)}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    for number in (svc, *(lines or ())):
        if number is not None and not math.isfinite(number):
            raise ValueError(f"svc and lines take finite numbers, not {number}")
    if svc is not None and svc <= 0:
        raise ValueError(f"svc must be above zero, not {svc}")
    if lines is not None and len(lines) != 2:
        raise ValueError(f"lines takes two numbers, alpha and beta, not {len(lines)}")
    weights, options = check_rule(rule, len(labels), weights, options)
    by_depth = None if lines is None else (float(lines[0]), float(lines[1]))
    return MergePlan(
        rule, list(labels), weights, seed, float(scale), options, svc, by_depth
    )


def check_rule(
    rule: str,
    n_models: int,
    weights: Sequence[float] | None,
    options: Mapping[str, Any],
) -> tuple[list[float], dict[str, Any]]:
    """Weights and options, defaults filled in; ValueError for a wrong one, before any reading."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: choose one of {', '.join(RULES)}")
    contract = RULES[rule]
    if n_models < contract.fewest:
        raise ValueError(
            f"{rule} needs at least {contract.fewest} models, not {n_models}"
        )
    available = options_of(rule)
    for name, value in options.items():
        if name not in available:
            names = ", ".join(available) or "none"
            raise ValueError(f"{rule} has no option {name!r}: it has {names}")
        for single in _singles(rule, name, value, n_models):
            _check_option(rule, name, single, available[name].annotation)
    if weights is None:
        weights = [contract.weight(n_models)] * n_models
    weights = list(map(float, weights))
    _check_weights(rule, n_models, weights)
    defaults = {name: option.default for name, option in available.items()}
    return weights, defaults | dict(options)


def _singles(rule: str, name: str, value: Any, n_models: int) -> list[Any]:
    """An option's values: of a density there may be one for each model."""
    if name != "density" or not isinstance(value, list):
        return [value]
    if len(value) != n_models:
        raise ValueError(f"{rule} got {len(value)} densities for {n_models} models")
    return value


def options_of(rule: str) -> dict[str, inspect.Parameter]:
    """The options of a rule that a caller may set, from its rule's annotations."""
    parameters = inspect.signature(RULES[rule].formula).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if get_origin(parameter.annotation) in (Annotated, Literal)
    }


def _check_option(rule: str, name: str, value: Any, annotation: Any) -> None:
    if get_origin(annotation) is Literal:
        right = value in get_args(annotation)
        kind = f"one of {get_args(annotation)}"
    else:
        low, high = get_args(annotation)[1]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = number and low <= value <= high
        kind = f"a number from {low:g} to {high:g}"
    if not right:
        raise ValueError(f"{name} of {rule} must be {kind}, not {value!r}")


def _check_weights(rule: str, n_models: int, weights: list[float]) -> None:
    contract = RULES[rule]
    if len(weights) != n_models:
        raise ValueError(f"{rule} got {len(weights)} weights for {n_models} models")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, not {weights}")
    if not contract.signed and min(weights) < 0:
        raise ValueError(f"the weights of {rule} must not be negative, not {weights}")
    if contract.divides and math.fsum(weights) == 0:
        raise ValueError(f"the weights of {rule} must not sum to zero")
