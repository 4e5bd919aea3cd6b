"""How are specialists combined? Merge rules on task vectors, and a report of what each merge did.

With base theta_0, task vectors tau_i = theta_i - theta_0, n specialists and weights w_i, a rule is
a function of one tensor's task vectors that returns the merged delta of that tensor (the merged
model is theta_0 + scale * delta):

    f(taus, weights, *, options) -> Tensor of the same shape, fp32

The task vectors are dense tensors or `vectors.Lazy` ones, of which only blocks of rows are ever
dense. `density` is the fraction kept, everywhere; the global factor lambda of the papers is
`merge`'s `scale`. Arithmetic is fp32; norms and inner products are accumulated in fp64.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from helpers.vectors import Lazy, Row, row_blocks, zero

Fraction = Annotated[float, (0.0, 1.0)]
Taus = Sequence[Tensor | Lazy]
Rows = Sequence[Row] | Callable[[], Iterable[Row]]

# Blocks of rows ----------------------------------------------------------------------------------


def blockwise(kernel: Callable[[list[Tensor], int], Tensor], taus: Taus) -> Tensor:
    """The dense result of `kernel(blocks, offset)`, called on one block of rows at a time."""
    shape, result = taus[0].shape, None
    for rows, offset in row_blocks(shape, taus[0].device):
        part = kernel([tau[rows] for tau in taus], offset)
        if rows is ...:
            return part
        if result is None:
            result = torch.empty(shape, device=part.device)
        result[rows] = part
    return result


def gram_matrix(tensors: Taus) -> np.ndarray:
    """All inner products <x_i, x_j> of tensors of one shape, (n, n) in fp64."""
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for rows, _ in row_blocks(tensors[0].shape, tensors[0].device):
        block = torch.stack([tensor[rows].reshape(-1) for tensor in tensors]).double()
        total += (block @ block.T).cpu()
    return total.numpy()


def weighted_sum(taus: Taus, weights: Sequence[float]) -> Tensor:
    """sum_i w_i tau_i, added in order."""
    return blockwise(lambda blocks, _: _add_up(blocks, weights), taus)


def _add_up(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = blocks[0] * weights[0]
    for block, weight in zip(blocks[1:], weights[1:], strict=True):
        total.add_(block, alpha=weight)
    return total


# Along the sum of task vectors -------------------------------------------------------------------


def linear(taus: Taus, weights: Sequence[float]) -> Tensor:
    """Model averaging: sum_i w_i theta_i / sum_i w_i, so delta = sum_i w_i tau_i / sum_i w_i.

    Equal weights: model soups (Wortsman et al. 2022). Every tensor alike. ValueError if sum w_i =
    0.
    """
    total = math.fsum(weights)
    if total == 0:
        raise ValueError("the weights of linear must not sum to zero")
    return weighted_sum(taus, [w / total for w in weights])


def task_arithmetic(taus: Taus, weights: Sequence[float]) -> Tensor:
    """delta = sum_i w_i tau_i (Ilharco et al. 2023, eq. 1). Every tensor alike."""
    return weighted_sum(taus, weights)


SLERP_THRESHOLD = 0.9995  # mergekit's: above this |cosine| the interpolation is linear


class Arc(NamedTuple):
    """Where an interpolation ends, on_base * theta_0 + sum_i on_taus[i] * tau_i, and its steps."""

    on_base: float
    on_taus: list[float]
    lerp: int
    slerp: int


def spherical(gram: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, int]:
    """Coefficients of the iterated spherical interpolation of n points; number of linear steps.

    gram: (n, n) inner products of the points. Point i is reached from the interpolation of those
    before it at t = w_i / (w_1 + .. + w_i). One step from a to b: (sin((1-t) angle) a + sin(t
    angle) b) / sin(angle) with the angle between the directions of a and b applied to the raw
    points; (1-t) a + t b where |cos| > 0.9995 (Shoemake 1985; threshold and raw points as
    mergekit).
    """
    coefficients, total, linear_steps = np.eye(len(weights))[0], weights[0], 0
    for i in range(1, len(weights)):
        total += weights[i]
        t = weights[i] / total if total else 0.0
        length, other = np.sqrt(coefficients @ gram @ coefficients), np.sqrt(gram[i, i])
        dot = coefficients @ gram[i]
        cosine = dot / (length * other) if length > 1e-8 and other > 1e-8 else 0.0
        if abs(cosine) > SLERP_THRESHOLD:
            ours, theirs = 1 - t, t
            linear_steps += 1
        else:
            angle = math.acos(cosine)
            ours, theirs = (
                math.sin((1 - t) * angle) / math.sin(angle),
                math.sin(t * angle) / math.sin(angle),
            )
        coefficients = ours * coefficients
        coefficients[i] = theirs
    return coefficients, linear_steps


def _slerp_arc(taus: Taus, weights: Sequence[float], base: Tensor | Lazy) -> Arc:
    models = np.hstack([np.ones((len(taus), 1)), np.eye(len(taus))])  # theta_i = theta_0 + tau_i
    gram = models @ gram_matrix([base, *taus]) @ models.T
    coefficients, lerp = spherical(gram, weights)
    steps = len(taus) - 1
    on_base = 0.0 if lerp == steps else float(coefficients.sum()) - 1
    return Arc(on_base, coefficients.tolist(), lerp, steps - lerp)


def slerp(
    taus: Taus, weights: Sequence[float], *, base: Tensor | Lazy, arc: Arc | None = None
) -> Tensor:
    """Spherical interpolation of the models themselves, tensor by tensor, flattened (`spherical`).

    Two models by definition (t = w_2 / (w_1 + w_2)); more are taken one after the other. Where the
    models are close (|cos| > 0.9995) it is the weighted mean, computed by the very function that
    `linear` uses.
    """
    arc = arc or _slerp_arc(taus, weights, base)
    if arc.on_base == 0:
        return weighted_sum(taus, arc.on_taus)
    return weighted_sum([*taus, base], [*arc.on_taus, arc.on_base])


def _task_slerp_arc(taus: Taus, weights: Sequence[float]) -> Arc:
    coefficients, lerp = spherical(gram_matrix(taus), weights)
    return Arc(0.0, coefficients.tolist(), lerp, len(taus) - 1 - lerp)


def task_slerp(taus: Taus, weights: Sequence[float], *, arc: Arc | None = None) -> Tensor:
    """Spherical interpolation of each tensor's task vectors (mergekit's nuslerp with a base)."""
    return weighted_sum(taus, (arc or _task_slerp_arc(taus, weights)).on_taus)


# Sparsify, then elect or add ---------------------------------------------------------------------


class Cut(NamedTuple):
    """What is kept: magnitudes above the threshold, those equal to it up to flat index `last`."""

    threshold: float
    last: int
    tied: int  # entries whose magnitude is the k-th largest one


def magnitude_cut(tau: Tensor | Lazy, density: float) -> Cut:
    """The cut that keeps exactly k = max(1, int(density * numel)) entries; none at density 0.

    Largest magnitudes first, ties by lowest flat index: the k first of a stable descending sort.
    """
    numel = tau.shape.numel()
    k = max(1, int(density * numel)) if density > 0 else 0
    if k == 0:
        return Cut(math.inf, -1, 0)
    if k == numel:
        return Cut(0.0, -1, 0)  # what is not above zero is zero
    magnitudes = _magnitudes(tau)
    magnitudes.partition(numel - k)  # introselect in place: 1 ns an entry, where a sort takes 70
    threshold = magnitudes[numel - k]
    tied = int(np.count_nonzero(magnitudes == threshold))
    quota = k - np.count_nonzero(magnitudes[numel - k :] > threshold)
    del magnitudes
    if threshold == 0:
        return Cut(0.0, -1, tied)
    if tied == quota:  # all ties are kept: one comparison with the next lower number does it
        return Cut(float(np.nextafter(threshold, np.float32(0))), -1, tied)
    last = np.flatnonzero(_magnitudes(tau) == threshold)[quota - 1]
    return Cut(float(threshold), int(last), tied)


def _magnitudes(tau: Tensor | Lazy) -> np.ndarray:
    flat = torch.empty(tau.shape.numel())
    for rows, offset in row_blocks(tau.shape, tau.device):
        block = tau[rows].reshape(-1)
        flat[offset : offset + block.numel()] = (
            block.abs_() if isinstance(tau, Lazy) else block.abs()
        )
    return flat.numpy()


def trim(tau: Tensor, cut: Cut, offset: int = 0) -> Tensor:
    """A block of tau that starts at flat index `offset`, its entries below the cut set to zero."""
    magnitude = tau.abs()
    keep = magnitude > cut.threshold
    if cut.last >= offset:
        tied = (magnitude == cut.threshold).reshape(-1)
        tied[cut.last + 1 - offset :] = False
        keep |= tied.view(keep.shape)
    return tau * keep


def disjoint_merge(
    kept: Sequence[Tensor], weights: Sequence[float], combine: str = "mean"
) -> Tensor:
    """Elect a sign per entry, then merge the members that agree with it (TIES, steps 2 and 3).

    Elected is the sign of sum_i w_i t_i (zero counts as +). Members are the i whose w_i t_i is not
    zero and has that sign: their sum, divided by the sum of their w_i for "mean" (where that is
    zero: by 1).
    """
    weighted = [t * w for t, w in zip(kept, weights, strict=True)]
    sign = torch.where(sum(weighted) >= 0, 1.0, -1.0)
    total, weight_sum = torch.zeros_like(sign), torch.zeros_like(sign)
    for member, weight in zip(weighted, weights, strict=True):
        agreeing = member.mul_(sign).clamp_(min=0)
        total += agreeing
        weight_sum.add_(agreeing.sign_(), alpha=weight)
    if combine == "mean":
        total /= weight_sum.masked_fill_(weight_sum == 0, 1)
    return total * sign


def ties(
    taus: Taus,
    weights: Sequence[float],
    *,
    density: Fraction = 0.2,
    scope: Literal["tensor", "model"] = "tensor",
    cuts: Sequence[Cut] | None = None,
) -> Tensor:
    """TIES (Yadav et al. 2023, alg. 1): trim each task vector, elect signs, average who agrees.

    Trimming keeps the k = max(1, int(density * numel)) largest magnitudes of each tensor, as
    mergekit and PEFT do; with `scope="model"` the authors' one threshold over the whole model,
    which `merge` finds in a pass of its own and gives as `cuts`. Every tensor alike.
    """
    cuts = cuts or [magnitude_cut(tau, density) for tau in taus]

    def kernel(blocks: list[Tensor], offset: int) -> Tensor:
        return disjoint_merge(
            [trim(b, c, offset) for b, c in zip(blocks, cuts, strict=True)], weights
        )

    return blockwise(kernel, taus)


def stream_seed(seed: int, method: str, tensor: str, label: str) -> int:
    """Seed of one model's random stream in one tensor: independent of order, shards and device."""
    return int.from_bytes(
        hashlib.sha256(json.dumps([seed, method, tensor, label]).encode()).digest()[:8]
    )


