"""The stream of task vectors: exact, alike for every kind of specialist, strict about misfits."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import merge as merging
from helpers.merge import blocks, vectors


def llama(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def merged_by_peft(base, adapter):
    """State dict of the base with the adapter merged in by PEFT."""
    from peft import PeftModel

    return (
        PeftModel.from_pretrained(llama(base), adapter).merge_and_unload().state_dict()
    )


def taus(base, specialist):
    return {row.name: row.taus[0] for row in vectors.stream(base, [specialist])}


@pytest.fixture
def base(tiny_base):
    return merging.open_base(tiny_base)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": False},
    ],
    ids=["plain", "rslora", "patterns", "head"],
)
def test_an_adapter_is_what_peft_merges(tmp_path, options):
    base = tiny.save_base(tmp_path / "base", tie_word_embeddings=False)
    adapter = tiny.save_adapter(tmp_path / "adapter", base, 1, **options)
    merged, plain = merged_by_peft(base, adapter), llama(base).state_dict()
    ours = taus(merging.open_base(base), merging.open_specialist(adapter))
    for name, tensor in plain.items():
        if name in ours:
            torch.testing.assert_close(
                tensor + ours[name], merged[name], rtol=0, atol=1e-7
            )
        else:
            assert torch.equal(tensor, merged[name]), name
    assert (
        "model.norm.weight" not in ours
        and "model.layers.0.self_attn.q_proj.weight" in ours
    )


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
        {"bias": "all"},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "bias": "lora_only"},
        {"trainable_token_indices": [1, 200], "target_modules": ["q_proj"]},
        {
            "trainable_token_indices": {"embed_tokens": [0, 256]},
            "target_modules": ["v_proj"],
        },
    ],
    ids=[
        "modules",
        "bias",
        "lora bias",
        "dora",
        "all of it",
        "tokens",
        "tokens by module",
    ],
)
def test_adapters_that_hold_more_than_factors_are_what_peft_merges(
    tmp_path, monkeypatch, options
):
    monkeypatch.setitem(blocks.BLOCK, "cpu", 64)  # a few rows at a time
    shape = {"tie_word_embeddings": False, "attention_bias": True}
    base = tiny.save_base(tmp_path / "base", **shape)
    adapter = tiny.save_adapter(
        tmp_path / "adapter", base, 1, everything=True, **options
    )
    merged, plain = merged_by_peft(base, adapter), llama(base).state_dict()
    rows = vectors.views(merging.open_base(base), [merging.open_specialist(adapter)])
    changed = {
        row.name: blocks.in_blocks(lambda parts, _: parts[0], row.taus) for row in rows
    }
    for name, tensor in plain.items():
        tuned = tensor + changed.get(name, 0)
        torch.testing.assert_close(tuned, merged[name], rtol=0, atol=1e-6)
        assert name in changed or torch.equal(tensor, merged[name]), name


def test_the_layers_class_decides_how_factors_are_stored(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    tuned.save_pretrained(tmp_path / "a")
    kinds = edited(tmp_path / "a", tmp_path / "silent", fan_in_fan_out=False)
    name = "transformer.h.0.attn.c_proj.weight"  # square: its shape says nothing
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    merged = (
        PeftModel.from_pretrained(base, tmp_path / "a")
        .merge_and_unload()
        .state_dict()[name]
    )
    before = load_file(tmp_path / "base" / "model.safetensors")[name]
    for folder in (tmp_path / "a", kinds):
        change = taus(
            merging.open_base(tmp_path / "base"), merging.open_specialist(folder)
        )
        torch.testing.assert_close(before + change[name], merged)


def test_an_embedding_adapter_is_what_peft_merges(tmp_path):
    base = tiny.save_base(tmp_path / "base", tie_word_embeddings=False)
    adapter = tiny.save_adapter(
        tmp_path / "a", base, 1, target_modules=["embed_tokens"]
    )
    ours = taus(merging.open_base(base), merging.open_specialist(adapter))
    name = "model.embed_tokens.weight"
    merged = merged_by_peft(base, adapter)[name]
    torch.testing.assert_close(llama(base).state_dict()[name] + ours[name], merged)


@pytest.mark.parametrize("shards", ["5GB", "20KB"], ids=["one file", "shards"])
def test_files_and_state_dicts_give_the_same_stream(tmp_path, tiny_base, shards):
    folder = tiny.save_base(tmp_path / "fine", seed=1, max_shard_size=shards)
    assert len(list(folder.glob("*.safetensors"))) == (1 if shards == "5GB" else 2)
    from_files = merging.open_base(tiny_base), merging.open_specialist(folder)
    in_memory = (
        merging.open_base(llama(tiny_base).state_dict()),
        merging.open_specialist(llama(folder).state_dict(), "fine"),
    )
    ours = list(vectors.stream(from_files[0], [from_files[1]]))
    theirs = list(vectors.stream(in_memory[0], [in_memory[1]]))
    assert [row.name for row in ours] == [row.name for row in theirs]
    assert (
        sum(row.name == "lm_head.weight" for row in ours) == 0
    )  # tied: once, under its first name
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.base, b.base) and torch.equal(a.taus[0], b.taus[0])


def test_views_give_any_block_of_rows(base, tiny_adapters, tmp_path, tiny_base):
    full = tiny.save_base(tmp_path / "full", seed=3)
    specialists = [merging.open_specialist(path) for path in (tiny_adapters[0], full)]
    for view, row in zip(
        vectors.views(base, specialists), vectors.stream(base, specialists), strict=True
    ):
        for lazy, dense in zip(
            [view.base, *view.taus], [row.base, *row.taus], strict=True
        ):
            torch.testing.assert_close(lazy[3:7], dense[3:7])


def test_only_changed_tensors_take_part(base, tiny_adapters, tiny_base):
    adapters = [merging.open_specialist(path) for path in tiny_adapters]
    names = vectors.changed_names(base, adapters)
    assert len(names) == 14 and names == sorted(names)  # 7 matrices in each of 2 layers
    state = {
        k: v.clone()
        for k, v in llama(tiny_base).state_dict().items()
        if k != "lm_head.weight"
    }
    state["model.norm.weight"][0] += 1
    one = merging.open_specialist(state, "one")
    assert vectors.changed_names(base, [one]) == ["model.norm.weight"]
    rows = list(vectors.stream(base, [one, adapters[0]]))
    # what a model left alone has tau = 0
    assert len(rows) == 15 and not rows[0].taus[0].any()


def test_a_bf16_checkpoint_is_promoted_before_the_subtraction(tiny_base, tmp_path):
    model = llama(tiny_base).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    specialist = merging.open_specialist(tmp_path / "bf16")
    for row in vectors.stream(merging.open_base(tiny_base), [specialist]):
        assert row.taus[0].dtype == torch.float32
        exact = model.get_parameter(row.name).detach().float() - row.base
        assert torch.equal(row.taus[0], exact)


def test_row_blocks_cover_a_tensor_once_with_even_blocks():
    for shape in [(70001, 3), (3, 200_001), (2**17 + 1,), (5, 5), ()]:
        numel, covered = torch.Size(shape).numel(), 0
        whole = torch.empty(shape, dtype=torch.uint8)
        parts = list(blocks.row_blocks(torch.Size(shape)))
        for i, part in enumerate(parts):
            assert part.offset == covered
            assert whole[part.rows].shape == part.shape
            covered += part.shape.numel()
            assert i == len(parts) - 1 or part.shape.numel() % 2 == 0
        assert covered == numel


# Refusals ----------------------------------------------------------------------------------------


def edited(folder, target, **changes):
    """A copy of an adapter folder with another configuration."""
    shutil.copytree(folder, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "must hold a magnitude"),
        ({"target_parameters": ["mlp.down_proj.weight"]}, "no layer's weight"),
        ({"r": "8"}, "r must be a number"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"alpha_pattern": ["x"]}, "alpha_pattern must give"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"r": 3}, "not of rank 3"),
    ],
)
def test_adapters_that_are_not_b_times_a_are_refused(
    tiny_adapters, tmp_path, change, reason
):
    with pytest.raises(ValueError, match=reason):
        merging.open_specialist(edited(tiny_adapters[0], tmp_path / "a", **change))


def test_factors_of_other_types_are_refused(tiny_adapters, tmp_path):
    adapter = edited(tiny_adapters[0], tmp_path / "a")
    file = adapter / "adapter_model.safetensors"
    save_file({name: x.to(torch.int8) for name, x in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="as torch.int8: convert it to float32"):
        merging.open_specialist(adapter)


def test_pickles_are_refused_unopened(tmp_path, tiny_adapters):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"not a pickle at all")
    adapter = edited(tiny_adapters[0], tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    for folder in (tmp_path / "model", adapter):
        with pytest.raises(ValueError, match="a pickle, which can run code"):
            merging.open_specialist(folder)


def test_folders_without_weights_or_with_missing_shards_are_refused(
    tmp_path, tiny_adapters
):
    with pytest.raises(ValueError, match="not a folder with safetensors"):
        merging.open_base(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is an adapter"):
        merging.open_base(tiny_adapters[0])
    folder = tiny.save_base(tmp_path / "base", max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="in its index, but it is not there"):
        merging.open_base(folder)


def test_damaged_files_are_refused(tmp_path, tiny_base, tiny_adapters):
    base, adapter = (
        shutil.copytree(tiny_base, tmp_path / "b"),
        edited(tiny_adapters[0], tmp_path / "a"),
    )
    for file in (base / "model.safetensors", adapter / "adapter_model.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])  # a copy that broke off
        with pytest.raises(ValueError, match="damaged or cut short"):
            merging.open_specialist(file.parent)


def plain_state():
    return {"a": torch.ones(2, 3), "b": torch.zeros(4), "steps": torch.tensor([7])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(3, 2)}, r"a is \(3, 2\), in the base \(2, 3\)"),
        (
            {"a": torch.ones(2, 3, dtype=torch.int64)},
            "a is torch.int64, in the base torch.float32",
        ),
        ({"steps": torch.tensor([8])}, "steps is not floating-point and differs"),
        ({"c": torch.ones(1)}, "the base lacks c"),
        ({"b": None}, "specialist x lacks b"),
    ],
)
def test_what_does_not_fit_the_base_is_named(change, message):
    state = {k: v for k, v in (plain_state() | change).items() if v is not None}
    base = merging.open_base(plain_state())
    with pytest.raises(ValueError, match=message):
        merging.check(base, [merging.open_specialist(state, "x")])


def test_a_base_in_eight_bits_is_refused_and_float_types_may_differ():
    state = {"a": torch.ones(2, 3)}
    other = merging.open_specialist({"a": torch.zeros(2, 3, dtype=torch.float16)}, "x")
    assert taus(merging.open_base(state), other)["a"].unique().tolist() == [-1]
    eight = merging.open_base({"a": torch.ones(2, 3).to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match="the base stores a as torch.float8_e4m3fn"):
        merging.check(eight, [other])


def test_equal_labels_and_foreign_bases_are_refused(tiny_base, tiny_adapters, tmp_path):
    base = merging.open_base(tiny_base)
    with pytest.raises(ValueError, match="different labels"):
        merging.check(
            base, [merging.open_specialist(p, "x") for p in tiny_adapters[:2]]
        )
    other = merging.open_base(tiny.save_base(tmp_path / "wide", hidden_size=32))
    with pytest.raises(ValueError, match="in the base"):
        merging.check(other, [merging.open_specialist(tiny_adapters[0])])
    ours, theirs = (
        shutil.copytree(tiny_base, tmp_path / "b"),
        edited(tiny_adapters[0], tmp_path / "a"),
    )
    (ours / "base.json").write_text('{"name": "base", "digest": "00"}')
    (ours / "seals.json").write_text("{}")
    (theirs / "base.json").write_text('{"name": "base", "digest": "11"}')
    with pytest.raises(ValueError, match="trained from another base than this one"):
        merging.check(merging.open_base(ours), [merging.open_specialist(theirs)])
    alike = edited(tiny_adapters[1], tmp_path / "c")
    (alike / "base.json").write_text('{"name": "base", "digest": "00"}')
    (ours / "seals.json").unlink()  # nothing is known of the base, but the two disagree
    with pytest.raises(
        ValueError, match="specialist a was trained from another base than c"
    ):
        merging.check(
            merging.open_base(ours), [*map(merging.open_specialist, (alike, theirs))]
        )


def test_an_adapter_of_a_tied_head_is_refused(tmp_path):
    untied = tiny.save_base(tmp_path / "untied", tie_word_embeddings=False)
    adapter = tiny.save_adapter(
        tmp_path / "a", untied, 1, target_modules=["q_proj", "lm_head"]
    )
    tied = merging.open_base(tiny.save_base(tmp_path / "tied"))
    with pytest.raises(ValueError, match="adapts lm_head.weight, which the base ties"):
        merging.check(tied, [merging.open_specialist(adapter)])


def test_a_copy_of_a_tied_head_on_disk_is_dropped_or_a_head_of_its_own(tmp_path):
    folder = tiny.save_base(tmp_path / "base")
    file = folder / "model.safetensors"
    state = load_file(file)
    head = state["model.embed_tokens.weight"].clone()
    save_file(state | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    assert "lm_head.weight" not in merging.open_base(folder).tensors
    save_file(state | {"lm_head.weight": head + 1}, file, metadata={"format": "pt"})
    opened = merging.open_base(folder).tensors["lm_head.weight"]
    assert torch.equal(opened, llama(folder).lm_head.weight)  # as transformers loads it


# Into a live model -------------------------------------------------------------------------------


def test_applied_writes_the_merge_and_restores_the_base_bit_for_bit(
    tiny_base, tiny_adapters
):
    model = llama(tiny_base)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    specialist = merging.open_specialist(tiny_adapters[0])
    delta = taus(merging.open_base(model.state_dict()), specialist)
    merged = merged_by_peft(tiny_base, tiny_adapters[0])
    with pytest.raises(RuntimeError, match="midway"), vectors.applied(model, delta):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-7)
        raise RuntimeError("midway")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_applied_keeps_tied_tensors_tied(tiny_base):
    model = llama(tiny_base)
    delta = {"model.embed_tokens.weight": torch.ones(257, 16)}
    with vectors.applied(model, delta):
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({"nope": torch.ones(1)}, "no parameter nope"),
        ({"model.norm.weight": torch.ones(3)}, r"\(3,\), in the model \(16,\)"),
    ],
)
def test_applied_refuses_what_does_not_fit(tiny_base, delta, message):
    with (
        pytest.raises(ValueError, match=message),
        vectors.applied(llama(tiny_base), delta),
    ):
        pass


def test_applied_adds_in_fp32_and_rounds_once(tiny_base):
    model = llama(tiny_base).to(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    changes = {name: torch.full(p.shape, 2.0**-12) for name, p in before.items()}
    pairs = ((name, change) for name, change in changes.items())  # never held together
    with vectors.applied(model, pairs):
        for name, parameter in model.named_parameters():
            once = (before[name].float() + changes[name]).bfloat16()
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, once)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
