"""Visits: applied, recorded once by what was asked, resumed, and the base restored."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers import merge, store
from helpers.states import prompt_states
from helpers.states.batch import encode_input
from helpers.study import bench as benches
from helpers.study import deltas, identity, plan, readings, scores, specialists, visit
from helpers.study.bench import Bench
from helpers.study.plan import Row

RULES = {
    "linear": {},
    "task_arithmetic": {"weights": [0.5, 0.5]},
    "ties": {"density": 0.5},
}
TIES = {"ties": RULES["ties"]}


@pytest.fixture
def bench(tiny_base, tiny_adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    toys = {name: tiny.toy(name, 6, ("0", "1")) for name in "abc"}
    folders = dict(zip("abc", tiny_adapters, strict=True))
    base = {"name": "tiny", "digest": "0"}
    return Bench(model, tiny.byte_tokenizer(), base, toys, folders, batch_size=4)


def merged(bench, groups, rules, *about, **options):
    return visit.run(bench, plan.merges(groups, rules, *about, **options))


def nll(found) -> dict:
    return found.examples.groupby("task")["nll"].mean().to_dict()


def test_the_base_is_restored_bit_for_bit(bench):
    before = {name: p.clone() for name, p in bench.model.named_parameters()}
    merged(bench, ["ab"], RULES)
    after = dict(bench.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_visit_sees_the_merged_model(bench):
    """Scores and states are those of a model that was merged by hand and run alone."""
    (found,) = merged(bench, ["ab"], ["linear"])
    delta, _ = merge.merge(bench.rows("ab"), "linear", list("ab"))
    with torch.no_grad():
        for name, change in delta.items():
            bench.model.get_parameter(name).add_(change)
    rows = bench.tasks["a"].splits["test"]
    by_hand = scores.score(bench.model, bench.tokenizer, rows, batch_size=4)
    seen = found.examples[found.examples["task"] == "a"].drop(columns="task")
    pd.testing.assert_frame_equal(seen.reset_index(drop=True), by_hand, atol=1e-6)

    prompt = bench.tasks["b"].splits["probe"][2]["prompt"]
    ids = torch.tensor([bench.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        states = bench.model(ids, output_hidden_states=True).hidden_states
    expected = torch.stack([layer[0, -1] for layer in states])
    torch.testing.assert_close(found.states["b"][2], expected, atol=1e-5, rtol=1e-5)


def test_one_merge_under_two_names_is_read_once(bench, monkeypatch):
    scored = []
    score = scores.score
    monkeypatch.setattr(
        scores, "score", lambda *a, **k: scored.append(1) or score(*a, **k)
    )
    linear, halves, ties = merged(bench, ["ab"], RULES)
    assert halves.same_as == linear.key != halves.key
    assert linear.same_as is None and ties.same_as is None
    assert len(scored) == 4  # two tasks of two different models
    pd.testing.assert_frame_equal(linear.examples, halves.examples)
    assert all(torch.equal(linear.states[x], halves.states[x]) for x in "ab")


def test_nothing_finished_is_done_again(bench, monkeypatch):
    asked = (
        plan.base("abc", "ab")
        + plan.doses("abc", [0.0, 1.0])
        + plan.merges(["ab"], RULES)
    )
    asked += plan.solos(asked)
    assert not asked.keyed(bench.identity).done().any()
    first = visit.run(bench, asked)
    assert len(asked.keyed(bench.identity).left()) == 0
    for name in ("merge", "dose"):
        monkeypatch.setattr(merge, name, lambda *a, **k: pytest.fail("computed again"))
    monkeypatch.setattr(scores, "score", lambda *a, **k: pytest.fail("scored again"))
    again = visit.run(bench, asked)
    for one, two in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one.examples, two.examples)
        assert all(torch.equal(one.states[x], two.states[x]) for x in one.states)
        assert (one.key, one.same_as) == (two.key, two.same_as)


def test_a_lost_or_damaged_visit_is_repeated_with_the_same_numbers(bench, tmp_path):
    asked = plan.merges(["ab"], RULES)
    first = visit.run(bench, asked)
    frames = [one.examples for one in first]
    lost, cut = sorted((tmp_path / "scores").glob("[0-9a-f]*"))[:2]
    shutil.rmtree(lost)
    (cut / readings.EXAMPLES).write_text("id,correct\n")
    # what is damaged is found when it is read
    assert len(asked.keyed(bench.identity).left()) == 1
    with pytest.warns(UserWarning, match="was damaged"):
        again = visit.run(bench, asked)
    for frame, two in zip(frames, again, strict=True):
        pd.testing.assert_frame_equal(frame, two.examples)


def test_a_damaged_visit_is_never_scored_on_the_bare_base(bench, tmp_path):
    """The planted fault: all entries there, one cut short: the delta has to be applied for it."""
    (first,) = merged(bench, ["ab"], TIES)
    frame = first.examples
    for folder in (tmp_path / "scores").glob("[0-9a-f]*"):
        (folder / readings.EXAMPLES).write_text("id\n")
    with pytest.warns(UserWarning, match="was damaged"):
        (again,) = merged(bench, ["ab"], TIES)
    pd.testing.assert_frame_equal(frame, again.examples)


def test_doses_end_at_the_base_and_at_the_specialist(bench):
    base, _, zero, one = visit.run(bench, plan.base("a") + plan.doses("a", [0.0, 1.0]))
    assert zero.key == base.key
    pd.testing.assert_frame_equal(zero.examples, base.examples)
    delta = deltas.model(bench, one.row)[1]()
    tau = next(merge.stream(*bench.sources("a")))
    assert torch.equal(delta[tau.name], tau.taus[0])


def test_a_task_trained_twice_is_two_models_of_one_task(bench):
    recipe = specialists.Recipe(examples=4, epochs=1, batch_size=4, rank=4)
    first = benches.train(bench, "a", recipe)
    bench = replace(bench, specialists=bench.specialists | {"a": first})
    two = benches.twins(bench, "a")
    assert two.specialists["once"] == first
    assert specialists.recipe_of(two.specialists["twice"]) == replace(recipe, seed=1)
    own = plan.doses(["once", "twice"], probed=["once"])
    once, twice, average = visit.run(
        two, own + plan.merges([("once", "twice")], ["linear"])
    )
    (alone,) = visit.run(bench, plan.doses("a", probed="a"))
    assert torch.equal(once.states["once"], alone.states["a"])
    assert not torch.allclose(once.states["once"][:, -1], twice.states["once"][:, -1])
    assert set(average.examples["task"]) == {"once", "twice"}


def test_solo_needs_no_partner(bench):
    """What TIES does to a task whose partner changed nothing is what trimming alone does."""
    alone = visit.run(bench, plan.solos(plan.merges(["ab"], TIES)))[0]
    rows = [
        r._replace(taus=[r.taus[0], merge.zero(r.base.shape)]) for r in bench.rows("a")
    ]
    delta, _ = merge.merge(rows, "ties", list("ab"), density=0.5)
    with merge.applied(bench.model, delta):
        rows = bench.tasks["a"].splits["test"]
        expected = scores.score(bench.model, bench.tokenizer, rows, batch_size=4)
    np.testing.assert_allclose(alone.examples["nll"], expected["nll"], atol=1e-6)


# --- identity ------------------------------------------------------------------------------------


def keys_of(bench, made) -> list[str]:
    return list(made.keyed(bench.identity).frame["key"])


def test_keys_hold_what_was_asked(bench, tmp_path):
    def key(rule="ties", arm="default", seed=0, group="ab", of=bench, **options):
        row = Row("merge", tuple(group), rule, arm, seed, options, tuple(group))
        return of.identity.model_key(row)

    assert key("linear") == key("linear", weights=[1, 1]) == key("linear", scale=1.0)
    assert key("linear") != key("linear", scale=2.0)
    different = [key(), key(arm="norm"), key(seed=1), key(group="ba"), key(density=0.4)]
    different += [key("dare"), key("chebyshev"), key(group="ac")]
    assert len(set(different)) == len(different)
    other = replace(bench, base={"name": "tiny", "digest": "1"})
    assert key(of=other) != key()
    edited = tmp_path / "edited"
    shutil.copytree(bench.specialists["a"], edited)
    file = edited / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"lora_alpha": 99}), encoding="utf-8")
    other = replace(bench, specialists=bench.specialists | {"a": edited})
    assert key(of=other) != key() and key(of=other, group="bc") == key(group="bc")


def test_machines_that_round_otherwise_name_the_same_merge_alike(
    bench, tmp_path, monkeypatch
):
    """Two stores; specialists of equal recipes whose bits differ; batches of other sizes."""
    recipe = specialists.Recipe(examples=6, epochs=1, batch_size=3, rank=4)
    arms = [("ties", "norm"), ("ties", "dose")]
    asked = plan.doses("abc", [0.5, 1.0]) + plan.merges(
        ["abc"], ["ties", "chebyshev"], arms
    )
    asked += plan.solos(asked)
    made = {}
    train = specialists.train_lora

    def elsewhere(model, tokenizer, base, rows, recipe, folder, desc):
        log = train(model, tokenizer, base, rows, recipe, folder, desc)
        (file,) = folder.glob("*.safetensors")
        tensors = {name: x * (1 + 1e-5) for name, x in load_file(file).items()}
        save_file(tensors, file)
        return log

    for name, how, batch_size in (("here", train, 4), ("there", elsewhere, 3)):
        monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / name))
        monkeypatch.setattr(specialists, "train_lora", how)
        folders = {x: benches.train(bench, x, recipe) for x in "abc"}
        trained = replace(bench, specialists=folders, batch_size=batch_size)
        norm = visit.run(trained, asked)[8].report["norm"]
        made[name] = keys_of(trained, asked), [x.name for x in folders.values()], norm
        assert {"device", "threads", "torch"} <= set(
            store.seal(folders["a"])["machine"]
        )
    (keys, *_, here), (_, *_, there) = made.values()
    assert made["here"][:2] == made["there"][:2] and len(set(keys)) == len(asked)
    assert here != there and here == pytest.approx(there, rel=1e-3)


def test_scores_follow_the_examples_and_models_do_not(bench):
    (row,) = plan.merges(["ab"], ["linear"])
    longer = replace(bench, tasks=bench.tasks | {"a": tiny.toy("a", 5, ("0", "1"))})
    assert longer.identity.model_key(row) == bench.identity.model_key(row)
    for entry in ("score_entry", "state_entry"):
        for x in "ab":
            one, two = (
                store.key(*getattr(of.identity, entry)(row, x))
                for of in (bench, longer)
            )
            assert (one != two) == (x == "a")


# --- arms and weights ----------------------------------------------------------------------------


def test_arms_bring_rules_to_the_scale_of_the_average(bench):
    arms = [("ties", "norm"), ("ties", "dose"), ("ties", "sum")]
    asked = plan.merges(["abc"], {"linear": {}} | TIES, arms)
    la, ties, norm, dose, summed = visit.run(bench, asked)
    assert norm.report["norm"] == pytest.approx(la.report["norm"])
    assert dose.report["own_mean"] == pytest.approx(la.report["own_mean"])
    assert summed.report["norm"] == pytest.approx(3 * ties.report["norm"])
    # alone, the rule is run at the factor that matching gave the merge, not matched again
    alone = plan.solos(plan.merges(["abc"], TIES, [("ties", "norm")]))
    (row,) = (row for row in alone if row.arm == "norm" and row.tasks == ("a",))
    factor = norm.report["norm"] / ties.report["norm"]
    assert deltas.recipe(bench, row) == {
        "rule": "ties",
        "seed": 0,
        "density": 0.5,
        "scale": pytest.approx(factor),
    }


def test_a_matched_arm_needs_no_average_in_the_plan(bench):
    both = plan.merges(["ab"], TIES, [("ties", "norm")])
    arm = plan.Plan.of(row for row in both if row.arm == "norm")
    (norm,) = visit.run(bench, arm)
    (la,) = merged(bench, ["ab"], ["linear"])
    assert norm.report["norm"] == pytest.approx(la.report["norm"])


def test_another_mask_is_the_draw_of_the_next_seed(bench):
    arms = [("dare", "mask1")]
    first, mask = merged(bench, ["ab"], ["dare"], arms)
    (second,) = merged(bench, ["ab"], ["dare"], seed=1)
    assert nll(mask) == nll(second) != nll(first)
    alone = [
        plan.solos(plan.merges(["ab"], ["dare"], x, s)) for x, s in ((arms, 0), ((), 1))
    ]
    of_mask = plan.Plan.of(row for row in alone[0] if row.arm == "mask1")
    for one, two in zip(
        visit.run(bench, of_mask), visit.run(bench, alone[1]), strict=True
    ):
        pd.testing.assert_frame_equal(one.examples, two.examples)
    with pytest.raises(
        ValueError, match="ties drops nothing at random: it has no arm 'mask1'"
    ):
        merged(bench, ["ab"], ["ties"], [("ties", "mask1")])


def test_a_merge_on_a_grid_has_the_doses_that_are_left_there(bench):
    linear, grid = merged(bench, ["ab"], ["linear"], [("linear", "bfloat16")])
    delta, _ = merge.merge(bench.rows("ab"), "linear", list("ab"))
    base = bench.sources([])[0].tensors
    change, own = merge.rounded(base, bench.rows("ab"), delta)
    assert grid.report["own"] == own != linear.report["own"]
    assert grid.same_as is None and nll(grid) != nll(linear)
    for name, left in deltas.model(bench, grid.row)[1]().items():
        assert torch.equal(left, change[name])
        stored = base[name].detach() + left
        torch.testing.assert_close(
            stored, stored.bfloat16().float(), rtol=1e-6, atol=1e-8
        )


def test_states_are_read_where_they_are_wanted(bench):
    arms = [("linear", "norm")]
    silent, scaled = merged(bench, ["ab"], ["linear"], arms, probe=False)
    read, again = merged(bench, ["ab"], ["linear"], arms)
    assert silent.states == scaled.states == again.states == {} and set(
        read.states
    ) == {"a", "b"}
    pd.testing.assert_frame_equal(silent.examples, read.examples)


def test_chebyshev_weights_are_those_of_the_group_on_its_own_probes(bench, monkeypatch):
    """Three points of an obtuse triangle: the ball is that of the longest side."""
    place = {"a": 0.0, "b": 1.0, "c": 4.0}
    monkeypatch.setattr(readings, "read_all", lambda *a: None)
    monkeypatch.setattr(
        readings,
        "states",
        lambda bench, row, y: torch.full((2, 1, 3), place[row.tasks[0]]),
    )
    assert deltas.chebyshev_weights(bench, "abc") == pytest.approx(
        [0.5, 0, 0.5], abs=1e-9
    )
    assert deltas.chebyshev_weights(bench, "ab") == pytest.approx([0.5, 0.5])


def test_a_chebyshev_merge_is_the_linear_one_with_these_weights(bench):
    (found,) = merged(bench, ["abc"], ["chebyshev"])
    weights = deltas.chebyshev_weights(bench, "abc")
    assert found.report["ingredient"] == pytest.approx(weights)
    (by_hand,) = merged(bench, ["abc"], {"linear": {"weights": weights}})
    assert nll(found) == pytest.approx(nll(by_hand))


def test_what_results_cost_is_in_the_store(bench):
    found = visit.run(bench, plan.merges(["ab", "ac"], ["linear"]))
    table = visit.costs(found).set_index(["step", "models"])
    assert table["count"].to_dict() == {
        ("merge", 2): 2,
        ("scores", 0): 4,
        ("states", 0): 4,
    }
    assert (table[["seconds", "megabytes"]] > 0).all(axis=None)


# --- from one notebook to the next -------------------------------------------------------------


def test_a_bench_travels_between_notebooks(bench, tmp_path, monkeypatch):
    file = tmp_path / "run" / "bench.json"
    folders = {x: store.store() / "specialist" / x for x in "abc"}
    for folder in folders.values():
        folder.mkdir(parents=True)
    kept = replace(bench, specialists=folders)
    benches.save_bench(kept, {"sizes": [1, 1, 1, 1], "seed": 0, "sources": {}}, file)
    assert str(tmp_path) not in file.read_text()
    named = {f"toy:{x}": task for x, task in bench.tasks.items()}
    monkeypatch.setattr(
        benches, "load_tasks", lambda names, **_: {n[-1]: named[n] for n in names}
    )
    about = bench.model, bench.tokenizer
    opened = benches.open_bench(file, *about, bench.base)
    assert opened.specialists == folders and list(opened.tasks) == list("abc")
    with pytest.raises(ValueError, match="were made from tiny, not from other"):
        benches.open_bench(file, *about, {"name": "other", "digest": "1"})
    folders["b"].rmdir()
    with pytest.raises(
        ValueError, match="b are gone from the store: delete bench.json in run"
    ):
        benches.open_bench(file, *about, bench.base)
    with pytest.raises(ValueError, match="run notebook 01 with this profile"):
        benches.open_bench(tmp_path / "none.json", *about, bench.base)


# --- an encoder ------------------------------------------------------------------------------


@pytest.fixture
def encoders(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "store"))
    folder = tiny.save_encoder(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    toys = {
        "a": tiny.toy("a", 8, ("no", "yes")),
        "b": tiny.toy("b", 8, ("x", "y", "z")),
    }
    base = {"name": "tiny bert", "digest": "0"}
    bench = Bench(model, tiny.byte_tokenizer(), base, toys, {}, batch_size=4)
    recipe = specialists.Recipe(8, 6, 8, 0.01, rank=0)
    folders = visit.train(bench, dict.fromkeys("ab", recipe))
    return replace(bench, specialists=folders)


def test_an_encoder_is_visited_with_the_head_of_the_task(encoders):
    """At dose 1 the live base gives what the specialist's own folder gives, opened by itself."""
    before = {name: p.clone() for name, p in encoders.model.named_parameters()}
    for x, task in encoders.tasks.items():
        (found,) = visit.run(encoders, plan.doses(x, probed=x))
        alone = AutoModelForSequenceClassification.from_pretrained(
            encoders.specialists[x]
        )
        for i, row in enumerate(task.splits["test"]):
            ids = torch.tensor([encode_input(encoders.tokenizer, row["prompt"])])
            with torch.no_grad():
                logprobs = alone(ids).logits[0].log_softmax(0)
            label = alone.config.label2id[row["answers"][0]]
            assert found.examples["nll"][i] == pytest.approx(
                -float(logprobs[label]), abs=1e-4
            )
            assert found.examples["correct"][i] == (int(logprobs.argmax()) == label)
        prompts = [
            encode_input(encoders.tokenizer, p) for p in task.splits["probe"]["prompt"]
        ]
        expected = prompt_states(alone, prompts, "mean")
        torch.testing.assert_close(found.states[x], expected, atol=1e-5, rtol=1e-4)
    after = dict(encoders.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_heads_of_encoders_are_never_merged(encoders):
    rows = encoders.rows("ab")
    assert rows and all(row.name.startswith("bert.") for row in rows)
    found = merged(encoders, ["ab"], RULES)
    assert [x.same_as is None for x in found] == [True, False, True]
    assert all(x.examples["invalid"].isna().all() for x in found)
    assert all(np.isfinite(x.examples["nll"]).all() for x in found)
    zero, base = visit.run(encoders, plan.doses("a", [0.0]) + plan.base("a"))[:2]
    assert zero.key != base.key  # the specialist's head on the base's body, not a probe


def test_the_base_of_encoders_answers_through_a_linear_probe(encoders):
    base, ability = visit.run(encoders, plan.base("a"))
    assert base.examples["correct"].isin([0.0, 1.0]).all()
    pd.testing.assert_frame_equal(base.examples, ability.examples)


def test_the_probe_is_shown_a_few_examples_of_each_label(encoders, monkeypatch):
    monkeypatch.setattr(readings, "SHOTS", 2)
    task = encoders.tasks["b"]
    answers = [row["answers"][0] for row in task.splits["train"]]
    shown = readings._shown(task, ["x", "y", "z"])
    assert [row["answers"][0] for row in shown].count("x") == min(2, answers.count("x"))
    places = [task.splits["train"]["prompt"].index(row["prompt"]) for row in shown]
    assert places == sorted(places)


GOLDEN = json.loads((store.ROOT / "tests" / "golden.json").read_text())


def test_a_step_that_computes_something_else_has_a_new_version(bench):
    """Golden values beside VERSION: if one changes, raise VERSION and renew the value.

    The tolerance is rounding's between machines; a changed computation is far outside it.
    """
    (found,) = merged(bench, ["ab"], TIES)
    seen = {
        "study": identity.VERSION,
        "evaluate": scores.VERSION,
        "nll": found.examples["nll"].mean(),
        "states": float(found.states["a"].double().norm()),
        "effective_scale": found.report["effective_scale"],
    }
    assert seen == pytest.approx(GOLDEN["visit"], rel=1e-4)
