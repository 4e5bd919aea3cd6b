"""How well does a model answer? One row per example.

A decoder reads each prompt once; the cached keys and values then serve every candidate answer
(accepted answers and options), teacher-forced. Greedy decoding gives an answer exactly when each
of its tokens, the end token included, is the most likely one after those before it. So most greedy
texts are known without generating them: the right ones, the empty ones, and those that stop. An
encoder answers with its head's most likely label.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from helpers.states.batch import (
    encode_answer,
    encode_input,
    encode_prompt,
    length_buckets,
    pad,
)
from helpers.study.answers import (
    Reading,
    Stop,
    batches,
    closing,
    generate,
    greedy_texts,
    is_forced,
    read_prompts,
    readings,
)
from helpers.study.kinds import failure_kind
from helpers.study.tasks import Task

__all__ = [
    "classify",
    "constant_answer",
    "generate",
    "graded",
    "outcome",
    "rouge_l",
    "score",
]
# a longer list is no choice, and reading it takes longer than all else
MOST_OPTIONS = 32
VERSION = 2  # raised by hand whenever a score changes


def score(
    model,
    tokenizer,
    rows,
    metric: str = "exact_match",
    batch_size: int = 16,
    end: str | None = None,
    texts: bool = True,
) -> pd.DataFrame:
    """One row per example of `rows` (columns id, prompt, answers, options), in their order.

    correct: 1 if greedy decoding gives an accepted answer (or ROUGE-L F1 with its best reference);
    nll: mean negative log-likelihood per token of the first answer, in nats, its end included
    (the end token, or the text `end` for a base model that was only shown examples);
    nll_answer: the same without the end;
    forced: correct, had the end token been forbidden for the right answer's length: a control for
    answers that stop too early. It tells a model how long an answer is at least, so it can only
    help; undefined for ROUGE-L;
    option_correct: the most likely option (sum over its tokens) is accepted; undefined without
    `choices`;
    invalid: greedy decoding gives none of the options; undefined without;
    answer: the greedy text; kind: of failure, as far as that text tells (`kinds.failure_kind`).
    There are no such columns without `texts`.
    """
    rows = list(rows)
    lengths = [len(encode_prompt(tokenizer, row["prompt"])) for row in rows]
    out: list[dict] = [{}] * len(rows)
    for batch in batches(model, lengths, batch_size):
        some = [rows[i] for i in batch]
        scored = score_batch(model, tokenizer, some, metric, end, texts)
        for i, scores in zip(batch, scored, strict=True):
            out[i] = scores
    return pd.DataFrame(out)


def score_batch(
    model, tokenizer, rows, metric: str, end: str | None, texts: bool
) -> list[dict]:
    """`score` of a few rows at once."""
    fill = tokenizer.pad_token_id
    stop = closing(tokenizer, end)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    names = [candidates(row) for row in rows]
    answers = [
        [encode_answer(tokenizer, name, end) for name in several] for several in names
    ]
    cached = read_prompts(model, prompts, fill)
    read = readings(model, cached, answers, fill, stop)
    scored = []
    for row, several, of in zip(rows, names, read, strict=True):
        scored.append(outcome(row, several, of, stop))
    if not texts and metric != "rouge_l":
        return scored
    said = greedy_texts(model, tokenizer, cached, read, stop)
    out = []
    for scores, row, text in zip(scored, rows, said, strict=True):
        out.append(with_text(scores, row, text, metric))
    return out


def choices(row: dict) -> list[str]:
    """The options of an example, unless they are more than MOST_OPTIONS."""
    return row["options"] if len(row["options"]) <= MOST_OPTIONS else []


def candidates(row: dict) -> list[str]:
    """Accepted answers and options, each once: an answer is usually one of the options too."""
    return list(dict.fromkeys([*row["answers"], *choices(row)]))


def outcome(
    row: dict, names: Sequence[str], read: Sequence[Reading], stop: Stop
) -> dict:
    """The scores of one example from the readings of its candidates, called `names`."""
    accepted = np.array([name in row["answers"] for name in names])
    options = np.array([name in choices(row) for name in names])
    greedy = np.array([of.best.all() for of in read])
    forced = np.array([is_forced(of, stop) for of in read])
    first = read[0].logprob.astype(float)
    unended = first[: -stop.length]
    scores = {
        "id": row["id"],
        "correct": float((greedy & accepted).any()),
        "nll": -first.mean(),
        "nll_answer": -unended.mean(),
        "forced": float((forced & accepted).any()),
        "option_correct": np.nan,
        "invalid": np.nan,
    }
    if options.any():
        logprob = np.array([of.logprob.sum() for of in read])
        likely = np.where(options, logprob, -np.inf).argmax()
        scores["option_correct"] = float(accepted[likely])
        scores["invalid"] = float(not (greedy & options).any())
    return scores


def with_text(scored: dict, row: dict, text: str, metric: str) -> dict:
    """An example's scores with its greedy text; the same text in other tokens is right too."""
    kind = failure_kind(text, row["answers"], row["prompt"])
    if metric == "rouge_l":
        scored = scored | {"correct": rouge_l(text, row["answers"]), "forced": np.nan}
    elif kind == "right":
        scored = scored | {"correct": 1.0, "forced": 1.0}
    return scored | {"kind": kind, "answer": text}


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 with the best-matching reference, in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"]).score_multi(references, text)["rougeL"].fmeasure


