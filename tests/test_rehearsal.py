"""The paper's studies rehearsed: their profiles, run by their command from a hub that is a folder.

Models, adapters and tasks have the names, files and architectures of the profiles, at tiny sizes.
Given otherwise are the device, where tasks lie, how much is done (LITTLE), and for GLUE how tiny
models learn and that all pass screening. Cells run in this process and spare a minute of kernels
that start, which is for test_chain.
"""

import json

import hub
import huggingface_hub
import numpy as np
import pandas
import pytest
import toy
import zoo
from matplotlib import pyplot

from helpers import run
from helpers.__main__ import main
from helpers.run import chain, forecast
from helpers.store import ROOT, read_jsonl
from helpers.study.tables import Study

pytestmark = pytest.mark.chain
LITTLE = {
    "DEVICE": "cpu",
    "TRAIN_EXAMPLES": 16,
    "MORE_EXAMPLES": 16,
    "DEV_EXAMPLES": 8,
    "PROBE_EXAMPLES": 5,
    "TEST_EXAMPLES": 8,
    "GROUPS_PER_SIZE": 1,
    "GROUP_SIZES": [3],
    "DOSES": [0.0, 0.5, 1.0],
    "CHECKED_DOSES": 1,
    "THREADS": 1,
}
GLUE = {
    "TASKS": [f"glue:{task}" for task in hub.GLUE],
    "LEARNING_RATE": 0.02,
    "EPOCHS": 8,
    "MARGIN": -1.0,
    "RULES": ["linear", "ties"],
    "ARMS": [],
    "GROUP_RULES": [],
}
LORAS = run.all_profiles()["paper_loras"]
CHOSEN = LORAS["TASKS"][:5]
LABELS = [task.removeprefix("sni:") for task in CHOSEN]
ADAPTERS = {label: LORAS["SPECIALISTS"][label] for label in LABELS}
UNTAUGHT = LABELS[0]
REHEARSED = {"mistral", "qwen2-tied", "t5-own-head"}  # by the profiles themselves


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the hub's files as they lie when fetched, and with a store of its own."""
    folder = tmp_path_factory.mktemp("rehearsal")
    cache = folder / "hub"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setenv("MERGING_COLLAPSE_STORE", str(folder / "store"))
        patch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody answers there
        patch.setattr(chain, "execute", in_process)
        base = zoo.save(hub.place(cache, LORAS["MODEL"]), "mistral")
        for number, (label, name) in enumerate(ADAPTERS.items()):
            taught = [hub.instruction(number, "train", i) for i in range(16)]
            some = [] if label == UNTAUGHT else taught
            hub.adapter(hub.place(cache, name), base, LORAS["MODEL"], some)
        hub.collection(folder / "Lots-of-LoRAs", LABELS)
        hub.glue(folder / "glue")
        yield folder


def in_process(step, part):
    """`toy.in_process`, after which pictures and tables look as before."""
    with pyplot.rc_context():
        toy.in_process(step, part)
    pyplot.close("all")
    pandas.reset_option("^display")


def command(place, profile, only, **parameters):
    """`python -m helpers run PROFILE --only … -p …`: the exit code."""
    given = LITTLE | {"RESULTS": str(place / profile)} | parameters
    flags = []
    for name, value in given.items():
        flags += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    return main(["run", profile, "--only", *only, *flags])


def adapters(place, only=("01", "02"), **parameters):
    """The command of the study of published adapters."""
    given = {"TASKS": CHOSEN, "SPECIALISTS": ADAPTERS}
    given |= {"SOURCES": {"sni": str(place / "Lots-of-LoRAs")}}
    return command(place, "paper_loras", only, **given | parameters)


@pytest.fixture(scope="module")
def study(place):
    """What five published adapters leave behind; some of them get no answer right."""
    few = {"PAIRS": 6, "POOL_TASKS": 3, "PERMUTATIONS": 99}
    few |= {"STUDY": "data/results/demo", "SMALL": ["data/results/demo"]}
    assert (
        adapters(place, ["01", "02", "03", "03a", "03b", "04", "05", "06"], **few) == 0
    )
    return Study(place / "paper_loras")


def test_published_adapters_are_merged_and_measured(study):
    rows = read_jsonl(study.folder / "manifest.jsonl")
    assert [row["status"] for row in rows] == 8 * ["finished"]
    assert rows[0]["parameters"]["MODEL"] == LORAS["MODEL"]
    assert rows[0]["parameters"]["DTYPE"] == "bfloat16"
    assert study.tasks == LABELS  # every adapter takes part, as in the paper
    assert set(study.merges["n"]) == {2, 3}
    assert set(study.table("tasks")["metric"]) == {"rouge_l", "exact_match"}
    # to lose: the loss is undefined, not zero
    nothing = study.losses["specialist"] == 0
    assert study.losses["loss"].isna().tolist() == nothing.tolist()
    assert set(nothing) == {True, False}
    trained = study.table("specialists")
    assert (trained["seconds"] == 0).all() and study.table("training").empty
    assert np.isfinite(study.table("bound")["r2"]).all()
    tried = study.table("trials").groupby(["rule", "tasks", "task"]).size()
    # five probes are too few for advice: dev prompts stand in
    assert (tried == 8).all()


