"""Every architecture through train, merge, score, states, bound, advise: the names of the tests are
the table. Oracles: PEFT's own merge, and transformers reading one prompt at a time, unpadded.
"""

from copy import deepcopy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import tiny
import torch
import zoo
from datasets import Dataset, DatasetDict
from peft import PeftModel

from helpers import merge, states
from helpers.advise.merges import Merge, alone
from helpers.advise.panel import open_panel
from helpers.advise.trials import references, trial
from helpers.study import bench as benches
from helpers.study import geometry, plan, scores, visit
from helpers.study.specialists import Recipe

RECIPE = Recipe(
    examples=4, epochs=16, batch_size=4, learning_rate=0.05, rank=2, alpha=4
)
TASKS = {x: tiny.toy(x, 4, ("0", "1")) for x in "ab"}


@pytest.fixture(scope="module", params=zoo.MODELS)
def folder(request, tmp_path_factory):
    """Folder of a model, in the hub's layout; the store is its own."""
    place = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGING_COLLAPSE_STORE", str(place / "store"))
        yield zoo.save(place / "model", request.param)


@pytest.fixture(scope="module")
def bench(folder):
    """The model with two specialists that it was taught by LoRA."""
    untaught = benches.Bench(*benches.load_base(str(folder)), TASKS, {}, batch_size=3)
    trained = {x: benches.train(untaught, x, RECIPE) for x in TASKS}
    return replace(untaught, specialists=trained)


@pytest.fixture(scope="module")
def visits(bench):
    """The base, both specialists and their average, with scores and states."""
    asked = plan.base(TASKS, probed=TASKS).kinds("base")
    asked += plan.doses(TASKS, [1.0], probed=TASKS)
    return visit.run(bench, asked + plan.merges([tuple(TASKS)], ["linear"]))


@pytest.fixture(scope="module")
def models(bench, folder):
    """The specialists, and last their average, as PEFT merges each adapter."""
    merged = []
    for specialist in bench.specialists.values():
        adapted = PeftModel.from_pretrained(deepcopy(loaded(folder)), specialist)
        merged.append(adapted.merge_and_unload().eval())
    states_of = [model.state_dict() for model in merged]
    mean = {name: sum(state[name] for state in states_of) / 2 for name in states_of[0]}
    average = deepcopy(loaded(folder))
    average.load_state_dict(mean)
    return [*merged, average.eval()]


@lru_cache
def loaded(folder):
    return benches.load_base(str(folder))[0]


