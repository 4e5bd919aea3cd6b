"""Visits: applied, recorded once by content, resumed, and the base restored."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers import merge as merging
from helpers.states import batch
from helpers.states import measures as hidden
from helpers.study import old as study
from helpers.study import scores as evaluate
from helpers.study import specialists

RECIPES = {
    "linear": {"method": "linear"},
    "halves": {"method": "task_arithmetic", "weights": [0.5, 0.5]},
    "ties": {"method": "ties", "density": 0.5},
}


@pytest.fixture
def bench(tiny_base, tiny_adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    toys = {name: tiny.toy(name, 6, ("0", "1")) for name in "abc"}
    folders = dict(zip("abc", tiny_adapters, strict=True))
    base = {"name": "tiny", "digest": "0"}
    return study.Bench(model, tiny.byte_tokenizer(), base, toys, folders, batch_size=4)


def test_the_base_is_restored_bit_for_bit(bench):
    before = {name: p.clone() for name, p in bench.model.named_parameters()}
    study.merge_group(bench, "ab", RECIPES)
    after = dict(bench.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_visit_sees_the_merged_model(bench):
    """Scores and states are those of a model that was merged by hand and run alone."""
    (merged,) = study.merge_group(bench, "ab", {"linear": RECIPES["linear"]})
    delta, _ = merging.merge(bench.rows("ab"), "linear", list("ab"))
    with torch.no_grad():
        for name, change in delta.items():
            bench.model.get_parameter(name).add_(change)
    rows = bench.tasks["a"].splits["test"]
    by_hand = evaluate.score(bench.model, bench.tokenizer, rows, batch_size=4)
    mine = merged.examples[merged.examples["task"] == "a"].drop(columns="task")
    pd.testing.assert_frame_equal(mine.reset_index(drop=True), by_hand, atol=1e-6)

    prompt = bench.tasks["b"].splits["probe"][2]["prompt"]
    ids = torch.tensor([bench.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        states = bench.model(ids, output_hidden_states=True).hidden_states
    expected = torch.stack([layer[0, -1] for layer in states])
    torch.testing.assert_close(merged.states["b"][2], expected, atol=1e-5, rtol=1e-5)


def test_one_merge_under_two_names_is_visited_once(bench):
    linear, halves, ties = study.merge_group(bench, "ab", RECIPES)
    assert halves.same_as == "linear" and linear.same_as is None and ties.same_as is None
    assert halves.examples is linear.examples


def test_nothing_finished_is_done_again(bench, monkeypatch):
    first = study.merge_group(bench, "ab", RECIPES)
    curves = study.dose_curves(bench, [0.0, 1.0])
    for name in ("merge", "dose"):
        monkeypatch.setattr(merging, name, lambda *a, **k: pytest.fail("computed again"))
    monkeypatch.setattr(evaluate, "score", lambda *a, **k: pytest.fail("scored again"))
    again = study.merge_group(bench, "ab", RECIPES)
    for one, two in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one.examples, two.examples)
        assert all(torch.equal(one.states[x], two.states[x]) for x in "ab")
    pd.testing.assert_frame_equal(curves, study.dose_curves(bench, [0.0, 1.0]))


def test_a_lost_visit_is_repeated_with_the_same_numbers(bench, tmp_path):
    first = study.merge_group(bench, "ab", RECIPES)
    lost = next((tmp_path / "scores").glob("[0-9a-f]*"))
    for file in lost.iterdir():
        file.unlink()
    lost.rmdir()
    again = study.merge_group(bench, "ab", RECIPES)
    for one, two in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one.examples, two.examples)


def test_committed_scores_are_taken_for_the_same_merges_only(bench, tmp_path, monkeypatch):
    """A store is lost, the tables are not; of two merges a dose or the examples differ there."""
    rules = {name: {"method": name} for name in ("linear", "ties", "dare")}
    arms = [("dare", "mask1"), ("linear", "bfloat16"), ("ties", "norm")]
    first = study.merge_all(bench, "ab", rules, arms)
    losses = study.loss_table(bench, first, study.dose_curves(bench, [0.0, 1.0]))
    examples = pd.concat(m.examples.assign(merge=m.name) for m in first)
    examples = examples.drop(columns="option_correct").rename(columns={"id": "example"})
    wrong = (losses["merge"] == "a+b|ties") & (losses["task"] == "b")
    losses.loc[wrong, "dose_own"] *= 1 + 2 * study.SAME_DOSE
    losses.loc[~wrong, "dose_own"] *= 1 + 1e-5  # a processor that rounds otherwise
    examples.loc[examples["merge"] == "a+b|dare|mask1", "example"] += "x"
    tables = tmp_path / "tables"
    tables.mkdir()
    losses.to_csv(tables / "losses.csv", index=False)
    examples.to_csv(tables / "examples.csv.gz", index=False)
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "new"))
    left = ["a+b|linear", "a+b|dare", "a+b|linear|bfloat16", "a+b|ties|norm"]
    again = [study.take(bench, "ab", rules, arms, tables) for _ in range(2)]
    assert [list(taken) for taken in again] == [left, left]
    assert all(apart == pytest.approx(1e-5, rel=1e-3) for apart in again[0].values())
    assert study.take(bench, "ac", rules, arms, tables) == {}

    scored = []
    score = evaluate.score
    monkeypatch.setattr(evaluate, "score", lambda *a: scored.append(1) or score(*a))
    again = study.merge_all(bench, "ab", rules, arms)
    assert len(scored) == 4  # two tasks of the two merges that were not the same
    for one, two in zip(first, again, strict=True):
        seen, told = (m.examples.drop(columns="option_correct") for m in (one, two))
        pd.testing.assert_frame_equal(seen, told, atol=1e-6)
        assert all(torch.equal(one.states[x], two.states[x]) for x in one.states)


def test_specialists_of_another_seed_are_told_from_those_rounded_otherwise(bench, tmp_path):
    """The planted fault: one of two tasks was trained otherwise at its last step."""
    logs = {"a": [2.0, 1.0], "b": [3.0, 0.5]}
    folders = {label: tmp_path / "trained" / label for label in logs}
    for label, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / "training.json").write_text(json.dumps({"loss": logs[label]}))
    bench = replace(bench, specialists=bench.specialists | folders)

    def told(**losses) -> float:
        rows = [(x, i, y) for x, curve in losses.items() for i, y in enumerate(curve)]
        table = pd.DataFrame(rows, columns=["task", "step", "loss"])
        table.to_csv(tmp_path / "training.csv", index=False)
        return study.same_training(bench, tmp_path)

    assert told(a=[2.0, 1.0003], b=[3.0, 0.5], z=[9.0]) == pytest.approx(3e-4)
    with pytest.raises(ValueError, match="the specialists of b are not those of"):
        told(a=[2.0, 1.0], b=[3.0, 0.55])
    with pytest.raises(ValueError, match="the specialists of a are not those of"):
        told(a=[2.0], b=[3.0, 0.5])  # trained for another number of steps
    with pytest.raises(ValueError, match="none of the tasks a, b, c"):
        told(z=[9.0])


def test_doses_end_at_the_base_and_at_the_specialist(bench):
    base = study.at_base(bench)[0].query("task == 'a'").reset_index(drop=True)
    pd.testing.assert_frame_equal(study.at_dose(bench, "a", 0.0)[0], base, atol=1e-6)
    _, delta = study.delta_at(bench, "a", 1.0)
    tau = next(merging.stream(*bench.sources("a")))
    assert torch.equal(delta()[tau.name], tau.taus[0])


def test_a_task_trained_twice_is_two_models_of_one_task(bench, monkeypatch):
    recipe = specialists.Recipe(examples=4, epochs=1, batch_size=4, rank=4)
    first = specialists.train(
        bench.model, bench.tokenizer, bench.base, bench.tasks["a"], recipe, quiet=True
    )
    bench = replace(bench, specialists=bench.specialists | {"a": first})
    two, (once, twice), loss = study.trained_twice(bench, "a")
    assert two.specialists["once"] == first
    assert specialists.recipe_of(two.specialists["twice"]) == replace(recipe, seed=1)
    assert {task.name for task in two.tasks.values()} == {bench.tasks["a"].name}
    own = study.at_dose(bench, "a", 1.0, ["a"])[1]["a"].double().numpy()
    np.testing.assert_array_equal(once, own)
    assert once.shape == twice.shape and not np.allclose(once[:, -1], twice[:, -1])
    assert math.isnan(loss)  # a tiny random model scores 0: nothing to lose
    monkeypatch.setattr(study, "_scores", lambda *a, f=study._scores: f(*a).assign(correct=0.5))
    assert study.trained_twice(bench, "a")[2] == 0


def test_solo_needs_no_partner(bench):
    """What TIES does to a task whose partner changed nothing is what trimming alone does."""
    alone = study.at_solo(bench, "a", 2, RECIPES["ties"])
    rows = [r._replace(taus=[r.taus[0], merging.zero(r.base.shape)]) for r in bench.rows("a")]
    delta, _ = merging.merge(rows, "ties", list("ab"), density=0.5)
    with merging.applied(bench.model, delta):
        rows = bench.tasks["a"].splits["test"]
        expected = evaluate.score(bench.model, bench.tokenizer, rows, batch_size=4)
    np.testing.assert_allclose(alone["nll"], expected["nll"], atol=1e-6)


def test_the_parts_of_a_loss_add_up_to_it(bench, monkeypatch):
    doses = study.dose_curves(bench, [0.0, 0.5, 1.0, 1.5])
    # a tiny random model scores 0 everywhere: give every visit a score that its NLL decides
    doses["score"] = np.exp(-doses["nll"])
    monkeypatch.setattr(
        study, "_scores", lambda *a, f=study._scores: f(*a).assign(correct=lambda d: np.exp(-d.nll))
    )
    merged = study.merge_group(bench, "ab", RECIPES)
    table = study.loss_table(bench, merged, doses)
    assert len(table) == 6
    parts = table[["dilution", "overlap", "interference"]].sum(axis=1)
    np.testing.assert_allclose(parts, table["loss"])
    by_method = table.set_index(["method", "task"])
    assert (by_method.loc["linear", "dose_ingredient"] == 0.5).all()
    assert by_method["control_solo"].notna().groupby("method").all().to_dict() == {
        "linear": False, "halves": False, "ties": True,
    }  # fmt: skip
    assert by_method["nll_solo"].notna().equals(by_method["control_solo"].notna())
    for x in "ab":
        alone = study.at_solo(bench, x, 2, RECIPES["ties"])
        assert by_method.loc[("ties", x), "nll_solo"] == pytest.approx(alone["nll"].mean())
    ratio = by_method["control_solo"] / by_method["specialist"]
    np.testing.assert_allclose(by_method["solo"], 100 * (ratio - 1))


@pytest.mark.parametrize(("alone", "floor"), [(0.05, True), (0.5, False), (np.nan, False)])
def test_the_floor_of_a_rule_with_a_solo_run_is_read_off_that_run(bench, monkeypatch, alone, floor):
    doses = pd.DataFrame([{"task": x, "dose": d, "score": 0.0} for x in "ab" for d in (0.0, 9.0)])
    known = {"specialist": 1.0, "base": 0.0, "chance": 0.0}
    known = pd.DataFrame([{"task": x} | known for x in "ab"])
    monkeypatch.setattr(study, "references", lambda bench: known)
    monkeypatch.setattr(study, "at_solo", lambda *a: pd.DataFrame({"correct": [alone], "nll": 1.0}))
    merged = study.merge_group(bench, "ab", RECIPES)
    table = study.loss_table(bench, merged, doses).set_index("method")
    assert (table.loc["ties", "floor"] == floor).all() and table.loc["linear", "floor"].all()


def test_what_decides_a_merge_is_in_its_key(bench, tmp_path):
    def key(recipe):
        return study._merge_key(bench, "ab", "ab", recipe, 0)

    assert key({"method": "linear"}) == key({"method": "linear", "weights": [1, 1]})
    assert key({"method": "ties"}) != key({"method": "ties", "match": "norm"})
    assert key({"method": "linear"}) != key({"method": "linear", "scale": 2.0})
    before, config = key(RECIPES["ties"]), bench.specialists["a"] / "adapter_config.json"
    assert before != key({"method": "ties"}) and before != key({"method": "ties", "density": 0.4})
    edited = tmp_path / "edited"
    shutil.copytree(config.parent, edited)
    settings = json.loads(config.read_text(encoding="utf-8"))
    (edited / config.name).write_text(json.dumps(settings | {"lora_alpha": 99}), encoding="utf-8")
    other = replace(bench, specialists=bench.specialists | {"a": edited})
    assert before != study._merge_key(other, "ab", "ab", RECIPES["ties"], 0)


def test_a_bench_travels_between_notebooks(bench, tmp_path):
    file = tmp_path / "run" / "bench.json"
    folders = {x: study.records.store() / "specialist" / x for x in "abc"}
    for folder in folders.values():
        folder.mkdir(parents=True)
    kept = replace(bench, specialists=folders)
    study.save_bench(kept, {"sizes": [1, 1, 1, 1], "seed": 0, "sources": {}}, file)
    assert str(tmp_path) not in file.read_text()
    with pytest.MonkeyPatch.context() as patch:
        named = {f"toy:{x}": task for x, task in bench.tasks.items()}
        patch.setattr(study, "load_tasks", lambda names, **_: {n[-1]: named[n] for n in names})
        opened = study.open_bench(file, bench.model, bench.tokenizer, bench.base)
        assert opened.specialists == folders and list(opened.tasks) == list("abc")
        with pytest.raises(ValueError, match="were made from tiny, not from other"):
            study.open_bench(file, bench.model, bench.tokenizer, {"name": "other", "digest": "1"})
        folders["b"].rmdir()
        with pytest.raises(ValueError, match="b are gone from the store: delete bench.json in run"):
            study.open_bench(file, bench.model, bench.tokenizer, bench.base)
    with pytest.raises(ValueError, match="run notebook 01 with this profile"):
        study.open_bench(tmp_path / "none.json", bench.model, bench.tokenizer, bench.base)


def test_a_sample_of_groups_is_seeded_and_grows():
    labels = list("abcdefg")
    assert study.draw_groups(labels, 2, 21) == study.draw_groups(labels, 2, 99)
    assert len(study.draw_groups(labels, 2, 21)) == 21
    few, more = (study.draw_groups(labels, 4, n, seed=3) for n in (5, 9))
    assert len(few) == 5 and set(few) < set(more)
    assert all(list(group) == sorted(set(group)) for group in more)
    assert few != study.draw_groups(labels, 4, 5, seed=4)


def test_swaps_put_one_newcomer_in_the_place_of_each_member():
    labels, group = list("abcdefg"), ("b", "d", "g")
    swaps = study.draw_swaps(labels, group, seed=3)
    assert [leaves for leaves, _, _ in swaps] == list(group)
    (enters,) = {enters for _, enters, _ in swaps}
    assert enters in "acef" and swaps == study.draw_swaps(labels, group, seed=3)
    assert all(new == tuple(sorted({*group, enters} - {x})) for x, _, new in swaps)
    assert len({study.draw_swaps(labels, group, seed)[0][1] for seed in range(20)}) > 1
    with pytest.raises(ValueError, match="no newcomer"):
        study.draw_swaps(labels, labels)


def test_a_swap_is_worth_what_the_swapped_group_loses(bench, monkeypatch):
    """Losses are read off merges that are made by hand here; a group without outsiders has none."""
    monkeypatch.setattr(study, "merging_loss", lambda merged, own: 100 * (merged - own))
    rules = {name: {"method": name} for name in ("linear", "ties")}
    both = study.swap_losses(bench, ["ab", "bc"], rules, seed=1)
    assert list(both["method"]) == ["linear"] * 4 + ["ties"] * 4
    own = {x: study.at_dose(bench, x, 1.0)[0]["correct"].mean() for x in "abc"}
    for rule, found in both.groupby("method"):
        assert list(found["group"]) == ["a+b"] * 2 + ["b+c"] * 2 and set(found["n"]) == {2}
        assert list(found["swapped"]) == ["b+c", "a+c", "a+c", "a+b"]
        assert list(found["enters"]) == ["c", "c", "a", "a"]
        for pair in ("ab", "ac", "bc"):
            (merged,) = study.merge_group(bench, pair, {rule: rules[rule]})
            score = merged.examples.groupby("task")["correct"].mean()
            loss = 100 * (score - pd.Series(own)[list(pair)]).mean()
            name = "+".join(pair)
            told = [*found.loc[found["group"] == name, "before"]]
            told += [*found.loc[found["swapped"] == name, "after"]]
            assert told and np.allclose(told, loss)
    assert study.swap_losses(bench, [], rules).empty


def test_chebyshev_weights_are_those_of_the_group_on_its_own_probes():
    """Three points of an obtuse triangle: the ball is that of the longest side."""
    owner, models = list("aabbcc"), ["base", *"abc"]
    place = np.array([9.0, 0, 1, 4])  # on a line
    d2x = np.repeat((place[:, None] - place)[..., None] ** 2, 6, axis=2)
    d2x[:, :, 4:] += 100 * (1 - np.eye(4))[..., None]  # the probes of c say otherwise
    assert study.chebyshev_weights(d2x, models, owner, "ab") == pytest.approx([0.5, 0.5])
    weights = study.chebyshev_weights(d2x[..., :4], models, owner[:4], "abc")
    assert weights == pytest.approx([0.5, 0, 0.5], abs=1e-9)


def test_arms_bring_rules_to_the_scale_of_the_average(bench):
    (la, ties) = study.merge_group(bench, "abc", {x: RECIPES[x] for x in ("linear", "ties")})
    recipes = {arm: study.in_arm(ties.recipe, arm, la.report, 3) for arm in ("norm", "dose", "sum")}
    norm, dose, summed = (
        study.merge_group(bench, "abc", {"ties": recipe}, arm=arm)[0]
        for arm, recipe in recipes.items()
    )
    assert norm.report["norm"] == pytest.approx(la.report["norm"])
    assert dose.report["own_mean"] == pytest.approx(la.report["own_mean"])
    assert summed.report["norm"] == pytest.approx(3 * ties.report["norm"])
    assert [norm.name, ties.name] == ["a+b+c|ties|norm", "a+b+c|ties"]
    doses = study.dose_curves(bench, [0.0, 1.0])
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        solo = study.at_solo
        patch.setattr(
            study, "at_solo", lambda b, x, n, r, s: asked.append(r) or solo(b, x, n, r, s)
        )
        table = study.loss_table(bench, [norm], doses)
    assert set(table["arm"]) == {"norm"}
    # alone, the rule is run at the factor that matching gave the merge, not matched again
    factor = norm.report["norm"] / ties.report["norm"]
    assert all("match" not in r and r["scale"] == round(factor, 2) for r in asked)
    with pytest.raises(ValueError, match="unknown arm 'length': choose one of norm, dose, sum"):
        study.in_arm(ties.recipe, "length", la.report, 3)


def test_another_mask_is_the_draw_of_the_next_seed(bench):
    dare = {"method": "dare"}
    first, next_seed = (study.merge_group(bench, "ab", {"dare": dare}, seed)[0] for seed in (0, 1))
    recipe = study.in_arm(dare, "mask1", {}, 2)
    (again,) = study.merge_group(bench, "ab", {"dare": recipe}, 0, "mask1")
    assert again.report["digest"] == next_seed.report["digest"] != first.report["digest"]
    alone = [study.at_solo(bench, "a", 2, of, seed) for of, seed in ((recipe, 0), (dare, 1))]
    pd.testing.assert_frame_equal(*alone)
    with pytest.raises(ValueError, match="ties drops nothing at random: it has no arm 'mask1'"):
        study.in_arm({"method": "ties"}, "mask1", {}, 2)


def test_a_merge_on_a_grid_has_the_doses_that_are_left_there(bench):
    recipe = study.in_arm(RECIPES["linear"], "bfloat16", {}, 2)
    report, make = study._merge(bench, "ab", recipe, 0)
    delta, _ = merging.merge(bench.rows("ab"), "linear", list("ab"))
    base = bench.sources([])[0].tensors
    change, own = merging.rounded(base, bench.rows("ab"), delta)
    assert report["own"] == own and report["digest"] == merging.delta_digest(change)
    assert report["digest"] != study._merge(bench, "ab", RECIPES["linear"], 0)[0]["digest"]
    for name, left in make().items():
        stored = base[name].detach() + left
        torch.testing.assert_close(stored, stored.bfloat16().float(), rtol=1e-6, atol=1e-8)


def test_states_are_read_where_they_are_wanted(bench):
    linear = {"linear": RECIPES["linear"]}
    (silent,) = study.merge_group(bench, "ab", linear, probe=False)
    (scaled,) = study.merge_group(bench, "ab", linear, arm="norm")
    (read,) = study.merge_group(bench, "ab", linear)
    assert silent.states == scaled.states == {} and set(read.states) == {"a", "b"}
    pd.testing.assert_frame_equal(silent.examples, read.examples)


def test_pairs_of_nearly_one_scale_share_a_run_without_partners(bench, monkeypatch):
    asked = []
    solo = study.at_solo
    monkeypatch.setattr(study, "at_solo", lambda *a: asked.append(a[3]["scale"]) or solo(*a))
    recipes = {str(scale): RECIPES["ties"] | {"scale": scale} for scale in (0.701, 0.699)}
    merged = study.merge_group(bench, "ab", recipes)
    study.loss_table(bench, merged, study.dose_curves(bench, [0.0, 1.0]))
    assert asked == [0.7] * 4


def test_a_segment_leads_from_one_specialist_to_the_other(bench):
    line = study.segment(bench, ("a", "b"), [0.0, 0.5, 1.0]).set_index(["alpha", "task"])["nll"]
    assert line[0.0, "a"] == pytest.approx(study.at_dose(bench, "a", 1.0)[0]["nll"].mean())
    assert line[1.0, "b"] == pytest.approx(study.at_dose(bench, "b", 1.0)[0]["nll"].mean())
    (middle,) = study.merge_group(bench, "ab", {"linear": RECIPES["linear"]})
    there = middle.examples.groupby("task")["nll"].mean()
    assert line[0.5].to_dict() == pytest.approx(there.to_dict())


# --- an encoder ------------------------------------------------------------------------------


@pytest.fixture
def encoders(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "store"))
    folder = tiny.save_encoder(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    toys = {"a": tiny.toy("a", 8, ("no", "yes")), "b": tiny.toy("b", 8, ("x", "y", "z"))}
    tokenizer, base = tiny.byte_tokenizer(), {"name": "tiny bert", "digest": "0"}
    recipe = specialists.Recipe(8, 6, 8, 0.01, rank=0)
    folders = {
        x: specialists.train(model, tokenizer, base, task, recipe, quiet=True)
        for x, task in toys.items()
    }
    return study.Bench(model, tokenizer, base, toys, folders, batch_size=4)


def test_an_encoder_is_visited_with_the_head_of_the_task(encoders):
    """At dose 1 the live base gives what the specialist's own folder gives, opened by itself."""
    before = {name: p.clone() for name, p in encoders.model.named_parameters()}
    for x, task in encoders.tasks.items():
        seen, states = study.at_dose(encoders, x, 1.0, [x])
        alone = AutoModelForSequenceClassification.from_pretrained(encoders.specialists[x])
        for i, row in enumerate(task.splits["test"]):
            ids = torch.tensor([batch.encode_input(encoders.tokenizer, row["prompt"])])
            with torch.no_grad():
                logprobs = alone(ids).logits[0].log_softmax(0)
            label = alone.config.label2id[row["answers"][0]]
            assert seen["nll"][i] == pytest.approx(-float(logprobs[label]), abs=1e-4)
            assert seen["correct"][i] == (int(logprobs.argmax()) == label)
        prompts = [
            batch.encode_input(encoders.tokenizer, p) for p in task.splits["probe"]["prompt"]
        ]
        expected = hidden.prompt_states(alone, prompts, "mean")
        torch.testing.assert_close(states[x], expected, atol=1e-5, rtol=1e-4)
    after = dict(encoders.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_heads_of_encoders_are_never_merged(encoders):
    rows = encoders.rows("ab")
    assert rows and all(row.name.startswith("bert.") for row in rows)
    merged = study.merge_group(encoders, "ab", RECIPES)
    assert [m.same_as for m in merged] == [None, "linear", None]
    doses = study.dose_curves(encoders, [0.0, 0.5, 1.0, 1.5])
    table = study.loss_table(encoders, merged, doses).set_index(["method", "task"])
    defined = table["loss"].notna()
    parts = table.loc[defined, ["dilution", "overlap", "interference"]].sum(axis=1)
    np.testing.assert_allclose(parts, table.loc[defined, "loss"], atol=1e-9)
    assert table.loc["ties", "control_solo"].notna().all() and table["invalid"].isna().all()
    assert np.isfinite(table["nll"]).all() and np.isfinite(table["nll_base"]).all()
    line = study.segment(encoders, ("a", "b"), [0.0, 1.0])
    assert line["score"].between(0, 1).all()


def test_the_base_of_encoders_answers_through_a_linear_probe(encoders):
    probed, _ = study.at_base(encoders, ["a"])
    assert set(probed["task"]) == {"a", "b"} and probed["correct"].isin([0.0, 1.0]).all()
    own = study.base_ability(encoders, "a")
    pd.testing.assert_frame_equal(own.assign(task="a"), probed[probed["task"] == "a"])


def test_the_probe_is_shown_a_few_examples_of_each_label(encoders, monkeypatch):
    monkeypatch.setattr(study, "SHOTS", 2)
    task = encoders.tasks["b"]
    answers = [row["answers"][0] for row in task.splits["train"]]
    shown = study._shown(task, ["x", "y", "z"])
    assert [row["answers"][0] for row in shown].count("x") == min(2, answers.count("x"))
    places = [task.splits["train"]["prompt"].index(row["prompt"]) for row in shown]
    assert places == sorted(places)
    fitted = []
    probe = evaluate.linear_probe
    monkeypatch.setattr(
        evaluate,
        "linear_probe",
        lambda known, *rest: fitted.append(len(known)) or probe(known, *rest),
    )
    study.base_ability(encoders, "b")
    assert fitted == [len(shown)]


GOLDEN = json.loads((study.records.ROOT / "tests" / "golden.json").read_text())


def test_a_step_that_computes_something_else_has_a_new_version(bench):
    """Golden values beside VERSION: if one changes, raise VERSION and renew the value.

    The tolerance is rounding's between machines; a changed computation is far outside it.
    """
    (merged,) = study.merge_group(bench, "ab", {"ties": RECIPES["ties"]})
    seen = {
        "study": study.VERSION,
        "evaluate": evaluate.VERSION,
        "nll": merged.examples["nll"].mean(),
        "states": float(merged.states["a"].double().norm()),
        "effective_scale": merged.report["effective_scale"],
    }
    assert seen == pytest.approx(GOLDEN["visit"], rel=1e-4)
