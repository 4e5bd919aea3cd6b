"""What lies beside the weights: only what belongs is copied, meaningless merges are refused."""

import json
import shutil

import pytest
import tiny
from test_anatomy import edited, noisy, stored
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers import merge as merging


def merge(base, models, out, *flags):
    named = ["--base", str(base), "--models", *map(str, models), "--out", str(out)]
    merging.main(["--rule", "linear", *named, *flags])
    return out


def tuned(base, folder, seed=1, **config):
    return edited(base, folder, noisy(stored(base), seed), **config)


def tokenizer(folder, swap=False, template=None):
    ours = tiny.byte_tokenizer()
    if swap:
        state = json.loads(ours.backend_tokenizer.to_str())
        vocabulary = state["model"]["vocab"]
        first, second, *_ = vocabulary
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(state))
        ours = PreTrainedTokenizerFast(tokenizer_file=str(file))
    ours.chat_template = template
    ours.save_pretrained(folder)


WEIGHTS_OF_OTHERS = (
    "tf_model.h5",
    "model.onnx",
    "model.gguf",
    "optimizer.pt",
    "pytorch_model.bin",
)
NO_PART = (
    "trainer_state.json",
    "eval.log",
    "modeling_my.py",
    "README.md",
    "base.json",
    "x.index.json",
)
PARTS = (
    "LICENSE.md",
    "NOTICE",
    "tokenizer.model",
    "1_Pooling/config.json",
    "merges.txt",
)


def test_only_what_belongs_is_copied(tiny_base, tiny_adapters, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "1_Pooling").mkdir()
    for name in (*WEIGHTS_OF_OTHERS, *NO_PART, *PARTS):
        (base / name).write_text("{}")
    out = merge(base, tiny_adapters[:1], tmp_path / "out")
    written = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert written >= {
        *PARTS,
        "config.json",
        "tokenizer.json",
        "generation_config.json",
    }
    ours = {"README.md", "merge_report.json", "model.safetensors"}
    assert not written & {*WEIGHTS_OF_OTHERS, *NO_PART} - ours
    assert (out / "README.md").read_text() != "{}"


def test_what_only_the_base_can_do_leaves_the_configuration(
    tiny_base, tiny_adapters, tmp_path
):
    stale = {
        "auto_map": {"AutoModel": "x.Y"},
        "quantization_config": {"quant_method": "gptq"},
    }
    base = edited(tiny_base, tmp_path / "base", stored(tiny_base), **stale)
    out = merge(base, tiny_adapters[:1], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert not config.keys() & stale.keys() and config["hidden_size"] == 16


@pytest.mark.parametrize("case", ["vocabulary", "function", "unrelated"])
def test_a_merge_that_means_nothing_is_refused_unless_forced(tiny_base, tmp_path, case):
    folder = tmp_path / "other"
    if case == "vocabulary":
        tokenizer(tuned(tiny_base, folder), swap=True)
    elif case == "function":
        tuned(tiny_base, folder, hidden_act="gelu")
    else:
        tiny.save_base(folder, seed=9)
    message = {
        "vocabulary": "other has another vocabulary than the base",
        "function": "hidden_act of its config is 'gelu'",
        "unrelated": "no fine-tuned version of the base",
    }[case]
    with pytest.raises(ValueError, match=message):
        merge(tiny_base, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merge(tiny_base, [folder], tmp_path / "out", "--force").is_dir()


def test_a_template_that_is_no_text_is_named(tiny_base, tmp_path):
    model = tuned(tiny_base, tmp_path / "model")
    (model / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja cannot be read"):
        merge(tiny_base, [model], tmp_path / "out")


def test_heads_of_other_labels_are_refused(tiny_base, tmp_path):
    kinds = {"architectures": ["LlamaForSequenceClassification"]}
    models = [
        tuned(tiny_base, tmp_path / name, id2label={"0": name, "1": "other"})
        for name in ("a", "b")
    ]
    for model in models:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | kinds))
    with pytest.raises(ValueError, match="their heads mean other things"):
        merge(tiny_base, models, tmp_path / "out")


def test_what_the_merge_loses_is_said_and_a_tokenizer_can_be_chosen(
    tiny_base, tmp_path, capsys
):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    model = tuned(tiny_base, tmp_path / "chat", eos_token_id=65)
    tokenizer(model, template=template)
    out = merge(tiny_base, [model], tmp_path / "out")
    said = capsys.readouterr().out
    assert "chat has a chat template" in said and "ends answers with token 65" in said
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    chosen = merge(tiny_base, [model], tmp_path / "chosen", "--tokenizer", str(model))
    assert AutoTokenizer.from_pretrained(chosen).chat_template == template
    with pytest.raises(ValueError, match="neither base, union nor"):
        merge(tiny_base, [model], tmp_path / "no", "--tokenizer", "x")


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ("other/model", "trained on other/model, not on"),
        ("x/llama-bnb-4bit", "few bits"),
    ],
)
def test_the_base_that_an_adapter_records_is_compared(
    tiny_base, tiny_adapters, tmp_path, capsys, recorded, message
):
    adapter = shutil.copytree(tiny_adapters[0], tmp_path / "a")
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": recorded}
    file.write_text(json.dumps(config))
    merge(tiny_base, [adapter], tmp_path / "out")
    assert message in capsys.readouterr().out
    capsys.readouterr()
    merge(tiny_base, tiny_adapters[1:2], tmp_path / "plain")
    assert "trained on" not in capsys.readouterr().out
