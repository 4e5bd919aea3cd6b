"""How sure? Intervals, permutation tests, effect sizes, equivalence and power, on tidy frames.

Pairs of tasks share tasks, so 28 pairs of 8 tasks are not 28 independent points: what is exchanged,
left out or resampled here is the task (or, for one merge's loss, the test example), never the pair.
A matrix below is a square table over tasks with an unused diagonal; cell (i, j) of a directed one
belongs to task i in the company of task j.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import permutations as all_orders
from typing import NamedTuple

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.tools.sm_exceptions import ConvergenceWarning, SingularMatrixWarning

COLLAPSE = -30.0  # a merging loss (%) below this …
CERTAINLY = -10.0  # … whose 95 % interval ends below this is a collapse


class Interval(NamedTuple):
    """An estimate with its 95 % interval (or as stated) over n resampled units."""

    value: float
    low: float
    high: float
    n: int


class Test(NamedTuple):
    """A statistic, its two-sided permutation p, the tasks and cells it rests on, permutations."""

    __test__ = False  # not a test for pytest to collect

    value: float
    p: float
    n_tasks: int
    n_cells: int
    permutations: int


# --- one merge: losses over test examples ------------------------------------------------------


def _check_scores(merged: NDArray, specialist: NDArray) -> None:
    """Raise ValueError unless both have the same non-zero length."""
    if merged.shape != specialist.shape or merged.ndim != 1 or merged.size == 0:
        raise ValueError(
            f"merged and specialist need scores of the same examples, got shapes {merged.shape} "
            f"and {specialist.shape}"
        )


@lru_cache(maxsize=8)  # a study asks for thousands of intervals over few sizes
def _resamples(sizes: tuple[int, ...], draws: int, seed: int) -> list[NDArray]:
    """How often each example is drawn, (draws, n) for each of the sizes n, drawn independently."""
    rng = np.random.default_rng(seed)
    return [rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float) for n in sizes]


def _loss(merged: ArrayLike, specialist: ArrayLike) -> NDArray:
    """(P_merged / P_specialist - 1) * 100 %, nan where the specialist scores 0."""
    merged, specialist = np.asarray(merged, float), np.asarray(specialist, float)
    known = specialist > 0
    return np.where(known, merged / np.where(known, specialist, 1) - 1, np.nan) * 100


def loss_interval(
    cells: Iterable[tuple[ArrayLike, ArrayLike]], draws: int = 2000, seed: int = 0
) -> Interval:
    """Mean merging loss (%) of the tasks of one merge, 95 % percentile interval, n = examples.

    `cells` holds one (merged, specialist) per task: scores of the same test examples. Examples are
    resampled within a task, once for both, tasks are kept. Undefined (nan) if any task's loss is.
    Two limits of the bootstrap: it sees no variation where all scores agree, and it knows nothing
    of training. Raises ValueError unless both have scores of the same examples, one at least.
    """
    cells = [(np.asarray(m, float), np.asarray(s, float)) for m, s in cells]
    for m, s in cells:
        _check_scores(m, s)
    counts = _resamples(tuple(m.size for m, _ in cells), draws, seed)
    of_tasks = [_loss(c @ m, c @ s) for c, (m, s) in zip(counts, cells, strict=True)]
    drawn = np.mean(of_tasks, axis=0)
    value = float(np.mean([_loss(m.mean(), s.mean()) for m, s in cells]))
    n = sum(m.size for m, _ in cells)
    if math.isnan(value):
        return Interval(math.nan, math.nan, math.nan, n)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high), n)


def collapsed(loss: ArrayLike, high: ArrayLike) -> pd.arrays.BooleanArray:
    """The collapse rule: loss < -30 % and the upper end of its 95 % interval < -10 %.

    Undefined (NA) where the loss is: a specialist that scores 0 has nothing to lose.
    """
    loss, high = np.atleast_1d(np.asarray(loss, float)), np.atleast_1d(np.asarray(high, float))
    answer = pd.array((loss < COLLAPSE) & (high < CERTAINLY), dtype="boolean")
    answer[np.isnan(loss)] = pd.NA
    return answer


def false_collapse_rate(specialist: ArrayLike, repeats: int = 500, seed: int = 0) -> float:
    """How often the collapse rule fires on a specialist against itself.

    Its test examples are split at random into two halves, one called the merge: share of splits
    that "collapse". Halving doubles the noise of the full rule, so this is an upper figure.
    """
    rng = np.random.default_rng(seed)
    scores = np.asarray(specialist, float)
    half = scores.size // 2
    fired = []
    for _ in range(repeats):
        shuffled = rng.permutation(scores)
        halves = [(shuffled[:half], shuffled[half : 2 * half])]
        found = loss_interval(halves, 200, int(rng.integers(2**31)))
        fired.append(collapsed(found.value, found.high)[0])
    return float(pd.array(fired, dtype="boolean").fillna(False).mean())


# --- matrices over tasks -----------------------------------------------------------------------


def square(pairs: pd.DataFrame, column: str, tasks: Sequence[str] | None = None) -> pd.DataFrame:
    """Symmetric matrix of a pair quantity; `pairs` has columns task_a, task_b and `column`.

    `tasks` sets the order (default: as they come). Raises ValueError if a pair is listed twice.
    """
    flipped = pairs.rename(columns={"task_a": "task_b", "task_b": "task_a"})
    both = pd.concat([pairs, flipped])
    if both.duplicated(["task_a", "task_b"]).any():
        raise ValueError(f"a pair is listed twice (or a task with itself) in the table of {column}")
    tasks = tasks or list(dict.fromkeys(pairs[["task_a", "task_b"]].to_numpy().ravel()))
    return both.pivot(index="task_a", columns="task_b", values=column).loc[tasks, tasks]


def _cells(n: int) -> tuple[NDArray, NDArray]:
    """Row and column indices of the off-diagonal cells of an n x n matrix."""
    return np.nonzero(~np.eye(n, dtype=bool))


def _remover(design: NDArray) -> NDArray:
    """Matrix that takes the least-squares fit on `design` out of a vector of cells."""
    left, sizes, _ = np.linalg.svd(design, full_matrices=False)
    basis = left[:, sizes > 1e-10 * sizes[0]]
    return np.eye(len(design)) - basis @ basis.T


def _design(n: int, covariates: Sequence[NDArray], specific: bool) -> NDArray:
    """Columns for the intercept, the covariates and, if `specific`, own and partner effects."""
    rows, columns = _cells(n)
    parts = [np.ones((len(rows), 1))] + [c[rows, columns][:, None] for c in covariates]
    if specific:
        parts += [np.eye(n)[rows], np.eye(n)[columns]]
    return np.concatenate(parts, axis=1)


def pair_specific(matrix: ArrayLike) -> NDArray:
    """The matrix without additive own-task (row) and partner (column) effects, least squares.

    What is left of cell (i, j) belongs to this pair alone. nan cells take no part and stay nan.
    """
    matrix = np.asarray(matrix, float)
    n = len(matrix)
    rows, columns = _cells(n)
    values = matrix[rows, columns]
    known = ~np.isnan(values)
    out = np.full((n, n), np.nan)
    left = _remover(_design(n, (), True)[known]) @ values[known]
    out[rows[known], columns[known]] = left
    return out


# --- correlation of two matrices ---------------------------------------------------------------


@lru_cache(maxsize=4)  # a study tests hundreds of metrics under the same orders
def _task_orders(n: int, permutations: int, seed: int) -> NDArray:
    """All n! orders if they are no more than `permutations` + 1, else that many drawn at random.

    The first row is the identity: counting it is the "+1 in both counts".
    """
    if math.factorial(n) <= permutations + 1:
        return np.array(list(all_orders(range(n))))
    rng = np.random.default_rng(seed)
    drawn = rng.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1)
    return np.concatenate([np.arange(n)[None], drawn])


@lru_cache(maxsize=4)
def _cell_orders(n: int, permutations: int, seed: int) -> NDArray:
    """What `_task_orders` make of the off-diagonal cells: positions in the flat matrix."""
    orders, (rows, columns) = _task_orders(n, permutations, seed), _cells(n)
    return orders[:, rows] * n + orders[:, columns]


def _check_matrices(x: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
    if (
        isinstance(x, pd.DataFrame)
        and isinstance(y, pd.DataFrame)
        and not (list(x.index) == list(y.index) == list(x.columns) == list(y.columns))
    ):
        raise ValueError("the two matrices list different tasks, or the same in another order")
    x, y = np.array(x, float), np.array(y, float)
    if x.shape != y.shape or x.ndim != 2 or x.shape[0] != x.shape[1] or len(x) < 3:
        raise ValueError(f"needs two square matrices of 3 tasks or more, got {x.shape}, {y.shape}")
    if np.isnan(x[_cells(len(x))]).any():
        raise ValueError("the predictor matrix has undefined cells; leave their tasks out")
    return x, y


def _ranked(matrix: NDArray) -> NDArray:
    """Ranks of the defined off-diagonal cells."""
    cells = _cells(len(matrix))
    out = np.full(matrix.shape, np.nan)
    out[cells] = stats.rankdata(matrix[cells], nan_policy="omit")
    return out


def mantel(
    x: ArrayLike,
    y: ArrayLike,
    covariates: Sequence[ArrayLike] = (),
    specific: bool = False,
    kind: str = "pearson",
    permutations: int = 9999,
    seed: int = 0,
) -> Test:
    """Correlation over off-diagonal cells with the task-permutation p of Mantel (1967).

    Rows and columns of `x` are permuted together, two-sided, +1 in both counts; all n! orders if
    they are few. `y` may be directed and may have undefined cells. `covariates` are matrices taken
    out of both (partial Mantel; residuals of x are permuted, Freedman & Lane 1983); `specific`
    takes additive own-task and partner effects out of both. kind: "pearson", or "spearman" (ranks
    over all cells, taken before anything is taken out). Raises ValueError for other tasks, fewer
    than 3, or undefined cells in `x`.
    """
    x, y = _check_matrices(x, y)
    covariates = [np.asarray(c, float) for c in covariates]
    if kind == "spearman":
        x, y, covariates = _ranked(x), _ranked(y), [_ranked(c) for c in covariates]
    elif kind != "pearson":
        raise ValueError(f"kind is 'pearson' or 'spearman', not {kind!r}")
    n, (rows, columns) = len(x), _cells(len(x))
    known = ~np.isnan(y[rows, columns])
    design = _design(n, covariates, specific)
    free = np.zeros((n, n))
    free[rows, columns] = _remover(design) @ x[rows, columns]
    clean = _remover(design[known])
    rows, columns = rows[known], columns[known]
    outcome = clean @ y[rows, columns]

    orders = _cell_orders(n, permutations, seed)
    if covariates or not known.all():
        predictors = free.take(orders[:, known]) @ clean
        sizes = np.linalg.norm(predictors, axis=1) * np.linalg.norm(outcome)
    else:  # what was taken out, and the size of what is left, are the same under every order
        predictors = free.take(orders)
        sizes = np.full(len(orders), np.linalg.norm(predictors[0]) * np.linalg.norm(outcome))
    # what rounding leaves of a predictor or an outcome that the removed effects explain is no r
    scale = np.linalg.norm(x[rows, columns]) * np.linalg.norm(y[rows, columns])
    if sizes[0] <= 1e-12 * scale:
        return Test(math.nan, math.nan, n, int(known.sum()), len(orders) - 1)
    r = predictors @ outcome / np.where(sizes > 0, sizes, np.inf)
    p = float(np.mean(np.abs(r) >= abs(r[0]) - 1e-12))
    return Test(float(r[0]), p, n, int(known.sum()), len(orders) - 1)


def correlation(x: ArrayLike, y: ArrayLike, specific: bool = False, kind: str = "pearson") -> float:
    """The statistic of `mantel` alone."""
    return mantel(x, y, specific=specific, kind=kind, permutations=0).value


def task_means(matrix: ArrayLike) -> NDArray:
    """Mean of each task's row without the diagonal, (n,); undefined cells take no part."""
    matrix = np.array(matrix, float)
    np.fill_diagonal(matrix, np.nan)
    known = ~np.isnan(matrix)
    return np.where(known, matrix, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)


