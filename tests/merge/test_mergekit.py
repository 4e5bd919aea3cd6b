"""mergekit's configurations read as recipes: its defaults, and a reason for what is not here."""

from pathlib import Path
from tempfile import TemporaryDirectory

import oracle_mergekit
import pytest
import tiny
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import merge as merging
from helpers.merge import mergekit
from helpers.merge.recipe import at_tensor


def config(tmp_path, text):
    file = tmp_path / "config.yml"
    file.write_text(text)
    return file


MODELS = "models: [{model: a}, {model: b}]"


@pytest.mark.parametrize(
    ("text", "rule", "weights", "options", "scale"),
    [
        (
            "merge_method: linear\n"
            "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]",
            *("linear", [1, 3], {}, 1),
        ),
        (
            "merge_method: task_arithmetic\nbase_model: base\n"
            "parameters: {weight: 0.4, lambda: 2, normalize: true}\n"
            "models: [{model: a}, {model: b}, {model: base}]",
            *("task_arithmetic", [0.5, 0.5], {}, 2),
        ),
        (
            "merge_method: ties\nbase_model: base\n"
            "parameters: {density: 1e-1, weight: 1, int8_mask: true}\n"
            "models: [{model: a}, {model: b, parameters: {weight: 2}}]",
            *("ties", [1, 2], {"density": 0.1, "combine": "mean"}, 1),
        ),
        (
            f"merge_method: dare_ties\nbase_model: base\nparameters: {{weight: 0.5}}\n{MODELS}",
            *("dare_ties", [0.5, 0.5]),
            {"density": 1.0, "combine": "sum", "rescale": "l1"},
            1,
        ),
        (
            "merge_method: breadcrumbs\nbase_model: base\n"
            f"parameters: {{weight: 1, density: 0.9}}\n{MODELS}",
            *("breadcrumbs", [1, 1], {"density": 0.9, "outliers": 0.01}, 1),
        ),
    ],
    ids=["linear", "task_arithmetic", "ties", "dare_ties", "breadcrumbs"],
)
def test_mergekit_configurations_are_read_with_mergekits_defaults(
    tmp_path, text, rule, weights, options, scale
):
    recipe = merging.read_mergekit(config(tmp_path, text))
    assert (recipe.rule, recipe.options, recipe.scale) == (rule, options, scale)
    assert recipe.weights == weights and recipe.models == ["a", "b"]


def test_mergekit_counts_a_base_model_of_linear_among_the_models(tmp_path):
    text = (
        f"merge_method: linear\nbase_model: base\nparameters: {{weight: 1}}\n{MODELS}"
    )
    recipe = merging.read_mergekit(config(tmp_path, text))
    assert recipe.models == ["a", "b", "base"] and recipe.weights == [1, 1, 1]


@pytest.mark.parametrize("rule", sorted(merging.MERGEKIT.keys() - {"slerp"}))
def test_a_mergekit_configuration_gives_each_model_its_weight(tmp_path, rule):
    text = (
        f"merge_method: {rule}\nbase_model: base\nparameters: {{normalize: true, density: 0.5}}\n"
        "models: [{model: base, parameters: {weight: 0}}, {model: a, parameters: {weight: 0.3}},"
        " {model: b, parameters: {weight: 0.7}}]"
    )
    recipe = merging.read_mergekit(config(tmp_path, text))
    given = dict(zip(recipe.models, recipe.weights, strict=True))
    assert {model: given[model] for model in "ab"} == {"a": 0.3, "b": 0.7}


def test_a_mergekit_model_with_an_adapter_is_the_adapter(tmp_path):
    text = "merge_method: {0}\nbase_model: b\nparameters: {{weight: 1}}\nmodels: [{{model: {1}}}]"
    assert merging.read_mergekit(
        config(tmp_path, text.format("ties", "b+x"))
    ).models == ["x"]
    with pytest.raises(ValueError, match="only adapters of the base_model"):
        merging.read_mergekit(config(tmp_path, text.format("ties", "c+x")))


