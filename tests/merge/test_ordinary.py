"""Inputs of an ordinary day, each of which once came out wrong: heads, labels, ends, padding."""

import json
import shutil

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_anatomy import edited, noisy, stored

from helpers import merge as merging
from helpers.merge import anatomy, mergekit

SIZES = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
BERT = transformers.BertConfig(**SIZES, **LAYERS)
ROBERTA = transformers.RobertaConfig(**SIZES, **LAYERS)


def merge(base, models, out, *flags):
    named = ["--base", str(base), "--models", *map(str, models), "--out", str(out)]
    merging.main(["--rule", "linear", *named, *map(str, flags)])
    return out


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def tuned(base, folder, seed=1, **config):
    return edited(base, folder, noisy(stored(base), seed), **config)


def setting(folder, file, **values):
    path = folder / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | values))
    return folder


def with_tokens(folder, *tokens):
    words = tiny.byte_tokenizer()
    words.add_tokens(list(tokens))
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def padded(tmp_path):
    """A model whose embedding has more rows than its tokenizer has tokens."""
    folder = saved(tiny.llama(vocab_size=264), tmp_path / "base")
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


# --- heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "of", "head"),
    [
        (ROBERTA, transformers.RobertaForMaskedLM, "decoder"),
        (ROBERTA, transformers.RobertaForMaskedLM, "word_embeddings"),
        (BERT, transformers.BertForMaskedLM, "decoder"),
    ],
)
def test_a_head_that_gives_up_its_ties_is_loaded_as_peft_merges_it(
    tmp_path, config, of, head
):
    torch.manual_seed(0)
    base = saved(of(config), tmp_path / "base")
    options = {"target_modules": ["query"], "modules_to_save": [head]}
    model = get_peft_model(of.from_pretrained(base), LoraConfig(r=2, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    adapter = saved(model, tmp_path / "adapter")
    out = merge(base, [adapter], tmp_path / "out")
    alone = PeftModel.from_pretrained(of.from_pretrained(base), adapter)
    tokens = torch.arange(1, 9)[None]
    theirs = alone.merge_and_unload().eval()(tokens).logits
    ours = of.from_pretrained(out).eval()(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("of", [transformers.BertForMaskedLM, transformers.BertModel])
def test_bodies_meet_though_one_has_a_pooler(tmp_path, of):
    torch.manual_seed(0)
    base = saved(of(BERT), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    if of is transformers.BertForMaskedLM:  # as the hub has it
        weights |= {"bert.pooler.dense.weight": torch.ones(16, 16)}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    tagger = transformers.BertForTokenClassification.from_pretrained(base)
    for parameter in tagger.parameters():
        parameter.data = parameter.data + 0.01
    model = saved(tagger, tmp_path / "model")
    out = merge(base, [model], tmp_path / "out", "--heads", "base")
    ours, theirs = load_file(out / "model.safetensors"), tagger.state_dict()
    assert ours.keys() == weights.keys()
    shared = 0
    for name, tensor in ours.items():
        full = name if name.startswith(("bert.", "cls.")) else f"bert.{name}"
        if full in theirs:
            torch.testing.assert_close(tensor, theirs[full], rtol=0, atol=1e-6)
            shared += 1
        else:
            assert torch.equal(tensor, weights[name])
    assert shared > 30


LABELS = {"0": "neg", "1": "pos"}
SWAPPED = {"0": "pos", "1": "neg"}


def classifier(folder, seed, labels):
    """A fine-tune of one classifier; None: the class's own names of labels."""
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(BERT)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.01 * seed
    saved(model, folder)
    return setting(folder, "config.json", id2label=labels) if labels else folder


def test_labels_are_compared_with_the_base_and_taken_where_it_has_none(tmp_path):
    named = classifier(tmp_path / "named", 0, LABELS)
    other = classifier(tmp_path / "other", 1, SWAPPED)
    with pytest.raises(ValueError, match="other has the labels .*the base"):
        merge(named, [other], tmp_path / "out")
    plain = classifier(tmp_path / "plain", 0, None)
    numbered = classifier(tmp_path / "numbered", 2, {"0": "LABEL_0", "1": "LABEL_1"})
    assert merge(plain, [numbered], tmp_path / "plain_out")
    models = [classifier(tmp_path / f"m{i}", i, LABELS) for i in (1, 2)]
    out = merge(plain, models, tmp_path / "named_out")
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.id2label == {0: "neg", 1: "pos"}
    assert config.label2id == {"neg": 0, "pos": 1}


# --- ends, tokens, files -----------------------------------------------------------------------


def test_the_merge_ends_as_the_model_whose_tokenizer_it_takes(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    setting(base, "generation_config.json", eos_token_id=256)
    model = tuned(base, tmp_path / "model", eos_token_id=7)
    tiny.byte_tokenizer().save_pretrained(model)
    (model / "generation_config.json").unlink(missing_ok=True)
    out = merge(base, [model], tmp_path / "out", "--tokenizer", f"{model}/")
    ends = [
        transformers.AutoModelForCausalLM.from_pretrained(x).generation_config
        for x in (model, out)
    ]
    assert ends[0].eos_token_id == ends[1].eos_token_id == 7


def test_an_end_that_only_the_config_states_is_no_difference(
    tiny_base, tmp_path, capsys
):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "generation_config.json").unlink(missing_ok=True)
    setting(base, "config.json", eos_token_id=7)
    model = tuned(base, tmp_path / "model")
    setting(model, "generation_config.json", eos_token_id=7)
    merge(base, [model], tmp_path / "out")
    assert "ends answers" not in capsys.readouterr().out


def test_one_row_of_the_padding_is_one_token(padded, tmp_path, capsys):
    a, b = (
        with_tokens(tuned(padded, tmp_path / name, seed), f"<{name}>")
        for seed, name in enumerate("ab", 1)
    )
    with pytest.raises(ValueError, match="b has another vocabulary than a .*'<b>'"):
        merge(padded, [a, b], tmp_path / "out")
    merge(padded, [a], tmp_path / "alone")
    assert "lacks, '<a>' among them" in capsys.readouterr().out
    merge(padded, [a, b], tmp_path / "union", "--tokenizer", "union")
    assert "lacks" not in capsys.readouterr().out


def test_a_union_has_the_rows_that_an_adapter_trained_in_the_padding(padded, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(padded)
    row = len(tiny.byte_tokenizer())
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[row])
    tuning = get_peft_model(model, config)
    for name, parameter in tuning.named_parameters():
        if "trainable_tokens" in name:
            parameter.data += 1
    adapter = with_tokens(saved(tuning, tmp_path / "adapter"), "<x>")
    out = merge(padded, [adapter], tmp_path / "out", "--tokenizer", "union")
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(x).get_input_embeddings()
        for x in (padded, out)
    )
    torch.testing.assert_close(after.weight[row], before.weight[row] + 1)
    assert transformers.AutoTokenizer.from_pretrained(out).get_vocab()["<x>"] == row


def test_a_tokenizers_files_and_a_sentence_encoders_weights_are_copied(
    tiny_base, tmp_path
):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    names = ["spm.model", "source.spm", "normalizer.json", "bpe.codes"]
    (base / "2_Dense").mkdir()
    for name in [*names, "2_Dense/model.safetensors"]:
        (base / name).write_text("{}")
    out = merge(base, [tuned(base, tmp_path / "model")], tmp_path / "out")
    assert all((out / name).is_file() for name in [*names, "2_Dense/model.safetensors"])


def test_a_models_base_is_known_by_its_name_in_the_hubs_cache(
    tiny_base, tmp_path, capsys
):
    place = tmp_path / "models--org--Tiny-7B" / "snapshots" / "0123abcd"
    base = shutil.copytree(tiny_base, place)
    adapter = tmp_path / "adapter"
    tiny.save_adapter(adapter, tiny_base, seed=1)
    setting(adapter, "adapter_config.json", base_model_name_or_path="org/Tiny-7B")
    merge(base, [adapter], tmp_path / "out")
    assert "was trained on" not in capsys.readouterr().out


# --- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"tokenizer_class": "A"}, {"tokenizer_class": "B"}),
        ({"max_window_layers": 2}, {"max_window_layers": 1}),
        ({"apply_spec_augment": True}, {"apply_spec_augment": False}),
    ],
)
def test_settings_that_change_no_function_are_no_objection(tmp_path, before, after):
    config = transformers.Qwen2Config(
        **SIZES, **LAYERS, num_key_value_heads=2, use_sliding_window=False
    )
    base = saved(transformers.Qwen2ForCausalLM(config), tmp_path / "base")
    model = tuned(base, tmp_path / "model", **after)
    setting(base, "config.json", **before)
    assert merge(base, [model], tmp_path / "out")


def test_a_width_that_is_worked_out_is_the_same_stated(tmp_path):
    config = transformers.GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2)
    base = saved(transformers.GPT2LMHeadModel(config), tmp_path / "base")
    model = tuned(base, tmp_path / "model", n_inner=64)
    assert merge(base, [model], tmp_path / "out")


