"""Rivals on curves and answers that are known by hand."""

import numpy as np
import pandas as pd
import pytest
import tiny
from datasets import Dataset, DatasetDict

from helpers.advise import rivals
from helpers.study.tasks import Task

DOSES = pd.DataFrame(
    [("a", d, s, n) for d, s, n in [(0.0, 0.0, 4.0), (0.5, 0.4, 1.0), (1.0, 0.8, 0.5)]]
    + [("b", d, s, n) for d, s, n in [(0.0, 0.2, 3.0), (0.5, 0.5, 2.0), (1.0, 0.5, 1.0)]],
    columns=["task", "dose", "score", "nll"],
)
LOSSES = pd.DataFrame(
    {
        "task": ["b", "a", "a"],
        "specialist": [0.5, 0.8, 0.8],
        "base": [0.25, 0.1, 0.1],
        "nll_specialist": [1.0, 0.5, 0.5],
        "nll_base": [3.0, 4.0, 4.0],
    }
)
TRAINING = pd.DataFrame({"task": ["a", "a", "b"], "step": [1, 2, 1]})


def test_what_is_known_of_each_task():
    table = rivals.of_tasks(LOSSES, DOSES, TRAINING)
    expected = {
        "dose_loss": [-50, 0],
        "dose_nll": [0.5, 1],
        "base_score": [0.1, 0.25],
        "gain": [0.7, 0.25],
        "base_nll": [4, 3],
        "nll_gain": [3.5, 2],
        "steps": [2, 1],
    }
    pd.testing.assert_frame_equal(
        table, pd.DataFrame(expected, ["a", "b"]), check_names=False, check_dtype=False
    )
    pair = rivals.means(table).loc[0]
    assert (pair.task_a, pair.task_b, pair.dose_loss, pair.steps) == ("a", "b", -25, 1.5)


def test_own_direction_doses_of_a_sum_are_those_of_the_vectors():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50)) * [[1.0], [0.8]] + 0.6
    norms = np.linalg.norm(a), np.linalg.norm(b)
    pairs = pd.DataFrame(
        {
            "task_a": ["a"],
            "task_b": ["b"],
            "cosine": [a @ b / norms[0] / norms[1]],
            "norm_a": norms[0],
            "norm_b": norms[1],
        }
    )
    reached = [(a + b) / 2 @ x / (x @ x) for x in (a, b)]
    assert 0.5 < reached[0] < 1 and 0.5 < reached[1] < 1
    expected = np.mean([(reached[0] - 1) * 100, 0])  # a's curve is a line, b's flat
    found = rivals.dose_losses(pairs, DOSES, 0.5)
    assert found[0] == pytest.approx(expected)
    assert np.isnan(rivals.dose_losses(pairs, DOSES, 1.0)[0])  # beyond the doses measured


def answering(*answers, options=()):
    rows = [
        {"id": str(i), "prompt": str(i), "answers": [a], "options": list(options)}
        for i, a in enumerate(answers)
    ]
    return Task("toy:x", "exact_match", DatasetDict({"train": Dataset.from_list(rows)}))


def test_answers_that_look_alike():
    # one token a byte, behind a space that all share: drop it to see the first letters
    tokenizer = tiny.byte_tokenizer()

    class Letters:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **options):
            return tokenizer(text.removeprefix(" "), **options)

    tasks = {
        "yes": answering("yes", "no", "no", "no", options=("yes", "no")),
        "no": answering("No", "nay", "yes", "no"),
        "sum": answering("12", "7"),
    }
    table = rivals.answer_formats(tasks, Letters()).set_index(["task_a", "task_b"])
    close, far = table.loc[("yes", "no")], table.loc[("yes", "sum")]
    assert close.first_token_overlap == pytest.approx(0.5 + 0.25)  # n: min(3/4, 2/4); y: 1/4
    assert close.answer_overlap == pytest.approx(2 / 3)  # yes, no of yes, no, nay
    assert far.first_token_overlap == far.answer_overlap == 0
    assert far.length_ratio == pytest.approx(2.5 / 3.25)  # with the end token
    assert (close.same_format, table.same_format[("no", "sum")]) == (0, 1)


def segment(curves, alphas=(0.0, 0.5, 1.0)):
    rows = [(t, a, v) for t, values in curves.items() for a, v in zip(alphas, values, strict=True)]
    return pd.DataFrame(rows, columns=["task", "alpha", "nll"])


def test_barrier_of_known_curves():
    assert rivals.barrier(segment({"a": [1, 2, 3], "b": [4, 3, 2]})) == 0  # straight
    assert rivals.barrier(segment({"a": [1, 0, 1], "b": [1, 0, 1]})) == 0  # a valley
    # mean 2, 4, 1: 4 - 1.5
    assert rivals.barrier(segment({"a": [1, 3, 1], "b": [3, 5, 1]})) == pytest.approx(2.5)
    four = segment({"a": [0, 2, 1, 3]}, (0.0, 0.25, 0.5, 1.0))
    assert rivals.barrier(four) == pytest.approx(1.25)


@pytest.mark.parametrize("lost", [0, 1, 5])
def test_barrier_refuses_a_segment_with_gaps(lost):
    with pytest.raises(ValueError, match="needs both ends"):
        rivals.barrier(segment({"a": [1, 2, 3], "b": [4, 3, 2]}).drop(index=lost))


def test_every_metric_says_what_it_needs():
    table = rivals.needs(["cosine"], ["hidden_sim"])
    assert list(table.index) == ["cosine", "hidden_sim", *rivals.RIVALS]
    assert table.loc["cosine"].tolist() == ["none", "none", "no", "no"]
    assert table.loc["hidden_sim", "data"] == "prompts"
    assert table.loc["barrier", "merge"] == "yes" and table.notna().all(axis=None)
