"""Resized and reordered vocabularies: rows by token, against a sum written out token by token."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_anatomy import edited, noisy, stored
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import merge as merging

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LENGTH = 257


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A base with three rows of padding below its tokens."""
    folder = tmp_path_factory.mktemp("untied") / "base"
    return tiny.save_base(folder, vocab_size=LENGTH + 3, tie_word_embeddings=False)


def grown(base, folder, added, rows, seed):
    """A full fine-tune with tokens added to the base's, and embeddings of that many rows."""
    tensors = noisy(stored(base), seed)
    generator = torch.Generator().manual_seed(seed)
    for name in (EMBEDDING, HEAD):
        more = torch.randn(max(rows - len(tensors[name]), 0), 16, generator=generator)
        tensors[name] = torch.cat([tensors[name], more])[:rows].contiguous()
    edited(base, folder, tensors, vocab_size=rows)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    return folder


def merge(base, models, out, *flags):
    named = ["--base", str(base), "--models", *map(str, models), "--out", str(out)]
    merging.main(["--rule", "task_arithmetic", *named, *map(str, flags)])
    return load_file(out / "model.safetensors")


def vocabulary(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def by_hand(name, token, base, models, weights):
    """The row of one token: the base's or a default for it, and each model's difference from it."""
    own = []
    for folder in (base, *models):
        row = vocabulary(folder).get(token)
        tensor = stored(folder)[name]
        own.append(tensor[row] if row is not None and row < len(tensor) else None)
    owners = [row for row in own[1:] if row is not None]
    origin = own[0] if own[0] is not None else torch.stack(owners).mean(0)
    changes = [0 if row is None else row - origin for row in own[1:]]
    return origin + sum(w * change for w, change in zip(weights, changes, strict=True))


@pytest.mark.parametrize("choice", ["base", "union", "b"])
def test_rows_are_matched_by_token(untied, tmp_path, choice):
    # in the padding
    a = grown(untied, tmp_path / "a", ["<think>", "<both>"], LENGTH + 3, 1)
    b = grown(untied, tmp_path / "b", ["<both>", "<b>", "<c>", "<d>"], LENGTH + 8, 2)
    weights = [0.75, 0.5]
    out = tmp_path / "out"
    ours = merge(untied, [a, b], out, "--tokenizer", choice, "--weights", *weights)
    rows = {"base": LENGTH + 3, "union": LENGTH + 5, "b": LENGTH + 8}[choice]
    tokens = vocabulary(out)
    added = {"base": set(), "union": {"<think>", "<both>", "<b>", "<c>", "<d>"}}
    named = added.get(choice, {"<both>", "<b>", "<c>", "<d>"})
    assert tokens.keys() == vocabulary(untied).keys() | named
    for name in (EMBEDDING, HEAD):
        assert ours[name].shape == (rows, 16)
        for token, row in tokens.items():
            expected = by_hand(name, token, untied, [a, b], weights)
            torch.testing.assert_close(ours[name][row], expected, msg=token)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == rows
    words = AutoTokenizer.from_pretrained(out)
    assert all(words.convert_tokens_to_ids(token) == tokens[token] for token in named)
    assert (
        model(torch.tensor([[tokens["a"], *(tokens[x] for x in named)]]))
        .logits.isfinite()
        .all()
    )


def test_without_a_choice_the_bases_rows_stay_and_it_is_said(untied, tmp_path, capsys):
    short = grown(untied, tmp_path / "short", [], LENGTH, 1)  # cut off the padding
    long = grown(untied, tmp_path / "long", ["<x>"], LENGTH + 64, 2)
    ours = merge(untied, [short, long], tmp_path / "out", "--weights", 1, 1)
    assert f"embeddings have {LENGTH + 3} rows" in capsys.readouterr().out
    base, one, two = (stored(folder)[HEAD] for folder in (untied, short, long))
    expected = base + (two[: LENGTH + 3] - base)
    expected[:LENGTH] += one - base[:LENGTH]
    torch.testing.assert_close(ours[HEAD], expected)


def test_a_reordered_vocabulary_is_put_in_order(untied, tmp_path):
    """The same model under a permutation of its tokens: nothing but its order differs."""
    other = shutil.copytree(untied, tmp_path / "other")
    state = json.loads((other / "tokenizer.json").read_text())
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)).tolist()
    words = state["model"]["vocab"]
    state["model"]["vocab"] = {
        x: order[row] if row < 256 else row for x, row in words.items()
    }
    (other / "tokenizer.json").write_text(json.dumps(state))
    tensors = noisy(stored(untied))
    tuned = edited(untied, tmp_path / "tuned", tensors)
    moved = {name: x.clone() for name, x in tensors.items()}
    for name in (EMBEDDING, HEAD):
        moved[name][torch.tensor(order)] = tensors[name][:256]
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another vocabulary"):
        merge(untied, [other], tmp_path / "no")
    ours = merge(untied, [other], tmp_path / "out", "--tokenizer", "base")
    expected = merge(untied, [tuned], tmp_path / "expected")
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)
    theirs = merge(untied, [other], tmp_path / "theirs", "--tokenizer", "other")
    for name, tensor in moved.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6)


def test_an_adapter_trained_on_more_tokens_is_what_peft_merges(untied, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(untied)
    model.resize_token_embeddings(LENGTH + 9)
    settings = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    get_peft_model(model, settings).save_pretrained(tmp_path / "a")
    words = AutoTokenizer.from_pretrained(untied)
    words.add_tokens([f"<{i}>" for i in range(9)])
    words.save_pretrained(tmp_path / "a")
    ours = merge(untied, [tmp_path / "a"], tmp_path / "out", "--tokenizer", "a")
    grown_base = AutoModelForCausalLM.from_pretrained(untied)
    grown_base.resize_token_embeddings(LENGTH + 9)
    merged = PeftModel.from_pretrained(grown_base, tmp_path / "a").merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def test_factors_of_an_embedding_keep_their_tokens_in_a_union(untied, tmp_path):
    options = {"target_modules": ["embed_tokens"]}
    adapter = tiny.save_adapter(tmp_path / "adapter", untied, 3, **options)
    b = grown(untied, tmp_path / "b", ["<b>", "<c>", "<d>", "<e>"], LENGTH + 4, 2)
    ours = merge(
        untied,
        [adapter, b],
        tmp_path / "out",
        "--tokenizer",
        "union",
        "--weights",
        1,
        0,
    )
    alone = merge(untied, [adapter], tmp_path / "alone")
    torch.testing.assert_close(ours[EMBEDDING][:LENGTH], alone[EMBEDDING][:LENGTH])
    torch.testing.assert_close(ours[EMBEDDING][LENGTH:], stored(b)[EMBEDDING][LENGTH:])


def test_a_union_of_other_vocabularies_is_refused(untied, tmp_path):
    other = edited(untied, tmp_path / "other", noisy(stored(untied)))
    state = json.loads((other / "tokenizer.json").read_text())
    state["model"]["vocab"]["ab"] = LENGTH + 1
    (other / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="'ab' in the vocabulary itself"):
        merge(untied, [other], tmp_path / "out", "--tokenizer", "union")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        merge(untied, [other], tmp_path / "out", "--tokenizer", "union")
