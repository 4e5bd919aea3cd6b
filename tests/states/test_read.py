"""Pooling keeps a state whatever the batch and the side of the padding; layers are named truly."""

import pytest
import tiny
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.states import read

PROMPTS = [[5, 9, 2], [7, 1, 8, 8, 3, 4, 11], [42], [3, 3, 14, 90]]
# read once
INSTRUCTED = [[7, 1, 8], [7, 1, 8, 8, 3, 4, 11], [7, 1, 8, 3], [7, 1, 14, 90]]


def pooled(model, prompts, how, side="right", length=9):
    """Pooled states of one padded batch."""
    ids = torch.full((len(prompts), length), 256)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        at = (
            slice(0, len(prompt))
            if side == "right"
            else slice(length - len(prompt), length)
        )
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    ends = [len(p) - 1 if side == "right" else length - 1 for p in prompts]
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            output_hidden_states=True,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        )
    return read.pool(out.hidden_states, mask, torch.tensor(ends), how)


@pytest.mark.parametrize("how", ["last", "mean", "first_decoder"])
def test_state_depends_neither_on_batch_nor_on_padding_side(how):
    model = tiny.llama()
    alone = torch.cat([pooled(model, [p], how, length=len(p)) for p in PROMPTS])
    assert alone.shape == (4, 3, 16) and alone.dtype == torch.float32
    for side in ("right", "left"):
        torch.testing.assert_close(
            pooled(model, PROMPTS, how, side), alone, rtol=1e-4, atol=1e-5
        )


def bert():
    size = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 100,
    }
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(num_hidden_layers=2, **size)).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=100,
        d_model=8,
        d_ff=16,
        d_kv=4,
        num_layers=1,
        num_decoder_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "make, how, prompts",
    [
        (tiny.llama, "last", PROMPTS),
        (tiny.llama, "last", INSTRUCTED),
        (tiny.llama, "mean", INSTRUCTED),
        (bert, "last", INSTRUCTED),
        (bert, "mean", PROMPTS),
        (t5, "first_decoder", INSTRUCTED),
    ],
)
def test_prompt_states_are_those_of_each_prompt_read_alone(make, how, prompts):
    model = make()
    together = read.prompt_states(model, prompts, how, batch_size=3)
    assert together.dtype == torch.float32 and together.is_contiguous()
    for prompt, states in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        extra = (
            {"decoder_input_ids": torch.tensor([[0]])} if how == "first_decoder" else {}
        )
        with torch.no_grad():
            out = model(ids, output_hidden_states=True, **extra)
        layers = out.decoder_hidden_states if extra else out.hidden_states
        expected = [h[0].mean(0) if how == "mean" else h[0, -1] for h in layers]
        assert len(states) == len(read.layer_names(model)) == 3
        torch.testing.assert_close(states, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_classification_head_changes_no_state():
    body = bert().base_model
    headed = BertForSequenceClassification(body.config).eval()
    headed.bert.load_state_dict(body.state_dict(), strict=False)
    states = [read.prompt_states(model, PROMPTS, "mean") for model in (bert(), headed)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert read.layer_names(headed) == ["embeddings", "block 1", "block 2"]


@pytest.mark.parametrize("make, how", [(tiny.llama, "first_decoder"), (t5, "last")])
def test_prompt_states_refuse_a_state_that_the_model_has_not(make, how):
    with pytest.raises(ValueError, match=f"has no '{how}' state"):
        read.prompt_states(make(), PROMPTS, how)


def test_pool_by_hand_and_nan_padding_never_counts():
    states = torch.arange(12.0).reshape(1, 4, 3)
    states[0, 3] = torch.nan
    mask, last = torch.tensor([[1, 1, 1, 0]]), torch.tensor([2])
    assert read.pool((states,), mask, last, "last").tolist() == [[[6.0, 7.0, 8.0]]]
    assert read.pool((states,), mask, last, "mean").tolist() == [[[3.0, 4.0, 5.0]]]
    assert read.pool((states,), mask, last, "first_decoder").tolist() == [
        [[0.0, 1.0, 2.0]]
    ]


def test_pool_promotes_half_precision_before_the_mean():
    states = torch.ones(1, 3, 2, dtype=torch.bfloat16)
    # one bfloat16 step: the mean, a third of it, would round away
    states[0, 0] += 2**-7
    mean = read.pool((states,), torch.ones(1, 3), torch.tensor([2]), "mean")
    assert mean.dtype == torch.float32
    torch.testing.assert_close(
        mean, torch.full((1, 1, 2), 1 + 2**-7 / 3), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    "mask, last, how, message",
    [
        ([[1, 1, 0]], [2], "last", "uncounted position"),
        ([[0, 0, 0]], [0], "mean", "no counted position"),
        ([[1, 1, 1]], [2], "max", "unknown pooling"),
    ],
)
def test_pool_refuses(mask, last, how, message):
    with pytest.raises(ValueError, match=message):
        read.pool((torch.zeros(1, 3, 2),), torch.tensor(mask), torch.tensor(last), how)


def test_layer_names_tell_final_norm_from_raw_stream():
    assert read.layer_names(tiny.llama()) == ["embeddings", "block 1", "final norm"]
    assert read.layer_names(tiny.llama(tie_last_hidden_states=False))[-1] == "block 2"
    assert read.layer_names(bert()) == ["embeddings", "block 1", "block 2"]
    assert read.layer_names(t5()) == ["embeddings", "block 1", "final norm"]