def between(x: ArrayLike, y: ArrayLike, permutations: int = 9999, seed: int = 0) -> Test:
    """Correlation of the tasks' means of two matrices (n = tasks), with a permutation p.

    Do tasks that lie far from all others lose more, with whomever? The task labels of x's means are
    permuted, two-sided; all n! orders if they are few. nan where either does not vary.
    """
    x, y = _check_matrices(x, y)
    mean_x, mean_y = (values - values.mean() for values in (task_means(x), task_means(y)))
    orders = _task_orders(len(x), permutations, seed)
    size = np.linalg.norm(mean_x) * np.linalg.norm(mean_y)
    counts = len(x), len(x), len(orders) - 1
    if not size > 1e-12 * np.linalg.norm(task_means(x)) * np.linalg.norm(task_means(y)):
        return Test(math.nan, math.nan, *counts)
    r = mean_x[orders] @ mean_y / size
    return Test(float(r[0]), float(np.mean(np.abs(r) >= abs(r[0]) - 1e-12)), *counts)


def leave_one_out(
    x: ArrayLike, y: ArrayLike, specific: bool = False, kind: str = "pearson"
) -> NDArray:
    """The correlation without each task in turn, (n,)."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    keep = [np.delete(np.arange(len(x)), i) for i in range(len(x))]
    return np.array([correlation(x[np.ix_(k, k)], y[np.ix_(k, k)], specific, kind) for k in keep])


def jackknife_interval(
    x: ArrayLike, y: ArrayLike, specific: bool = False, kind: str = "pearson", level: float = 0.95
) -> Interval:
    """Correlation with an interval over tasks: delete-one-task jackknife of Fisher's z, t(n - 1).

    Leaving a task out leaves out all its pairs, so pairs that share tasks are no problem. It errs
    on the wide side: of simulated 95 % intervals 97-99 % cover (6 to 14 tasks). No interval (nan)
    below 5 tasks.
    """
    n = len(np.asarray(x))
    value = correlation(x, y, specific, kind)
    if n < 5:
        return Interval(value, math.nan, math.nan, n)
    z = np.arctanh(leave_one_out(x, y, specific, kind))
    se = math.sqrt((n - 1) / n * np.sum((z - z.mean()) ** 2))
    reach = stats.t.ppf(0.5 + level / 2, n - 1) * se
    low, high = np.tanh([np.arctanh(value) - reach, np.arctanh(value) + reach])
    return Interval(value, float(low), float(high), n)


def predict_left_out(x: ArrayLike, y: ArrayLike) -> float:
    """Out-of-task R^2: the share of variation that a line fitted without a task predicts for it.

    For each task, a line and a mean are fitted to the pairs of the others and both predict its
    pairs; 1 - squared error of the line / squared error of the mean, over all tasks. Negative: the
    metric predicts worse than saying the mean. nan below 4 tasks, where no line is left to fit, and
    where y does not vary.
    """
    x, y = _check_matrices(x, y)
    if len(x) < 4:
        return math.nan
    rows, columns = _cells(len(x))
    known = ~np.isnan(y[rows, columns])
    rows, columns = rows[known], columns[known]
    line = mean = 0.0
    for task in range(len(x)):
        held = (rows == task) | (columns == task)
        (fit_x, fit_y), (x_held, y_held) = (
            (x[rows[part], columns[part]], y[rows[part], columns[part]]) for part in (~held, held)
        )
        # a metric that only the task left out sets apart has no slope without it
        fitted = np.polyfit(fit_x, fit_y, 1) if np.ptp(fit_x) > 0 else [fit_y.mean()]
        line += np.sum((np.polyval(fitted, x_held) - y_held) ** 2)
        mean += np.sum((fit_y.mean() - y_held) ** 2)
    return float(1 - line / mean) if mean > 0 else math.nan


def task_bootstrap(
    matrices: Sequence[ArrayLike],
    statistic: Callable[..., float],
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """`statistic(*vectors)` of the matrices' cells, 95 % percentile interval over tasks, n = tasks.

    Tasks are drawn with replacement; a pair counts as often as its two tasks were drawn together,
    a task with itself never. That doubles the pairs' own noise, so the interval errs on the wide
    side: of simulated 95 % intervals 97-99 % cover (6 to 14 tasks).
    """
    matrices = [np.asarray(m, float) for m in matrices]
    n, rng = len(matrices[0]), np.random.default_rng(seed)
    values = []
    for draw in range(draws + 1):
        chosen = rng.integers(n, size=n) if draw else np.arange(n)
        rows, columns = np.nonzero(chosen[:, None] != chosen)
        cells = np.stack([m[chosen[rows], chosen[columns]] for m in matrices])
        cells = cells[:, ~np.isnan(cells).any(0)]
        values.append(statistic(*cells) if cells.size else math.nan)  # one task alone has no pair
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high), n)


# --- comparing, and equivalence ----------------------------------------------------------------


def stronger(
    a: ArrayLike, b: ArrayLike, y: ArrayLike, draws: int = 1000, seed: int = 0
) -> Interval:
    """|r(a, y)| - |r(b, y)| of three matrices, with an interval over tasks (`task_bootstrap`)."""

    def difference(a: NDArray, b: NDArray, y: NDArray) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            r = np.corrcoef([a, b, y])  # nan for a draw of two tasks: one pair, many times
        return abs(r[0, 2]) - abs(r[1, 2])

    return task_bootstrap([a, b, y], difference, draws, seed)


def steiger(r_ay: float, r_by: float, r_ab: float, n: int) -> tuple[float, float]:
    """Z and two-sided p for r_ay = r_by, two correlations with one y in one sample of n.

    Steiger 1980, equation 14 (Fisher's z, covariance at the pooled r). It takes n independent
    points: for pairs that share tasks it is shown beside `stronger`, not instead of it.
    """
    pooled = (r_ay + r_by) / 2
    left = r_ab * (1 - 2 * pooled**2) - pooled**2 * (1 - 2 * pooled**2 - r_ab**2) / 2
    covariance = left / (1 - pooled**2) ** 2
    z = (math.atanh(r_ay) - math.atanh(r_by)) * math.sqrt((n - 3) / (2 - 2 * covariance))
    return z, float(2 * stats.norm.sf(abs(z)))


def head_to_head(a: ArrayLike, b: ArrayLike, y: ArrayLike, specific: bool) -> dict[str, float]:
    """Does metric a go with y more closely than metric b? Steiger's test on one estimand.

    A directed y is averaged over its directions. specific: the pair residuals of the matrices, of
    which n(n-3)/2 are free; otherwise the tasks' means, n of them. Signs are turned so that both
    correlations are positive. Returns a, b (their |r|), z and p; nan below 5 tasks.
    """
    a, b, y = ((m + m.T) / 2 for m in (np.asarray(m, float) for m in (a, b, y)))
    n = len(y)
    if n < 5:
        return dict.fromkeys(("a", "b", "z", "p"), math.nan)
    upper = np.triu_indices(n, 1)
    vectors = [pair_specific(m)[upper] if specific else task_means(m) for m in (a, b, y)]
    with np.errstate(divide="ignore", invalid="ignore"):  # nan where a vector does not vary
        r_ab, r_ay, r_by = np.corrcoef(vectors)[np.triu_indices(3, 1)]
    points = n * (n - 3) // 2 + 1 if specific else n
    z, p = steiger(abs(r_ay), abs(r_by), r_ab * np.sign(r_ay * r_by), points)
    return {"a": float(abs(r_ay)), "b": float(abs(r_by)), "z": z, "p": p}


def equivalent(r: float, se: float, margin: float = 0.3) -> float:
    """p of two one-sided tests (TOST) against |rho| >= margin; small: no correlation that matters.

    `se` is the standard error of Fisher's z of `r`; the margin is fixed before looking.
    """
    z, edge = math.atanh(r), math.atanh(margin)
    return float(stats.norm.sf(min(edge - z, edge + z) / se))


def specific_se(n_tasks: int) -> float:
    """Standard error of Fisher's z of a pair-specific correlation of two symmetric matrices.

    n tasks leave n(n-3)/2 free pair residuals; 1/sqrt(n - 3) has n - 1 of them. Raises ValueError
    below 5 tasks.
    """
    free = n_tasks * (n_tasks - 3) / 2
    if free <= 2:
        raise ValueError(f"{n_tasks} tasks leave {free:.0f} free pair residuals; 5 or more needed")
    return 1 / math.sqrt(free - 2)


def fisher_interval(r: float, se: float, n: int) -> Interval:
    """95 % interval of a correlation from the standard error of its Fisher z; n as it is told."""
    reach = stats.norm.ppf(0.975) * se
    low, high = np.tanh([np.arctanh(r) - reach, np.arctanh(r) + reach])
    return Interval(r, float(low), float(high), n)


def between_interval(x: ArrayLike, y: ArrayLike) -> Interval:
    """`between`'s r with Fisher's 95 % interval, se 1/sqrt(n - 3). No interval below 5 tasks.

    Of simulated intervals 93-96 % cover (6 to 14 tasks).
    """
    r, _, n, *_ = between(x, y, permutations=0)
    return fisher_interval(r, 1 / math.sqrt(n - 3) if n >= 5 else math.nan, n)


def specific_interval(x: ArrayLike, y: ArrayLike) -> Interval:
    """Pair-specific Pearson r of two symmetric matrices, 95 % interval by `specific_se`.

    Of simulated intervals 93-97 % cover (6 to 14 tasks). A directed y is averaged over its two
    directions: a symmetric x can follow no more of it. No interval (nan) below 5 tasks.
    """
    y = np.asarray(y, float)
    r, n = correlation(np.asarray(x, float), (y + y.T) / 2, specific=True), len(y)
    return fisher_interval(r, specific_se(n) if n >= 5 else math.nan, n)


def auroc(score: ArrayLike, label: ArrayLike) -> float:
    """Chance that a positive has the higher score than a negative; nan if either is missing."""
    score, label = np.asarray(score, float), np.asarray(label, bool)
    if label.all() or not label.any():
        return math.nan
    u = stats.mannwhitneyu(score[label], score[~label]).statistic
    return float(u / (label.sum() * (~label).sum()))


def pool_correlations(r: ArrayLike, se: ArrayLike) -> dict[str, float]:
    """Random-effects meta-analysis of correlations over studies, on Fisher's z.

    `se`: standard errors of z. Paule-Mandel tau^2, Hartung-Knapp-Sidik-Jonkman interval (t with
    k - 1 degrees of freedom), never narrower than without their correction: a few studies that
    agree by luck would give one of almost no width (Roever, Knapp & Friede 2015). Returns r, low,
    high, tau2, i2, k. Raises ValueError below 2 studies.
    """
    r, se = np.asarray(r, float), np.asarray(se, float)
    if len(r) < 2:
        raise ValueError("a meta-analysis needs two studies or more")
    found = combine_effects(np.arctanh(r), se**2, method_re="iterated", use_t=True)
    spread = max(found.sd_eff_w_re, found.sd_eff_w_re_hksj)
    reach = stats.t.ppf(0.975, len(r) - 1) * spread
    pooled = np.tanh(found.mean_effect_re + reach * np.array([0, -1, 1]))
    out = dict(zip(("r", "low", "high"), map(float, pooled), strict=True))
    return out | {"tau2": float(found.tau2), "i2": float(found.i2), "k": len(r)}


# --- what the loss depends on: pair and method -------------------------------------------------


def partial_omega2(f: float, df: float, df_error: float, n: int) -> Interval:
    """Partial omega squared of an effect from its F, with the interval that inverts noncentral F.

    df (F - 1) / (df (F - 1) + n); limits lambda / (lambda + n) at the noncentralities lambda whose
    F has .975 and .025 of its mass below the one seen (Steiger 2004). n: observations.
    """

    def limit(mass: float) -> float:
        def excess(nc: float) -> float:
            return stats.ncf.cdf(f, df, df_error, nc) - mass

        if stats.f.cdf(f, df, df_error) < mass:
            return 0.0
        top = 4 * df * f + 100
        while excess(top) > 0:
            top *= 2
        return optimize.brentq(excess, 1e-9, top)

    low, high = limit(0.975), limit(0.025)
    gain = df * (f - 1)
    return Interval(max(gain / (gain + n), 0.0), low / (low + n), high / (high + n), n)


def block_model(losses: pd.DataFrame, permutations: int = 9999, seed: int = 0) -> pd.DataFrame:
    """The model loss ~ pair + method: one row per effect.

    `losses`: columns task_a, task_b, method, loss; one row per pair and method. F and its textbook
    p come with partial omega squared [omega2_low, omega2_high] and a permutation p of F: for
    `method`, methods are exchanged within each pair; for `pair`, task labels are permuted over the
    whole matrix of every method but the first (is the same pair hurt whatever the method?). Raises
    ValueError unless each pair has one loss per method, all defined.
    """
    table = losses.pivot(index=["task_a", "task_b"], columns="method", values="loss")
    if table.isna().any(axis=None) or min(table.shape) < 2:
        raise ValueError(
            "the block model needs a defined loss of every pair for every one of 2 or more methods"
        )
    values, rng = table.to_numpy(), np.random.default_rng(seed)
    n = values.size
    fit = smf.ols("loss ~ C(pair) + C(method)", _long(table)).fit()
    anova = anova_lm(fit, typ=2)
    seen = _block_f(values[None])[:, 0]
    within = rng.permuted(np.tile(values, (permutations, 1, 1)), axis=2)
    p_method = (1 + np.sum(_block_f(within)[1] >= seen[1] - 1e-9)) / (permutations + 1)
    moved = _relabelled(table, permutations, rng)
    p_pair = (1 + np.sum(_block_f(moved)[0] >= seen[0] - 1e-9)) / (permutations + 1)
    rows = []
    for effect, p in (("pair", p_pair), ("method", p_method)):
        f, df, textbook = anova.loc[f"C({effect})", ["F", "df", "PR(>F)"]]
        omega = partial_omega2(f, df, fit.df_resid, n)
        rows.append(
            {"effect": effect, "F": f, "df": df, "df_error": fit.df_resid, "p_textbook": textbook,
             "p_permutation": p, "omega2": omega.value, "omega2_low": omega.low,
             "omega2_high": omega.high, "n": n}
        )  # fmt: skip
    return pd.DataFrame(rows).set_index("effect")


def _long(table: pd.DataFrame) -> pd.DataFrame:
    """Pair (as one label), method, loss."""
    named = table.set_axis([f"{a}+{b}" for a, b in table.index]).rename_axis("pair")
    return named.reset_index().melt(id_vars="pair", var_name="method", value_name="loss")


def _block_f(values: NDArray) -> NDArray:
    """F of rows (pairs) and of columns (methods) in (draws, pairs, methods): (2, draws)."""
    _, pairs, methods = values.shape
    centred = values - values.mean((1, 2), keepdims=True)
    by_pair = methods * (centred.mean(2) ** 2).sum(1)
    by_method = pairs * (centred.mean(1) ** 2).sum(1)
    # losses that agree to rounding leave no error: F is then infinite, not negative
    error = np.clip((centred**2).sum((1, 2)) - by_pair - by_method, 1e-300, None)
    df_error = (pairs - 1) * (methods - 1)
    return np.stack([by_pair / (pairs - 1), by_method / (methods - 1)]) / (error / df_error)


def _relabelled(table: pd.DataFrame, permutations: int, rng) -> NDArray:
    """Losses with task labels permuted, each method but the first by an order of its own."""
    matrices = [square(table[m].rename("loss").reset_index(), "loss") for m in table]
    tasks = list(matrices[0].index)
    place = {task: i for i, task in enumerate(tasks)}
    a, b = (np.array([place[pair[side]] for pair in table.index]) for side in (0, 1))
    columns = [np.tile(table.iloc[:, 0].to_numpy(), (permutations, 1))]
    for matrix in matrices[1:]:
        orders = rng.permuted(np.tile(np.arange(len(tasks)), (permutations, 1)), axis=1)
        columns.append(matrix.to_numpy()[orders[:, a], orders[:, b]])
    return np.stack(columns, axis=2)


def mixed_model(cells: pd.DataFrame) -> pd.DataFrame:
    """Variance components of loss ~ method + (own task) + (partner): crossed random effects, REML.

    `cells`: columns own, partner, method, loss; one row per directed cell and method. Returns one
    row per component (own, partner, residual) with variance and share, and `method`: the variance
    of the fitted method means (fixed effect). Raises ValueError if the fit has not converged.
    """
    cells = cells.assign(everything=1)
    parts = {"own": "0 + C(own)", "partner": "0 + C(partner)"}
    model = smf.mixedlm("loss ~ C(method)", cells, groups="everything", vc_formula=parts)
    # Only standard errors need the Hessian, and where a search went astray there is none.
    model.hessian = lambda params: (-np.eye(model.k_fe + model.k_re2 + model.k_vc), False)
    # By values alone and to the end: at the boundary the gradient misleads, and the default of
    # statsmodels then stops at shares that differ by a fifth between two processors. Powell's
    # search is the quicker one, but now and then a step of it leaves the numbers.
    with warnings.catch_warnings():
        # a variance of zero lies on the boundary: an answer, not a failure (that is checked below)
        for kind in (ConvergenceWarning, SingularMatrixWarning, RuntimeWarning):
            warnings.simplefilter("ignore", kind)
        for search in ("powell", "nm"):  # nm: Nelder and Mead
            fit = model.fit(reml=True, method=search, ftol=1e-12, maxiter=1000)
            if fit.converged:
                break
    if not fit.converged:
        raise ValueError("the mixed model has not converged; the variance components mean nothing")
    means = cells.assign(fitted=np.asarray(model.exog @ fit.fe_params))
    variance = dict(zip(model.exog_vc.names, fit.vcomp, strict=True))
    variance |= {"residual": fit.scale, "method": means.groupby("method")["fitted"].first().var()}
    out = pd.Series(variance, name="variance").rename_axis("component").to_frame()
    return out.assign(share=out["variance"] / out["variance"].sum())


def crossed_model(cells: pd.DataFrame, permutations: int = 9999, seed: int = 0) -> pd.DataFrame:
    """`mixed_model` with task-jackknife intervals of the shares, and permutation p-values.

    Adds low, high: share ± t(n - 1) times the jackknife's standard error (each task left out as own
    and as partner), cut at 0 and 1; nan below 6 tasks. p of method: methods exchanged within each
    pair. Own and partner effects are tested together, since the two cells of a pair come from one
    merge and share its noise, in two further rows: `task` (do some tasks' pairs lose more? sums of
    the two cells exchanged between pairs) and `side` (do some tasks lose more than their partners
    do? signs of the differences flipped). Raises ValueError as `mixed_model`, and where a cell is
    missing.
    """
    tasks = sorted(set(cells["own"]) | set(cells["partner"]))
    n, methods = len(tasks), list(dict.fromkeys(cells["method"]))
    tables = cells.pivot(index="own", columns=["method", "partner"], values="loss")
    cube = np.stack([tables[m].loc[tasks, tasks].to_numpy() for m in methods])
    if np.isnan(cube[:, *_cells(n)]).any():
        raise ValueError("the crossed model needs a defined loss of every cell for every method")
    out, spread = mixed_model(cells), []
    if n >= 6:
        kept = [cells[(cells["own"] != x) & (cells["partner"] != x)] for x in tasks]
        spread = [mixed_model(part)["share"].loc[out.index] for part in kept]
    se = np.sqrt((n - 1) * np.var(spread, axis=0)) if spread else np.full(len(out), np.nan)
    reach = stats.t.ppf(0.975, n - 1) * se
    out["low"], out["high"] = (out["share"] - reach).clip(0), (out["share"] + reach).clip(upper=1)

    rng = np.random.default_rng(seed)
    i, j = np.triu_indices(n, 1)
    pairs = (cube + cube.transpose(0, 2, 1))[:, i, j].T  # (pairs, methods)
    moved = rng.permuted(np.tile(pairs, (permutations, 1, 1)), axis=2)
    out.loc["method", "p"] = _share_above(moved.mean(1).var(1), pairs.mean(0).var())
    for name, p in zip(("task", "side"), _task_tests(cube.mean(0), permutations, rng), strict=True):
        out.loc[name, "p"] = p
    return out


def _task_tests(table: NDArray, permutations: int, rng) -> tuple[float, float]:
    """p of equal task means of the pairs' sums, and of no task-wise tilt of their differences."""
    n = len(table)
    i, j = np.triu_indices(n, 1)
    total, tilt = table[i, j] + table[j, i], table[i, j] - table[j, i]
    first, second = np.eye(n)[i], np.eye(n)[j]
    shuffled = rng.permuted(np.tile(total, (permutations, 1)), axis=1) @ (first + second)
    flipped = rng.choice([-1.0, 1.0], (permutations, len(tilt))) * tilt @ (first - second)
    return (
        _share_above(shuffled.var(1), (total @ (first + second)).var()),
        _share_above(flipped.var(1), (tilt @ (first - second)).var()),
    )


