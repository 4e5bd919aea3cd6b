"""What is lost? Scores of a model on a task's examples, and the losses of a merge.

A decoder reads each prompt once; the cached keys and values then serve every candidate answer
(accepted answers and options), teacher-forced. Greedy decoding gives an answer exactly when each
of its tokens, the end token included, is the most likely one after those before it, so exact match
needs no generation; only ROUGE-L does. An encoder answers with its head's most likely label.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from helpers.states.batch import encode_answer, encode_input, encode_prompt, length_buckets, pad
from helpers.study.tasks import Task

VERSION = 1  # raised by hand whenever a score changes


@torch.no_grad()
def score(
    model,
    tokenizer,
    rows,
    metric: str = "exact_match",
    batch_size: int = 16,
    end: str | None = None,
) -> pd.DataFrame:
    """One row per example of `rows` (columns id, prompt, answers, options), in their order.

    correct: 1 if greedy decoding gives an accepted answer (or ROUGE-L F1 with its best reference);
    nll: mean negative log-likelihood per token of the first answer, in nats, its end included
    (the end token, or the text `end` for a base model that was only shown examples);
    option_correct: the most likely option (sum over its tokens) is accepted; undefined without;
    invalid: greedy decoding gives none of the options; undefined without options.
    """
    rows = list(rows)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    out = [{}] * len(rows)
    for batch in length_buckets([len(p) for p in prompts], batch_size):
        # each different candidate once; an accepted answer is usually one of the options too
        candidates = [
            list(dict.fromkeys([*rows[i]["answers"], *rows[i]["options"]])) for i in batch
        ]
        logprobs, greedy, lengths = candidate_logprobs(
            model,
            [prompts[i] for i in batch],
            [[encode_answer(tokenizer, text, end) for text in texts] for texts in candidates],
            tokenizer.pad_token_id,
        )
        for i, texts, lp, hit, n in zip(batch, candidates, logprobs, greedy, lengths, strict=True):
            out[i] = outcome(rows[i], texts, lp, hit, n)
    frame = pd.DataFrame(out)
    if metric == "rouge_l":
        longest = max(len(encode_answer(tokenizer, a)) for row in rows for a in row["answers"])
        texts = generate(model, tokenizer, [row["prompt"] for row in rows], longest + 8, batch_size)
        frame["correct"] = [rouge_l(t, row["answers"]) for t, row in zip(texts, rows, strict=True)]
    return frame


def outcome(
    row: dict, texts: list[str], logprobs: np.ndarray, greedy: np.ndarray, lengths: np.ndarray
) -> dict:
    """The scores of one example from its candidates' log-probabilities and greedy flags."""
    accepted = np.array([text in row["answers"] for text in texts])
    options = np.array([text in row["options"] for text in texts])
    best = np.where(options, logprobs, -np.inf).argmax()
    return {
        "id": row["id"],
        "correct": float((greedy & accepted).any()),
        "nll": -logprobs[0] / lengths[0],
        "option_correct": float(accepted[best]) if options.any() else np.nan,
        "invalid": float(not (greedy & options).any()) if options.any() else np.nan,
    }


def candidate_logprobs(
    model, prompts: list[list[int]], candidates: list[list[list[int]]], fill: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """For each prompt, over its candidates: log-probability (nats), greedy?, number of tokens."""
    ids, mask = (t.to(model.device) for t in pad(prompts, fill))
    last = mask.sum(1) - 1
    positions, place = last.unique(return_inverse=True)  # logits are wanted at few positions only
    first = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=positions)
    start = first.logits[torch.arange(len(prompts)), place]

    owner = torch.tensor([i for i, texts in enumerate(candidates) for _ in texts])
    target, real = (t.to(model.device) for t in pad([c for t in candidates for c in t], fill))
    steps = torch.arange(target.shape[1] - 1, device=model.device)
    first.past_key_values.batch_select_indices(owner.to(model.device))
    rest = model(
        target[:, :-1],
        attention_mask=torch.cat([mask[owner], real[:, :-1]], 1),
        position_ids=last[owner, None] + 1 + steps,
        past_key_values=first.past_key_values,
    )
    logits = torch.cat([start[owner, None], rest.logits], 1).float()
    chosen = logits.gather(2, target[..., None])[..., 0] - logits.logsumexp(2)
    logprob = (chosen * real).sum(1)
    greedy = ((logits.argmax(2) == target) | (real == 0)).all(1)
    sizes = [len(texts) for texts in candidates]
    return tuple(
        [part.numpy() for part in t.cpu().split(sizes)] for t in (logprob, greedy, real.sum(1))
    )