def test_infinity_is_read_as_transformers_writes_it(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8}
    limit = (0.0, float("inf"))
    config = transformers.Mamba2Config(
        vocab_size=257, n_groups=1, state_size=8, time_step_limit=limit, **sizes
    )
    base = saved(transformers.Mamba2ForCausalLM(config), tmp_path / "base")
    assert "Infinity" in (base / "config.json").read_text()
    assert merge(base, [tuned(base, tmp_path / "model")], tmp_path / "out")


def test_each_stack_of_layers_has_its_own_depth():
    names = [f"encoder.layers.{i}.w" for i in range(2)]
    names += [f"decoder.layers.{i}.w" for i in range(5)] + ["shared.weight", "norm.w"]
    depths = anatomy.depths(names)
    assert [depths[name] for name in names[:2]] == [0, 1]
    assert [depths[name] for name in names[2:7]] == [0, 0.25, 0.5, 0.75, 1]
    assert depths["shared.weight"] == 0 and depths["norm.w"] == 1


# --- mergekit files ----------------------------------------------------------------------------


def read(tmp_path, text):
    file = tmp_path / "config.yml"
    file.write_text(text)
    return mergekit.read_mergekit(file)


TASK = "merge_method: task_arithmetic\nbase_model: base\n"


@pytest.mark.parametrize(
    ("text", "models"),
    [
        (
            "models: [{model: {model: {path: org/a, revision: v2}}}]\nparameters: {weight: 1}",
            ["org/a@v2"],
        ),
        ("models: [{model: base/+org/b}]\nparameters: {weight: 1}", ["org/b"]),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 2]}], parameters: {weight: 1}}]",
            ["a"],
        ),
    ],
)
def test_models_are_named_as_mergekit_names_them(tmp_path, text, models):
    recipe = read(tmp_path, TASK + text)
    assert recipe.base == "base" and recipe.models == models and recipe.weights == [1]


