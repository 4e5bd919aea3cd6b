"""Kinds of failure: known answers for each, read from texts alone."""

import pandas as pd
import pytest

from helpers.study.kinds import KINDS, failure_kind, failure_kinds, form

PROMPT = "Reverse the letters.\nInput: s, e, n, i, l\nOutput:"
RIGHT = ["l, i, n, e, s"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("l, i, n, e, s", "right"),
        ("", "empty"),
        ("l, i", "stops"),
        ("!5!7!", "partner's answer"),
        ("!19!", "partner's format"),
        ("lines are", "base's answer"),
        ("s, e, n, i, l", "copies prompt"),
        # though its last letter has a comma in the prompt
        ("S, E, N, i", "copies prompt"),
        ("output:", "copies prompt"),
        ("s,", "other"),  # of the prompt, but less than half of the right answer
        ("l, i, n, e, s, s", "other"),
    ],
)
def test_each_kind_has_its_known_answer(text, kind):
    partner, base = ["", "!5!7!"], "lines are"
    assert failure_kind(text, RIGHT, PROMPT, partner, base) == kind


@pytest.mark.parametrize(
    ("text", "right", "prompt", "kind"),
    [
        (
            "it has rained",
            "has it rained",
            "John thinks it has rained, but",
            "copies prompt",
        ),
        (
            "it has rained.",
            "has it rained",
            'He said: "It has rained"',
            "copies prompt",
        ),
        ("49", "-1", "What is 49 minus 50?", "copies prompt"),
        # its sign makes it another number
        ("-49", "-1", "What is 49 minus 50?", "other"),
        # of the same digits only
        ("2000-05-20", "20 May", "The date !2000!05!20!", "other"),
        ("odd", "even", "Is 43864 even or odd?", "other"),  # a wrong choice is no copy
        ("even or odd", "even", "Is 43864 even or odd?", "copies prompt"),
        (
            "tah mel",
            "tah MEL",
            "Write the last word in capitals: tah mel",
            "copies prompt",
        ),
        ("-", "no", "Is it + or - here?", "other"),  # no word
        # a bracket is missing
        ("Sequence: ( )", "0", "How many? Sequence: ( ( ) )", "other"),
    ],
)
def test_a_copy_is_words_of_the_prompt(text, right, prompt, kind):
    assert failure_kind(text, [right], prompt) == kind


def test_without_others_an_answer_is_none_of_theirs():
    assert failure_kind("!5!7!", RIGHT, PROMPT) == "other"
    # the right format too
    assert failure_kind("x, y", RIGHT, PROMPT, ["a, b, c"]) == "other"


def test_a_form_is_which_characters_come_in_which_order():
    forms = [
        form(text)
        for text in ("93", "-36", "!12!05!", "2019-12", "l, i, n", "do they go", "")
    ]
    assert forms == ["9", "-9", "!9", "9-", "a, ", "a ", ""]


def test_kinds_of_a_table_follow_its_rows():
    rows = [{"id": i, "prompt": f"{i}?", "answers": [i]} for i in "abc"]
    examples = pd.DataFrame({"id": list("abc"), "answer": ["a", "7", "none"]})
    partner = pd.DataFrame({"id": list("abc"), "answer": ["1", "7", "9"]})
    base = pd.DataFrame({"id": list("abc"), "answer": ["x", "y", "none"]})
    assert failure_kinds(examples, rows, [partner], base) == [
        "right",
        "partner's answer",
        "base's answer",
    ]
    assert failure_kinds(examples, rows) == ["right", "other", "other"]
    assert set(KINDS) > set(failure_kinds(examples, rows, [partner]))