def _share_above(drawn: NDArray, seen: float) -> float:
    """Permutation p: share of draws as large as the value seen, +1 in both counts."""
    return float((1 + np.sum(drawn >= seen * (1 - 1e-9))) / (len(drawn) + 1))


# --- what a test can see: simulation -----------------------------------------------------------


def simulate_pairs(
    n: int, rng, task_share: float = 0.5, r_task: float = 0.0, r_pair: float = 0.0
) -> tuple[NDArray, NDArray]:
    """Two symmetric n x n matrices m_ij = t_i + t_j + e_ij of unit variance per cell.

    `task_share` of the variance is the tasks'; `r_task` and `r_pair` correlate the task effects
    and the pair residuals of the two. Both 0: the null that pairs of shared tasks make treacherous.
    """

    def couple(shape: tuple[int, ...], r: float) -> NDArray:
        first, second = rng.standard_normal((2, *shape))
        return np.stack([first, r * first + math.sqrt(1 - r**2) * second])

    task = couple((n,), r_task) * math.sqrt(task_share / 2)
    upper = np.triu(couple((n, n), r_pair), 1) * math.sqrt(1 - task_share)
    x, y = task[:, :, None] + task[:, None, :] + upper + upper.transpose(0, 2, 1)
    return x, y


def tasks_for(z: float, power_z: float, specific: bool) -> int:
    """Fewest tasks (5 or more) whose standard error of Fisher's z is at most z / power_z."""
    n = 5
    while (specific_se(n) if specific else 1 / math.sqrt(n - 3)) > z / power_z:
        n += 1
    return n


