"""How sure? Pure functions on matrices of tasks, with NaN for pairs that nobody merged."""

from helpers.stats.correlations import (
    ESTIMANDS,
    MARGIN,
    correlation,
    equivalence,
    of_pairs,
    of_tasks,
    orders,
    p_value,
    pearson,
)
from helpers.stats.dyads import (
    components,
    decompose,
    pair_effects,
    same_family,
    shares,
    symmetric,
    unrelated,
)
from helpers.stats.effects import (
    Interval,
    contrasts,
    holm,
    jackknife,
    leave_out,
    mean,
    rule_shares,
    share,
    stacked,
)
