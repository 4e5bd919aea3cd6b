"""Adapters and checkpoints as people have them, merged by the command and loaded by transformers.

The oracles are PEFT's own merge and transformers' loader.
"""

import json

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_anatomy import edited, gpt2, noisy, store, stored

from helpers import merge as merging

SIZES = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32}
HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2}
TIED = transformers.LlamaForCausalLM
GPT2 = transformers.GPT2LMHeadModel
BART = transformers.BartForConditionalGeneration


def bart(folder):
    """Its embedding is of a subclass of torch's."""
    torch.manual_seed(0)
    part = {f"{x}_{y}": n for x in ("encoder", "decoder") for y, n in PARTS.items()}
    config = transformers.BartConfig(vocab_size=257, d_model=16, **part)
    BART(config).save_pretrained(folder)
    return folder


BOTH = ["embed_tokens", "lm_head"]
PARTS = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


def adapter(folder, base, of, seed=1, size=0.1, **options):
    """A LoRA adapter with noise on whatever it trains."""
    torch.manual_seed(seed)
    model = get_peft_model(
        of.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, **options)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + size * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def merge(base, models, out, *flags):
    named = ["--base", str(base), "--models", *map(str, models), "--out", str(out)]
    merging.main(["--rule", "task_arithmetic", *named, *map(str, flags)])
    return out


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=name)


def llama(folder):
    return tiny.save_base(folder)


@pytest.mark.parametrize(
    ("make", "of", "options"),
    [
        (gpt2, GPT2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
        (llama, TIED, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
        (
            llama,
            TIED,
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        ),
        (llama, TIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (
            llama,
            TIED,
            {"target_modules": ["q_proj"], "modules_to_save": BOTH},
        ),
        (
            llama,
            TIED,
            {
                "target_modules": ["q_proj"],
                "modules_to_save": ["embed_tokens"],
                "ensure_weight_tying": True,
            },
        ),
        (bart, BART, {"target_modules": ["embed_positions", "fc1"]}),
    ],
    ids=[
        "conv1d dora",
        "embedding dora",
        "embedding",
        "head",
        "both",
        "tied",
        "subclass",
    ],
)
def test_what_transformers_loads_is_what_peft_merges(tmp_path, make, of, options):
    base = make(tmp_path / "base")
    folder = adapter(tmp_path / "a", base, of, fan_in_fan_out=of is GPT2, **options)
    theirs = PeftModel.from_pretrained(
        of.from_pretrained(base), folder
    ).merge_and_unload()
    ours = of.from_pretrained(merge(base, [folder], tmp_path / "out"))
    same(ours.state_dict(), theirs.state_dict())


def test_a_tie_that_one_model_gave_up_is_given_up_by_all(tiny_base, tmp_path, capsys):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    head = adapter(tmp_path / "head", tiny_base, TIED, **options)
    full = tiny.save_tuned(tmp_path / "full", tiny_base, 2)
    out = merge(tiny_base, [head, full], tmp_path / "out", "--weights", 0.5, 0.5)
    assert (
        "lm_head.weight is not tied to model.embed_tokens.weight"
        in capsys.readouterr().out
    )
    base, tuned = stored(tiny_base), stored(full)
    name = "model.embed_tokens.weight"
    saved = load_file(head / "adapter_model.safetensors")[
        "base_model.model.lm_head.weight"
    ]
    loaded = TIED.from_pretrained(out).state_dict()
    torch.testing.assert_close(loaded[name], base[name] / 2 + tuned[name] / 2)
    torch.testing.assert_close(loaded["lm_head.weight"], saved / 2 + tuned[name] / 2)
    embedding = adapter(
        tmp_path / "e", tiny_base, TIED, target_modules=["embed_tokens"]
    )
    with pytest.raises(ValueError, match="another specialist no longer ties"):
        merge(tiny_base, [head, embedding], tmp_path / "no")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits


def test_two_adapters_give_the_logits_of_the_sum_in_memory(tiny_base, tmp_path):
    """The whole way of a user: PEFT's folders, the command, transformers; one adapter has B = 0."""
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    one, two = (
        adapter(tmp_path / x, tiny_base, TIED, i, **options)
        for i, x in enumerate("ab", 1)
    )
    idle = adapter(tmp_path / "idle", tiny_base, TIED, 3, size=0, **options)
    out = merge(
        tiny_base, [one, two, idle], tmp_path / "out", "--weights", 0.75, 0.5, 1
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base)
    total = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for folder, weight in ((one, 0.75), (two, 0.5)):
        model = PeftModel.from_pretrained(TIED.from_pretrained(tiny_base), folder)
        for name, tensor in model.merge_and_unload().state_dict().items():
            total[name] += weight * (tensor - base.state_dict()[name])
    base.load_state_dict(total)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(loaded), logits(base), rtol=1e-5, atol=1e-5)
    report = json.loads((out / "merge_report.json").read_text())
    assert report["own"][2] is None


def test_an_adapter_beside_a_full_checkpoint_of_the_same_base(
    tiny_base, tiny_adapters, tmp_path
):
    full = tiny.save_tuned(tmp_path / "full", tiny_base, 1)
    out = merge(
        tiny_base, [tiny_adapters[0], full], tmp_path / "out", "--weights", 0.5, 0.25
    )
    base, tuned = stored(tiny_base), stored(full)
    model = PeftModel.from_pretrained(TIED.from_pretrained(tiny_base), tiny_adapters[0])
    merged = model.merge_and_unload().state_dict()
    for name, tensor in stored(out).items():
        expected = (
            base[name]
            + (merged[name] - base[name]) / 2
            + (tuned[name] - base[name]) / 4
        )
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


# Names -------------------------------------------------------------------------------------------


def bert(folder):
    torch.manual_seed(0)
    transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, **HEADS)
    ).save_pretrained(folder)


