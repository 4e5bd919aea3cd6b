"""Scores against a bare forward pass and greedy generation; losses against known values."""

import math

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from helpers.study import answers, probe
from helpers.study import scores as evaluate


@pytest.fixture(scope="module")
def talker():
    return tiny.llama(3), tiny.byte_tokenizer()


def rows_of(prompts, answers, options=()):
    return [
        {"id": str(i), "prompt": p, "answers": a, "options": list(options)}
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]


def greedy_texts(model, tokenizer, prompts, n=4):
    """Greedy continuations, one prompt at a time and without a cache: the plain oracle."""
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(n):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        texts.append(ids[-n:])
    return texts


def test_nll_is_that_of_a_bare_forward_pass(talker):
    model, tokenizer = talker
    rows = rows_of(
        ["abc", "a longer prompt", "q"], [["x y"], ["no"], ["zz"]], ["yes", "no"]
    )
    scores = evaluate.score(model, tokenizer, rows, batch_size=2)
    for row, nll in zip(rows, scores["nll"], strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(" " + row["answers"][0])["input_ids"] + [
            tokenizer.eos_token_id
        ]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        mine = [
            logprobs[len(prompt) - 1 + k, token].item()
            for k, token in enumerate(answer)
        ]
        assert nll == pytest.approx(-np.mean(mine), abs=1e-5)


def test_teacher_forced_exact_match_is_greedy_generation(monkeypatch):
    model, tokenizer = tiny.llama(5), tiny.byte_tokenizer()
    prompts = [f"prompt number {i} {'x' * (i % 7)}" for i in range(40)]
    tokens = greedy_texts(model, tokenizer, prompts, n=3)
    # any token may end an answer in this check: the third greedy token is declared the end
    wrong = {i for i in range(0, 40, 3)}

    def answer(tokenizer, text, end=None):
        i = int(text)
        first = (tokens[i][0] + 1) % 256 if i in wrong else tokens[i][0]
        return [first, *tokens[i][1:]]

    monkeypatch.setattr(evaluate, "encode_answer", answer)
    rows = rows_of(prompts, [[str(i)] for i in range(40)])
    hit = evaluate.score(model, tokenizer, rows)["correct"]
    assert [i for i in range(40) if not hit[i]] == sorted(wrong)


def test_generation_pads_on_the_left_without_a_trace(talker):
    model, tokenizer = talker
    prompts = ["a", "a much longer prompt than that", "mid size"]
    together = evaluate.generate(model, tokenizer, prompts, 4, batch_size=3)
    alone = [evaluate.generate(model, tokenizer, [p], 4)[0] for p in prompts]
    assert together == alone


def test_scores_do_not_depend_on_the_batch(talker):
    model, tokenizer = talker
    rows = rows_of(
        [f"p{'q' * i}" for i in range(9)], [["a", "bcd"]] * 9, ["a", "bcd", "e"]
    )
    one, many = (
        evaluate.score(model, tokenizer, rows, batch_size=size) for size in (1, 9)
    )
    pd.testing.assert_frame_equal(one, many, atol=1e-5)


def reading(logprobs, best, unended=None, ends=None):
    """A candidate of as many tokens, its end the last."""
    ends = ends or [False] * len(best)
    arrays = (np.array(x) for x in (logprobs, best, unended or best, ends))
    return answers.Reading(list(range(len(best))), *arrays)


END = answers.Stop(256, 1)


def test_any_accepted_answer_counts_and_options_are_told_from_it():
    row = {"id": "0", "answers": ["b", "c"], "options": ["a", "b"]}
    names, wrong = ["b", "c", "a"], [False, True]
    b, c, a = (
        reading([-0.5, -1.5], wrong),
        reading([-9.0, 0.0], wrong),
        reading([-1.0], [False]),
    )
    right_c, right_a = (
        c._replace(best=np.array([True] * 2)),
        a._replace(best=np.array([True])),
    )
    by_c = evaluate.outcome(row, names, [b, right_c, a], END)
    assert (by_c["correct"], by_c["option_correct"], by_c["invalid"]) == (1.0, 0.0, 1.0)
    assert (by_c["nll"], by_c["nll_answer"]) == (1.0, 0.5)
    by_a = evaluate.outcome(row, names, [b, c, right_a], END)
    assert (by_a["correct"], by_a["invalid"]) == (0.0, 0.0)
    many = ["b", *map(str, range(evaluate.MOST_OPTIONS))]
    for no_choice in ([], many):
        open_row = row | {"options": no_choice}
        free = evaluate.outcome(open_row, names, [b, c, a], END)
        assert math.isnan(free["option_correct"]) and math.isnan(free["invalid"])
        assert evaluate.candidates(open_row) == ["b", "c"]


def test_the_end_token_is_forbidden_within_the_right_answer_only():
    stops = reading(
        [0, 0, 0], [True, False, True], [True, True, True], [False, True, False]
    )
    assert answers.is_forced(stops, END) and answers.followed([stops], END) == [0]
    empty = stops._replace(
        best=np.array([False, False, False]), ends=np.array([True] * 3)
    )
    assert answers.is_forced(empty._replace(best=np.array([False, False, True])), END)
    assert not answers.is_forced(empty, END)  # it goes on where the right answer ends
    assert answers.followed([empty], END) == []
    elsewhere = reading([0, 0, 0], [True, False, True])
    assert (
        not answers.is_forced(elsewhere, END)
        and answers.followed([elsewhere], END) is None
    )
    # another candidate shows it
    assert answers.followed([elsewhere, stops], END) == [0]


def biased(model, tokenizer, towards):
    """The model with the logit of the end token raised: it stops too early."""
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.weight.data = model.get_output_embeddings().weight.data.clone()
    head.bias.data.zero_()
    head.bias.data[tokenizer.eos_token_id] = towards
    model.set_output_embeddings(head)
    return model


def test_a_model_that_stops_too_early_is_right_when_the_end_is_forbidden():
    tokenizer = tiny.byte_tokenizer()
    prompts = [f"prompt number {i} {'x' * (i % 7)}" for i in range(12)]
    # what the model says in two tokens if it may not end; then, as planted, it ends at once
    model = biased(tiny.llama(5), tokenizer, -1e4)
    said = greedy_texts(model, tokenizer, prompts, n=2)
    silent = biased(tiny.llama(5), tokenizer, 1e4)
    fill, rows = tokenizer.pad_token_id, range(12)
    cached = answers.read_prompts(
        silent, [tokenizer(p)["input_ids"] for p in prompts], fill
    )
    tokens = [[[*ids, tokenizer.eos_token_id]] for ids in said]
    read = answers.readings(silent, cached, tokens, fill, END)
    assert [answers.followed(read[i], END) for i in rows] == [[]] * 12
    assert not any(read[i][0].best.all() for i in rows)
    assert all(answers.is_forced(read[i][0], END) for i in rows)
    wrong = [[[(ids[0] + 1) % 256, ids[1], tokenizer.eos_token_id]] for ids in said]
    read = answers.readings(silent, cached, wrong, fill, END)
    assert not any(answers.is_forced(read[i][0], END) for i in rows)


def test_texts_are_those_of_greedy_decoding_whether_generated_or_read(talker):
    model, tokenizer = talker
    prompts = [f"say {i} {'y' * (i % 5)}" for i in range(10)]
    said = evaluate.generate(model, tokenizer, prompts, 100)
    asked = [text[:20] if i % 2 else "something else" for i, text in enumerate(said)]
    rows = rows_of(prompts, [[text] for text in asked])
    scores = evaluate.score(model, tokenizer, rows, batch_size=4)
    for text, answer in zip(said, scores["answer"], strict=True):
        assert text.startswith(answer) and answer
    without = evaluate.score(model, tokenizer, rows, batch_size=4, texts=False)
    pd.testing.assert_frame_equal(without, scores.drop(columns=["kind", "answer"]))


def test_rouge_l_takes_the_best_reference():
    assert evaluate.rouge_l("the cat sat", ["a dog", "the cat sat"]) == 1.0
    # the longest common subsequence is "the sat": precision 2/3, recall 1
    assert evaluate.rouge_l("the cat sat", ["the sat"]) == pytest.approx(0.8)


def test_rouge_tasks_are_scored_by_generation(talker):
    model, tokenizer = talker
    rows = rows_of(["one", "two"], [["alpha"], ["beta"]])
    texts = evaluate.generate(model, tokenizer, ["one", "two"], 20)
    rows[0]["answers"] = ["same words " + texts[0]]
    scores = evaluate.score(model, tokenizer, rows, metric="rouge_l")["correct"]
    assert scores.between(0, 1).all()


def test_the_commonest_training_answer_is_chance():
    task = tiny.toy("t", n=9, options=("yes", "no"))
    assert evaluate.constant_answer(task, "test") == pytest.approx(5 / 9)


def test_a_linear_probe_minimises_its_objective_and_learns_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    known, asked = (torch.randn(n, 5, generator=generator) for n in (200, 100))
    truth = torch.tensor([2.0, -1, 0, 0, 0])
    targets = (known @ truth > 0.3).long()
    guess = probe.linear_probe(known, targets, asked, 2).argmax(1)
    assert (guess == (asked @ truth > 0.3).long()).float().mean() > 0.9

    logprobs = probe.logistic(known, targets, known, 2, penalty=0.1)
    standard = (known.double() - known.double().mean(0)) / known.double().std(0)
    residual = logprobs.exp() - torch.nn.functional.one_hot(targets, 2)
    # the gradient in W is X'(p - y) / n + penalty W: where it vanishes, W gives these odds again
    weight = -standard.T @ residual / (0.1 * len(known))
    odds = (logprobs[:, 1] - logprobs[:, 0]).double()
    again = standard @ (weight[:, 1] - weight[:, 0])
    torch.testing.assert_close(
        odds - odds.mean(), again - again.mean(), atol=1e-4, rtol=1e-3
    )


def test_a_classifier_is_graded_by_its_labels():
    rows = [
        {"id": str(i), "answers": answers}
        for i, answers in enumerate((["b"], ["a", "c"]))
    ]
    logprobs = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.3, 0.6]]).log()
    graded = evaluate.graded(rows, ["a", "b", "c"], logprobs)
    assert list(graded["correct"]) == [1.0, 1.0] and graded["invalid"].isna().all()
    assert list(graded["nll"]) == pytest.approx([-math.log(0.5), -math.log(0.1)])
