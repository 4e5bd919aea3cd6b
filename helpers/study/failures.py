"""How does a merge fail? A loss split into answers that stop, other formats, and content.

Three things can be wrong with an answer. It *stops*: with the end token forbidden for the right
answer's length it is right (`forced`, `scores.score`). It is of another *format*: of what stays
wrong, the answer belongs to another task or model, or copies the prompt, so the merge does not know
which task it is asked. Or its *content* is wrong: all that remains. The parts of a loss are the
growth of each over the specialist's own failures; they add up to the loss.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from helpers.study.losses import (
    DRAWS,
    SPECIALIST,
    Cells,
    Interval,
    limits,
    percent,
    resamples,
)

PARTS = ("stops", "format", "content")
FORMAT_KINDS = (
    "partner's answer",
    "partner's format",
    "base's answer",
    "copies prompt",
)


def failures(examples: pd.DataFrame) -> NDArray:
    """What each example's score lacks, (examples, PARTS); rows sum to 1 - correct.

    `examples` has the columns correct, forced (both in [0, 1]) and kind. An answer that is wrong
    even when it is made to go on counts as content, an empty one included.
    """
    correct = examples["correct"].to_numpy(float)
    forced = examples["forced"].to_numpy(float)
    reached = np.maximum(correct, forced)
    other = examples["kind"].isin(FORMAT_KINDS).to_numpy()
    wrong = 1 - reached
    parts = reached - correct, wrong * other, wrong * ~other
    return np.stack(parts, axis=1)


def split(
    merged: pd.DataFrame,
    specialist: pd.DataFrame,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Interval]:
    """The merging loss of a cell (%) in PARTS, each with a paired bootstrap interval.

    part = 100 * (failures of the specialist - failures of the merge) / score of the specialist, so
    a specialist that stops too early itself costs the merge nothing. Undefined (nan) where the
    specialist's score is 0. Raises ValueError unless both are of the same examples.
    """
    if list(merged["example"]) != list(specialist["example"]):
        raise ValueError(
            "merged and specialist need the same examples in the same order"
        )
    own = specialist["correct"].to_numpy(float)
    change = failures(specialist) - failures(merged)
    (counts,) = resamples((len(own),), draws, seed)
    value = percent(change.mean(0), own.mean())
    drawn = percent(counts @ change, (counts @ own)[:, None])
    low, high = limits(drawn) if own.any() else (value, value)
    ends = zip(value.tolist(), low.tolist(), high.tolist(), strict=True)
    return {
        part: Interval(*numbers, len(own))
        for part, numbers in zip(PARTS, ends, strict=True)
    }


def with_parts(losses: pd.DataFrame, cells: Cells, seed: int = 0) -> pd.DataFrame:
    """`losses` with each of PARTS (%) and the ends of its interval, as stops, stops_low, …

    Needs the kinds of the answers: a study scored before they were read has no parts.
    """
    rows = []
    for row in losses.itertuples():
        merged = cells[row.merge, row.task]
        own = cells[SPECIALIST, row.task]
        found = {}
        for part, of in split(merged, own, seed=seed).items():
            ends = {f"{part}_low": of.low, f"{part}_high": of.high}
            found |= {part: of.value} | ends
        rows.append(found)
    return losses.join(pd.DataFrame(rows, losses.index))