def llava(folder):
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SIZES, **HEADS, num_key_value_heads=1)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, **HEADS, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.parametrize("which", ["base", "model"])
def test_names_of_older_files_are_those_that_transformers_loads(tmp_path, which):
    bert(tmp_path / "base")
    edited(tmp_path / "base", tmp_path / "model", noisy(stored(tmp_path / "base")))
    expected = transformers.BertForMaskedLM.from_pretrained(
        tmp_path / "model"
    ).state_dict()
    old = {}
    for name, tensor in stored(tmp_path / which).items():
        for new, before in (
            ("LayerNorm.weight", "LayerNorm.gamma"),
            ("Norm.bias", "Norm.beta"),
        ):
            name = name.replace(new, before)
        old[name] = tensor
    store(tmp_path / which, old)
    out = merge(tmp_path / "base", [tmp_path / "model"], tmp_path / "out")
    # as the base's file has them
    assert stored(out).keys() == stored(tmp_path / "base").keys()
    same(transformers.BertForMaskedLM.from_pretrained(out).state_dict(), expected)


def test_an_adapter_of_a_model_whose_file_has_other_names_than_the_class(tmp_path):
    of = transformers.LlavaForConditionalGeneration
    llava(tmp_path / "base")
    a = adapter(tmp_path / "a", tmp_path / "base", of, target_modules=["q_proj"])
    theirs = PeftModel.from_pretrained(
        of.from_pretrained(tmp_path / "base"), a
    ).merge_and_unload()
    out = merge(tmp_path / "base", [a], tmp_path / "out")
    assert stored(out).keys() == stored(tmp_path / "base").keys()
    same(of.from_pretrained(out).state_dict(), theirs.state_dict())


# Surroundings ------------------------------------------------------------------------------------


def settings(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_settings_of_parts_are_compared_as_the_class_reads_them(tmp_path):
    llava(tmp_path / "base")
    base = json.loads((tmp_path / "base" / "config.json").read_text())["text_config"]
    tensors = noisy(stored(tmp_path / "base"))
    alike = base | {"dtype": "bfloat16", "use_cache": False}
    edited(tmp_path / "base", tmp_path / "alike", tensors, text_config=alike)
    merge(tmp_path / "base", [tmp_path / "alike"], tmp_path / "out")
    other = {
        key: x
        for key, x in base.items()
        if key not in ("rope_parameters", "hidden_act")
    }
    for changes, message in (
        (
            {"rope_theta": 7.0},
            "text_config.rope_parameters.rope_theta of its config is 7.0",
        ),
        ({"hidden_act": "gelu"}, "text_config.hidden_act of its config is 'gelu'"),
    ):
        folder = tmp_path / next(iter(changes))
        edited(tmp_path / "base", folder, tensors, text_config=other | changes)
        with pytest.raises(ValueError, match=message):
            merge(tmp_path / "base", [folder], tmp_path / "no")


@pytest.mark.parametrize("file", ["vocab.txt", "vocab.json"])
def test_vocabularies_in_older_files_are_compared(tiny_base, tmp_path, file):
    words = {"base": ["a", "b", "c"], "model": ["a", "c", "b"]}
    for name, tokens in words.items():
        folder = edited(tiny_base, tmp_path / name, noisy(stored(tiny_base), len(name)))
        (folder / "tokenizer.json").unlink()
        numbered = json.dumps({token: row for row, token in enumerate(tokens)})
        (folder / file).write_text(
            "\n".join(tokens) if file == "vocab.txt" else numbered
        )
    with pytest.raises(ValueError, match="token 1 is 'c', not 'b'"):
        merge(tmp_path / "base", [tmp_path / "model"], tmp_path / "out")
