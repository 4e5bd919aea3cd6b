"""From visits to tables: what a loss is made of, and the files that other notebooks read."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from helpers import store
from helpers.study import (
    design,
    frames,
    geometry,
    losses,
    plan,
    schema,
    scores,
    tasks,
    visit,
)
from helpers.study.bench import Bench

GIVEN = {
    "RULES": ["linear", "task_arithmetic", "ties"],
    "GROUP_RULES": ["chebyshev"],
    "ARMS": [["ties", "norm"], ["chebyshev", "sum"]],
    "PAIRS": 3,
    "PARTNERS": 0,
    "STAGES": [],
    "RELATIVES": False,
    "CROSS": True,
    "GROUP_SIZES": [3],
    "GROUPS_PER_SIZE": 1,
    "GROUP_DOSE": 0.0,
    "SWAPS": 0,
    "SWAP_RULES": ["linear"],
    "GROUP_SEED": 0,
    "DOSES": [0.0, 0.5, 1.0, 1.5],
    "SEED": 0,
}


@pytest.fixture(scope="module")
def study(tiny_base, tiny_adapters, tmp_path_factory):
    """A tiny study: its bench and visits. A tiny model is never right: its NLL gives the score."""
    score = scores.score

    def graded(*about, **options):
        return score(*about, **options).assign(
            correct=lambda frame: np.exp(-frame["nll"])
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path_factory.mktemp("store")))
        patch.setattr(scores, "score", graded)
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        toys = {name: tiny.toy(name, 6, ("0", "1")) for name in "abc"}
        folders = dict(zip("abc", tiny_adapters, strict=True))
        base = {"name": "tiny", "digest": "0"}
        bench = Bench(model, tiny.byte_tokenizer(), base, toys, folders, batch_size=4)
        families = dict(zip("abc", "abc", strict=True))
        drawn = design.drawn("abc", families, GIVEN)
        visits = visit.run(bench, design.visits("abc", drawn, GIVEN))
        visits += visit.run(bench, plan.solos(visit.distinct(visits)))
        yield bench, visits


@pytest.fixture
def table(study):
    bench, visits = study
    references = frames.references(visits, bench.tasks)
    collisions = tasks.collisions(bench.tasks)
    cells = frames.cells(visits, collisions)
    return losses.loss_table(cells, references, frames.doses(visits))


def test_the_parts_of_a_loss_add_up_to_it(study, table):
    _, visits = study
    merges = frames.merges(visits).set_index("merge")
    assert len(table) == 3 * 2 * 4 + 3 * 6
    parts = table[["dilution", "overlap", "interference"]].sum(axis=1)
    np.testing.assert_allclose(parts, table["loss"])
    rule = table["merge"].map(merges["rule"])
    of_pairs = table["merge"].map(merges["n"]) == 2
    linear = table[(rule == "linear") & of_pairs]
    assert (linear["dose_ingredient"] == 0.5).all()
    assert table["control_solo"].notna().equals(rule == "ties")


def test_alone_is_what_the_rule_leaves_without_a_partner(study, table):
    _, visits = study
    (solo,) = (
        x
        for x in visits
        if x.row.kind == "solo" and x.row.tasks == ("a",) and x.row.options == {"n": 2}
    )
    merges = frames.merges(visits)
    ties = merges[
        (merges["rule"] == "ties") & (merges["arm"] == "default") & (merges["n"] == 2)
    ]
    rows = table[table["merge"].isin(ties["merge"]) & (table["task"] == "a")]
    assert len(rows) == 2
    np.testing.assert_allclose(rows["nll_solo"], solo.examples["nll"].mean())


def test_a_larger_group_keeps_the_dose_that_is_asked_for(study):
    bench, _ = study
    drawn = design.drawn("abc", dict(zip("abc", "abc", strict=True)), GIVEN)
    asked = design.visits("abc", drawn, GIVEN | {"GROUP_DOSE": 0.5})
    visits = visit.run(bench, asked)
    visits += visit.run(bench, plan.solos(visit.distinct(visits)))
    of_group = [x for x in visits if x.row.tasks == ("a", "b", "c")]
    assert [x.row.rule for x in of_group] == [*GIVEN["RULES"], "chebyshev"]
    for found in of_group:
        np.testing.assert_allclose(np.mean(found.report["own"]), 0.5, rtol=1e-4)
    # of one scale, an average and a sum are one model; both keep half, trimmed entries or not
    assert [bool(x.same_as) for x in of_group] == [False, True, False, False]
    cells = frames.cells(visits, tasks.collisions(bench.tasks)).set_index("merge")
    assert cells.loc[[x.key for x in of_group], "nll_solo"].isna().all()


def test_a_cell_is_ambiguous_where_its_task_collides_with_another_of_the_merge(
    study, table
):
    _, visits = study
    assert not table["ambiguous"].any()  # the toy tasks share no prompt
    collisions = pd.DataFrame(
        {"task_a": ["a", "a"], "task_b": ["c", "b"], "share": [0.9, 0.001]}
    )
    merges = frames.merges(visits)[["merge", "tasks"]]
    cells = frames.cells(visits, collisions).merge(merges, on="merge")
    both = cells["tasks"].map({"a", "c"}.issubset) & cells["task"].isin(["a", "c"])
    assert cells["ambiguous"].equals(both) and both.any() and not both.all()
    pairs = losses.directed(cells)
    assert set(zip(pairs["victim"], pairs["partner"], strict=True)) == {
        ("a", "b"),
        ("b", "a"),
        ("b", "c"),
        ("c", "b"),
    }


def test_a_score_is_the_mean_of_its_examples(study, table):
    bench, visits = study
    cells = losses.by_cell(frames.merges(visits), frames.examples(visits, bench.tasks))
    for row in table.itertuples():
        assert row.score == pytest.approx(
            cells[row.merge, row.task]["correct"].mean(), abs=1e-5
        )
        own = cells[losses.SPECIALIST, row.task]["correct"].mean()
        assert row.specialist == pytest.approx(own, abs=1e-5)
    references = frames.references(visits, bench.tasks).set_index("task")
    (base,) = frames.of_kind(visits, "base")
    bare = base.examples.groupby("task")["nll"].mean()
    assert references["nll_base"].to_dict() == pytest.approx(bare.to_dict())


def test_the_tables_are_those_of_the_schema(study, table, tmp_path):
    bench, visits = study
    merges, examples = frames.merges(visits), frames.examples(visits, bench.tasks)
    cells = losses.by_cell(merges, examples)
    written = {"merges": losses.merge_losses(merges, cells)}
    written |= {
        "losses": losses.with_intervals(table, cells),
        "doses": frames.doses(visits),
    }
    written |= {
        "examples": examples.drop(columns="answer"),
        "costs": visit.costs(visits),
    }
    written["answers"] = frames.answers(examples)
    per_task = written["answers"].groupby(["merge", "task"]).size()
    assert (per_task == frames.KEPT_ANSWERS).all()
    written["prompts"] = frames.prompts(written["answers"], bench.tasks)
    asked = {row["id"]: row for row in bench.tasks["a"].splits["test"]}
    for row in written["prompts"].query("task == 'a'").itertuples():
        example = asked[row.example]
        assert (row.prompt, row.right) == (example["prompt"], example["answers"][0])
    states = geometry.pooled(visits, "abc")
    written["distortion"] = geometry.distortion(visits, states)
    for name, frame in written.items():
        schema.write(tmp_path, name, frame)
        assert len(schema.read(tmp_path, name)) == len(frame)


def test_committed_scores_are_found_by_their_keys_when_they_are_scored_again(
    study, table, tmp_path, monkeypatch
):
    bench, _ = study
    asked = plan.merges(["ab", "ac"], ["linear", "ties"]).keyed(bench.identity)
    held = table[table["merge"].isin(asked.frame["key"])]
    assert len(held) == 4 * 2
    # a machine that has none of it
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path))
    sample = plan.Plan.of(
        row for row in asked if row.tasks == ("a", "b") and row.rule == "ties"
    )
    visits = visit.run(bench, sample + plan.solos(sample))
    again = frames.cells(visits, tasks.collisions(bench.tasks))
    both = again.merge(held, on=["merge", "task"], suffixes=("", "_committed"))
    assert len(both) == 2
    for name in ("nll", "dose_own", "nll_solo"):
        np.testing.assert_allclose(both[name], both[f"{name}_committed"], rtol=1e-5)


def test_a_swap_is_worth_what_the_swapped_group_loses():
    drawn = pd.DataFrame(
        {"tasks": [("a", "b")], "leaves": "a", "enters": "c", "swapped": [("b", "c")]}
    )
    merged = pd.DataFrame(
        {"tasks": [("a", "b"), ("b", "c")] * 2, "rule": ["linear"] * 2 + ["ties"] * 2}
    ).assign(arm="default", loss=[-1.0, -2.0, -3.0, -4.0])
    found = frames.swap_losses(drawn, merged, ["linear", "ties"])
    assert found[["rule", "before", "after"]].to_numpy().tolist() == [
        ["linear", -1.0, -2.0],
        ["ties", -3.0, -4.0],
    ]
    assert frames.swap_losses(drawn[:0], merged, ["linear"]).empty


def test_distances_and_distortions_are_those_of_the_states(study):
    bench, visits = study
    states = geometry.pooled(visits, "abc")
    assert states.models == ["base", "a", "b", "c"] and states.states.shape[1] == 18
    head = bench.model.get_output_embeddings()
    answers = geometry.readout(states, head)
    arrays = geometry.arrays(states, ["0", "1", "2"], answers)
    by_hand = ((states.states[1, :, -1] - states.states[2, :, -1]) ** 2).sum(-1)
    np.testing.assert_allclose(arrays["d2x"][1, 2], by_hand, rtol=1e-4)
    found = geometry.distortion(visits, states, answers)
    (pair,) = (
        x
        for x in frames.of_kind(visits, "merge")
        if x.row.tasks == ("a", "b") and x.row.rule == "task_arithmetic"
    )
    rows = found[(found["merge"] == pair.key) & (found["model"] == "a")]
    (last,) = rows[(rows["probe_task"] == "a") & (rows["layer"] == 2)].to_dict(
        "records"
    )
    own = frames.specialists(visits)["a"].states["a"][:, -1]
    moved = (pair.states["a"][:, -1] - own).square().sum(1).mean()
    assert last["delta"] == pytest.approx(float(moved), rel=1e-4)
    logits = pair.states["a"][:, -1] @ head.weight.T, own @ head.weight.T
    flips = (torch.stack(logits).argmax(2).diff(dim=0) != 0).float().mean()
    assert last["flips"] == pytest.approx(float(flips))


def test_screening_reads_dev(study, monkeypatch, tmp_path):
    bench, _ = study
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path))
    visits = visit.run(bench, plan.screening("abc"))
    table = frames.screening(visits, bench.tasks).set_index("task")
    assert list(table.index) == list("abc")
    for x, task in bench.tasks.items():
        assert table.loc[x, "chance"] == scores.constant_answer(task, "dev")
    assert store.store() == tmp_path