def test_a_study_may_draw_the_partners_of_its_tasks(place):
    """Then distances are known of all pairs, what needs labels or a merge of the drawn ones."""
    drawn = {
        "RESULTS": str(place / "drawn"),
        "PARTNERS": 2,
        "RELATIVES": True,
        "STAGES": [4],
    }
    drawn |= {"SMALL": ["data/results/demo"], "OTHER_PROMPT": "", "PERMUTATIONS": 99}
    assert adapters(place, ["01", "02", "03", "03b", "04", "05"], **drawn) == 0
    study = Study(place / "drawn")
    assert study.tasks == LABELS[:4]  # all five pass
    merged = set(study.in_arm(n=2, table="merges")["tasks"])
    pairs = study.table("pair_predictors").set_index(["task_a", "task_b"])
    assert len(merged) == 4 and len(pairs) == 6  # two partners each
    assert set(pairs["cross_nll"].dropna().index) == merged
    assert np.isfinite(pairs.drop(columns="cross_nll")).all(axis=None)
    assert (study.table("bound")["r2"] > 0).all()
    asked = study.table("predictors").query("status != 'exploratory'")
    assert {"hidden_sim", "cross_nll", "neutral_movement", "base_ability"} <= set(
        asked["metric"]
    )


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("org/none", "cannot fetch 'org/none' from the hub"),
        (
            "org/other",
            "was trained on org/Llama, not on mistralai/Mistral-7B-Instruct-v0.2",
        ),
        ("org/small", "has rank 8, not 16"),
    ],
)
def test_an_adapter_that_will_not_do_is_told_before_any_work(
    place, tmp_path, capsys, name, fault
):
    if name != "org/none":
        base = zoo.save(tmp_path / "base", "mistral")
        stated = "org/Llama" if name == "org/other" else LORAS["MODEL"]
        rank = 8 if name == "org/small" else 16
        hub.adapter(hub.place(place / "hub", name), base, stated, rank=rank)
    given = ADAPTERS | {LABELS[1]: name, LABELS[3]: "org/none"}
    assert adapters(place, SPECIALISTS=given, RESULTS=str(place / name)) == 2
    told = capsys.readouterr().err.partition("error: ")[2].splitlines()
    assert told[0].startswith(f"{LABELS[1]}: ") and fault in told[0]
    assert (
        told[1].startswith(f"{LABELS[3]}: cannot fetch 'org/none'") and len(told) == 2
    )
    assert not (place / name / "manifest.jsonl").exists()


@pytest.mark.parametrize(
    ("profile", "architecture", "dtype"),
    [
        ("paper_glue", "qwen2-tied", "bfloat16"),
        ("paper_glue_t5", "t5-own-head", "float32"),
    ],
)
def test_glue_is_learned_and_merged(place, capsys, profile, architecture, dtype):
    model = run.all_profiles()[profile]["MODEL"]
    zoo.save(hub.place(place / "hub", model), architecture)
    given = GLUE | {"SOURCES": {"glue": str(place / "glue")}}
    given |= {"STUDY": "data/results/demo", "SMALL": ["data/results/demo"]}
    given |= {"PERMUTATIONS": 99}
    pages = ["00", "01", "02", "03", "03a", "03b", "04", "05", "07"]
    assert command(place, profile, pages, **given) == 0, capsys.readouterr().err
    study = Study(place / profile)
    rows = read_jsonl(study.folder / "manifest.jsonl")
    assert [row["status"] for row in rows] == len(pages) * ["finished"]
    (given,) = (row["parameters"] for row in rows if row["notebook"] == "01_finetune")
    assert given["MODEL"] == model and given["DTYPE"] == dtype
    assert set(study.tasks) == set(hub.GLUE) and set(study.merges["n"]) == {2, 3}
    training = study.table("training").groupby("task")["loss"]
    assert (training.last() < training.first()).all()
    assert np.isfinite(study.losses["nll_loss"]).all()


@pytest.mark.parametrize("architecture", sorted(zoo.MODELS.keys() - REHEARSED))
def test_any_architecture_is_tuned_and_merged_from_a_local_folder(
    place, tmp_path, architecture
):
    folder = zoo.save(tmp_path / "model", architecture)
    given = GLUE | {"SOURCES": {"glue": str(place / "glue")}, "RULES": ["linear"]}
    given |= {"MODEL": str(folder), "RESULTS": str(tmp_path / "results")}
    assert command(place, "paper_glue", ["01", "02", "04"], **given) == 0
    study = Study(tmp_path / "results")
    assert set(study.tasks) == set(hub.GLUE) and set(study.merges["n"]) == {2, 3}
    assert np.isfinite(study.losses["nll_loss"]).all()
    assert np.isfinite(study.table("bound")["r2"]).all()


def test_the_forecast_of_a_profile_says_what_it_rests_on():
    told = "\n".join(forecast.lines("paper_loras", LORAS))
    assert "GPU minutes" in told and "64 specialist 0 min" in told
    assert "prompts are 10 times as long as in groups8" in told
    assert "take 27 GB of the GPU" in told
    fewer = forecast.lines(
        "paper_glue", run.all_profiles()["paper_glue"] | {"MODEL": "org/some"}
    )
    assert "the model is no larger than that of glue" in fewer[1]
    own = run.all_profiles()["tasks96"]
    larger = forecast.lines("tasks96", own | {"MODEL": "HuggingFaceTB/SmolLM2-360M"})
    assert "0.36 billion, 2.67 times" in larger[1]
    assert forecast.billions("demo", "org/some-8x7B") is None
    assert list(forecast.ancestry("paper_glue_t5"))[1:3] == ["paper_glue", "glue"]
    assert (ROOT / "data" / "results" / "groups8" / "costs.csv").is_file()