def test_a_mergekit_slerp_interpolates_from_the_base(tiny_base, tmp_path):
    tuned = tiny.save_tuned(tmp_path / "tuned", tiny_base, 1)
    text = f"""
        merge_method: slerp
        base_model: {tiny_base}
        models: [{{model: {tuned}}}]
        parameters: {{t: 0.3}}
        dtype: float32
    """
    file = config(tmp_path, text)
    merging.main(["--mergekit", str(file), "--out", str(tmp_path / "out")])
    ours = load_file(tmp_path / "out" / "model.safetensors")
    a, b = (load_file(f / "model.safetensors") for f in (tiny_base, tuned))
    for name, tensor in ours.items():
        x, y = a[name].flatten(), b[name].flatten()
        cosine = torch.dot(x, y) / x.norm() / y.norm()
        angle = torch.acos(cosine.clamp(-1, 1))
        expected = (
            torch.sin(0.7 * angle) * x + torch.sin(0.3 * angle) * y
        ) / torch.sin(angle)
        if cosine.abs() > 0.9995:
            expected = 0.7 * x + 0.3 * y
        torch.testing.assert_close(tensor.flatten(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "merge_method: della\nbase_model: b\nmodels: [{model: a}]",
            "merge_method della is not",
        ),
        ("merge_method: ties\nmodels: [{model: a}]", "ties needs a base_model"),
        (
            "merge_method: ties\nbase_model: a\nmodels: [{model: a}]",
            "no model is listed but the base",
        ),
        (
            "merge_method: slerp\nbase_model: b\n"
            "slices: [{sources: [{model: a}]}, {sources: [{model: b}]}]",
            "several slices",
        ),
        ("merge_method: passthrough\nslices: [{}, {}]", "passthrough stacks layers"),
        (
            "merge_method: linear\ndtype: float8\nmodels: [{model: a, parameters: {weight: 1}}]",
            "dtype float8 is not supported",
        ),
        ("models: [", "config.yml: "),
        (
            "modules: {}\nmodels: [{model: a}]\nmerge_method: linear",
            "modules is not supported",
        ),
        ("merge_method: linear\nmodels: [{model: a}]", "weight of a is missing"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: []}}]",
            "empty list",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: ['0,5']}}]",
            "a number",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]",
            "a number",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: true}}]",
            "a number",
        ),
        (
            "merge_method: linear\nmodels: [{parameters: {weight: 1}}]",
            "model is missing",
        ),
        ("merge_method: linear\nmodels: [a, b]", "models.0 must be a mapping"),
        ("merge_method: linear\nmodels: [{model: 7}]", "named by text"),
        (
            "merge_method: [linear]\nmodels: [{model: a}]",
            "merge_method .'linear'. is not",
        ),
        ("merge_method: linear\nmodels: a", "models must be a list"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: [weight]}]",
            "parameters must be a map",
        ),
        (
            "merge_method: linear\nmerge_method: ties\nmodels: [{model: a}]",
            "stated twice",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {1: 2}}]",
            "parameters.1 is not",
        ),
        ("- model: a", "a configuration is a mapping"),
        ("", "a configuration is a mapping"),
        ("!!python/object/apply:os.system ['echo hi']", "config.yml"),
        ("a: 1\n---\nb: 2", "config.yml"),
        (
            "merge_method: linear\ntokenizer: {tokens: {}}\n"
            "models: [{model: a, parameters: {weight: 1}}]",
            "tokenizer is supported",
        ),
        (
            "merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {epsilon: 1}}]",
            "epsilon",
        ),
        (
            "merge_method: linear\nparameters: {normalize: 'false'}\nmodels: [{model: a}]",
            "normalize must be true or false",
        ),
    ],
)
def test_what_is_not_supported_in_a_mergekit_configuration_is_named(
    tmp_path, text, message
):
    with pytest.raises(ValueError, match=message):
        merging.read_mergekit(config(tmp_path, text))


def test_one_slice_of_the_whole_model_is_its_models(tmp_path):
    source = "{{model: {0}, layer_range: [0, 2], parameters: {{weight: {1}}}}}"
    sources = f"[{source.format('a', 0.6)}, {source.format('b', 0.4)}]"
    text = f"merge_method: linear\nslices: [{{sources: {sources}}}]"
    recipe = merging.read_mergekit(config(tmp_path, text))
    assert (
        recipe.models == ["a", "b"]
        and recipe.weights == [0.6, 0.4]
        and recipe.layers == 2
    )
    for other in ("[1, 2]", "[0, two]", "2"):
        with pytest.raises(ValueError, match="layer_range"):
            merging.read_mergekit(config(tmp_path, text.replace("[0, 2]", other)))


def test_a_model_that_is_listed_twice_counts_twice(tmp_path):
    entries = ", ".join(
        f"{{model: {m}, parameters: {{weight: {w}}}}}" for m, w in ("a1", "b1", "a3")
    )
    recipe = merging.read_mergekit(
        config(tmp_path, f"merge_method: linear\nmodels: [{entries}]")
    )
    assert recipe.models == ["a", "b", "a"] and recipe.weights == [1, 1, 3]