def drop(block: Tensor, bits: np.random.PCG64, density: float) -> Tensor:
    """The block, each entry kept with probability `density` by the next bits of the stream."""
    # Raw bits: the one output that numpy promises never to change. Two 32-bit numbers a draw.
    draws = bits.random_raw((block.numel() + 1) // 2).view(np.uint32)[: block.numel()]
    keep = torch.from_numpy(draws < density * 2**32).view(block.shape)
    return block * keep.to(block.device)


def drop_factor(tau: Tensor | Lazy, seed: int, density: float, rescale: str) -> float:
    """What the kept entries are multiplied by: 1 / density, which keeps the mean ("inverse"),
    or the factor that keeps the tensor's L1 norm ("l1", mergekit; 1 where a norm is below 1e-7).
    """
    if rescale == "inverse":
        return 1 / density if density > 0 else 0.0
    bits, before, after = np.random.PCG64(seed), 0.0, 0.0
    for rows, _ in row_blocks(tau.shape, tau.device):
        block = tau[rows]
        before += float(block.abs().sum(dtype=torch.float64))
        after += float(drop(block, bits, density).abs().sum(dtype=torch.float64))
    return before / after if min(before, after) >= 1e-7 else 1.0


def _after_drop(taus: Taus, seeds: Sequence[int], density: float, rescale: str, kernel) -> Tensor:
    """kernel(blocks) on the task vectors after dropping and rescaling."""
    bits = [np.random.PCG64(seed) for seed in seeds]
    factors = [drop_factor(t, seed, density, rescale) for t, seed in zip(taus, seeds, strict=True)]

    def dropped(blocks: list[Tensor], _: int) -> Tensor:
        kept = [drop(block, b, density) for block, b in zip(blocks, bits, strict=True)]
        return kernel([block.mul_(factor) for block, factor in zip(kept, factors, strict=True)])

    return blockwise(dropped, taus)


def dare(
    taus: Taus,
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: Fraction = 0.2,
    rescale: Literal["inverse", "l1"] = "inverse",
) -> Tensor:
    """DARE (Yu et al. 2024): drop entries at random, rescale the rest, then sum_i w_i tau_i.

    seeds: one per model (`stream_seed`). Every tensor alike.
    """
    return _after_drop(taus, seeds, density, rescale, lambda kept: _add_up(kept, weights))


def dare_ties(
    taus: Taus,
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: Fraction = 0.2,
    rescale: Literal["inverse", "l1"] = "inverse",
    combine: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """DARE's drop in place of TIES' trim, then sign election as in TIES. Every tensor alike.

    PEFT takes the mean of the agreeing members; mergekit their sum and rescale="l1".
    """
    return _after_drop(
        taus, seeds, density, rescale, lambda kept: disjoint_merge(kept, weights, combine)
    )


# Contracts ---------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A merge with every choice resolved."""

    method: str
    labels: list[str]
    weights: list[float]
    seed: int
    scale: float
    options: dict[str, Any]
    cuts: list[Cut] | None = None  # of the whole model, for ties with scope="model"


State = Callable[[Row, Plan], tuple[dict[str, Any], dict[str, Any]]]


class Method(NamedTuple):
    """A merge rule and its contract. Options, ranges and defaults are in the rule's annotations."""

    rule: Callable[..., Tensor]
    fewest: int = 1  # models
    weight: Callable[[int], float] = lambda n: 1.0  # default weight of each of n models
    coefficients: Callable[[Sequence[float]], list[float]] | None = None  # of a plain weighted sum
    state: State = lambda row, plan: ({}, {})  # (arguments of the rule, notes) for one tensor


def _ties_state(row: Row, plan: Plan):
    cuts = plan.cuts or [magnitude_cut(tau, plan.options["density"]) for tau in row.taus]
    return {"cuts": cuts}, {"tied": sum(cut.tied for cut in cuts)}


def _dare_state(row: Row, plan: Plan):
    return {
        "seeds": [stream_seed(plan.seed, plan.method, row.name, label) for label in plan.labels]
    }, {}


def _slerp_state(row: Row, plan: Plan):
    arc = _slerp_arc(row.taus, plan.weights, row.base)
    return {"base": row.base, "arc": arc}, {"lerp": arc.lerp, "slerp": arc.slerp}


def _task_slerp_state(row: Row, plan: Plan):
    arc = _task_slerp_arc(row.taus, plan.weights)
    return {"arc": arc}, {"lerp": arc.lerp, "slerp": arc.slerp}


def _share(n: int) -> float:
    return 1 / n


METHODS = {
    "linear": Method(linear, coefficients=lambda w: [x / math.fsum(w) for x in w]),
    "task_arithmetic": Method(task_arithmetic, coefficients=list),
    "slerp": Method(slerp, fewest=2, state=_slerp_state),
    "task_slerp": Method(task_slerp, fewest=2, state=_task_slerp_state),
    "ties": Method(ties, state=_ties_state),
    "dare": Method(dare, weight=_share, state=_dare_state),
    "dare_ties": Method(dare_ties, state=_dare_state),
}


def options_of(method: str) -> dict[str, inspect.Parameter]:
    """The options of a method that a caller may set, from its rule's annotations."""
    parameters = inspect.signature(METHODS[method].rule).parameters
    return {
        name: p
        for name, p in parameters.items()
        if get_origin(p.annotation) in (Annotated, Literal)
    }


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
        [contract.weight(n_models)] * n_models if weights is None else [float(w) for w in weights]
    )
    if len(weights) != n_models:
        raise ValueError(f"{method} got {len(weights)} weights for {n_models} models")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, not {weights}")
    if "slerp" in method and min(weights) < 0:
        raise ValueError(f"{method} interpolates: its weights must not be negative, not {weights}")
    if method == "linear" and math.fsum(weights) == 0:
        raise ValueError("the weights of linear must not sum to zero")
    return weights, {name: p.default for name, p in known.items()} | dict(options)


def _check_option(method: str, name: str, value: Any, annotation: Any) -> None:
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise ValueError(
                f"{name} of {method} must be one of {get_args(annotation)}, not {value!r}"
            )
        return
    low, high = get_args(annotation)[1]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(
            f"{name} of {method} must be a number from {low:g} to {high:g}, not {value!r}"
        )


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

    method: str
    labels: list[str]
    weights: list[float]
    seed: int
    scale: float
    options: dict[str, Any]
    per_tensor: list[dict[str, Any]]
    sketch: list[float]

    def _sum(self, key: str) -> Any:
        return (
            np.sum([t[key] for t in self.per_tensor if key in t], axis=0)
            if self.per_tensor
            else 0.0
        )

    @property
    def gram(self) -> np.ndarray:
        n = len(self.labels)
        return np.reshape(self._sum("gram"), (n, n)) if self.per_tensor else np.zeros((n, n))

    @property
    def dots(self) -> np.ndarray:
        return self._sum("dots") if self.per_tensor else np.zeros(len(self.labels))

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
        return _ratio(float(self._sum("tied")), len(self.labels) * float(self._sum("numel")))

    @property
    def slerp(self) -> dict[str, int]:
        return {key: int(self._sum(key)) for key in ("lerp", "slerp")}

    @property
    def ingredient(self) -> list[float]:
        coefficients = METHODS[self.method].coefficients
        if coefficients:
            return [self.scale * c for c in coefficients(self.weights)]
        return (np.linalg.pinv(self.gram, rcond=1e-10, hermitian=True) @ self.dots).tolist()

    @property
    def own(self) -> list[float | None]:
        return [
            float(b / g) if g > 0 else None
            for b, g in zip(self.dots, self.gram.diagonal(), strict=True)
        ]

    @property
    def rho2(self) -> float:
        a = np.array(self.ingredient)
        return _ratio(float(a @ self.gram @ a), self.norm**2)

    def as_row(self) -> dict[str, Any]:
        """The totals, flat: one row of a table of merges."""
        own = [c for c in self.own if c is not None]
        return {
            "method": self.method,
            "scale": self.scale,
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
        totals = {"ingredient": self.ingredient, "own": self.own, "norms": self.norms}
        return asdict(self) | self.as_row() | totals


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def measure(row: Row, delta: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """The numbers of one tensor that every total of the report is made of."""
    products = gram_matrix([*row.taus, delta])
    if not np.isfinite(products).all():
        culprit = next(
            (x for x, p in zip(labels, products.diagonal(), strict=False) if not np.isfinite(p)), ""
        )
        raise ValueError(f"{row.name}: {culprit or 'the merge'} holds NaN or infinite values")
    return {
        "name": row.name,
        "numel": delta.numel(),
        "gram": products[:-1, :-1].tolist(),
        "dots": products[-1, :-1].tolist(),
        "norm2": float(products[-1, -1]),
        "nonzero": int(delta.count_nonzero()),
    }


def _sketch(delta: Tensor) -> np.ndarray:
    """A linear summary of one tensor, about as long as it: entries summed by index modulo 251."""
    whole = delta.numel() // SKETCH * SKETCH
    flat = delta.reshape(-1)
    folded = flat[:whole].view(-1, SKETCH).sum(0, dtype=torch.float64)
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


def plan(
    method: str,
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    scale: float = 1.0,
    **options: Any,
) -> Plan:
    """A merge with every choice resolved and checked (`check_method`), before anything is read."""
    if len(set(labels)) != len(labels):
        raise ValueError(f"models must have different labels, not {list(labels)}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    weights, options = check_method(method, len(labels), weights, options)
    return Plan(method, list(labels), weights, seed, float(scale), options)


def merge_tensor(row: Row, plan: Plan) -> tuple[Tensor, dict[str, Any]]:
    """The merged delta of one tensor, times the plan's scale, and its record for the report."""
    contract = METHODS[plan.method]
    arguments, notes = contract.state(row, plan)
    delta = contract.rule(row.taus, plan.weights, **(plan.options | arguments))
    if plan.scale != 1:
        delta.mul_(plan.scale)
    return delta, measure(row, delta, plan.labels) | notes


def merge(
    rows: Rows,
    method: str,
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    scale: float = 1.0,
    **options: Any,
) -> tuple[dict[str, Tensor], Report]:
    """The merged delta by tensor name (fp32; the merged model is base + delta) and the report.

    rows: a list of rows (`vectors.views`), or a function that gives them anew, as some rules need
    two passes. labels: one per model, in the rows' order. Raises ValueError for a choice that the
    method's contract does not allow and for NaN or infinite values.
    """
    chosen = plan(method, labels, weights, seed, scale, **options)
    delta, records, sketch = {}, [], np.zeros(SKETCH)
    for position, row in enumerate(rows() if callable(rows) else rows):
        delta[row.name], record = merge_tensor(row, chosen)
        records.append(record)
        sketch += np.roll(_sketch(delta[row.name]), position)
    fields = chosen._asdict() | {"per_tensor": records, "sketch": sketch.tolist()}
    del fields["cuts"]
    return delta, Report(**fields)


def solo(
    rows: Rows,
    method: str,
    i: int,
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    scale: float = 1.0,
    **options: Any,
) -> tuple[dict[str, Tensor], Report]:
    """The merge with the partners' task vectors at zero: what the rule alone does to model i."""

    def alone() -> Iterable[Row]:
        for name, base, taus in rows() if callable(rows) else rows:
            yield Row(
                name, base, [t if j == i else zero(t.shape, t.device) for j, t in enumerate(taus)]
            )

    return merge(alone, method, labels, weights, seed, scale, **options)


def dose(rows: Rows, i: int, a: float) -> dict[str, Tensor]:
    """The delta a * tau_i: model i alone at dose a."""
    return {
        row.name: weighted_sum([row.taus[i]], [a]) for row in (rows() if callable(rows) else rows)
    }