# --- encoders, and chance --------------------------------------------------------------------


@torch.no_grad()
def label_logprobs(
    model, encoded: Sequence[list[int]], batch_size: int
) -> torch.Tensor:
    """Log-probabilities (examples, labels) of a classifier, of the token ids of each example."""
    batches = length_buckets([len(ids) for ids in encoded], batch_size)
    parts = []
    for batch in batches:
        ids, mask = pad([encoded[i] for i in batch], 0)
        mask = mask.to(model.device)
        logits = model(ids.to(model.device), attention_mask=mask).logits.float()
        parts.append(logits.log_softmax(1).cpu())
    order = torch.tensor([i for batch in batches for i in batch])
    return torch.cat(parts)[order.argsort()]


def classify(
    model, tokenizer, rows, labels: Sequence[str], batch_size: int = 16
) -> pd.DataFrame:
    """What `score` gives of a decoder, of an encoder whose head has these outputs (`graded`)."""
    rows = list(rows)
    encoded = [encode_input(tokenizer, row["prompt"]) for row in rows]
    logprobs = label_logprobs(model, encoded, batch_size)
    return graded(rows, labels, logprobs)


def graded(rows, labels: Sequence[str], logprobs: torch.Tensor) -> pd.DataFrame:
    """One row per example from the log-probabilities (examples, labels) of a classifier.

    correct, option_correct: the most likely label is accepted; nll: of the first answer, in nats;
    invalid: undefined, as a classifier can give nothing but a label.
    """
    out = []
    for row, logprob in zip(rows, logprobs, strict=True):
        correct = float(labels[int(logprob.argmax())] in row["answers"])
        nll = -float(logprob[labels.index(row["answers"][0])])
        out.append(
            {
                "id": row["id"],
                "correct": correct,
                "nll": nll,
                "option_correct": correct,
                "invalid": np.nan,
            }
        )
    return pd.DataFrame(out)


def constant_answer(task: Task, split: str = "test") -> float:
    """Score of always giving the commonest training answer: what chance is worth on this task."""
    given = Counter(row["answers"][0] for row in task.splits["train"])
    ((common, _),) = given.most_common(1)
    accepted = [row["answers"] for row in task.splits[split]]
    if task.metric == "rouge_l":
        grades = [rouge_l(common, answers) for answers in accepted]
    else:
        grades = [float(common in answers) for answers in accepted]
    return float(np.mean(grades))
