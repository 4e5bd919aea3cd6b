"""Whatever a file holds, it is read or refused in a sentence that names it: no traceback.

FUZZ=2000 python -m pytest tests/merge/test_fuzz.py tries that many inputs of each kind.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers import merge as merging
from helpers.advise.prompts import read_prompts
from helpers.merge.recipe import plan_of, read_recipe

often = settings(
    max_examples=int(os.environ.get("FUZZ", "40")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

plain = (
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4)
)
odd = st.sampled_from(
    [10**400, -(10**30), 2**63, "../x", "/", "(", "a.b", "1e-3", "nan", "~"]
)
trees = st.recursive(
    plain | odd,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=6,
)


@st.composite
def spoiled(draw, valid):
    """A valid tree with one to three of its parts replaced, left out or doubled."""
    tree = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        place, key = tree, None
        while (
            isinstance(place, dict | list)
            and place
            and (key is None or draw(st.booleans()))
        ):
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            parent, key = place, draw(st.sampled_from(keys))
            place = parent[key]
        if key is None:
            return draw(trees)
        what = draw(st.sampled_from(["replace", "remove", "rename"]))
        if what == "replace":
            parent[key] = draw(trees)
        elif what == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=5))] = parent.pop(key)
    return tree


def as_bytes(tree, draw_cut):
    """JSON, whole or cut short, or not UTF-8 at all."""
    text = json.dumps(tree).encode()
    return {"whole": text, "cut": text[: len(text) // 2], "bytes": b"\xff\xfe" + text}[
        draw_cut
    ]


cuts = st.sampled_from(["whole", "whole", "whole", "whole", "cut", "bytes"])


def refused_by_name(name, read, *arguments):
    """Whether it could not be read, and the sentence names the file or its folder."""
    try:
        read(*arguments)
    except ValueError as error:
        assert name in str(error), f"{error!r} names no {name}"
        assert "\n" not in str(error)
        return True
    return False


INDEX = {
    "metadata": {"total_size": 12},
    "weight_map": {"a": "1.safetensors", "b": "2.safetensors"},
}


@often
@given(spoiled(INDEX) | trees, cuts)
def test_an_index(tree, cut):
    with TemporaryDirectory() as place:
        folder = Path(place) / "model-x"
        folder.mkdir()
        save_file({"a": torch.ones(2)}, folder / "1.safetensors")
        save_file({"b": torch.ones(1)}, folder / "2.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(as_bytes(tree, cut))
        if not refused_by_name("model-x", merging.read_folder, folder):
            assert merging.read_folder(folder).keys() <= {"a", "b"}


@pytest.fixture(scope="module")
def adapter_parts(tiny_adapters):
    config = json.loads((tiny_adapters[0] / "adapter_config.json").read_text())
    return config, load_file(tiny_adapters[0] / "adapter_model.safetensors")


def test_an_adapter(adapter_parts, tiny_base):
    config, tensors = adapter_parts
    base = merging.open_base(tiny_base)
    names = st.sampled_from(
        ["lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A"]
    )
    ends = names | st.sampled_from(
        ["weight", "lora_magnitude_vector", "base_layer.weight", "x"]
    )
    ends |= st.just("token_adapter.trainable_tokens_delta")
    shapes = st.lists(st.integers(0, 17), max_size=3)

    def read(folder):
        rows = merging.views(base, [merging.open_specialist(folder)])
        for row in rows:
            assert row.taus[0][...].shape == row.base.shape

    @often
    @given(
        spoiled(config),
        cuts,
        st.sampled_from(sorted(tensors)),
        ends,
        shapes,
        st.booleans(),
    )
    def check(tree, cut, name, end, shape, keeps):
        with TemporaryDirectory() as place:
            folder = Path(place) / "adapter-x"
            folder.mkdir()
            (folder / "adapter_config.json").write_bytes(as_bytes(tree, cut))
            module = name.partition(".lora_")[0]
            changed = tensors | {f"{module}.{end}": torch.ones(shape)}
            if not keeps:
                del changed[name]
            save_file(changed, folder / "adapter_model.safetensors")
            refused_by_name("adapter-x", read, folder)

    check()


def test_a_configuration(tiny_base):
    config = json.loads((tiny_base / "config.json").read_text())

    @often
    @given(spoiled(config) | trees, cuts)
    def check(tree, cut):
        with TemporaryDirectory() as place:
            folder = Path(place) / "model-x"
            shutil.copytree(tiny_base, folder)
            (folder / "config.json").write_bytes(as_bytes(tree, cut))
            refused_by_name("model-x", merging.open_base, folder)

    check()


ENTRY = {"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": [0.1, 1]}]}}
MERGEKIT = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        ENTRY,
        {"model": "base+b", "parameters": {"weight": 0.3, "density": [0.2, 0.5]}},
    ],
    "parameters": {"normalize": True, "lambda": 0.5, "int8_mask": True, "density": 0.3},
    "dtype": "float32",
    "tokenizer_source": "union",
}
SLICES = {
    "merge_method": "slerp",
    "base_model": "a",
    "slices": [{"sources": [{"model": x, "layer_range": [0, 2]} for x in "ab"]}],
    "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]},
}


@often
@given(spoiled(MERGEKIT) | spoiled(SLICES) | trees, cuts)
def test_a_mergekit_file(tree, cut):
    with TemporaryDirectory() as place:
        file = Path(place) / "config-x.yaml"
        file.write_bytes(as_bytes(tree, cut))
        refused_by_name("config-x.yaml", merging.read_mergekit, file)
        with suppress(ValueError):
            plan_of(merging.read_mergekit(file))


RECIPE = {
    "rule": "ties",
    "base": "base",
    "models": ["a", "b"],
    "weights": [
        0.5,
        [{"filter": "mlp", "value": [0, 1]}, {"filter": None, "value": 1}],
    ],
    "options": {"density": [0.2, 0.3], "scope": "tensor"},
    "lines": [0.5, 1.0],
    "match": "norm",
}


@often
@given(spoiled(RECIPE) | trees, cuts, st.booleans())
def test_a_recipe(tree, cut, is_card):
    with TemporaryDirectory() as place:
        file = Path(place) / ("recipe-x.md" if is_card else "recipe-x.yaml")
        text = as_bytes(tree, cut)
        if is_card and cut == "whole":
            text = f"# x\n```yaml\n{yaml.safe_dump(tree)}```\n".encode()
        file.write_bytes(text)
        refused_by_name("recipe-x", read_recipe, file)
        with suppress(ValueError):
            plan_of(read_recipe(file))


PROMPTS = [
    {"prompt": "What is this?", "answer": "that"},
    {"messages": [{"role": "user"}]},
    "x",
]


@often
@given(spoiled(PROMPTS) | trees, cuts)
def test_a_file_of_prompts(tree, cut):
    with TemporaryDirectory() as place:
        file = Path(place) / "prompts-x.jsonl"
        lines = (
            [as_bytes(row, cut) for row in tree]
            if isinstance(tree, list)
            else [b"", b"\n"]
        )
        file.write_bytes(b"\n".join(lines))
        refused_by_name("prompts-x", read_prompts, file)
