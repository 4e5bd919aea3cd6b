"""The merge command: what it writes is the merge, complete or not there at all."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.__main__ import main
from helpers.merge import engine as merging
from helpers.merge import folder as checkpoints
from helpers.merge import rules, vectors


def llama(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model):
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        return model(ids).logits


def merge(base, models, out, *more):
    checkpoints.main(
        ["--base", str(base), "--models", *map(str, models), "--out", str(out), *map(str, more)]
    )
    return out


@pytest.fixture(scope="module")
def full_models(tmp_path_factory):
    """Two full fine-tunes: one file, and shards."""
    root = tmp_path_factory.mktemp("full")
    sizes = {1: "5GB", 2: "20KB"}
    return [tiny.save_base(root / f"full{s}", s, max_shard_size=size) for s, size in sizes.items()]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {"weights": [2, 1]}),
        ("ties", {"density": 0.3, "shard_size": "20KB"}),
        ("ties", {"scope": "model", "match": "norm"}),
        ("dare_ties", {"rescale": "l1", "combine": "sum", "seed": 3}),
        ("slerp", {}),
        ("iso_c", {}),
    ],
)
@pytest.mark.parametrize("kind", ["adapters", "full"])
def test_transformers_loads_the_merge_and_gives_its_logits(
    method, options, kind, tiny_base, tiny_adapters, full_models, tmp_path
):
    models = tiny_adapters[:2] if kind == "adapters" else full_models
    flags = [
        part
        for name, value in options.items()
        for part in (f"--{name.replace('_', '-')}", *(value if name == "weights" else [value]))
    ]
    out = merge(tiny_base, models, tmp_path / "out", "--method", method, *flags)
    assert (out / "model.safetensors.index.json").exists() == ("shard_size" in options)

    base = vectors.open_base(tiny_base)
    specialists = [vectors.open_specialist(m, str(i)) for i, m in enumerate(models, 1)]
    rows = vectors.views(base, specialists)
    same = {name: value for name, value in options.items() if name != "shard_size"}
    delta, report = merging.merge(rows, method, ["1", "2"], **same)
    model = llama(tiny_base)
    with vectors.applied(model, delta):
        torch.testing.assert_close(logits(llama(out)), logits(model), rtol=1e-5, atol=1e-5)
    written = json.loads((out / "merge_report.json").read_text())
    assert written["own"] == pytest.approx(report.own)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<end>"


def inputs(model, layer, texts):
    """What the texts give a layer as input, (tokens, in)."""
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    for text in texts:
        with torch.no_grad():
            model(torch.tensor([list(tiny.byte_tokenizer()(text)["input_ids"])]))
    hook.remove()
    return torch.cat(seen)


def test_regmean_reads_each_models_own_probes(tiny_base, tiny_adapters, tmp_path):
    from peft import PeftModel

    texts = [["what is 1 + 1?", "a longer text, so that one is padded"], ["say no", "say yes"]]
    files = [tmp_path / "sums.txt", tmp_path / "words.jsonl"]
    files[0].write_text("\n\n".join(texts[0]))
    rows = [{"prompt": texts[1][0], "text": "not this"}, {"text": texts[1][1]}]
    files[1].write_text("\n".join(map(json.dumps, rows)))
    flags = ["--method", "regmean", "--shrink", "1", "--probes", *files]
    out = merge(tiny_base, tiny_adapters[:2], tmp_path / "out", *flags)

    whole = [
        PeftModel.from_pretrained(llama(tiny_base), path).merge_and_unload()
        for path in tiny_adapters[:2]
    ]
    ours, base = llama(out), llama(tiny_base).state_dict()
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        xs = [inputs(model, layer, mine) for model, mine in zip(whole, texts, strict=True)]
        xs = [x.double() / len(x) ** 0.5 for x in xs]
        weights = [model.get_submodule(layer).weight.double() for model in whole]
        wanted = torch.cat([x @ w.T for x, w in zip(xs, weights, strict=True)])
        fit = torch.cat(xs) @ ours.get_submodule(layer).weight.double().T
        best = torch.cat(xs) @ torch.linalg.lstsq(torch.cat(xs), wanted).solution
        torch.testing.assert_close(fit, best, rtol=1e-4, atol=1e-4)
        assert (wanted - fit).norm() < 0.9 * (wanted - torch.cat(xs) @ sum(weights).T / 2).norm()
    assert torch.equal(ours.model.norm.weight, base["model.norm.weight"])
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["model.safetensors"]
    recipe = yaml.safe_load((out / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    assert recipe["probes"] == ["sums.txt", "words.jsonl"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "holds no text"),
        ("a.jsonl", '{"prompt": "x"}\n{"answer": "y"}', "line 2: no prompt or text"),
        ("a.jsonl", "plain words", "line 1 is not JSON: Expecting value"),
    ],
)
def test_probes_that_are_no_texts_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        checkpoints.read_probes(tmp_path / name)


def test_the_written_file_holds_what_the_base_holds(tiny_base, tiny_adapters, tmp_path):
    out = merge(tiny_base, tiny_adapters, tmp_path / "out", "--method", "linear")
    ours, base = load_file(out / "model.safetensors"), load_file(tiny_base / "model.safetensors")
    assert ours.keys() == base.keys()
    assert torch.equal(ours["model.norm.weight"], base["model.norm.weight"])
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_merge_of_one_adapter_is_what_peft_merges(tiny_base, tiny_adapters, tmp_path):
    from peft import PeftModel

    out = merge(tiny_base, tiny_adapters[:1], tmp_path / "out", "--method", "task_arithmetic")
    theirs = PeftModel.from_pretrained(llama(tiny_base), tiny_adapters[0]).merge_and_unload()
    for name, tensor in llama(out).state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=0, atol=1e-7)


def test_bf16_output_is_the_fp32_merge_cast_once(tiny_base, full_models, tmp_path):
    exact = merge(tiny_base, full_models, tmp_path / "fp32", "--method", "ties")
    out = merge(
        tiny_base, full_models, tmp_path / "bf16", "--method", "ties", "--dtype", "bfloat16"
    )
    cast = load_file(out / "model.safetensors")
    for name, tensor in load_file(exact / "model.safetensors").items():
        assert torch.equal(cast[name], tensor.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    # and a base that is stored in bf16 gives bf16 again, added in fp32
    again = merge(out, full_models, tmp_path / "again", "--method", "linear")
    assert {t.dtype for t in load_file(again / "model.safetensors").values()} == {torch.bfloat16}


def test_models_in_bf16_are_merged_in_fp32(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {"w": torch.randn(9, 7, generator=generator), "s": torch.tensor(0.5)}
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        change = {k: torch.randn(v.shape, generator=generator) / 10 for k, v in state.items()}
        stored = {k: (v + change[k]).bfloat16() for k, v in state.items()}
        save_file(stored, tmp_path / name / "model.safetensors")
    models = [tmp_path / "one", tmp_path / "two"]
    flags = ["--method", "ties", "--density", "0.5", "--weights", "2", "1", "--dtype", "float32"]
    out = merge(tmp_path / "base", models, tmp_path / "out", *flags)
    ours = load_file(out / "model.safetensors")
    base, one, two = (load_file(tmp_path / m / "model.safetensors") for m in ("base", "one", "two"))
    for name, tensor in ours.items():  # matrices and 0-d tensors alike
        taus = [m[name].float() - base[name].float() for m in (one, two)]
        kept = [rules.trim(tau, rules.magnitude_cut(tau, 0.5)) for tau in taus]
        expected = base[name].float() + rules.disjoint_merge(kept, [2, 1])
        assert torch.equal(tensor, expected)


def test_integer_buffers_are_copied(tmp_path):
    for name, value in [("base", 0.0), ("one", 1.0), ("two", 2.0)]:
        (tmp_path / name).mkdir()
        tensors = {
            "w": torch.full((3, 2), value),
            "flags": torch.tensor([True, False]),
            "n": torch.tensor(7),
        }
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    models = [tmp_path / "one", tmp_path / "two"]
    out = load_file(
        merge(tmp_path / "base", models, tmp_path / "o", "--method", "linear") / "model.safetensors"
    )
    assert (
        out["w"].unique().tolist() == [1.5]
        and out["n"] == 7
        and out["flags"].tolist() == [True, False]
    )


def test_the_card_states_base_tag_and_recipe_without_paths(tiny_base, tiny_adapters, tmp_path):
    out = merge(
        tiny_base, tiny_adapters[:2], tmp_path / "out", "--method", "ties", "--scale", "0.5"
    )
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == [tiny_base.name, "task1", "task2"] and front["tags"] == ["merge"]
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["method"] == "ties" and recipe["scale"] == 0.5
    assert recipe["options"]["density"] == 0.2 and recipe["weights"] == [1, 1]
    assert str(tmp_path) not in card and str(tiny_base.parent) not in card


def test_cost_is_shown_first_and_the_effect_last(tiny_base, tiny_adapters, tmp_path, capsys):
    merge(tiny_base, tiny_adapters[:2], tmp_path / "out", "--method", "linear")
    lines = capsys.readouterr().out.splitlines()
    assert "GB on disk" in lines[0] and "GB of memory" in lines[0]
    assert lines[1].startswith("task1: dose 0.5") and "cosine to their sum 1.000" in lines[3]


# Complete or not at all --------------------------------------------------------------------------


def test_a_failed_merge_leaves_nothing(tiny_base, tmp_path):
    broken = llama(tiny_base)
    broken.model.norm.weight.data[0] = float("nan")  # met at the end, when most is written
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="model.norm.weight: 1 holds NaN"):
        merge(tiny_base, [tmp_path / "broken"], tmp_path / "out", "--method", "linear")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_a_killed_merge_leaves_no_folder_that_looks_finished(tiny_base, tiny_adapters, tmp_path):
    code = (
        "import os, signal, sys; from helpers import checkpoints as c\n"
        "c._write_tensor = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.main(sys.argv[1:])"
    )
    arguments = ["--method", "linear", "--base", tiny_base, "--models", tiny_adapters[0]]
    done = subprocess.run([sys.executable, "-c", code, *arguments, "--out", tmp_path / "out"])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [p.name.startswith(".out.part-") for p in tmp_path.iterdir()] == [True]
    running = tmp_path / f".out.part-{os.getppid()}"  # another process may still write this one
    running.mkdir()
    merge(tiny_base, tiny_adapters[:1], tmp_path / "out", "--method", "linear")
    assert llama(tmp_path / "out")
    assert set(tmp_path.iterdir()) == {tmp_path / "out", running}


def test_requests_are_refused_before_any_work(tiny_base, tiny_adapters, tmp_path, capsys):
    out = tmp_path / "out"
    fine = ["merge", "--base", str(tiny_base), "--out", str(out), "--models", str(tiny_adapters[0])]
    for more, message in [
        (["--method", "slerp"], "slerp needs at least 2 models"),
        (["--method", "ties", "--density", "2"], "density of ties must be a number from 0 to 1"),
        (["--method", "linear", "--density", ".2"], "linear has no option 'density'"),
        (["--method", "linear", "--weights", "1", "1"], "2 weights for 1 models"),
        (["--method", "regmean"], "regmean, and no other method, needs probes"),
        (["--method", "ties", "--probes", "x"], "regmean, and no other method, needs probes"),
        (["--method", "regmean", "--probes", "x", "y"], "2 files of probes for 1 models"),
        (["--method", "linear", "--device", "gpu"], "device must be cpu, cuda, or one of"),
        (["--method", "linear", "--device", "cuda:99"], "finds no device cuda:99"),
    ]:
        assert main([*fine, *more]) == 2
        assert message in capsys.readouterr().err
    file = config(tmp_path, "")
    assert main([*fine, "--mergekit", str(file)]) == 2
    assert "leave them out" in capsys.readouterr().err
    out.mkdir()
    assert main([*fine, "--method", "linear"]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_full_disk_is_noticed_first(tiny_base, tiny_adapters, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match="the merge needs"):
        merge(tiny_base, tiny_adapters, tmp_path / "new" / "out", "--method", "linear")


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from helpers.merge import folder as checkpoints
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))
peak = [0]
def sample():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
threading.Thread(target=sample, daemon=True).start()
checkpoints.main(sys.argv[1:])
print(peak[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_memory_is_that_of_the_largest_tensor_not_of_the_model(tmp_path, method):
    """And within 20 % of what is shown before the merge."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((2000, 1000))
    for model in ("base", "one", "two", "three"):
        (tmp_path / model).mkdir()
        tensors = {f"w{i}": torch.randn(shape, generator=generator) for i in range(8)}
        save_file(tensors, tmp_path / model / "model.safetensors")
    command = ["--method", method, "--base", "base", "--models", "one", "two", "three"]
    run = [sys.executable, "-c", MEASURE, *command, "--out", "out"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert checkpoints.working_memory(method, [shape]) < 20e6 < 64e6  # a model has 64 MB
    stated = float(re.search(r"([\d.]+) GB of memory", done.stdout)[1]) * 1e9
    assert 0.8 * stated < int(done.stdout.split()[-1]) < 1.2 * stated


# mergekit ----------------------------------------------------------------------------------------


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
    recipe = checkpoints.read_mergekit(config(tmp_path, text))
    assert (recipe.method, recipe.options, recipe.scale) == (method, options, scale)
    assert recipe.weights == weights and recipe.models == ["a", "b"]


def test_mergekit_counts_a_base_model_of_linear_among_the_models(tmp_path):
    text = f"merge_method: linear\nbase_model: base\nparameters: {{weight: 1}}\n{MODELS}"
    recipe = checkpoints.read_mergekit(config(tmp_path, text))
    assert recipe.models == ["a", "b", "base"] and recipe.weights == [1, 1, 1]


@pytest.mark.parametrize("method", sorted(checkpoints.MERGEKIT.keys() - {"slerp"}))
def test_a_mergekit_configuration_gives_each_model_its_weight(tmp_path, method):
    text = (
        f"merge_method: {method}\nbase_model: base\nparameters: {{normalize: true, density: 0.5}}\n"
        "models: [{model: base, parameters: {weight: 0}}, {model: a, parameters: {weight: 0.3}},"
        " {model: b, parameters: {weight: 0.7}}]"
    )
    recipe = checkpoints.read_mergekit(config(tmp_path, text))
    given = dict(zip(recipe.models, recipe.weights, strict=True))
    assert {model: given[model] for model in "ab"} == {"a": 0.3, "b": 0.7}


def test_a_mergekit_model_with_an_adapter_is_the_adapter(tmp_path):
    text = "merge_method: {0}\nbase_model: b\nparameters: {{weight: 1}}\nmodels: [{{model: {1}}}]"
    assert checkpoints.read_mergekit(config(tmp_path, text.format("ties", "b+x"))).models == ["x"]
    with pytest.raises(ValueError, match="only adapters of the base_model"):
        checkpoints.read_mergekit(config(tmp_path, text.format("ties", "c+x")))


def test_a_mergekit_slerp_interpolates_from_the_base(tiny_base, full_models, tmp_path):
    text = f"""
        merge_method: slerp
        base_model: {tiny_base}
        models: [{{model: {full_models[0]}}}]
        parameters: {{t: 0.3}}
        dtype: float32
    """
    file = config(tmp_path, text)
    checkpoints.main(["--mergekit", str(file), "--out", str(tmp_path / "out")])
    ours = load_file(tmp_path / "out" / "model.safetensors")
    a, b = (load_file(f / "model.safetensors") for f in (tiny_base, full_models[0]))
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
        checkpoints.read_mergekit(config(tmp_path, text))
