"""How long does a search over trial merges take, and how does it grow with models and prompts?

    python tests/benchmarks/bench_advise.py --base BASE --models A B … --prompts a.jsonl b.jsonl …

For each number of models and of prompts, in a process and a store of its own: the models' own
answers, pairs and the group of all models under LA and TIES. `--pairs` of the pairs are measured;
all pairs, and groups grown by one model at a time, follow from them (a merge's time is linear in
its models). Writes data/results/bench_advise.csv.
"""

import argparse
import math
import os
import resource
import tempfile
import time
from itertools import combinations, islice
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from helpers import advise
from helpers.run import machine
from helpers.store import ROOT

RULES = ("linear", "ties")


def seconds(work, *given) -> float:
    """Processor time of a call."""
    started = time.process_time()
    work(*given)
    return time.process_time() - started


def measure(base: str, models: dict, prompts: dict, pairs: int) -> dict:
    """One row of the table."""
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as store:
        os.environ["MERGING_COLLAPSE_STORE"] = store
        panel = advise.open_panel(base, models, prompts)
        answers = sum(
            seconds(advise.references, panel, label) for label in panel.labels
        )
        drawn = list(islice(combinations(panel.labels, 2), pairs))
        two = [advise.Merge(pair, rule) for pair in drawn for rule in RULES]
        whole = [advise.Merge(panel.labels, rule) for rule in RULES]
        pair = sum(seconds(advise.trial, panel, merge) for merge in two) / len(two)
        group = sum(seconds(advise.trial, panel, merge) for merge in whole) / len(whole)
    n = len(models)
    grown = sum(
        pair + (group - pair) * (size - 2) / (n - 2) for size in range(3, n + 1)
    )
    search = len(RULES) * (math.comb(n, 2) * pair + grown)
    return {
        "models": n,
        "prompts": min(map(len, prompts.values())),
        "merges": len(RULES) * (math.comb(n, 2) + n - 2),
        "measured": len(two) + len(whole),
        "cpu_answers": answers / n,
        "cpu_pair": pair,
        "cpu_group": group,
        "cpu_minutes": (answers + search) / 60,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "load": load,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument(
        "--counts", nargs="+", type=int, default=[4, 8], help="of models"
    )
    parser.add_argument(
        "--read", nargs="+", type=int, default=[8, 32], help="prompts of each"
    )
    parser.add_argument("--pairs", type=int, default=100, help="that are measured")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "data" / "results" / "bench_advise.csv"
    )
    options = parser.parse_args()
    labels = advise.labels_of(options.models)
    folders = dict(zip(labels, options.models, strict=True))
    texts = advise.prompts_of(labels, options.prompts)
    rows = []
    for n in options.counts:
        for count in options.read:
            models = dict(islice(folders.items(), n))
            prompts = {label: texts[label][:count] for label in models}
            given = options.base, models, prompts, options.pairs
            with get_context("spawn").Pool(1) as pool:  # its peak of memory is its own
                rows.append(pool.apply(measure, given))
            print(rows[-1], flush=True)
            pd.DataFrame(rows).round(2).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
