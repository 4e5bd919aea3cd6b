"""Streamed gradients against autograd on whole vectors; the pair table on known gradients."""

from itertools import combinations

import numpy as np
import pytest
import tiny
import torch
from transformers import T5Config, T5ForConditionalGeneration

from helpers.states import answer_loss, encode_examples, gradients, read

EXAMPLES = {
    "plural": [
        ([5, 9, 2], [7, 256]),
        ([7, 1, 8, 8, 3], [4, 11, 256]),
        ([42], [9, 256]),
    ],
    "past": [([3, 3, 14, 90], [2, 256]), ([1, 2], [3, 4, 5, 6, 256])],
    "sum": [([60, 61, 62, 63, 64, 65], [8, 256])],
}


def by_autograd(model, names):
    """Whole gradients (tasks, coordinates), one example at a time."""
    parameters = [model.get_parameter(name) for name in names]
    out = []
    for examples in EXAMPLES.values():
        losses = []
        for prompt, answer in examples:
            logits = model(torch.tensor([prompt + answer])).logits[
                0, len(prompt) - 1 : -1
            ]
            losses.append(-logits.log_softmax(-1)[range(len(answer)), answer])
        found = torch.autograd.grad(torch.cat(losses).mean(), parameters)
        out.append(torch.cat([g.flatten() for g in found]).double())
    return torch.stack(out)


def matrices(model):
    return [n for n, p in model.named_parameters() if "layers" in n and p.ndim == 2]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_streamed_inner_products_are_those_of_whole_gradients(batch_size):
    model = tiny.llama()
    whole = by_autograd(model, matrices(model))
    streamed = gradients.grams(model, EXAMPLES, batch_size=batch_size)
    assert streamed.shape == (2, 3, 3)
    np.testing.assert_allclose(streamed.sum(0), whole @ whole.T, rtol=1e-4, atol=1e-7)


def test_an_encoder_decoder_is_differentiated_but_for_the_shared_position_bias():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    names = [
        n for n, p in model.named_parameters() if "decoder.block" in n and p.ndim == 2
    ]
    parameters = [model.get_parameter(n) for n in names if "bias" not in n]
    assert len(parameters) == len(names) - 1
    whole = []
    for examples in EXAMPLES.values():
        loss = answer_loss(model, examples) / sum(len(answer) for _, answer in examples)
        found = torch.autograd.grad(loss, parameters)
        whole.append(torch.cat([g.flatten() for g in found]).double())
    whole = torch.stack(whole)
    streamed = gradients.grams(model, EXAMPLES).sum(0)
    np.testing.assert_allclose(streamed, whole @ whole.T, rtol=1e-4, atol=1e-7)


def test_named_parameters_only_and_the_model_is_left_as_it_was():
    model = tiny.llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    names = [
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.input_layernorm.weight",
    ]
    whole = by_autograd(model, names)
    streamed = gradients.grams(model, EXAMPLES, names).sum(0)
    np.testing.assert_allclose(streamed, whole @ whole.T, rtol=1e-4, atol=1e-9)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()
    assert not any(
        m._forward_pre_hooks or m._forward_hooks for m in read.blocks_of(model)
    )


def test_examples_are_prompts_and_first_answers_with_their_end():
    tokenizer = tiny.byte_tokenizer()
    rows = tiny.toy("toy").splits["train"].take(3)
    texts = [
        tuple(map(tokenizer.decode, pair)) for pair in encode_examples(tokenizer, rows)
    ]
    assert texts[1] == ("toy train long 1:", " 1<end>") and len(texts) == 3


def test_pair_table_of_known_gradients():
    g = np.array([[3.0, 0, 0], [0, 4.0, 0], [-6.0, 0, 0]])
    table = gradients.gradient_table(g @ g.T, list("abc")).set_index(
        ["task_a", "task_b"]
    )
    assert table.loc[("a", "b")].tolist() == pytest.approx([5, 0, 3, 4])
    assert table.loc[("a", "c")].tolist() == pytest.approx([9, -1, 3, 6])
    for (i, a), (j, b) in combinations(enumerate("abc"), 2):
        assert table.gradient_l2[(a, b)] == pytest.approx(np.linalg.norm(g[i] - g[j]))


def test_one_task_under_two_names_is_no_distance_apart():
    model = tiny.llama()
    twice = {"a": EXAMPLES["past"], "b": EXAMPLES["past"][::-1]}
    table = gradients.gradient_table(
        gradients.grams(model, twice).sum(0), list(twice)
    ).loc[0]
    assert table.gradient_cosine == pytest.approx(1, abs=1e-6)
    assert table.gradient_l2 < 1e-3 * table.gradient_norm_a


# (transformation of both, or of the second alone) -> what stays: l2, cosine, norm of a
@pytest.mark.parametrize(
    "change, alike, stays",
    [
        (lambda g: g[:, ::-1], True, (1, 1, 1)),  # permuted coordinates
        # rotated
        (lambda g: g @ np.linalg.qr(np.vander([1.0, 2, 3, 4]))[0], True, (1, 1, 1)),
        (lambda g: 3 * g, True, (0, 1, 0)),
        (lambda g: 3 * g, False, (0, 1, 1)),
        (lambda g: g + 1, True, (1, 0, 0)),
        (lambda g: g + 1, False, (0, 0, 1)),
        (lambda g: np.hstack([g, g]), True, (0, 1, 0)),
    ],
)
def test_invariance(change, alike, stays):
    g = np.random.default_rng(0).normal(size=(2, 4))
    after = change(g) if alike else np.vstack([g[:1], change(g[1:])])
    columns = ["gradient_l2", "gradient_cosine", "gradient_norm_a"]
    old, new = (
        gradients.gradient_table(x @ x.T, ["a", "b"]).loc[0, columns]
        for x in (g, after)
    )
    assert [n == pytest.approx(o) for o, n in zip(old, new, strict=True)] == list(
        map(bool, stays)
    )


@pytest.mark.parametrize(
    "tasks, names, message",
    [
        ({"a": []}, None, "task a has no answer tokens"),
        ({"a": [([1], [])]}, None, "task a has no answer tokens"),
        (EXAMPLES, ["model.norm.weight"], "model.norm.weight is in no block"),
    ],
)
def test_grams_refuse(tasks, names, message):
    with pytest.raises(ValueError, match=message):
        gradients.grams(tiny.llama(), tasks, names)
