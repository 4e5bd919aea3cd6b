"""From adapters and a checkpoint that the study did not make to a merge that transformers loads."""

import json
import math
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from helpers import merge as merging
from helpers.__main__ import main
from helpers.advise import choices as choose
from helpers.advise import report as advise
from helpers.states import measures as hidden
from helpers.states.batch import encode_prompt
from helpers.study import scores as evaluate


def save_checkpoint(folder, base, seed=5, size=0.02):
    """`base` with all its parameters moved at random, by transformers."""
    model = LlamaForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("full") / "tuned", tiny_base)


@pytest.fixture
def probes(tmp_path):
    file = tmp_path / "probes.txt"
    file.write_text("\n".join(f"probe number {i} of {i % 7}" for i in range(24)))
    return file


# --- what is given ----------------------------------------------------------------------------


def test_probes_are_texts_json_or_neutral(tmp_path):
    plain, lines = tmp_path / "mine.txt", tmp_path / "theirs.jsonl"
    plain.write_text("first\n\n second \nfirst\n" + "x" * 5000)
    lines.write_text('{"prompt": "third"}\n{"text": "first"}\n')
    told = advise.read_probes([str(plain), str(lines)])
    assert told["source"].tolist() == ["mine", "mine", "mine", "theirs"]
    assert told["text"].str.len().tolist() == [5, 6, advise.LONGEST, 5]
    neutral = advise.read_probes()
    assert len(neutral) >= 60 and neutral["text"].str.len().max() < 100


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", "same\nsame\n same ", "the probes are all the same"),
        ("a.jsonl", '{"prompt": "x"}\n{"question": "y"}', "line 2: no prompt or text"),
        ("a.jsonl", '{"prompt": "x"}\nplain', "line 2 is not JSON"),
    ],
)
def test_bad_probes_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        advise.read_probes([str(tmp_path / name)])
    with pytest.raises(ValueError, match="neither a file nor a task"):
        advise.read_probes(["nowhere.txt"])


def test_labelled_examples_are_read_or_refused(tmp_path):
    file = tmp_path / "solved.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "a", "answers": ["b", "c"]}\n')
    one, two = advise.read_labelled(file)
    assert one == {"id": "1", "prompt": "1+1=", "answers": ["2"], "options": []}
    assert two["answers"] == ["b", "c"]
    for content, message in (("", "holds no examples"), ('{"prompt": "x"}', "needs a prompt and")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            advise.read_labelled(file)


def test_models_are_called_by_the_last_part_of_their_path_unless_two_agree():
    assert advise.names_of(["runs/one", "org/two"]) == ["one", "two"]
    assert advise.names_of(["a/final", "b/final"]) == ["a/final", "b/final"]


# --- from states to tables --------------------------------------------------------------------


def test_distances_intervals_and_ranking():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 12))
    states = np.stack([base, base + 0.1 * rng.normal(size=(40, 12)), rng.normal(size=(40, 12))])
    pairs, models, stability = advise.distance_tables(states, ["a", "b", "c"], ["x"] * 40)
    assert pairs["distance"][0] == pytest.approx(hidden.hidden_sim(states[0], states[1]))
    assert (pairs["low"] <= pairs["distance"]).all() and (pairs["distance"] <= pairs["high"]).all()
    by_name = models.set_index("model")
    assert by_name.loc["c", "mds"] == pytest.approx(pairs["distance"][1:].mean())
    assert by_name.loc["c", ["rank", "rank_low", "rank_high"]].tolist() == [1, 1, 1]
    assert 0 < stability < 1  # a and b change places
    sd = np.std([hidden.probe_distances(states[0], states[2])]) / np.sqrt(40)
    assert (pairs["high"] - pairs["low"])[1] == pytest.approx(2 * 1.645 * sd, rel=0.15)
    assert math.isnan(advise.distance_tables(states[:2], ["a", "b"], ["x"] * 40)[2])


def test_probes_are_resampled_within_their_source():
    a = np.eye(2)[[0] * 6 + [1] * 2]
    states = np.stack(
        [a, np.eye(2)[[0] * 8]]
    )  # equal on the first source, orthogonal on the second
    (row,) = advise.distance_tables(states, ["a", "b"], ["x"] * 6 + ["y"] * 2)[0].itertuples()
    assert row.low == row.distance == row.high == pytest.approx(np.sqrt(2) / 4)


