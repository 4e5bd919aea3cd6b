"""From adapters and prompts to advice that can be carried out; refusals before any work."""

import json
import shlex
import shutil
from pathlib import Path

import jsonschema
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from helpers.__main__ import main
from helpers.advise import recipes, report
from helpers.advise.advice import Advice
from helpers.advise.merges import Merge
from helpers.merge import main as merge_main

SCHEMA = json.loads((Path(report.__file__).parent / "advice.schema.json").read_text())


@pytest.fixture(autouse=True)
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "store"))


@pytest.fixture
def files(tmp_path):
    out = []
    for name in "abc":
        file = tmp_path / f"{name}.txt"
        file.write_text("\n".join(f"{name} prompt {i}:" for i in range(16)))
        out.append(file)
    return out


def run(capsys, *argv):
    """Exit code, standard output, standard error."""
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_advice_is_told_as_text_json_and_page(
    tiny_base, tiny_adapters, files, tmp_path, capsys
):
    ask = [
        "advise",
        "--base",
        tiny_base,
        "--models",
        *tiny_adapters,
        "--prompts",
        *files,
    ]
    ask += ["--tokens", "3", "--report", tmp_path / "out.html"]
    code, out, err = run(capsys, *ask, "--json")
    assert "12 prompts are left to judge by" in err
    content = json.loads(out)
    assert "12 prompts are left to judge by" in content["limits"][0]
    jsonschema.validate(content, SCHEMA)
    decisions = [row["decision"] for row in content["models"]]
    assert code == (3 if set(decisions) == {"abstain"} else 0)
    assert {row["model"] for row in content["models"]} == {"task1", "task2", "task3"}
    page = (tmp_path / "out.html").read_text()
    assert content["sentence"] in page and "task3" in page
    again = json.loads(run(capsys, *ask, "--json")[1])
    assert again["trials"] == content["trials"]


def test_what_every_model_keeps_is_merged_by_the_command_and_by_mergekits(
    tiny_base, tiny_adapters, files, tmp_path, capsys, monkeypatch
):
    """Adapters too small to change an answer: sure of it at a low threshold."""
    small = [
        shutil.copytree(folder, tmp_path / folder.name) for folder in tiny_adapters[:2]
    ]
    for folder in small:
        file = folder / "adapter_model.safetensors"
        weights = {name: 1e-3 * tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    ask = ["advise", "--base", tiny_base, "--models", *small, "--prompts", *files[:2]]
    code, out, _ = run(capsys, *ask, "--keep", "0.6", "--json")
    content = json.loads(out)
    (merge,) = content["merges"]
    assert code == 0 and merge["verdict"] == "safe"
    assert content["sentence"].startswith("Merge task1 and task2 by ")
    assert "the base alone gives the answers of task1, task2" in " ".join(
        content["limits"]
    )
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *shlex.split(merge["command"])[3:])[0] == 0
    assert (tmp_path / "merged-1" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "merge",
    [
        Merge(("task1", "task2")),
        Merge(("task1", "task2"), "task_arithmetic", (1.0, 1.5), 0.7),
        Merge(("task1", "task2", "task3"), "ties"),
    ],
    ids=["average", "weighted sum", "ties"],
)
def test_command_and_configuration_make_one_model(
    merge, tiny_base, tiny_adapters, tmp_path, capsys
):
    sources = {folder.name: str(folder) for folder in tiny_adapters}
    command = recipes.command(merge, str(tiny_base), sources, str(tmp_path / "one"))
    assert main(shlex.split(command)[3:]) == 0
    config = tmp_path / "config.yml"
    config.write_text(recipes.mergekit(merge, str(tiny_base), sources, set(sources)))
    merge_main(["--mergekit", str(config), "--out", str(tmp_path / "two")])
    one, two = (
        load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")
    )
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def example(n):
    """Advice on n models, two of them merged, with a cell for every pair."""
    models = [f"a rather long name {i}" for i in range(n)]
    cells = [
        {"victim": a, "partner": b, "kept": (i % 11) / 10, "low": 0.0, "high": 1.0, "rise": 0.1,
         "dose": 0.5, "prompts": 16, "cause": ["", "dose", "partner"][i % 3]}
        for i, (a, b) in enumerate((a, b) for a in models for b in models if a != b)
    ]  # fmt: skip
    table = pd.DataFrame(
        {"model": models, "decision": "keep apart", "merge": -1, "kept": 0.5}
    )
    table["least"] = float("nan")
    return Advice(
        "base", {m: m for m in models}, 0.9, dict.fromkeys(models, 64), table, [],
        pd.DataFrame(cells), pd.DataFrame(cells), pd.DataFrame(), pd.DataFrame(),
        1.0, False, [],
    )  # fmt: skip


