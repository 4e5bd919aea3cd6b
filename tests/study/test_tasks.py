"""Tasks: sources, prompts, splits; no network, no real data."""

import json

import pytest
import tiny
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from helpers import run
from helpers.states import batch
from helpers.study import archives, tasks


def bigbench(tmp_path, monkeypatch, **content):
    file = tmp_path / "task.json"
    file.write_text(json.dumps(content))
    monkeypatch.setattr(archives, "bigbench_files", lambda names: [file])


def load(sizes, name="bigbench:toy", prompt="bare", **settings):
    return tasks.load_task(name, sizes, prompt=prompt, **settings)


def numbered(n):
    return [{"input": f"item {i}", "target": str(i)} for i in range(n)]


def test_splits_are_disjoint_by_normalised_input_and_stable(tmp_path, monkeypatch):
    doubled = numbered(40) + [
        {"input": f"  ITEM   {i} ", "target": str(i)} for i in range(40)
    ]
    bigbench(tmp_path, monkeypatch, examples=doubled)
    task = load((10, 10, 10, 10))
    seen = [
        " ".join(p.casefold().split())
        for s in task.splits.values()
        for p in s["prompt"]
    ]
    assert len(seen) == len(set(seen)) == 40
    fewer = load((5, 10, 10, 10))
    assert fewer.splits["test"]["id"] == task.splits["test"]["id"]
    assert fewer.splits["train"]["id"] == task.splits["train"]["id"][:5]
    other = load((10, 10, 10, 10), seed=1)
    assert other.splits["test"]["id"] != task.splits["test"]["id"]


def test_the_digest_is_of_the_content(tmp_path, monkeypatch):
    bigbench(tmp_path, monkeypatch, examples=numbered(40))
    one, more = (load((n, 5, 5, 5)) for n in (10, 20))
    assert one.digest("test", "probe") == more.digest("test", "probe")
    assert one.digest("train") != more.digest("train")


def test_bigbench_prompts_and_answers(tmp_path, monkeypatch):
    bigbench(
        tmp_path,
        monkeypatch,
        task_prefix="Yes or no?\n",
        example_input_prefix="Item: ",
        example_output_prefix="\nSay: ",
        examples=[{"input": "sky", "target_scores": {"yes": 1, "no": 0, "aye": 1}}],
    )
    row = load((0, 0, 0, 1)).splits["test"][0]
    assert row["prompt"] == "Yes or no?\nItem: sky\nSay:"
    assert row["answers"] == ["yes", "aye"]
    assert row["options"] == ["aye", "no", "yes"]


def test_free_answers_have_no_options_though_scores_are_listed(tmp_path, monkeypatch):
    example = {
        "input": "2+2",
        "target": ["4", "four"],
        "target_scores": {"4": 1, "banana": 0},
    }
    bigbench(tmp_path, monkeypatch, examples=[example])
    row = load((0, 0, 0, 1)).splits["test"][0]
    assert row["prompt"] == "Q: 2+2\nA:"
    assert (row["answers"], row["options"]) == (["4", "four"], [])


def test_bigbench_options_are_stripped_and_examples_without_answer_left_out(
    tmp_path, monkeypatch
):
    examples = [
        {"input": "sky", "target_scores": {" blue": 1, "red ": 0}},
        {"input": "sea", "target": ""},
        {"input": "sun", "target": []},
    ]
    bigbench(tmp_path, monkeypatch, examples=examples)
    row = load((0, 0, 0, 1)).splits["test"][0]
    assert (row["answers"], row["options"]) == (["blue"], ["blue", "red"])
    with pytest.raises(ValueError, match="only 1 of the 2 different inputs"):
        load((0, 0, 0, 2))


def test_several_tasks_are_loaded_by_label(tmp_path, monkeypatch):
    bigbench(tmp_path, monkeypatch, examples=numbered(4))
    asked = []

    def files(names):
        asked.append(names)
        return [tmp_path / "task.json"]

    monkeypatch.setattr(archives, "bigbench_files", files)
    loaded = tasks.load_tasks(
        ["bigbench:x/b_json", "bigbench:a"], sizes=(1, 1, 1, 1), prompt="bare"
    )
    assert {label: task.name for label, task in loaded.items()} == {
        "b": "bigbench:x/b_json",
        "a": "bigbench:a",
    }
    assert asked[0] == ["x/b_json", "a"]  # all in one pass
    with pytest.raises(
        ValueError, match="tasks bigbench:x/a and sni:a are both called 'a'"
    ):
        tasks.load_tasks(["bigbench:x/a", "sni:a"], sizes=(1, 1, 1, 1))


