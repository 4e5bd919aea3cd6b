"""A trial against the merged model itself, made by other code, and what it must leave alone."""

from itertools import combinations

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

from helpers.advise import advise, page, sentence
from helpers.advise.merges import Merge, alone, retention
from helpers.advise.panel import open_panel
from helpers.advise.trials import applied, references, trial, try_pairs
from helpers.merge import blocks
from helpers.study.bench import Bench, load_base
from helpers.study.executor import executor

TOKENS = 2


@pytest.fixture(autouse=True)
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "store"))


def prompts(label, n=10):
    return [f"{label} {'word ' * (i % 4)}{i}:" for i in range(n)]


@pytest.fixture
def panel(tiny_base, tiny_adapters):
    models = {folder.name: str(folder) for folder in tiny_adapters}
    texts = {label: prompts(label) for label in models}
    return open_panel(str(tiny_base), models, texts, tokens=TOKENS)


def generated(model, panel, ids):
    """Greedy continuation of one prompt, unpadded, up to and with the end token."""
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=256
    )
    return out[0, len(ids) :].tolist()


def test_own_answers_are_what_the_model_generates(panel, tiny_base, tiny_adapters):
    base = LlamaForCausalLM.from_pretrained(tiny_base)
    model = PeftModel.from_pretrained(base, tiny_adapters[0]).merge_and_unload().eval()
    own = references(panel, "task1")["answer"]
    expected = [generated(model, panel, ids) for ids in panel.inputs["task1"]]
    assert own.tolist() == expected
    assert len({tuple(answer) for answer in expected}) > 1  # prompts are told apart


def test_retention_is_the_share_of_answers_that_the_merge_generates(
    panel, tiny_base, tiny_adapters
):
    base = LlamaForCausalLM.from_pretrained(tiny_base)
    model = PeftModel.from_pretrained(base, tiny_adapters[0], adapter_name="a")
    model.load_adapter(tiny_adapters[1], adapter_name="b")
    model.add_weighted_adapter(
        ["a", "b"], [0.5, 0.5], "average", combination_type="cat"
    )
    model.set_adapter("average")
    merged = model.merge_and_unload().eval()
    frame = trial(panel, Merge(("task1", "task2")))
    for label in ("task1", "task2"):
        own = references(panel, label)["answer"]
        ids = panel.inputs[label]
        same = [
            generated(merged, panel, prompt) == answer
            for prompt, answer in zip(ids, own, strict=True)
        ]
        kept = frame.loc[frame["model"] == label, "kept"]
        assert kept.astype(bool).tolist() == same
    assert 0 < frame["kept"].mean() < 1


def test_a_model_alone_keeps_everything_and_the_base_restores_bit_for_bit(panel):
    before = {name: p.clone() for name, p in panel.model.named_parameters()}
    row = retention(trial(panel, alone("task2", 1.0))).iloc[0]
    assert row["kept"] == 1 and row["rise"] == pytest.approx(0, abs=1e-5)
    assert row["dose"] == pytest.approx(1)
    with pytest.raises(RuntimeError), applied(panel, Merge(("task1", "task2"))):
        raise RuntimeError
    for name, parameter in panel.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_partner_that_undoes_a_model_is_noticed(panel):
    """Weights 1 and -1 of nearly one model: what a trial must not call kept."""
    frame = trial(panel, Merge(("task1", "task2"), "task_arithmetic", (0.0, 1.0)))
    table = retention(frame).set_index("model")
    assert table.loc["task2", "kept"] == 1
    assert table.loc["task1", "kept"] < 0.5 and table.loc["task1", "rise"] > 0


def test_trials_are_remembered_and_new_prompts_are_not_confused(panel, monkeypatch):
    first = trial(panel, Merge(("task1", "task3")))
    monkeypatch.setattr(blocks, "row_blocks", None)  # nothing may be merged again
    again = trial(panel, Merge(("task1", "task3")))
    assert again.equals(first)
    with pytest.raises(TypeError):
        trial(panel, Merge(("task1", "task3")), {"task1": slice(0, 4)})


def test_parts_are_parts(panel):
    merge = Merge(("task1", "task2"))
    whole = trial(panel, merge)
    part = trial(panel, merge, {"task1": slice(2, 6), "task2": slice(0, 3)})
    joined = whole.merge(part, on=["model", "prompt"], suffixes=("", "_part"))
    assert len(part) == len(joined) == 7
    assert (joined["kept"] == joined["kept_part"]).all()
    assert np.allclose(joined["rise"], joined["rise_part"], atol=1e-5)


