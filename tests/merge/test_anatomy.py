"""Weights, names, ties and buffers as transformers loads them, whatever the files say."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers import merge as merging
from helpers.merge import anatomy, weights

WEIGHTS = "model.safetensors"


def stored(folder):
    return load_file(folder / WEIGHTS)


def store(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edited(folder, target, tensors, **config):
    """A copy of a model's folder with these tensors and another configuration."""
    shutil.copytree(folder, target)
    store(target, tensors)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


def noisy(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


def gpt2(folder):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 257,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
    }
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    return folder


def gemma(folder):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 257,
        "hidden_size": 16,
        "intermediate_size": 32,
        "head_dim": 8,
    }
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("tie_word_embeddings", None)  # as on the hub: the class's default ties
    file.write_text(json.dumps(config))
    return folder


def t5(folder):
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "d_model": 16, "d_kv": 8, "d_ff": 32}
    T5ForConditionalGeneration(
        T5Config(**sizes, num_layers=1, num_heads=2)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_labels"])
def test_a_configuration_that_never_ends_is_refused(tiny_base, tmp_path, name):
    folder = edited(tiny_base, tmp_path / "model", stored(tiny_base), **{name: 2**63})
    with pytest.raises(ValueError, match=f"config.json describes no .*: {name} is 9"):
        merging.open_base(folder)


@pytest.mark.parametrize(
    ("make", "copy"),
    [
        (gemma, "lm_head.weight"),
        (gpt2, "lm_head.weight"),
        (t5, "decoder.embed_tokens.weight"),
    ],
)
def test_copies_of_a_tied_tensor_are_one_whatever_the_configuration_says(
    tmp_path, make, copy
):
    base = make(tmp_path / "base")
    original = anatomy.anatomy(base).ties[copy]
    tuned = noisy(stored(base))
    both = edited(base, tmp_path / "both", tuned | {copy: tuned[original].clone()})
    only = {copy: tuned[original].clone()} | {
        n: t for n, t in tuned.items() if n != original
    }
    renamed = edited(base, tmp_path / "only", only)
    ours = merging.open_base(base)
    for folder in (both, renamed):
        (row,) = [
            row
            for row in merging.views(ours, [merging.open_specialist(folder)])
            if row.name in (copy, original)
        ]
        assert row.name == original
        torch.testing.assert_close(
            row.taus[0][...], tuned[original] - stored(base)[original]
        )
    torn = edited(base, tmp_path / "torn", tuned | {copy: tuned[original] + 1})
    apart = {
        row.name: row.taus[0]
        for row in merging.views(ours, [merging.open_specialist(torn)])
    }
    start = stored(base)[original]
    torch.testing.assert_close(apart[original][...], tuned[original] - start)
    torch.testing.assert_close(apart[copy][...], tuned[original] + 1 - start)
    alike = merging.views(
        merging.open_base(torn), [merging.open_specialist(torn, "same")]
    )
    assert not alike and copy in merging.open_base(torn).tensors


def test_the_hubs_layout_without_prefix_and_with_old_buffers_is_one_model(
    tmp_path, capsys
):
    base = gpt2(tmp_path / "base")
    tuned = edited(base, tmp_path / "tuned", noisy(stored(base)))
    plain = {name.removeprefix("transformer."): x for name, x in stored(base).items()}
    buffers = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    hub = edited(base, tmp_path / "hub", plain | buffers)
    flags = ["--rule", "task_arithmetic", "--base", str(hub), "--models", str(tuned)]
    merging.main([*flags, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "not those of GPT2LMHeadModel" in said and "2 buffers" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in (
        AutoModelForCausalLM.from_pretrained(tuned).state_dict().items()
    ):
        torch.testing.assert_close(merged.state_dict()[name], tensor)


def test_a_configuration_that_changes_is_read_anew(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    assert anatomy.anatomy(folder).ties
    file = folder / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False})
    )
    assert not anatomy.anatomy(folder).ties


def test_inverse_frequencies_of_old_files_take_no_part(tiny_base, tmp_path):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0)}
    tuned = edited(tiny_base, tmp_path / "old", noisy(stored(tiny_base)) | old)
    base = merging.open_base(tiny_base)
    names = [row.name for row in merging.views(base, [merging.open_specialist(tuned)])]
    assert set(names) == stored(tiny_base).keys()


def test_a_classifier_is_merged_into_its_headless_base_on_request(tmp_path):
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32}
    config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    body = BertModel(config)
    body.save_pretrained(tmp_path / "base")
    classifier = BertForSequenceClassification(config)
    classifier.bert.load_state_dict(body.state_dict())
    classifier.save_pretrained(tmp_path / "tuned")
    store(tmp_path / "tuned", noisy(stored(tmp_path / "tuned")))
    base = merging.open_base(tmp_path / "base")
    tuned = merging.open_specialist(tmp_path / "tuned")
    with pytest.raises(ValueError, match="the base lacks classifier.bias"):
        merging.views(base, [tuned])
    rows = merging.views(base, [tuned], heads="base")
    assert {row.name for row in rows} == stored(tmp_path / "base").keys()


def test_the_files_are_those_that_transformers_loads(tiny_base, tmp_path):
    folder = tiny.save_base(tmp_path / "both", max_shard_size="20KB")
    shifted = {name: tensor + 1 for name, tensor in stored(tiny_base).items()}
    store(folder, shifted)  # a later save beside the old shards
    name = "model.norm.weight"
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()[name]
    assert torch.equal(weights.read_folder(folder)[name], loaded)
    named = edited(
        tiny_base, tmp_path / "named", stored(tiny_base), transformers_weights="x"
    )
    with pytest.raises(ValueError, match="x is damaged"):
        weights.read_folder(named)
    save_file(shifted, named / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((named / "config.json").read_text())
    for place, right in (("other.safetensors", True), ("../other.safetensors", False)):
        (named / "config.json").write_text(
            json.dumps(config | {"transformers_weights": place})
        )
        if right:
            assert torch.equal(weights.read_folder(named)[name], shifted[name])
        else:
            with pytest.raises(ValueError, match="no file beside it"):
                weights.read_folder(named)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {}}',
    ]
    + ['{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 7}}', "\x00"],
)
def test_a_malformed_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"):
        weights.read_folder(tmp_path)


def test_codes_of_a_quantised_model_are_refused_with_the_remedy(
    tiny_base, tiny_adapters, tmp_path
):
    name = "model.layers.0.self_attn.q_proj.weight"
    codes = stored(tiny_base) | {name: stored(tiny_base)[name].to(torch.int8)}
    rule = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    eight = edited(tiny_base, tmp_path / "eight", codes, quantization_config=rule)
    adapter = merging.open_specialist(tiny_adapters[0])
    with pytest.raises(ValueError, match="quantised .bitsandbytes.*dequantize"):
        merging.views(merging.open_base(eight), [adapter])
    silent = edited(tiny_base, tmp_path / "silent", codes)
    with pytest.raises(ValueError, match="stores as torch.int8: dequantise"):
        merging.views(merging.open_base(silent), [adapter])