def test_the_least_dose_that_keeps_the_score():
    doses = pd.DataFrame(
        [("early", 0.0, 0.0), ("early", 0.5, 1.0), ("early", 1.0, 1.0), ("late", 0.0, 0.0),
         ("late", 1.0, 0.5), ("never", 0.0, 0.0), ("never", 1.0, 0.0)],
        columns=["task", "dose", "score"],
    )  # fmt: skip
    kept = advise.doses_kept(doses)
    assert kept[["early", "late"]].tolist() == pytest.approx([0.45, 0.9])
    assert math.isnan(kept["never"])


# --- the round trip ---------------------------------------------------------------------------


def run(capsys, *argv):
    """Exit code, standard output, standard error."""
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_models_of_ones_own_are_advised_on_merged_and_run(
    tiny_base, tiny_adapters, checkpoint, probes, tmp_path, capsys, monkeypatch
):
    solved = tmp_path / "solved.jsonl"
    examples = [{"prompt": f"say {i}:", "answer": str(i % 2)} for i in range(4)]
    solved.write_text("\n".join(map(json.dumps, examples)))
    models, report = [*tiny_adapters[:2], checkpoint], tmp_path / "told.html"
    code, out, err = run(
        capsys, "advise", "--base", tiny_base, "--models", *models, "--probes", probes,
        "--report", report, "--labelled", f"tuned={solved}",
    )  # fmt: skip
    assert code == 0
    assert "4 passes over 24 probes and 20 labelled examples" in err
    told = json.loads(report.with_suffix(".json").read_text())
    assert [r["title"] for r in told["recommendations"]][:3] == ["all", "keep 2", "minimax"]
    assert {row["model"] for row in told["models"]} == {"task1", "task2", "tuned"}
    page, picture = report.read_text(), tmp_path / "told_distances.png"
    assert picture.is_file() and "data:image/png;base64" in page
    assert all(limit.split(":")[0] in out for limit in told["limits"])

    monkeypatch.chdir(tmp_path)
    for made in told["recommendations"]:
        assert made["command"] in out and len(made["models"]) >= 2
        code, _, err = run(capsys, *shlex.split(made["command"])[3:])
        assert code == 0, err
        folder = tmp_path / f"merged-{made['title'].replace(' ', '-')}"
        config = tmp_path / "config.yml"
        config.write_text(made["mergekit"])  # the same merge in mergekit's words
        merging.main(["--mergekit", str(config), "--out", str(tmp_path / "again")])
        ours, theirs = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
        assert all(torch.allclose(ours[x], theirs[x], atol=1e-6) for x in ours)
        shutil.rmtree(tmp_path / "again")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = evaluate.score(merged, tokenizer, advise.read_labelled(solved))
    assert np.isfinite(scores["nll"]).all()


def test_states_are_those_of_the_models_themselves(
    tiny_base, tiny_adapters, checkpoint, probes, capsys
):
    from peft import PeftModel

    texts = advise.read_probes([str(probes)])
    models = {"adapter": str(tiny_adapters[0]), "full": str(checkpoint)}
    reading = advise.read(str(tiny_base), models, texts)
    adapted = LlamaForCausalLM.from_pretrained(tiny_base)
    alone = [
        LlamaForCausalLM.from_pretrained(tiny_base),
        PeftModel.from_pretrained(adapted, tiny_adapters[0]).merge_and_unload(),
        LlamaForCausalLM.from_pretrained(checkpoint),
    ]
    encoded = [encode_prompt(tiny.byte_tokenizer(), text) for text in texts["text"]]
    for state, model in zip(reading.states, alone, strict=True):
        expected = hidden.prompt_states(model.eval(), encoded)[:, -1]
        np.testing.assert_allclose(state, expected, rtol=1e-3, atol=1e-5)
    base, _, full = (
        torch.cat([p.detach().flatten() for p in model.parameters()]) for model in alone
    )
    moved = (full - base).norm() / base.norm()
    assert reading.moved[1] == pytest.approx(float(moved), rel=1e-4)


def test_excluded_models_take_no_part_and_the_number_kept_is_checked(
    tiny_base, tiny_adapters, checkpoint, probes, tmp_path, capsys
):
    ask = ["advise", "--base", tiny_base, "--probes", probes, "--report", tmp_path / "x.html"]
    ask += ["--models", *tiny_adapters, checkpoint]
    code, _, err = run(capsys, *ask, "--keep", 9)
    assert code == 2 and "keep between 2 and 4" in err
    code, _, err = run(capsys, *ask, "--exclude", "nobody")
    assert code == 2 and "--exclude nobody" in err
    assert run(capsys, *ask, "--exclude", "tuned", "--keep", 2)[0] == 0
    told = json.loads((tmp_path / "x.json").read_text())
    assert set(told["sources"]) == {"task1", "task2", "task3"}
    assert [len(r["models"]) for r in told["recommendations"] if r["title"] == "keep 2"] == [2]