def inputs_of(model, ids, answer=()):
    """What a model is given of one prompt and the beginning of an answer."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": torch.tensor([[*ids, *answer]])}
    start = model.config.decoder_start_token_id
    behind = torch.tensor([[start, *answer]])
    return {"input_ids": torch.tensor([ids]), "decoder_input_ids": behind}


@torch.no_grad()
def bare(model, ids, answer=(), **options):
    return model(**inputs_of(model, ids, answer), **options)


def generated(model, ids, most):
    """Greedy tokens behind one prompt, step by step and without a cache, through the end token."""
    said = []
    while len(said) < most and (not said or said[-1] != 256):
        said.append(int(bare(model, ids, said).logits[0, -1].argmax()))
    return said


def test_train(bench, folder, models):
    untouched = loaded(folder).state_dict()
    for name, tensor in bench.model.state_dict().items():
        assert torch.equal(tensor, untouched[name]), name
    for task, taught in zip(TASKS.values(), models, strict=False):
        examples = states.encode_examples(bench.tokenizer, task.splits["train"])
        before = states.answer_loss(bench.model, examples)
        assert states.answer_loss(taught, examples) < 0.9 * before


def test_a_beginning_that_is_read_once_is_differentiated_for_all(folder):
    model = deepcopy(loaded(folder))
    examples = [([7, 1, 8, *rest], [9, 4]) for rest in ([], [3], [5, 2, 6])]
    found = []
    for share in (True, False):
        model.zero_grad()
        loss = states.answer_loss(model, examples, share)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([loss.detach()[None], *gradients]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_merge(bench, folder, models):
    rows = bench.rows(TASKS)
    stored = merge.views(*bench_sources(folder, bench))
    assert [row.name for row in rows] == [row.name for row in stored]
    delta, _ = merge.merge(rows, "linear", list(TASKS))
    expected = models[-1].state_dict()
    with merge.applied(bench.model, delta):
        for name, tensor in bench.model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    assert states.pair_metrics(rows, list(TASKS)).notna()["cosine"].all()


def bench_sources(folder, bench):
    """Base and specialists as the command line opens them: from their folders alone."""
    opened = [merge.open_specialist(place, x) for x, place in bench.specialists.items()]
    return merge.open_base(folder), opened


def test_score(bench, models, visits):
    model, tokenizer = models[-1], bench.tokenizer
    scored = visits[-1].examples.set_index(["task", "id"])
    for x, task in TASKS.items():
        pairs = states.encode_examples(tokenizer, task.splits["test"])
        for row, (ids, answer) in zip(task.splits["test"], pairs, strict=True):
            logits = bare(model, ids, answer[:-1]).logits[0, -len(answer) :]
            nll = -logits.log_softmax(1).gather(1, torch.tensor(answer)[:, None]).mean()
            found = scored.loc[x, row["id"]]
            assert found["nll"] == pytest.approx(float(nll), rel=1e-3, abs=1e-4)
            said = tokenizer.decode(generated(model, ids, len(answer) + 4))
            assert found["answer"] == said.removesuffix("<end>").strip()


def test_states(bench, folder, models, visits):
    model = models[-1]
    names = states.layer_names(model)
    assert names[-1] == (
        "block 2" if folder.parent.name.startswith("bart") else "final norm"
    )
    for x, read in visits[-1].states.items():
        prompts = TASKS[x].splits["probe"]["prompt"]
        for prompt, state in zip(prompts, read, strict=True):
            out = bare(
                model, bench.tokenizer(prompt)["input_ids"], output_hidden_states=True
            )
            layers = out.get("decoder_hidden_states") or out.hidden_states
            expected = torch.stack([layer[0, -1] for layer in layers])
            assert len(names) == len(state)
            torch.testing.assert_close(state, expected, rtol=1e-3, atol=1e-4)
            again = states.logits(model, state[-1:])[0]
            np.testing.assert_allclose(again, out.logits[0, -1], rtol=1e-3, atol=1e-3)


def test_bound(bench, visits):
    pool = geometry.pooled(visits, list(TASKS))
    head = bench.model.get_output_embeddings()
    answers = geometry.readout(pool, head)
    places = [pool.models.index(task) for task in pool.owner]
    own = pool.states[places, np.arange(len(places)), -1]
    assert (answers.top == states.logits(bench.model, own).argmax(1)).all()
    table = geometry.distortion(visits, pool, answers)
    worst = table[table["model"].isin(TASKS)].groupby("model")["delta"].mean().max()
    d2 = states.squared_distances(np.float64(pool.states[1:, :, -1])).mean(-1)
    assert 0 < states.minimax(d2).r2 <= worst * (1 + 1e-6)


def test_gradients(bench):
    solved = {
        x: states.encode_examples(bench.tokenizer, task.splits["train"].take(3))
        for x, task in TASKS.items()
    }
    blocks = states.blocks_of(bench.model)
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    gradients = []
    for examples in solved.values():
        tokens = sum(len(answer) for _, answer in examples)
        loss = states.answer_loss(bench.model, examples) / tokens
        parts = torch.autograd.grad(loss, matrices)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    stacked = torch.stack(gradients)
    found = states.grams(bench.model, solved).sum(axis=0)
    np.testing.assert_allclose(found, (stacked @ stacked.T).numpy(), rtol=1e-3)


def test_advise(bench, folder, models):
    given = {x: str(place) for x, place in bench.specialists.items()}
    texts = {x: [f"{x} {'word ' * (i % 3)}{i}:" for i in range(8)] for x in TASKS}
    panel = open_panel(str(folder), given, texts, tokens=3)
    merged = models[-1]
    for x, own in zip(TASKS, models, strict=False):
        said = references(panel, x)["answer"]
        assert said.tolist() == [generated(own, ids, 3) for ids in panel.inputs[x]]
        assert trial(panel, alone(x, 1.0))["kept"].all()
        table = trial(panel, Merge(tuple(TASKS))).query("model == @x")
        kept = [
            generated(merged, ids, 3)[: len(answer)] == answer
            for ids, answer in zip(panel.inputs[x], said, strict=True)
        ]
        assert table["kept"].tolist() == kept


@pytest.mark.parametrize(
    ("name", "places"), [("gpt2", 1024), ("bart", 512), ("llama", None)]
)
def test_what_is_longer_than_learned_positions_is_refused(tmp_path, name, places):
    model, tokenizer, _ = benches.load_base(str(zoo.save(tmp_path / "model", name)))
    benches.check_lengths(model, tokenizer, TASKS)
    row = TASKS["a"].splits["test"][0] | {"prompt": 1100 * "x"}
    splits = DatasetDict(TASKS["a"].splits | {"test": Dataset.from_list([row])})
    long = {"long": replace(TASKS["a"], splits=splits)}
    if places is None:
        benches.check_lengths(model, tokenizer, long)
    else:
        with pytest.raises(
            ValueError, match=f"long has .* positions for {places}: leave"
        ):
            benches.check_lengths(model, tokenizer, long)


@pytest.mark.parametrize(("name", "rank"), [("t5", 0), ("t5-own-head", 4), ("bart", 0)])
def test_an_encoder_decoder_learns_two_tasks_by_lora_or_whole(
    tmp_path, monkeypatch, name, rank
):
    monkeypatch.setenv("MERGING_COLLAPSE_STORE", str(tmp_path / "store"))
    place = zoo.save(tmp_path / "model", name)
    untaught = benches.Bench(*benches.load_base(str(place)), TASKS, {})
    recipe = replace(RECIPE, epochs=120, learning_rate=0.01, rank=rank)
    trained = {x: benches.train(untaught, x, recipe) for x in TASKS}
    bench = replace(untaught, specialists=trained)
    rows = bench.rows(TASKS)
    stored = merge.views(*bench_sources(place, bench))
    assert [row.name for row in rows] == [row.name for row in stored]
    for i, task in enumerate(TASKS.values()):
        with merge.applied(bench.model, merge.dose(rows, i, 1.0)):
            scored = scores.score(bench.model, bench.tokenizer, task.splits["train"])
        assert scored["correct"].mean() >= 0.75
    if not rank:  # every tensor was tuned, those that are shared once
        delta, _ = merge.merge(rows, "linear", list(TASKS))
        tuned = [loaded(folder).state_dict() for folder in trained.values()]
        with merge.applied(bench.model, delta):
            for key, tensor in bench.model.state_dict().items():
                mean = (tuned[0][key] + tuned[1][key]) / 2
                torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)