def tasks_to_show(r: float = 0.5, specific: bool = True, alpha: float = 0.05) -> int:
    """Fewest tasks at which a true correlation r is found with power .80, two-sided alpha."""
    return tasks_for(math.atanh(r), stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(0.8), specific)


def tasks_to_exclude(margin: float = 0.3, specific: bool = True, alpha: float = 0.05) -> int:
    """Fewest tasks at which `equivalent` is below alpha with power .80 when the true r is 0."""
    return tasks_for(math.atanh(margin), stats.norm.ppf(1 - alpha) + stats.norm.ppf(0.9), specific)


def task_share(matrix: ArrayLike) -> float:
    """Share of the variance between pairs that additive task effects carry, in [0, 1].

    The diallel's ANOVA estimate (Griffing 1956, method 4): E MS_task = s2 + (n-2) t2 and
    E MS_pair = s2 give 2 t2 / (2 t2 + s2). A directed matrix is averaged over its two directions.
    Raises ValueError for fewer than 4 tasks or undefined cells.
    """
    matrix = np.asarray(matrix, float)
    n = len(matrix)
    upper = np.triu_indices(n, 1)
    both = (matrix + matrix.T) / 2
    if n < 4 or np.isnan(both[upper]).any():
        raise ValueError("the task share needs 4 tasks or more and no undefined cell")
    left = np.sum(pair_specific(both)[upper] ** 2)
    ms_pair = left / (n * (n - 3) / 2)
    ms_task = (np.sum((both[upper] - both[upper].mean()) ** 2) - left) / (n - 1)
    task = 2 * max((ms_task - ms_pair) / (n - 2), 0)
    return float(task / (task + ms_pair))


