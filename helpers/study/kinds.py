"""How is a greedy answer wrong? Read from texts alone: no model, no torch."""

from collections.abc import Iterable, Sequence

import pandas as pd

KINDS = (
    "right",
    "empty",
    "stops",
    "partner's answer",
    "partner's format",
    "base's answer",
    "copies prompt",
    "other",
)
OPENING = "\"'("  # punctuation that may stand before a word …
CLOSING = "\"').,;:!?"  # … and after it


def failure_kind(
    text: str,
    right: Sequence[str],
    prompt: str,
    partner_answers: Iterable[str] = (),
    base_answer: str | None = None,
) -> str:
    """One of KINDS, the first that fits a greedy answer.

    right: an accepted answer; empty; stops: a right beginning; partner's answer: what another
    specialist of the merge says to the same prompt; partner's format: characters as in that answer
    and not as in the right one (`form`); base's answer: what the base says; copies prompt: a piece
    of it (`copies`); other.
    """
    others = [answer for answer in partner_answers if answer]
    forms = {form(answer) for answer in others} - {form(answer) for answer in right}
    fits = {
        "right": text in right,
        "empty": not text,
        "stops": any(answer.startswith(text) for answer in right),
        "partner's answer": text in others,
        "partner's format": form(text) in forms,
        "base's answer": text == base_answer,
        "copies prompt": copies(text, right, prompt),
        "other": True,
    }
    return next(kind for kind in KINDS if fits[kind])


def copies(text: str, right: Sequence[str], prompt: str) -> bool:
    """Whether a text is words of the prompt, in a row, at least half as long as the right answer.

    Where the right answer stands in the prompt as well, others of no more words are a wrong choice
    and no copy: `odd` for `even`.
    """
    words, asked = plain(text), plain(prompt)
    says = any(c.isalnum() for c in text)
    if not says or words not in asked or 2 * len(text) < min(map(len, right)):
        return False
    choices = [choice for choice in map(plain, right) if choice in asked]
    longer = all(words.count(" ") > choice.count(" ") for choice in choices)
    return longer or words in choices


def plain(text: str) -> str:
    """Its words in lower case, a space around each, without the punctuation before and after them.

    Signs stay, as they make another number: `-49` is not `49`; so does punctuation by itself.
    """
    words = text.casefold().split()
    bare = (word.lstrip(OPENING).rstrip(CLOSING) or word for word in words)
    return f" {' '.join(bare)} "


def form(text: str) -> str:
    """Which characters a text is made of, in the order of their first use: a, 9, or themselves.

    `12-05` has the form `9-`, `!12!05!` the form `!9`, a sentence the form `a `.
    """
    kinds = ("a" if c.isalpha() else "9" if c.isdigit() else c for c in text)
    return "".join(dict.fromkeys(kinds))


def failure_kinds(
    examples: pd.DataFrame,
    rows: Iterable[dict],
    partners: Iterable[pd.DataFrame] = (),
    base: pd.DataFrame | None = None,
) -> list[str]:
    """The kinds of the answers in `examples` beside those of others to the same prompts.

    `rows` are the task's examples, in the order of `examples`; `partners` is what `scores.score`
    gives on them of the merge's other specialists, `base` of the base.
    """
    said = [frame["answer"] for frame in partners]
    others = list(zip(*said, strict=True)) if said else [()] * len(examples)
    untaught = [None] * len(examples) if base is None else base["answer"]
    about = zip(examples["answer"], rows, others, untaught, strict=True)
    return [
        failure_kind(text, row["answers"], row["prompt"], partner_answers, base_answer)
        for text, row, partner_answers, base_answer in about
    ]