def test_trials_of_a_study_are_those_of_its_adapters_whoever_makes_them(
    tiny_base, tiny_adapters, tmp_path, monkeypatch
):
    folders = {folder.name: folder for folder in tiny_adapters}
    toys = {label: tiny.toy(label, 10, ("0", "1")) for label in folders}
    bench = Bench(*load_base(str(tiny_base)), toys, folders)
    with executor(workers=2) as pool:
        shared = try_pairs(bench, list(combinations(folders, 2)), ["linear"], pool)
    assert set(shared["tasks"]) == set(combinations(folders, 2))
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "another"))
    texts = {label: task.splits["probe"]["prompt"] for label, task in toys.items()}
    models = {label: str(folder) for label, folder in folders.items()}
    panel = open_panel(str(tiny_base), models, texts)
    for pair in combinations(folders, 2):
        alone = trial(panel, Merge(pair))
        rows = shared[[tasks == pair for tasks in shared["tasks"]]]
        assert rows["task"].tolist() == alone["model"].tolist()
        assert rows["kept"].tolist() == alone["kept"].tolist()
        assert np.allclose(rows["rise"], alone["rise"], atol=1e-5)


def test_wilson_intervals_are_known_ones():
    import pandas as pd

    frame = pd.DataFrame(
        {"model": "a", "kept": [1.0] * 9 + [0.0], "rise": 0.0, "dose": 1.0}
    )
    # 9 of 10: R's prop.test(9, 10, correct = FALSE)
    row = retention(frame, 0.95).iloc[0]
    assert (row["low"], row["high"]) == pytest.approx((0.5958, 0.9821), abs=1e-4)


# --- encoders ------------------------------------------------------------------------------------


def save_classifier(folder, encoder, seed, labels):
    """`encoder` with moved weights below a head of its own, as transformers writes it."""
    config = BertConfig.from_pretrained(encoder, num_labels=labels)
    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(encoder, config=config)
    with torch.no_grad():
        for parameter in model.bert.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        model.classifier.weight.normal_()
    model.save_pretrained(folder)
    return folder


def test_an_encoder_is_tried_by_the_labels_of_each_models_own_head(tmp_path):
    encoder = tiny.save_encoder(tmp_path / "base")
    folders = {
        "two": save_classifier(tmp_path / "two", encoder, 1, 2),
        "three": save_classifier(tmp_path / "three", encoder, 2, 3),
    }
    texts = {label: prompts(label, 30) for label in folders}
    models = {label: str(folder) for label, folder in folders.items()}
    panel = open_panel(str(encoder), models, texts)
    frame = trial(panel, Merge(("two", "three")))
    states = [
        BertForSequenceClassification.from_pretrained(f) for f in folders.values()
    ]
    for model, label in zip(states, folders, strict=True):
        own = _labels(model, panel.inputs[label])
        with torch.no_grad():
            for name, parameter in model.bert.named_parameters():
                both = [dict(m.bert.named_parameters())[name] for m in states]
                parameter.copy_(sum(both) / 2 if label == "two" else parameter)
        if label == "two":
            same = _labels(model, panel.inputs[label]) == own
            assert (
                frame.loc[frame["model"] == label, "kept"].astype(bool).tolist()
                == same.tolist()
            )
            break
    assert retention(trial(panel, alone("three", 1.0)))["kept"].item() == 1
    assert 0 < frame["kept"].mean() < 1


def test_encoders_are_advised_on_from_prompts_to_page(tmp_path):
    encoder = tiny.save_encoder(tmp_path / "base")
    folders = [
        save_classifier(tmp_path / name, encoder, i, 2)
        for i, name in enumerate("ab", 1)
    ]
    models = {folder.name: str(folder) for folder in folders}
    texts = {label: prompts(label, 40) for label in models}
    advice = advise(str(encoder), models, texts, keep=0.5)
    assert set(advice.cells["victim"]) == {"a", "b"}
    assert advice.trials["prompts"].eq(10).all()  # a quarter of them choose
    assert sentence(advice) in page(advice)
    assert advice.pairs["hidden_sim"].notna().all()


def _labels(model, encoded):
    with torch.no_grad():
        rows = [
            model.eval()(torch.tensor([ids])).logits[0].argmax().item()
            for ids in encoded
        ]
    return np.array(rows)
