"""The merge command: what it writes is the merge, complete or not there at all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import huggingface_hub
import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import merge as merging
from helpers.__main__ import main
from helpers.merge import cost, rules, weights
from helpers.merge.selection import magnitude_cut, trim


def llama(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model):
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        return model(ids).logits


def merge(base, models, out, *more):
    merging.main(
        [
            "--base",
            str(base),
            "--models",
            *map(str, models),
            "--out",
            str(out),
            *map(str, more),
        ]
    )
    return out


@pytest.fixture(scope="module")
def full_models(tiny_base, tmp_path_factory):
    """Two full fine-tunes: one file, and shards."""
    root = tmp_path_factory.mktemp("full")
    sizes = {1: "5GB", 2: "20KB"}
    return [
        tiny.save_tuned(root / f"full{s}", tiny_base, s, size)
        for s, size in sizes.items()
    ]


@pytest.mark.parametrize(
    ("rule", "options"),
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
    rule, options, kind, tiny_base, tiny_adapters, full_models, tmp_path
):
    models = tiny_adapters[:2] if kind == "adapters" else full_models
    flags = [
        part
        for name, value in options.items()
        for part in (
            f"--{name.replace('_', '-')}",
            *(value if name == "weights" else [value]),
        )
    ]
    out = merge(tiny_base, models, tmp_path / "out", "--rule", rule, *flags)
    assert (out / "model.safetensors.index.json").exists() == ("shard_size" in options)

    base = merging.open_base(tiny_base)
    specialists = [merging.open_specialist(m, str(i)) for i, m in enumerate(models, 1)]
    rows = merging.views(base, specialists)
    same = {name: value for name, value in options.items() if name != "shard_size"}
    # the paper's flat vector
    entries = sum(tensor.numel() for tensor in base.tensors.values())
    delta, report = merging.merge(rows, rule, ["1", "2"], entries=entries, **same)
    model = llama(tiny_base)
    with merging.applied(model, delta):
        torch.testing.assert_close(
            logits(llama(out)), logits(model), rtol=1e-5, atol=1e-5
        )
    written = json.loads((out / "merge_report.json").read_text())
    assert written["own"] == pytest.approx(report.own)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<end>"


def test_the_written_file_holds_what_the_base_holds(tiny_base, tiny_adapters, tmp_path):
    out = merge(tiny_base, tiny_adapters, tmp_path / "out", "--rule", "linear")
    ours, base = (
        load_file(out / "model.safetensors"),
        load_file(tiny_base / "model.safetensors"),
    )
    assert ours.keys() == base.keys()
    assert torch.equal(ours["model.norm.weight"], base["model.norm.weight"])
    with safe_open(out / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    report = json.loads((out / "merge_report.json").read_text())
    assert metadata["format"] == "pt"
    for key in ("recipe", "inputs", "merging_collapse"):
        assert json.loads(metadata[key]) == report[key]


def test_a_merge_of_one_adapter_is_what_peft_merges(tiny_base, tiny_adapters, tmp_path):
    from peft import PeftModel

    out = merge(
        tiny_base, tiny_adapters[:1], tmp_path / "out", "--rule", "task_arithmetic"
    )
    theirs = PeftModel.from_pretrained(
        llama(tiny_base), tiny_adapters[0]
    ).merge_and_unload()
    for name, tensor in llama(out).state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=0, atol=1e-7)


def test_bf16_output_is_the_fp32_merge_cast_once(tiny_base, full_models, tmp_path):
    exact = merge(tiny_base, full_models, tmp_path / "fp32", "--rule", "ties")
    out = merge(
        tiny_base,
        full_models,
        tmp_path / "bf16",
        "--rule",
        "ties",
        "--dtype",
        "bfloat16",
    )
    cast = load_file(out / "model.safetensors")
    for name, tensor in load_file(exact / "model.safetensors").items():
        assert torch.equal(cast[name], tensor.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    # and a base that is stored in bf16 gives bf16 again, added in fp32
    again = merge(out, full_models, tmp_path / "again", "--rule", "linear")
    assert {t.dtype for t in load_file(again / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_models_in_bf16_are_merged_in_fp32(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {"w": torch.randn(9, 7, generator=generator), "s": torch.tensor(0.5)}
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        change = {
            k: torch.randn(v.shape, generator=generator) / 10 for k, v in state.items()
        }
        stored = {k: (v + change[k]).bfloat16() for k, v in state.items()}
        save_file(stored, tmp_path / name / "model.safetensors")
    models = [tmp_path / "one", tmp_path / "two"]
    flags = [
        "--rule",
        "ties",
        "--density",
        "0.5",
        "--weights",
        "2",
        "1",
        "--dtype",
        "float32",
    ]
    out = merge(tmp_path / "base", models, tmp_path / "out", *flags)
    ours = load_file(out / "model.safetensors")
    base, one, two = (
        load_file(tmp_path / m / "model.safetensors") for m in ("base", "one", "two")
    )
    for name, tensor in ours.items():  # matrices and 0-d tensors alike
        taus = [m[name].float() - base[name].float() for m in (one, two)]
        kept = [trim(tau, magnitude_cut(tau, 0.5)) for tau in taus]
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
        merge(tmp_path / "base", models, tmp_path / "o", "--rule", "linear")
        / "model.safetensors"
    )
    assert (
        out["w"].unique().tolist() == [1.5]
        and out["n"] == 7
        and out["flags"].tolist() == [True, False]
    )


def test_the_card_run_again_gives_the_same_file(
    tiny_base, tiny_adapters, tmp_path, monkeypatch
):
    flags = ["--rule", "dare", "--match", "norm", "--weights", "1", "2", "--seed", "5"]
    grid = ["--dtype", "bfloat16", "--round", "stochastic", "--shard-size", "5KB"]
    merge(tiny_base, tiny_adapters[:2], tmp_path / "one", *flags, *grid)
    for model in (tiny_base, *tiny_adapters[:2]):
        (tmp_path / model.name).symlink_to(model)
    monkeypatch.chdir(tmp_path)
    merging.main(
        [
            "--recipe",
            str(tmp_path / "one" / "README.md"),
            "--out",
            str(tmp_path / "two"),
        ]
    )
    files = {file.name for file in (tmp_path / "one").iterdir()} - {"README.md"}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    for name in files:
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_digests_tell_the_inputs_apart(tiny_base, tiny_adapters, tmp_path):
    digests = [weights.sampled_digest(folder) for folder in (tiny_base, *tiny_adapters)]
    assert len(set(digests)) == 4
    copy = shutil.copytree(tiny_base, tmp_path / "copy")
    assert weights.sampled_digest(copy) == digests[0]
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert weights.sampled_digest(copy) != digests[0]


def test_a_revision_of_a_hub_model_is_taken_and_named(
    tiny_base, tiny_adapters, tmp_path, monkeypatch
):
    """From the hub's cache alone, as a machine without network has it."""
    cache = tmp_path / "hub" / "models--our--base"
    commits = {"v1": "a" * 40, "main": "b" * 40}
    shutil.copytree(tiny_base, cache / "snapshots" / commits["v1"])
    tiny.save_base(cache / "snapshots" / commits["main"], seed=4)
    (cache / "refs").mkdir()
    for name, commit in commits.items():
        (cache / "refs" / name).write_text(commit)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub")
    )
    out = tmp_path / "out"
    flags = ["--rule", "linear", "--models", str(tiny_adapters[0]), "--out", str(out)]
    assert main(["merge", "--base", "our/base@v1", *flags]) == 0
    expected = merge(
        tiny_base, tiny_adapters[:1], tmp_path / "plain", "--rule", "linear"
    )
    ours, theirs = (load_file(x / "model.safetensors") for x in (out, expected))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    report = json.loads((out / "merge_report.json").read_text())
    assert report["inputs"][0]["revision"] == commits["v1"]
    assert report["recipe"]["base"] == "our/base@v1"
    front = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert front["base_model"][0] == "our/base"


