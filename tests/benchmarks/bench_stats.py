"""Level, power and coverage of every test and interval of notebook 05, by simulation.

Run by hand (`python tests/benchmarks/bench_stats.py`, about an hour on one core). Writes
data/results/bench_stats.csv, which notebook 05 shows. Studies as in tests/simulated.py:
relatives whose task effects go together and whose pairs spread three times as far, sparse designs.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.store import ROOT

sys.path.insert(0, str(Path(__file__).parents[1]))
import simulated  # noqa: E402

DESIGNS = ((14, None, 300), (48, 8, 150), (96, 8, 80))  # tasks, partners (None: all), studies
TRUTHS = (0.0, 0.3, 0.5)


def design(tasks: int, partners: int | None, draws: int, seed: int = 0) -> pd.DataFrame:
    """All rates of one design."""
    rng = np.random.default_rng(seed)
    blocks = simulated.families(tasks)

    def study() -> list[dict]:
        rows = simulated.of_means(blocks, rng, partners)
        for r in TRUTHS:
            rows += simulated.of_correlations(blocks, rng, partners, r, 199)
        return rows

    table = simulated.rates(study, draws)
    return table.assign(tasks=tasks, partners=partners or tasks - 1, studies=draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the studies")
    parser.add_argument("--out", default=ROOT / "data" / "results" / "bench_stats.csv")
    options = parser.parse_args()
    tables = [design(n, k, max(int(options.share * draws), 1)) for n, k, draws in DESIGNS]
    table = pd.concat(tables, ignore_index=True)
    first = ["tasks", "partners", "studies", "test", "way", "unit", "truth"]
    rest = ["covered", "rejected", "equivalent"]
    table[first + rest].round(3).to_csv(options.out, index=False)
    print(table[first + rest].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
