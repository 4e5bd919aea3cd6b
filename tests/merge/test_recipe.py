"""mergekit's configurations read as recipes: its defaults, and a reason for what is not here."""

import pytest
import tiny
import torch
from safetensors.torch import load_file

from helpers import merge as merging


def config(tmp_path, text):
    file = tmp_path / "config.yml"
    file.write_text(text)
    return file


MODELS = "models: [{model: a}, {model: b}]"


@pytest.mark.parametrize(
    ("text", "method", "weights", "options", "scale"),
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
    tmp_path, text, method, weights, options, scale
):
    recipe = merging.read_mergekit(config(tmp_path, text))
    assert (recipe.method, recipe.options, recipe.scale) == (method, options, scale)
    assert recipe.weights == weights and recipe.models == ["a", "b"]


def test_mergekit_counts_a_base_model_of_linear_among_the_models(tmp_path):
    text = f"merge_method: linear\nbase_model: base\nparameters: {{weight: 1}}\n{MODELS}"
    recipe = merging.read_mergekit(config(tmp_path, text))
    assert recipe.models == ["a", "b", "base"] and recipe.weights == [1, 1, 1]


@pytest.mark.parametrize("method", sorted(merging.MERGEKIT.keys() - {"slerp"}))
def test_a_mergekit_configuration_gives_each_model_its_weight(tmp_path, method):
    text = (
        f"merge_method: {method}\nbase_model: base\nparameters: {{normalize: true, density: 0.5}}\n"
        "models: [{model: base, parameters: {weight: 0}}, {model: a, parameters: {weight: 0.3}},"
        " {model: b, parameters: {weight: 0.7}}]"
    )
    recipe = merging.read_mergekit(config(tmp_path, text))
    given = dict(zip(recipe.models, recipe.weights, strict=True))
    assert {model: given[model] for model in "ab"} == {"a": 0.3, "b": 0.7}


def test_a_mergekit_model_with_an_adapter_is_the_adapter(tmp_path):
    text = "merge_method: {0}\nbase_model: b\nparameters: {{weight: 1}}\nmodels: [{{model: {1}}}]"
    assert merging.read_mergekit(config(tmp_path, text.format("ties", "b+x"))).models == ["x"]
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
        expected = (torch.sin(0.7 * angle) * x + torch.sin(0.3 * angle) * y) / torch.sin(angle)
        if cosine.abs() > 0.9995:
            expected = 0.7 * x + 0.3 * y
        torch.testing.assert_close(tensor.flatten(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: della\nbase_model: b\nmodels: [{model: a}]", "merge_method della is not"),
        ("merge_method: ties\nmodels: [{model: a}]", "ties needs a base_model"),
        ("merge_method: slerp\nbase_model: b\nslices: []", "no models are listed"),
        (
            "merge_method: linear\ndtype: float8\nmodels: [{model: a, parameters: {weight: 1}}]",
            "dtype float8 is not supported",
        ),
        ("models: [", "config.yml: "),
        ("modules: {}\nmodels: [{model: a}]", "modules is not supported"),
        ("merge_method: linear\nmodels: [{model: a}]", "weight is missing"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [0, 1]}}]", "gradients"),
        ("merge_method: linear\ntokenizer_source: union\nmodels: [{model: a}]", "tokenizer_source"),
        (
            "merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {epsilon: 1}}]",
            "epsilon",
        ),
        (
            "merge_method: ties\nbase_model: b\nparameters: {weight: 1}\nmodels: "
            "[{model: a, parameters: {density: 0.1}}, {model: c, parameters: {density: 0.2}}]",
            "density must be the same",
        ),
    ],
)
def test_what_is_not_supported_in_a_mergekit_configuration_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        merging.read_mergekit(config(tmp_path, text))