def test_the_card_states_base_tag_and_recipe_without_paths(
    tiny_base, tiny_adapters, tmp_path
):
    out = merge(
        tiny_base,
        tiny_adapters[:2],
        tmp_path / "out",
        "--rule",
        "ties",
        "--scale",
        "0.5",
    )
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == [tiny_base.name, "task1", "task2"] and front[
        "tags"
    ] == ["merge"]
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["rule"] == "ties" and recipe["scale"] == 0.5
    assert str(tmp_path) not in card and str(tiny_base.parent) not in card


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("dtype: fp16", "dtype must be 'float32', 'bfloat16' or 'float16'"),
        ("round: up", "round must be 'nearest' or 'stochastic'"),
        ("heads: mrege", "heads must be 'merge' or 'base'"),
        (
            "options: {scope: model, density: [[0.1, 0.9]]}",
            "density must be one number a model",
        ),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(
    tiny_base, tiny_adapters, tmp_path, line, told
):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"rule: ties\nbase: {tiny_base}\nmodels: [{tiny_adapters[0]}]\n{line}\n"
    )
    with pytest.raises(ValueError, match=told):
        merging.main(["--recipe", str(file), "--out", str(tmp_path / "out")])
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_cost_is_shown_first_and_the_effect_last(
    tiny_base, tiny_adapters, tmp_path, capsys
):
    merge(tiny_base, tiny_adapters[:2], tmp_path / "out", "--rule", "linear")
    lines = capsys.readouterr().out.splitlines()
    assert "GB on disk" in lines[0] and "GB of memory" in lines[0]
    assert (
        lines[1].startswith("task1: dose 0.5")
        and "cosine to their sum 1.000" in lines[3]
    )


# Complete or not at all --------------------------------------------------------------------------