def null_sd(n: int, share: float, draws: int = 1000, seed: int = 0) -> float:
    """sd of raw Pearson r over the pairs of n tasks when nothing is related (`simulate_pairs`)."""
    rng, upper = np.random.default_rng(seed), np.triu_indices(n, 1)
    pairs = (simulate_pairs(n, rng, share) for _ in range(draws))
    return float(np.std([np.corrcoef(x[upper], y[upper])[0, 1] for x, y in pairs]))


def tasks_needed(share: float, margin: float = 0.3, draws: int = 1000, seed: int = 0) -> int:
    """Fewest tasks at which 95 % of the raw r of unrelated matrices lie within the margin.

    Below it an r at the margin is no surprise, and "no correlation" cannot be told from one.
    `share`: the geometric mean of the two matrices' `task_share`.
    """
    low, high = 4, 8
    while 1.96 * null_sd(high, share, draws, seed) > margin:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        narrow = 1.96 * null_sd(middle, share, draws, seed) <= margin
        low, high = (low, middle) if narrow else (middle, high)
    return high


def rejection_rates(
    n: int,
    draws: int = 400,
    permutations: int = 199,
    alpha: float = 0.05,
    seed: int = 0,
    **pairs: float,
) -> dict[str, float]:
    """Share of simulated studies of n tasks with p < alpha, by four tests, and the sd of raw r.

    naive: textbook p of the raw Pearson r over pairs; mantel: its task-permutation p; between and
    specific: that of the task means and of the pair-specific r. `pairs` goes to `simulate_pairs`:
    without correlation these are false-positive rates, with one it is power.
    """
    rng = np.random.default_rng(seed)
    upper, found = np.triu_indices(n, 1), []
    for _ in range(draws):
        x, y = simulate_pairs(n, rng, **pairs)
        inner = int(rng.integers(2**31))
        plain = mantel(x, y, permutations=permutations, seed=inner)
        means = between(x, y, permutations, inner)
        own = mantel(x, y, specific=True, permutations=permutations, seed=inner)
        naive = stats.pearsonr(x[upper], y[upper]).pvalue
        tests = {"naive": naive, "mantel": plain.p, "between": means.p, "specific": own.p}
        found.append(tests | {"r": plain.value})
    p = pd.DataFrame(found)
    return (p.drop(columns="r") < alpha).mean().to_dict() | {"sd_r": float(p["r"].std(ddof=0))}


def power_curve(tasks: Iterable[int], seed: int = 0, **options: float) -> pd.DataFrame:
    """`rejection_rates` for several numbers of tasks, one row each."""
    rows = {n: rejection_rates(n, seed=seed, **options) for n in tasks}
    return pd.DataFrame(rows).T.rename_axis("tasks")


def coverage(
    n: int, r: float = 0.0, draws: int = 400, seed: int = 0, share: float = 0.5
) -> dict[str, float]:
    """Share of simulated studies of n tasks whose 95 % interval holds the true r, by estimand.

    Task effects and pair residuals of the two matrices correlate by r alike (`simulate_pairs`).
    equivalence: share of studies that `equivalent` calls free of a correlation of .3 or more; a
    false alarm where |r| is .3 or more. Raises ValueError below 5 tasks.
    """
    rng, se, found = np.random.default_rng(seed), specific_se(n), []
    for _ in range(draws):
        x, y = simulate_pairs(n, rng, share, r, r)
        spans = {"between": between_interval(x, y), "specific": specific_interval(x, y)}
        held = {name: span.low <= r <= span.high for name, span in spans.items()}
        found.append(held | {"equivalence": equivalent(spans["specific"].value, se) < 0.05})
    return pd.DataFrame(found).mean().to_dict()