def test_settings_along_the_depth_and_by_filter_are_mergekits():
    gradient = [{"filter": "mlp", "value": [0, 0.5, 1]}, {"filter": None, "value": 0.3}]
    assert [at_tensor([0, 1], "w", t) for t in (0.0, 0.25, 1.0)] == [0, 0.25, 1]
    assert [at_tensor(gradient, "x.mlp.w", t) for t in (0.0, 0.25, 0.75)] == [
        0,
        0.25,
        0.75,
    ]
    assert at_tensor(gradient, "x.attn.w", 0.5) == 0.3
    with pytest.raises(ValueError, match="no filter"):
        at_tensor(gradient[:1], "x.attn.w", 0.5)


def test_weights_and_densities_by_layer_are_those_of_each_tensor(tiny_base, tmp_path):
    a, b = (
        tiny.save_tuned(tmp_path / name, tiny_base, i) for i, name in enumerate("ab", 1)
    )
    text = f"""
merge_method: ties
base_model: {tiny_base}
models:
  - model: {a}
    parameters: {{weight: [{{filter: mlp, value: [0.2, 0.8]}}, {{value: 1}}], density: 0.5}}
  - model: {b}
    parameters: {{weight: 0.5, density: [0.1, 0.9]}}
"""
    merging.main(
        ["--mergekit", str(config(tmp_path, text)), "--out", str(tmp_path / "out")]
    )
    ours = load_file(tmp_path / "out" / "model.safetensors")
    base, one, two = (load_file(f / "model.safetensors") for f in (tiny_base, a, b))
    for name, tensor in ours.items():
        # what lies outside the layers counts as the first
        deep = float("layers.1." in name)
        weight = (0.2, 0.8)[int(deep)] if "mlp" in name else 1
        row = merging.Row(
            name, base[name], [one[name] - base[name], two[name] - base[name]]
        )
        densities = [0.5, (0.1, 0.9)[int(deep)]]
        delta, _ = merging.merge(
            [row], "ties", ["1", "2"], [weight, 0.5], density=densities
        )
        torch.testing.assert_close(tensor, base[name] + delta[name])


plain = (
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=3)
)
fields = mergekit.Configuration.model_fields | mergekit.Parameters.model_fields
names = st.sampled_from(sorted(fields.keys() | {"lambda", "model", "filter", "value"}))
words = st.sampled_from(["linear", "ties", "slerp", "base", "a", "b", "float32"])
trees = st.recursive(
    plain | words,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4)
    ),
    max_leaves=12,
)
model = st.fixed_dictionaries({"model": words | trees}, optional={"parameters": trees})
likely = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(list(mergekit.MERGEKIT)),
        "models": st.lists(model) | trees,
    },
    optional={
        "base_model": words | trees,
        "parameters": trees,
        "slices": trees,
        "dtype": trees,
    },
)


@settings(max_examples=300, deadline=None)
@given(trees | likely)
def test_whatever_a_configuration_holds_it_is_a_recipe_or_a_sentence(tree):
    with TemporaryDirectory() as folder:
        file = config(Path(folder), yaml.safe_dump(tree))
        try:
            recipe = merging.read_mergekit(file)
        except ValueError as error:
            assert str(file) in str(error)
        else:
            assert recipe.models and recipe.rule in merging.RULES


# --- the oracle ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded_models(tmp_path_factory):
    """Folders of the models that mergekit was given."""
    with safe_open(oracle_mergekit.RECORD, "pt") as record:
        settings_of = record.metadata()["config"]
    folders = {}
    for model in oracle_mergekit.MODELS:
        folders[model] = tmp_path_factory.mktemp(model)
        (folders[model] / "config.json").write_text(settings_of)
        tensors = oracle_mergekit.recorded(model)
        save_file(
            tensors, folders[model] / "model.safetensors", metadata={"format": "pt"}
        )
    return folders


@pytest.mark.parametrize("case", oracle_mergekit.CASES)
def test_a_merge_is_what_mergekit_makes_of_the_same_files(
    case, recorded_models, tmp_path
):
    file = oracle_mergekit.written(case, recorded_models, tmp_path / "config.yml")
    merging.main(["--mergekit", str(file), "--out", str(tmp_path / "out")])
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = oracle_mergekit.recorded(case)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_the_oracle_tells_merges_apart():
    base = oracle_mergekit.recorded("base")
    cases = [oracle_mergekit.recorded(case) for case in oracle_mergekit.CASES]
    for at, one in enumerate(cases):
        for other in [base, *cases[:at]]:
            apart = [(one[name] - other[name]).abs().max() for name in one]
            assert max(apart) > 1e-5