def test_numbers_for_truths_and_types_with_torchs_prefix_are_read(tmp_path):
    text = (
        "parameters: {weight: 1, normalize: 1.0, int8_mask: 0}\nmodels: [{model: a}]\n"
    )
    recipe = read(tmp_path, f"{TASK}dtype: torch.bfloat16\n{text}")
    assert recipe.dtype == "bfloat16"
    with pytest.raises(ValueError, match="normalize must be true or false"):
        read(tmp_path, TASK + text.replace("1.0", "2"))


def test_what_no_filter_matches_has_the_parameter_of_the_whole(tmp_path):
    own = "[{filter: mlp, value: 0.25}]"
    models = f"models: [{{model: a, parameters: {{weight: {own}, density: {own}}}}}]\n"
    text = f"merge_method: ties\nbase_model: base\n{models}parameters: {{weight: 0.5}}"
    recipe = read(tmp_path, text)
    last = {"filter": None, "value": 0.5}
    assert recipe.weights == [[{"filter": "mlp", "value": 0.25}, last]]
    (density,) = recipe.options["density"]  # mergekit's default
    assert density[-1] == {"filter": None, "value": 1.0}


def test_a_filter_that_is_missing_is_noticed_before_any_work(tiny_base, tmp_path):
    model = tuned(tiny_base, tmp_path / "model")
    weight = "[{filter: mlp, value: 1}]"
    models = f"models: [{{model: {model}, parameters: {{weight: {weight}}}}}]"
    file = tmp_path / "config.yml"
    file.write_text(TASK.replace("base\n", f"{tiny_base}\n") + models)
    with pytest.raises(ValueError, match="no filter .* matches model.embed_tokens"):
        merging.main(["--mergekit", str(file), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_average_of_adapters_needs_no_base_model(tmp_path):
    each = "{model: base+org/a, parameters: {weight: 1}}"
    text = f"merge_method: linear\nmodels: [{each}, {each.replace('org/a', 'org/b')}]"
    recipe = read(tmp_path, text)
    assert (recipe.base, recipe.models) == ("base", ["org/a", "org/b"])


def test_slices_count_the_layers_as_the_class_does(tmp_path):
    config = transformers.GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2)
    base = saved(transformers.GPT2LMHeadModel(config), tmp_path / "base")
    model = tuned(base, tmp_path / "model")
    source = f"{{model: {model}, layer_range: [0, 2], parameters: {{weight: 1}}}}"
    file = tmp_path / "config.yml"
    file.write_text(
        f"{TASK.replace('base' + chr(10), f'{base}' + chr(10))}slices: [{{sources: [{source}]}}]"
    )
    merging.main(["--mergekit", str(file), "--out", str(tmp_path / "out")])
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(model / "model.safetensors").items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def test_slices_that_are_the_whole_together_are_its_models(tmp_path):
    source = "{{model: a, layer_range: {0}, parameters: {{weight: {1}}}}}"
    parts = [f"{{sources: [{source.format(x, 1)}]}}" for x in ("[0, 1]", "[1, 4]")]
    recipe = read(tmp_path, f"{TASK}slices: [{', '.join(parts)}]")
    assert (recipe.models, recipe.weights, recipe.layers) == (["a"], [1], 4)
    for last in (source.format("[2, 4]", 1), source.format("[1, 4]", 2)):
        with pytest.raises(ValueError, match="whole model"):
            read(tmp_path, f"{TASK}slices: [{parts[0]}, {{sources: [{last}]}}]")


def test_a_tied_model_has_a_head_beside_an_untied_base(tmp_path):
    base = saved(tiny.llama(tie_word_embeddings=False), tmp_path / "base")
    model = saved(tiny.llama(seed=1), tmp_path / "model")
    out = merge(base, [model], tmp_path / "out", "--force")
    tokens = torch.arange(9)[None]
    of = transformers.AutoModelForCausalLM
    ours, theirs = (of.from_pretrained(x)(tokens).logits for x in (out, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_an_index_may_write_files_beside_it_with_a_dot(tmp_path):
    base = tiny.save_base(tmp_path / "base", max_shard_size="20KB")
    model = shutil.copytree(base, tmp_path / "model")
    index = "model.safetensors.index.json"
    places = json.loads((model / index).read_text())["weight_map"]
    setting(model, index, weight_map={x: f"./{file}" for x, file in places.items()})
    with pytest.raises(ValueError, match="no model differs"):  # it was read
        merge(base, [model], tmp_path / "out")


def test_a_name_that_no_file_can_have_is_refused_first(tiny_base, tmp_path):
    model = tuned(tiny_base, tmp_path / "model")
    with pytest.raises(ValueError, match="is no UTF-8"):
        merge(tiny_base, [model], f"{tmp_path}/caf\udce9")