def test_a_failed_merge_leaves_nothing(tiny_base, tmp_path):
    broken = llama(tiny_base)
    # met at the end, when most is written
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="model.norm.weight: 1 holds NaN"):
        merge(tiny_base, [tmp_path / "broken"], tmp_path / "out", "--rule", "linear")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_a_killed_merge_leaves_no_folder_that_looks_finished(
    tiny_base, tiny_adapters, tmp_path
):
    code = (
        "import os, signal, sys; from helpers import merge; from helpers.merge import shards\n"
        "shards._write_tensor = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge.main(sys.argv[1:])"
    )
    arguments = ["--rule", "linear", "--base", tiny_base, "--models", tiny_adapters[0]]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--out", tmp_path / "out"]
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [p.name.startswith(".out.part-") for p in tmp_path.iterdir()] == [True]
    # another process may still write this one
    running = tmp_path / f".out.part-{os.getppid()}"
    running.mkdir()
    merge(tiny_base, tiny_adapters[:1], tmp_path / "out", "--rule", "linear")
    assert llama(tmp_path / "out")
    assert set(tmp_path.iterdir()) == {tmp_path / "out", running}


def test_requests_are_refused_before_any_work(
    tiny_base, tiny_adapters, tmp_path, capsys
):
    out = tmp_path / "out"
    fine = [
        "merge",
        "--base",
        str(tiny_base),
        "--out",
        str(out),
        "--models",
        str(tiny_adapters[0]),
    ]
    for more, message in [
        (["--rule", "slerp"], "slerp needs at least 2 models"),
        (
            ["--rule", "ties", "--density", "2"],
            "density of ties must be a number from 0 to 1",
        ),
        (["--rule", "linear", "--density", ".2"], "linear has no option 'density'"),
        (["--rule", "linear", "--weights", "1", "1"], "2 weights for 1 models"),
        (["--rule", "linear", "--device", "gpu"], "device must be one of cpu, cuda"),
        (["--rule", "linear", "--device", "cuda:99"], "finds no device cuda:99"),
    ]:
        assert main([*fine, *more]) == 2
        assert message in capsys.readouterr().err
    file = tmp_path / "config.yml"
    file.write_text("")
    assert main([*fine, "--mergekit", str(file)]) == 2
    assert "leave them out" in capsys.readouterr().err
    out.mkdir()
    assert main([*fine, "--rule", "linear"]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_full_disk_is_noticed_first(tiny_base, tiny_adapters, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match="the merge needs"):
        merge(tiny_base, tiny_adapters, tmp_path / "new" / "out", "--rule", "linear")


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from helpers import merge
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))
peak = [0]
def sample():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
threading.Thread(target=sample, daemon=True).start()
merge.main(sys.argv[1:])
print(peak[0])
"""


@pytest.fixture
def one_thread():
    """Linear algebra on one thread: on more it rounds in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def asked(rule, *models):
    """The command for models in folders of these names, less --out."""
    return ["--rule", rule, "--base", "base", "--models", *models, "--force"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rule", ["linear", "ties", "dare", "iso_c"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_make_the_same_file_and_report(tmp_path, monkeypatch, rule, dtype):
    """Though a thread may be at another tensor, of another shape, of the same lazy base."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 400), (7, 5), (400, 300), (64, 2000), (11,)]
    for model in ("base", "one", "two", "three"):
        (tmp_path / model).mkdir()
        tensors = {}
        for i in range(20):
            tensors[f"w{i:02}"] = torch.randn(shapes[i % 5], generator=generator)
        save_file(tensors, tmp_path / model / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    files, reports = [], []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        command = asked(rule, "one", "two", "three")
        merging.main([*command, "--dtype", dtype, "--out", f"out{threads}"])
        files.append((tmp_path / f"out{threads}" / "model.safetensors").read_bytes())
        report = json.loads(
            (tmp_path / f"out{threads}" / "merge_report.json").read_text()
        )
        reports.append(report)
    assert files[0] == files[1] == files[2]
    assert reports[0] == reports[1] == reports[2]


def test_a_thread_that_meets_nan_stops_the_merge(tmp_path, monkeypatch):
    for model in ("base", "one", "two"):
        (tmp_path / model).mkdir()
        tensors = {f"w{i}": torch.ones(40, 50) * (i + len(model)) for i in range(9)}
        if model == "two":
            tensors["w4"][3, 3] = torch.nan
        save_file(tensors, tmp_path / model / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    command = asked("linear", "one", "two")
    with pytest.raises(ValueError, match="w4: .* holds NaN"):
        merging.main([*command, "--out", "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_memory_is_that_of_the_largest_tensor_not_of_the_model(tmp_path, rule):
    """And within 20 % of what is shown before the merge."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((2000, 1000))
    for model in ("base", "one", "two", "three"):
        (tmp_path / model).mkdir()
        tensors = {f"w{i}": torch.randn(shape, generator=generator) for i in range(8)}
        save_file(tensors, tmp_path / model / "model.safetensors")
    command = asked(rule, "one", "two", "three")
    run = [sys.executable, "-c", MEASURE, *command, "--out", "out"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    # a model has 64 MB
    assert cost.working_memory(rule, [shape], models=3) < 20e6 < 64e6
    stated = float(re.search(r"([\d.]+) GB of memory", done.stdout)[1]) * 1e9
    assert 0.8 * stated < int(done.stdout.split()[-1]) < 1.2 * stated
