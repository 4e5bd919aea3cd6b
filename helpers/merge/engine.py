"""How are specialists combined? The rule on every tensor that one of them changed, and a report.

Two ways to one result: `merge` holds the merged change of the whole model, `merge_tensors` gives
one tensor at a time, so that a folder can be written in the memory of its largest tensor.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.merge import rules
from helpers.merge.anatomy import depths
from helpers.merge.blocks import Block, Taus, gram_matrix, in_blocks, kernel_of
from helpers.merge.plans import RULES, MergePlan, plan
from helpers.merge.report import Report, Tally, own_doses, summary
from helpers.merge.rounding import Grid
from helpers.merge.selection import model_cuts
from helpers.merge.spectral import svc as svc_of
from helpers.merge.vectors import Row

Rows = Sequence[Row] | Callable[[], Iterable[Row]]
MATCHES = ("norm", "dose")
# of a task vector's length: a shorter merge is what rounding leaves of nothing
CANCELLED = 1e-5


def merge(
    rows: Rows,
    rule: str,
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    scale: float = 1.0,
    match: str | None = None,
    svc: float | None = None,
    lines: Sequence[float] | None = None,
    entries: int | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Report]:
    """The merged delta by tensor name (fp32; the merged model is base + delta) and the report.

    rows: a list of rows (`vectors.views`), or a function that gives them anew, as some rules need
    more than one pass. labels: one per model, in the rows' order. match: one factor for the whole
    model that makes ||delta|| = |scale| * mean_i ||tau_i|| ("norm") or mean_i c_i = scale ("dose").
    svc, lines: calibrations of the merge (`plans.plan`). entries: of the whole model, changed or
    not, over which scope="model" trims; by default those of the rows.
    Raises ValueError for a choice that the rule's contract does not allow and for NaN or infinite
    values.
    """
    chosen = plan(rule, labels, weights, seed, scale, svc, lines, **options)
    chosen = chosen._replace(entries=entries)
    check_match(match)
    delta = {}
    records = []
    for row, change, numbers in merge_tensors(rows, chosen):
        delta[row.name] = change
        records.append(numbers)
    report = summary(chosen, records)
    if match is not None:
        factor = match_factor(report, match)
        report = report.scaled(factor)
        for change in delta.values():
            change.mul_(factor)
    return delta, report


Grids = Callable[[str], Grid | None]


def merge_tensors(
    rows: Rows, chosen: MergePlan, grid_of: Grids = lambda name: None, threads: int = 1
) -> Iterator[tuple[Row, Tensor, dict[str, Any]]]:
    """(row, merged delta times the plan's scale, record for the report) of one tensor at a time.

    grid_of: the grid of a file, by tensor name: in the delta's place is then base + delta on that
    grid, and the record holds what a coarse one leaves of the change. threads: how many tensors are
    in the making at once.
    """
    passes = _passes(rows)
    if chosen.options.get("scope") == "model":

        def task_vectors() -> Iterator[Taus]:
            return (row.taus for row in passes())

        n = len(chosen.labels)
        densities = rules.each(chosen.options["density"], n)
        cuts = model_cuts(task_vectors, densities, chosen.entries)
        chosen = chosen._replace(cuts=cuts)
    if chosen.lines is not None and chosen.depths is None:
        names = [row.name for row in passes()]
        chosen = chosen._replace(depths=depths(names))

    def merged(item: tuple[int, Row]) -> tuple[Row, Tensor, dict[str, Any]]:
        position, row = item
        return _merge_tensor(row, chosen, position, grid_of(row.name))

    # no name here or in `_in_order` holds on to what is given
    items = enumerate(passes())
    if threads < 2:
        yield from map(merged, items)
    else:
        yield from _in_order(merged, items, threads)


def _in_order(work: Callable, items: Iterable, threads: int) -> Iterator:
    """What `work` makes of each item, in their order.

    A block of a tensor is too small to share, so each thread has a tensor of its own, and one more
    waits.
    """
    with ThreadPoolExecutor(
        threads, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        begun: deque[Future] = deque()
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def _passes(rows: Rows) -> Callable[[], Iterable[Row]]:
    if isinstance(rows, Iterator):
        raise ValueError(
            "rows must be a list or a function that gives them anew, not an iterator"
        )
    return rows if callable(rows) else lambda: rows


def _merge_tensor(
    row: Row, chosen: MergePlan, position: int, grid: Grid | None
) -> tuple[Row, Tensor, dict[str, Any]]:
    if len(row.taus) != len(chosen.labels):
        raise ValueError(
            f"{row.name}: {len(row.taus)} models for {len(chosen.labels)} labels"
        )
    chosen = chosen.at(row.name)
    contract = RULES[chosen.rule]
    formula = contract.formula
    if not hasattr(formula, "kernel"):  # linear algebra stops at NaN without naming it
        _check_finite(row, chosen.labels, gram_matrix(row.taus))
    arguments, notes = contract.state(row, chosen)
    if chosen.svc is not None and len(row.taus[0].shape) == 2:
        formula = partial(_calibrated, formula, chosen.svc)
    models = len(chosen.labels)
    tally = Tally(models)

    def finish(stack: Tensor, at: Block) -> Tensor:
        delta, written = stack[-2:]
        if chosen.scale != 1:
            delta.mul_(chosen.scale)
        if grid is None:
            tally.add(stack[:-1], at)
            return delta
        base = row.base[at.rows].reshape(-1)
        merged = grid(base + delta)
        if grid.is_coarse:
            torch.sub(merged, base, out=written)
        tally.add(stack if grid.is_coarse else stack[:-1], at)
        return merged

    kernel = kernel_of(formula, row.taus, chosen.weights, **chosen.options | arguments)
    result = in_blocks(kernel, row.taus, finish)
    _check_finite(
        row, [*chosen.labels, "the merge"], tally.products[: models + 1, : models + 1]
    )
    if not np.isfinite(tally.products).all():
        raise ValueError(
            f"{row.name}: the merge overflows {grid.dtype}: write it in bfloat16"
        )
    return row, result, tally.record(row.name, position) | notes


def _calibrated(
    formula: Callable, alpha: float, taus: Taus, weights: Sequence[float], **options
):
    return svc_of(formula(taus, weights, **options), taus, alpha)


def _check_finite(row: Row, labels: Sequence[str], products: np.ndarray) -> None:
    for label, square in zip(labels, products.diagonal(), strict=True):
        if np.isfinite(square):
            continue
        finite = row.base is None or bool(row.base[...].isfinite().all())
        blamed = label if finite else "the base"
        raise ValueError(f"{row.name}: {blamed} holds NaN or infinite values")


# Another scale -----------------------------------------------------------------------------------


def matched(rows: Rows, chosen: MergePlan, match: str) -> MergePlan:
    """The plan at the scale that `match` asks for (`merge`), from a pass that keeps no delta."""
    records = map(itemgetter(2), merge_tensors(rows, chosen))
    factor = match_factor(summary(chosen, records), match)
    return chosen._replace(scale=chosen.scale * factor)


def check_match(match: str | None) -> None:
    """Raise ValueError unless `match` is one that `merge` knows, or None."""
    if match not in (None, *MATCHES):
        raise ValueError(f"match must be one of {', '.join(MATCHES)}, not {match!r}")


def match_factor(report: Report, match: str) -> float:
    """The factor, above zero, that brings a merge to `match` (`merge`); ValueError if there is
    none, as where the models cancel.
    """
    scale = report.plan.scale
    now = report.effective_scale if match == "norm" else report.as_row()["own_mean"]
    asked = abs(scale) if match == "norm" else scale
    if report.effective_scale <= CANCELLED * abs(scale) or not now or asked / now <= 0:
        raise ValueError(
            f"{report.plan.rule} cannot be matched by {match}: its {match} is {now}"
        )
    return asked / now


def dose(rows: Rows, i: int, a: float) -> dict[str, Tensor]:
    """The delta a * tau_i: model i alone at dose a."""
    return {
        row.name: rules.task_arithmetic([row.taus[i]], [a]) for row in _passes(rows)()
    }


# Another grid ------------------------------------------------------------------------------------


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
    changes = {}
    steps = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            continue
        full = tensor.detach().float()
        # the model may live on a GPU and the merge have been streamed on the CPU
        if name in delta:
            full = full.to(delta[name].device)
        on_grid = Grid(dtype)(full).float()
        change = on_grid - full
        if name in delta:
            result = Grid(dtype)(on_grid + delta[name]).float()
            steps[name] = result - on_grid
            change = result - full
        if change.any():
            changes[name] = change
    products = sum(gram_matrix([*row.taus, steps[row.name]]) for row in _passes(rows)())
    return changes, own_doses(products[-1, :-1], products.diagonal()[:-1])


def check_device(device: str, others: Sequence[str] = ()) -> None:
    """Raise ValueError unless torch has this device here; `others` than cpu and cuda may do too."""
    if device not in ("cpu", *others) and not re.fullmatch(r"cuda(:\d+)?", device):
        names = ", ".join(["cpu", "cuda", "cuda:1", *others])
        raise ValueError(f"device must be one of {names}, not {device!r}")
    kind, _, number = device.partition(":")
    missing = False
    if kind == "cuda":
        missing = int(number or 0) >= torch.cuda.device_count()
    if kind == "mps":
        missing = not torch.backends.mps.is_available()
    if missing:
        raise ValueError(f"torch finds no device {device} on this machine: use cpu")