# --- honest limits ------------------------------------------------------------------------------


def test_limits_are_said(tiny_base, checkpoint, probes, tmp_path, capsys):
    stranger = tiny.save_base(tmp_path / "stranger", seed=9)  # same shape, never fine-tuned from it
    near = save_checkpoint(tmp_path / "near", tiny_base, seed=6)
    told = advise.advise(str(tiny_base), [str(stranger), str(checkpoint), str(near)], [str(probes)])
    assert any(x.startswith("stranger lies") for x in told.limits)
    assert not any(x.startswith(("tuned lies", "near lies")) for x in told.limits)
    assert any("LoRA adapters of one small model" in x for x in told.limits)
    assert "stranger lies" in advise.text(told)


def test_an_unstable_ranking_and_distances_out_of_range_are_said():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(4, 6, 8))  # three unrelated models, six probes
    doses = pd.DataFrame(columns=["task", "dose", "score"])
    reading = advise.Reading(["a", "b", "c"], states, np.full(3, 0.01), doses)
    measured = pd.DataFrame(
        {"task_a": list("pppqqr"), "task_b": list("qrsrss"), "hidden_sim_pool": [0.1, 0.2, 0.3] * 2}
    ).assign(method="ties", loss=[-10.0, -20, -30, -12, -21, -33])
    known = choose.Known(measured, pd.DataFrame(columns=["n", "method", "loss", "group"]),
                         ["toy"], "hidden_sim_pool")  # fmt: skip
    told = advise.advice(reading, ["x"] * 6, known, "base", {x: x for x in "abc"})
    limits = " ".join(told.limits)
    assert "ranking is not stable on 6 probes" in limits
    assert "3 of 3 distances lie outside what the studies saw (0.10 to 0.30)" in limits
    assert "4 calibration tasks are too few for prediction intervals" in limits


# --- refusals -----------------------------------------------------------------------------------


def nan_weights(folder, base):
    save_checkpoint(folder, base)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def renumbered(folder, base):
    save_checkpoint(folder, base)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    return folder


def other_digest(folder, base):
    tiny.save_adapter(folder, base, seed=8)
    (folder / "base.json").write_text(json.dumps({"name": "another", "digest": "0" * 64}))
    return folder


REFUSED = {
    "NaN": (nan_weights, "odd: model.norm.weight holds NaN"),
    "vocabulary": (renumbered, "odd has another vocabulary than the base"),
    "width": (lambda f, b: tiny.save_base(f, hidden_size=24), "in the base"),
    "layers": (lambda f, b: tiny.save_base(f, num_hidden_layers=3), "must hold the same tensors"),
    "tokens": (lambda f, b: tiny.save_base(f, vocab_size=300), "in the base (257, 16)"),
    "adapter of another base": (
        lambda f, b: tiny.save_adapter(f, tiny.save_base(f.parent / "wide", hidden_size=24), 1),
        "in the base",
    ),
    "adapter of a base of the same shape": (other_digest, "trained from another base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_merged_are_refused(
    case, tiny_base, tiny_adapters, probes, tmp_path, capsys
):
    make, message = REFUSED[case]
    odd = make(tmp_path / "odd", tiny_base)
    capsys.readouterr()
    code, out, err = run(
        capsys, "advise", "--base", tiny_base, "--models", tiny_adapters[0], odd, "--probes", probes
    )
    said = err.strip().splitlines()[-1]
    assert code == 2 and said.startswith("error: ") and message in said
    assert "passes" not in err  # before any long work


@pytest.mark.parametrize(
    "models, message",
    [
        (["{0}"], "two models or more, not 1"),
        (["{0}", "{0}"], "a model is given twice"),
        (["{0}", "no-such-model"], "there is no model 'no-such-model'"),
    ],
)
def test_lists_of_models_that_make_no_sense_are_refused(models, message, tiny_base, tiny_adapters):
    given = [model.format(tiny_adapters[0]) for model in models]
    with pytest.raises(ValueError, match=message):
        advise.advise(str(tiny_base), given)


def test_labelled_examples_of_nobody_are_refused(tiny_base, tiny_adapters, tmp_path, capsys):
    file = tmp_path / "solved.jsonl"
    file.write_text('{"prompt": "1", "answer": "2"}\n')
    ask = ["advise", "--base", tiny_base, "--models", *tiny_adapters, "--labelled"]
    code, _, err = run(capsys, *ask, f"nobody={file}")
    assert code == 2 and "labelled examples of nobody" in err
    code, _, err = run(capsys, *ask, "task1=missing.jsonl")
    assert code == 2 and "is not NAME=FILE" in err