def test_an_unknown_metric_is_refused(monkeypatch):
    monkeypatch.setattr(
        tasks, "catalogue", lambda: {"bigbench:toy": {"metric": "bleu"}}
    )
    with pytest.raises(
        ValueError, match="bigbench:toy has metric 'bleu' in tasks.toml"
    ):
        load((1, 1, 1, 1))


def test_glue_from_a_folder_tests_on_validation(tmp_path):
    for split, n in (("train", 12), ("validation", 6)):
        rows = [
            {"sentence1": f"{split} {i}", "sentence2": "b", "label": i % 2, "idx": i}
            for i in range(n)
        ]
        (tmp_path / "rte").mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / "rte" / f"{split}.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: rte\n  data_files:\n"
        "  - {split: train, path: rte/train.parquet}\n"
        "  - {split: validation, path: rte/validation.parquet}\n---\n"
    )
    task = tasks.load_task("glue:rte", (6, 3, 3, 6), sources={"glue": str(tmp_path)})
    assert all("validation" in prompt for prompt in task.splits["test"]["prompt"])
    assert not any("validation" in prompt for prompt in task.splits["train"]["prompt"])
    row = task.splits["train"][0]
    assert row["options"] == ["entailment", "unrelated"]
    assert row["prompt"].endswith(
        "\nSentence: b\nQuestion: entailment or unrelated?\nAnswer:"
    )


def test_natural_instructions(tmp_path):
    rows = [
        {
            "id": f"x-{i}",
            "definition": "Say A or B.",
            "input": f"text {i}",
            "output": ["AB"[i % 2]],
        }
        for i in range(30)
    ]
    (tmp_path / "task1_toy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tasks.load_task(
        "sni:task1_toy", (10, 5, 5, 10), sources={"sni": str(tmp_path)}
    )
    row = task.splits["test"][0]
    assert row["prompt"].startswith("Say A or B.\n\nInput: text ")
    assert row["options"] == ["A", "B"] and task.metric == "exact_match"


def test_free_natural_instructions_are_graded_by_rouge(tmp_path):
    rows = [
        {"definition": "Go on.", "input": str(i), "output": f"so {i}"}
        for i in range(12)
    ]
    (tmp_path / "task2_toy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tasks.load_task(
        "sni:task2_toy", (1, 1, 1, 1), sources={"sni": str(tmp_path)}
    )
    assert task.splits["test"][0]["options"] == [] and task.metric == "rouge_l"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("plural", "unknown task 'plural'"),
        ("kaggle:plural", "unknown task 'kaggle:plural'"),
        ("glue:stsb", "unknown GLUE task 'stsb'"),
        ("sni:task0", "task0.jsonl is not in"),
    ],
)
def test_an_unknown_task_is_refused_in_one_sentence(name, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        tasks.load_task(name, (1, 1, 1, 1), sources={"sni": str(tmp_path)})


def test_too_few_inputs_are_refused(tmp_path, monkeypatch):
    bigbench(tmp_path, monkeypatch, examples=numbered(20))
    with pytest.raises(
        ValueError, match="only 8 of the 10 different inputs asked for its dev"
    ):
        load((5, 10, 6, 6))
    with pytest.raises(
        ValueError, match="only 0 of the 10 different inputs asked for its train"
    ):
        load((10, 8, 6, 6))
    assert load((10, 5, 5, 5)).splits.num_rows["train"] == 5


def test_names_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(archives, "bigbench_files", asked.append)
    tasks.check_names(["bigbench:intent_recognition", "glue:mrpc"])
    assert not asked  # what the catalogue names is known without the archive
    tasks.check_names(["bigbench:intent_recognition", "bigbench:x/strange"])
    assert asked == [["x/strange"]]
    with pytest.raises(ValueError, match="unknown GLUE task 'stsb'"):
        tasks.check_names(["glue:mrpc", "glue:stsb"])
    with pytest.raises(ValueError, match=r"task0.jsonl is not in"):
        tasks.check_names(["sni:task0"], {"sni": str(tmp_path)})


def test_few_shot_shows_training_examples_only(tmp_path, monkeypatch):
    bigbench(tmp_path, monkeypatch, examples=numbered(30))
    task = load((10, 5, 5, 5))
    rows = tasks.few_shot(task, "test", shots=2)
    shown = [task.splits["train"][i] for i in range(2)]
    start = "".join(f"{row['prompt']} {row['answers'][0]}\n\n" for row in shown)
    assert [row["prompt"] for row in rows] == [
        start + p for p in task.splits["test"]["prompt"]
    ]


def test_every_candidate_task_says_why_it_is_here():
    for name, entry in tasks.catalogue().items():
        assert name.split(":")[0] in tasks.READERS
        assert entry["kind"] and entry["reason"] and entry["family"]
        assert "\n" not in entry.get("instruction", "")
        assert entry.get("metric", "exact_match") in tasks.METRICS


@pytest.mark.parametrize("profile", run.all_profiles().values(), ids=run.all_profiles())
def test_a_profile_names_tasks_of_the_catalogue(profile):
    # tasks of a collection on the hub are named in it
    hub = {name for name in profile["TASKS"] if name.startswith("sni:")}
    assert set(profile["TASKS"]) - hub <= tasks.catalogue().keys()
    tasks.check_names(profile["TASKS"], profile["SOURCES"])


@given(
    st.lists(
        st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5
    )
)
def test_padding_is_masked_by_position(sequences):
    ids, mask = batch.pad(sequences, fill=3)
    for sequence, row, real in zip(sequences, ids, mask, strict=True):
        assert row[real.bool()].tolist() == sequence
        assert (row[~real.bool()] == 3).all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8))
