"""Rivals on samples and curves that are known by hand."""

import pandas as pd
import pytest

from helpers.states import rivals


def test_answers_that_look_alike():
    assert rivals.shared_mass("ynnn", "nnyn") == 1
    assert rivals.shared_mass("ynnn", "yynz") == pytest.approx(0.25 + 0.25)
    assert rivals.shared_mass([1, 2], [3, 4]) == 0
    assert rivals.jaccard(["Yes", "no"], ["yes ", "nay", "NO"]) == pytest.approx(2 / 3)


def segment(curves, alphas=(0.0, 0.5, 1.0)):
    rows = [
        (t, a, v)
        for t, values in curves.items()
        for a, v in zip(alphas, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["task", "alpha", "nll"])


def test_barrier_of_known_curves():
    assert rivals.barrier(segment({"a": [1, 2, 3], "b": [4, 3, 2]})) == 0  # straight
    assert rivals.barrier(segment({"a": [1, 0, 1], "b": [1, 0, 1]})) == 0  # a valley
    # mean 2, 4, 1: 4 - 1.5
    assert rivals.barrier(segment({"a": [1, 3, 1], "b": [3, 5, 1]})) == pytest.approx(
        2.5
    )
    four = segment({"a": [0, 2, 1, 3]}, (0.0, 0.25, 0.5, 1.0))
    assert rivals.barrier(four) == pytest.approx(1.25)


@pytest.mark.parametrize("lost", [0, 1, 5])
def test_barrier_refuses_a_segment_with_gaps(lost):
    with pytest.raises(ValueError, match="needs both ends"):
        rivals.barrier(segment({"a": [1, 2, 3], "b": [4, 3, 2]}).drop(index=lost))


def test_every_rival_says_what_it_needs():
    assert rivals.RIVALS["barrier"].merge and rivals.RIVALS["gradient_l2"].gradients
    for rival in rivals.RIVALS.values():
        assert rival.data in ("none", "prompts", "labels") and rival.passes