@pytest.mark.parametrize("n", [3, 30])
def test_the_matrix_has_a_cell_for_each_victim_and_partner(n):
    rows = report.matrix(example(n))
    assert sum(cell is not None for row in rows for cell in row) == n * (n - 1)
    lines = report.matrix_text(example(n)).splitlines()
    assert len(lines) == n + 1 and max(map(len, lines)) < 200
    assert report.page(example(n)).count("<td class=") >= n * n


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, name, message",
    [
        ("", "a.txt", "holds 0 different prompts"),
        ("same\n" * 20, "a.txt", "most of its 20 lines are repeats"),
        ('{"prompt": "x"}\n' * 20, "a.jsonl", "holds 1 different prompts"),
        ('{"question": "x"}\n' * 9, "a.jsonl", 'line 1: an object needs "prompt"'),
        ('{"prompt": "x"\n', "a.jsonl", "line 1 is not JSON"),
        ("[]", "a.json", "write .jsonl"),
        ("a\0b\n" * 9, "a.txt", "holds NUL bytes"),
        (b"\xff\xfeh\0", "a.txt", "is no UTF-8 text"),
    ],
)
def test_prompts_that_are_none_are_refused(
    content, name, message, tiny_base, tiny_adapters, files, tmp_path, capsys
):
    odd = tmp_path / name
    odd.write_bytes(content.encode() if isinstance(content, str) else content)
    ask = ["advise", "--base", tiny_base, "--models", *tiny_adapters[:2]]
    code, _, err = run(capsys, *ask, "--prompts", odd, files[0])
    assert code == 2 and message in err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--keep", "9"], "keep is a share"),
        (["--budget", "0"], "the budget is in minutes"),
        (["--tokens", "0"], "1 token or more"),
        (["--device", "gpu"], "device must be"),
        (["--report", "out.pdf"], "must end in .html"),
        (["--report", "."], "must end in .html"),
        (["--prompts", "nowhere.txt"], "there is no file of prompts"),
    ],
)
def test_bad_requests_are_refused_in_a_sentence(
    flags, message, tiny_base, tiny_adapters, capsys
):
    code, out, err = run(
        capsys, "advise", "--base", tiny_base, "--models", *tiny_adapters[:2], *flags
    )
    assert (code, out) == (2, "") and message in err


def test_models_that_change_nothing_and_pickles_are_refused(
    tiny_base, tiny_adapters, files, tmp_path, capsys
):
    copies = [shutil.copytree(tiny_base, tmp_path / name) for name in ("one", "two")]
    ask = ["advise", "--base", tiny_base, "--prompts", *files[:2], "--models"]
    code, _, err = run(capsys, *ask, *copies)
    assert code == 2 and "no model differs from the base" in err
    pickle = tmp_path / "pickle"
    pickle.mkdir()
    (pickle / "pytorch_model.bin").write_bytes(b"x")
    code, _, err = run(capsys, *ask, tiny_adapters[0], pickle)
    assert code == 2 and "pickle" in err
    code, _, err = run(capsys, *ask[:2], tiny_adapters[2], *ask[3:], *tiny_adapters[:2])
    assert code == 2 and "is an adapter" in err
    stranger = tiny.save_base(tmp_path / "stranger", hidden_size=32)
    code, _, err = run(capsys, *ask, tiny_adapters[0], stranger)
    assert code == 2 and "error: stranger" in err


def test_models_that_answer_the_same_prompts_differently_are_named(
    tiny_base, tiny_adapters, files, capsys
):
    ask = ["advise", "--base", tiny_base, "--models", *tiny_adapters[:2]]
    code, out, _ = run(capsys, *ask, "--prompts", files[0], files[0], "--tokens", "3")
    assert "of the same prompts differently" in out
