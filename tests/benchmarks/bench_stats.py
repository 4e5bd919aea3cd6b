"""Level, power and coverage of every test and interval of notebook 05, by simulation.

Run by hand (`python tests/benchmarks/bench_stats.py`, minutes on one core for each design of 48
tasks). Writes data/results/bench_stats.csv, which notebook 05 shows. Studies as in
tests/simulated.py: relatives whose task effects go together and whose pairs spread three times as
far, sparse designs, variance components as with bare or with instructed prompts, or, for the
design of the declared study, as that study turned out to have them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.store import ROOT
from helpers.study import schema

sys.path.insert(0, str(Path(__file__).parents[1]))
import simulated  # noqa: E402

RESULTS = ROOT / "data" / "results"
# tasks, partners (None: all), studies
DESIGNS = ((14, None, 300), (48, 8, 150), (96, 8, 80))
DECLARED = "tasks96", 48  # known of no other number of tasks
TRUTHS = (0.0, 0.3, 0.5)


def design(
    components: str, tasks: int, partners: int | None, draws: int, seed: int = 0
) -> pd.DataFrame:
    """All rates of one design."""
    rng = np.random.default_rng(seed)
    kin = simulated.SIZES_DECLARED if components == DECLARED[0] else simulated.SIZES
    blocks, of = simulated.families(tasks, kin), simulated.COMPONENTS[components]

    def study() -> list[dict]:
        rows = simulated.of_means(blocks, rng, partners, of)
        for r in TRUTHS:
            rows += simulated.of_correlations(blocks, rng, partners, r, 199, of)
        return rows

    table = simulated.rates(study, draws).assign(components=components, tasks=tasks)
    return table.assign(partners=partners or tasks - 1, studies=draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the studies")
    parser.add_argument("--components", nargs="+", default=list(simulated.COMPONENTS))
    parser.add_argument(
        "--tasks", nargs="+", type=int, default=[n for n, _, _ in DESIGNS]
    )
    options = parser.parse_args()
    tables = [
        design(components, n, k, max(int(options.share * draws), 1))
        for components in options.components
        for n, k, draws in DESIGNS
        if n in options.tasks and (components != DECLARED[0] or n == DECLARED[1])
    ]
    made = pd.concat(tables, ignore_index=True).round(3)
    print(made.to_string(index=False))
    before = schema.read(RESULTS, "bench_stats")
    again = zip(before["components"], before["tasks"], strict=True)
    new = set(zip(made["components"], made["tasks"], strict=True))
    kept = before[[design not in new for design in again]]
    schema.write(RESULTS, "bench_stats", pd.concat([kept, made], ignore_index=True))


if __name__ == "__main__":
    main()