@torch.no_grad()
def generate(model, tokenizer, prompts: list[str], max_new_tokens: int, batch_size: int = 16):
    """Greedy continuations up to the end token, stripped; prompts are padded on the left."""
    texts = [""] * len(prompts)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for batch in length_buckets([len(e) for e in encoded], batch_size):
        ids, mask = pad([encoded[i][::-1] for i in batch], tokenizer.pad_token_id)
        out = model.generate(
            ids.flip(1).to(model.device),
            attention_mask=mask.flip(1).to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, new, strict=True):
            texts[i] = text.strip()
    return texts


def rouge_l(text: str, references: list[str]) -> float:
    """ROUGE-L F1 with the best-matching reference, in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"]).score_multi(references, text)["rougeL"].fmeasure


@torch.no_grad()
def classify(model, tokenizer, rows, labels: Sequence[str], batch_size: int = 16) -> pd.DataFrame:
    """What `score` gives of a decoder, of an encoder whose head has these outputs (`graded`)."""
    rows = list(rows)
    encoded = [encode_input(tokenizer, row["prompt"]) for row in rows]
    batches = length_buckets([len(ids) for ids in encoded], batch_size)
    parts = []
    for batch in batches:
        ids, mask = (t.to(model.device) for t in pad([encoded[i] for i in batch], 0))
        parts.append(model(ids, attention_mask=mask).logits.float().log_softmax(1).cpu())
    order = torch.tensor([i for batch in batches for i in batch])
    return graded(rows, labels, torch.cat(parts)[order.argsort()])


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
            {"id": row["id"], "correct": correct, "nll": nll}
            | {"option_correct": correct, "invalid": np.nan}
        )
    return pd.DataFrame(out)


PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def linear_probe(
    known: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor, classes: int
) -> torch.Tensor:
    """Log-probabilities (n_asked, classes) by multinomial logistic regression on frozen features.

    `known` (n, d) with `targets` (n,) are its training examples, `asked` (n_asked, d) the others;
    features are standardised. The L2 penalty is the one of PENALTIES with the least NLL on the last
    fifth of the training examples when fitted to the others; then all are used.
    """
    n = len(known) - max(1, len(known) // 5)

    def held_out(penalty: float) -> float:
        logprobs = logistic(known[:n], targets[:n], known[n:], classes, penalty)
        return float(torch.nn.functional.nll_loss(logprobs, targets[n:]))

    return logistic(known, targets, asked, classes, min(PENALTIES, key=held_out))


def logistic(
    known: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor, classes: int, penalty: float
) -> torch.Tensor:
    """Log-probabilities of the minimum of mean NLL + penalty * |W|^2 / 2, float64, by L-BFGS."""
    centre, width = known.double().mean(0), known.double().std(0).clamp(min=1e-6)
    known, asked = ((x.double() - centre) / width for x in (known, asked))
    weight = torch.zeros(known.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        descent.zero_grad()
        nll = torch.nn.functional.cross_entropy(known @ weight + bias, targets)
        loss = nll + penalty * weight.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        descent.step(objective)
    return (asked @ weight + bias).detach().log_softmax(1)


def constant_answer(task: Task, split: str = "test") -> float:
    """Score of always giving the commonest training answer: what chance is worth on this task."""
    common = Counter(row["answers"][0] for row in task.splits["train"]).most_common(1)[0][0]
    grade = rouge_l if task.metric == "rouge_l" else lambda text, answers: float(text in answers)
    return float(np.mean([grade(common, row["answers"]) for row in task.splits[split]]))