def test_buckets_hold_every_example_once_by_length(lengths, size):
    buckets = batch.length_buckets(lengths, size)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(lengths)))
    assert [lengths[i] for bucket in buckets for i in bucket] == sorted(lengths)
    assert max(map(len, buckets)) <= size


def test_an_answer_ends_with_the_end_token_or_the_given_text():
    tokenizer = tiny.byte_tokenizer()
    assert batch.encode_answer(tokenizer, "ab")[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(batch.encode_answer(tokenizer, "ab", "\n")) == " ab\n"


@pytest.fixture
def instructed(tmp_path, monkeypatch):
    bigbench(tmp_path, monkeypatch, examples=numbered(40))
    entry = {"instruction": "Count.", "family": "numbers"}
    monkeypatch.setattr(tasks, "catalogue", lambda: {"bigbench:toy": entry})
    return load((10, 5, 5, 5), prompt="instructed")


def test_an_instruction_stands_before_the_same_examples(instructed):
    bare = load((10, 5, 5, 5))
    assert (instructed.family, instructed.instruction, bare.instruction) == (
        "numbers",
        "Count.",
        "",
    )
    for name, split in bare.splits.items():
        assert instructed.splits[name]["id"] == split["id"]
        assert instructed.splits[name]["prompt"] == [
            f"Count.\n{p}" for p in split["prompt"]
        ]
    assert instructed.digest() != bare.digest()


def test_solved_examples_stand_behind_one_instruction(instructed):
    (prompt, *_) = (
        row["prompt"] for row in tasks.few_shot(instructed, "test", shots=2)
    )
    bare = tasks.few_shot(load((10, 5, 5, 5)), "test", shots=2)[0]["prompt"]
    assert prompt == f"Count.\n{bare}"


def test_a_task_without_an_instruction_is_refused_but_bare_or_from_a_source_that_has_them(
    tmp_path, monkeypatch
):
    bigbench(tmp_path, monkeypatch, examples=numbered(4))
    with pytest.raises(
        ValueError, match=r"bigbench:toy has no instruction in data/tasks.toml"
    ):
        load((1, 1, 1, 1), prompt="instructed")
    with pytest.raises(
        ValueError, match="prompt 'long' is unknown: choose one of instructed, bare"
    ):
        load((1, 1, 1, 1), prompt="long")
    lines = [
        {"id": str(i), "definition": "Copy.", "input": str(i), "output": str(i)}
        for i in "abcd"
    ]
    (tmp_path / "task1.jsonl").write_text("\n".join(map(json.dumps, lines)))
    where = {"sources": {"sni": str(tmp_path)}}
    task = load((1, 1, 1, 1), "sni:task1", "instructed", **where)
    assert task.digest() == load((1, 1, 1, 1), "sni:task1", **where).digest()


def planted(label, answers):
    rows = [
        {"id": p, "prompt": p, "answers": a, "options": []} for p, a in answers.items()
    ]
    return tasks.Task(label, "exact_match", DatasetDict(test=Dataset.from_list(rows)))


def test_prompts_with_other_answers_in_two_tasks_collide():
    one = planted("one", {"a b": ["x"], "c": ["y", "z"], "d": ["u"]})
    two = planted("two", {"A  b": ["w"], "c": ["z"], "e": ["v"], "f": ["v"]})
    # agrees with `one`, not with `two`
    three = planted("three", {"c": ["y"], "g": ["x"]})
    table = tasks.collisions({"one": one, "two": two, "three": three})
    assert table.values.tolist() == [
        ["one", "two", 2, 1, 1 / 3],
        ["two", "three", 1, 1, 1 / 2],
    ]
    assert tasks.collisions({"one": one, "three": three}).empty
