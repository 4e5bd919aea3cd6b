"""What happened to each merge? Visits: apply a delta to the base, read scores and states, restore.

A visit is keyed by the content of its delta, so equal merges under two names are visited once and a
killed run resumes where it was. Dose curves, controls, pairs and groups are all lists of visits.

The base is a decoder, which answers in words, or an encoder (no LM head): each task's specialist
then brings its own classification head, which is attached while that task is scored and never
merged.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    logging,
)

from helpers import merge as merging
from helpers import store as records
from helpers.states import bound
from helpers.states import measures as hidden
from helpers.states.batch import encode_input, encode_prompt
from helpers.study import assets, specialists
from helpers.study import scores as evaluate
from helpers.study.losses import merging_loss, read_dose
from helpers.study.tasks import (
    SHOT_END,
    Task,
    few_shot,
    label_set,
    load_tasks,
)

VERSION = 1  # raised by hand whenever a visit records something else
BASE = "base"  # the digest of no delta
# Other versions of a rule than its default (`in_arm`): scales, draws of the entries that it drops
# at random, and the grid on which base and result are stored.
ARMS = ("norm", "dose", "sum", "mask1", "mask2", "bfloat16")
# From equal seeds, two processors that round otherwise train and merge alike to within these (nats,
# relative); two seeds do not. Seen on the 14 tasks of `decoder`: training losses up to 0.005 apart,
# from one seed to the next over 0.05; doses 1e-5. (Of LA, doses of two seeds can agree to 3e-5.)
SAME_LOSS, SAME_DOSE = 0.02, 1e-3
SHOTS = 4  # solved examples (an encoder's: of each label) by which the base's ability is measured

# The settings of an adapter that its task vector depends on.
SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")

Delta = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bench:
    """The live base model (fp32), its tasks and their specialists' folders, both by task label."""

    model: torch.nn.Module
    tokenizer: Any
    base: dict  # name and digest
    tasks: dict[str, Task]
    specialists: dict[str, Path]
    batch_size: int = 0  # examples read at a time; 0: as many as suit the device

    def __post_init__(self) -> None:
        if not self.batch_size:
            size = 64 if self.model.device.type == "cuda" else 20
            object.__setattr__(self, "batch_size", size)

    @property
    def encoder(self) -> bool:
        """Whether the model has no LM head."""
        return self.model.get_output_embeddings() is None

    def sources(self, labels: Iterable[str]) -> tuple[merging.Source, list[merging.Source]]:
        """The base and these specialists, open for streaming; of encoders without their heads."""
        base = merging.open_base(dict(self.model.named_parameters()))
        base = base._replace(base_digest=self.base["digest"])
        specialists = [merging.open_specialist(self.specialists[x], x) for x in labels]
        if self.encoder:
            base, *specialists = (
                source._replace(
                    tensors={n: t for n, t in source.tensors.items() if not _in_head(self.model, n)}
                )
                for source in (base, *specialists)
            )
        return base, specialists

    def rows(self, labels: Iterable[str], device: str | None = None) -> list[merging.Row]:
        """Their task vectors by tensor, to pass over at will; by default on the base's device."""
        return merging.views(*self.sources(labels), device or self.model.device.type)

    def parents(self, labels: Sequence[str]) -> dict:
        """What identifies a merge's parents: digests of the base and, in order, the specialists."""
        return {
            "base": self.base["digest"],
            "specialists": [[x, _contents(self.specialists[x])] for x in labels],
        }

    def machine(self) -> dict:
        """What rounding depends on beside the numbers."""
        return {"dtype": str(self.model.dtype)}


@cache  # the store's folders never change, and an encoder's is as large as the model
def _contents(folder: Path) -> str:
    """Digest of what a specialist's task vector is made of: its tensors and their scaling."""
    weights = [records.digest(file) for file in sorted(folder.glob("*.safetensors"))]
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return records.digest([weights, {name: config.get(name) for name in SCALING}])


def load_base(name: str, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any, dict]:
    """(model, tokenizer, name and digest) of a base: a decoder, or an encoder below some head.

    Raises ValueError (AssetError) for a model that cannot be had, and for an encoder-decoder.
    """
    config = AutoConfig.from_pretrained(assets.model_folder(name), trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder: name a decoder or an encoder")
    writes = any(kind.endswith("ForCausalLM") for kind in config.architectures or [])
    auto_class = AutoModelForCausalLM if writes else AutoModelForSequenceClassification
    told = logging.get_verbosity()
    if not writes:  # that the head is untrained is no news: no task is scored with it
        logging.set_verbosity_error()
    model, tokenizer = assets.load_model(name, dtype, device, auto_class)
    logging.set_verbosity(told)
    return model, tokenizer, assets.base_info(name)


# --- an encoder's heads ----------------------------------------------------------------------


def _in_head(model, name: str) -> bool:
    """Whether a parameter of a sequence classifier lies outside its body."""
    return not name.startswith(f"{model.base_model_prefix}.")


@contextmanager
def with_head(model, specialist: Path) -> Iterator[list[str]]:
    """`model` with the classification head of a specialist inside the `with`: yields its labels."""
    named = json.loads((specialist / "config.json").read_text(encoding="utf-8"))["id2label"]
    stored = merging.read_folder(specialist)
    head = {name: tensor for name, tensor in stored.items() if _in_head(model, name)}
    own = {name: model.get_parameter(name).data for name in head}
    try:
        for name, tensor in head.items():
            model.get_parameter(name).data = tensor.to(model.device)
        yield [named[str(i)] for i in range(len(named))]
    finally:
        for name, tensor in own.items():
            model.get_parameter(name).data = tensor


# --- one visit -------------------------------------------------------------------------------


def visit(
    bench: Bench,
    digest: str,
    make: Callable[[], Delta],
    scored: Sequence[str],
    probed: Sequence[str] = (),
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Scores on the test examples of `scored` tasks, states on the probes of `probed` ones.

    `digest` identifies the delta and `make()` builds it, which happens only if something is not
    recorded yet. Returns the examples (column task and those of `evaluate.score`) and, by task, the
    states (probes, layers, d), fp32: at the last prompt token, of an encoder the mean over tokens.
    """
    wanted = [_score_key(bench, digest, x) for x in scored]
    wanted += [_state_key(bench, digest, bench.tasks[x]) for x in probed]
    seen = all(records.finished(*key) for key in wanted)
    with nullcontext() if seen else merging.applied(bench.model, make()):
        examples = [_scores(bench, digest, x).assign(task=x) for x in scored]
        states = {x: _states(bench, digest, bench.tasks[x]) for x in probed}
    return pd.concat(examples, ignore_index=True), states


def _score_key(
    bench: Bench, digest: str, label: str, split: str = "test", shots: int = 0
) -> tuple[str, int, dict]:
    task = bench.tasks[label]
    what = {"base": bench.base["digest"], "delta": digest, "task": task.name, "shots": shots}
    what |= {"split": task.digest(split), "evaluate": evaluate.VERSION} | bench.machine()
    probe = bench.encoder and digest == BASE
    if bench.encoder:
        what["head"] = f"{SHOTS}-shot probe" if probe else _contents(bench.specialists[label])
    if shots or probe:
        what["shown"] = task.digest("train")
    return "scores", VERSION, what


def _scores(
    bench: Bench, digest: str, label: str, split: str = "test", shots: int = 0
) -> pd.DataFrame:
    """Scores of the live model on one split of a task, recorded as those of the delta `digest`."""
    task, model, size = bench.tasks[label], bench.model, bench.batch_size

    def compute(folder: Path) -> None:
        if not bench.encoder:
            rows = few_shot(task, split, shots) if shots else task.splits[split]
            end = SHOT_END if shots else None
            frame = evaluate.score(model, bench.tokenizer, rows, task.metric, size, end)
        elif digest == BASE:
            frame = _probe_scores(bench, task, split)
        else:
            with with_head(model, bench.specialists[label]) as labels:
                rows = task.splits[split]
                frame = evaluate.classify(model, bench.tokenizer, rows, labels, size)
        frame.to_csv(folder / "examples.csv", index=False)

    folder = records.cached(*_score_key(bench, digest, label, split, shots), compute)
    return pd.read_csv(folder / "examples.csv", dtype={"id": str})


def _probe_scores(bench: Bench, task: Task, split: str) -> pd.DataFrame:
    """Scores of a linear probe on the live encoder's last states, fitted to a few examples."""
    labels = label_set(task.splits["train"])
    train, asked = _shown(task, labels), list(task.splits[split])
    known, unknown = (
        _read(bench, [row["prompt"] for row in rows])[:, -1] for rows in (train, asked)
    )
    targets = torch.tensor([labels.index(row["answers"][0]) for row in train])
    logprobs = evaluate.linear_probe(known, targets, unknown, len(labels))
    return evaluate.graded(asked, labels, logprobs)


def _shown(task: Task, labels: Sequence[str]) -> list[dict]:
    """The first SHOTS training examples of each label, in the order of the split."""
    left, shown = dict.fromkeys(labels, SHOTS), []
    for row in task.splits["train"]:
        if left[row["answers"][0]] > 0:
            left[row["answers"][0]] -= 1
            shown.append(row)
    return shown


def _state_key(bench: Bench, digest: str, task: Task) -> tuple[str, int, dict]:
    what = {"base": bench.base["digest"], "delta": digest, "task": task.name}
    return "states", VERSION, what | {"probe": task.digest("probe")} | bench.machine()


def _states(bench: Bench, digest: str, task: Task) -> Tensor:
    def compute(folder: Path) -> None:
        states = _read(bench, task.splits["probe"]["prompt"])
        save_file({"states": states}, folder / "states.safetensors")

    folder = records.cached(*_state_key(bench, digest, task), compute)
    return load_file(folder / "states.safetensors")["states"]


def _read(bench: Bench, prompts: Iterable[str]) -> Tensor:
    """States (prompts, layers, d) of the live model at prompts."""
    encode, how = (encode_input, "mean") if bench.encoder else (encode_prompt, "last")
    encoded = [encode(bench.tokenizer, prompt) for prompt in prompts]
    return hidden.prompt_states(bench.model, encoded, how, bench.batch_size)


# --- what is visited -------------------------------------------------------------------------


def train(bench: Bench, label: str, recipe: specialists.Recipe, quiet: bool = True) -> Path:
    """Folder of the specialist of a task of the bench, trained once (`specialists.train`)."""
    about = bench.model, bench.tokenizer, bench.base, bench.tasks[label]
    return specialists.train(*about, recipe, quiet)


def try_task(bench: Bench, label: str, recipe: specialists.Recipe) -> None:
    """Leave in the store all that screening asks of a task: its specialist, and dev scores."""
    folder = train(bench, label, recipe)
    on_dev(replace(bench, specialists={label: folder}), label)
    base_ability(bench, label, "dev")


def base_ability(bench: Bench, label: str, split: str = "test") -> pd.DataFrame:
    """Scores of the base as it is: what it can do untaught.

    Of a decoder behind SHOTS solved training examples, as a bare prompt tells it neither task nor
    format. An encoder has nothing to answer with: a linear probe on its frozen last states (mean
    over tokens) is fitted to SHOTS training examples of each label. (Fitted to all of them it is a
    rival of the specialist, not the base untaught.)
    """
    return _scores(bench, BASE, label, split, 0 if bench.encoder else SHOTS)


def on_dev(bench: Bench, label: str) -> pd.DataFrame:
    """Scores of a specialist on its dev split: what screening and tuning may read."""
    record, make = delta_at(bench, label, 1.0)
    key = _score_key(bench, record["digest"], label, "dev")
    with nullcontext() if records.finished(*key) else merging.applied(bench.model, make()):
        return _scores(bench, record["digest"], label, "dev")


def at_base(bench: Bench, probed: Sequence[str] = ()) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """The base itself: scores on every task (bare prompts; linear probes), states on `probed`."""
    return visit(bench, BASE, dict, list(bench.tasks), probed)


def at_dose(
    bench: Bench, label: str, dose: float, probed: Sequence[str] = ()
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """theta_0 + dose * tau of one specialist, on its own task; dose 1 is the specialist.

    An encoder has the specialist's own head at every dose, 0 included.
    """
    if dose == 0 and not bench.encoder:
        return visit(bench, BASE, dict, [label], probed)
    record, make = delta_at(bench, label, dose)
    return visit(bench, record["digest"], make, [label], probed)


def delta_at(bench: Bench, label: str, dose: float) -> tuple[dict, Callable[[], Delta]]:
    """Record (its digest) and maker of dose * tau of one specialist."""
    what = bench.parents([label]) | bench.machine() | {"dose": dose}
    return _known("dose", what, lambda: (merging.dose(bench.rows([label]), 0, dose), {}))


def _known(
    step: str, what: dict, make: Callable[[], tuple[Delta, dict]]
) -> tuple[dict, Callable[[], Delta]]:
    """The record of a delta (its digest and what `make` tells of it), and a maker of the delta.

    The delta is built for the record only if no earlier run has left one, and never twice.
    """
    made: list[tuple[Delta, dict]] = []

    def once() -> tuple[Delta, dict]:
        if not made:
            made.append(make())
        return made[0]

    def compute(folder: Path) -> None:
        delta, told = once()
        record = told | {"digest": merging.delta_digest(delta)}
        (folder / "record.json").write_text(json.dumps(record, default=int), encoding="utf-8")

    folder = records.cached(step, VERSION, what, compute)
    return json.loads((folder / "record.json").read_text(encoding="utf-8")), lambda: once()[0]


def dose_curves(bench: Bench, doses: Iterable[float]) -> pd.DataFrame:
    """Dose-response of every specialist: columns task, dose, score, nll. Dose 0 is the base (of an
    encoder, below the specialist's head)."""
    plan = [(label, dose) for label in bench.tasks for dose in doses]
    out = []
    for label, dose in tqdm(plan, desc="dose-response", unit="visit", mininterval=5):
        examples, _ = at_dose(bench, label, dose)
        mean = examples[["correct", "nll"]].mean()
        out.append({"task": label, "dose": dose, "score": mean["correct"], "nll": mean["nll"]})
    return pd.DataFrame(out)


@dataclass(frozen=True)
class Merged:
    """A merge that was visited. `recipe` is {"method": …, options…}; `report` is that of
    merging.Report.as_dict(); `examples` and `states` as `visit` gives them; `same_as` names the
    earlier method of the group with the same delta."""

    group: tuple[str, ...]
    method: str
    arm: str
    recipe: dict
    report: dict
    examples: pd.DataFrame
    states: dict[str, Tensor]
    same_as: str | None = None

    @property
    def name(self) -> str:
        return merge_name(self.group, self.method, self.arm)


def merge_name(group: Iterable[str], method: str, arm: str = "default") -> str:
    """What the tables call a merge."""
    return f"{'+'.join(group)}|{method}" + ("" if arm == "default" else f"|{arm}")


def draw_groups(
    labels: Sequence[str], size: int, count: int, seed: int = 0
) -> list[tuple[str, ...]]:
    """A seeded sample of `count` different groups of `size` tasks; all, if there are no more.

    Members and groups are in the order of `labels`. A larger `count` adds groups to the same draw.
    """
    if math.comb(len(labels), size) <= count:
        return list(combinations(labels, size))
    rng, drawn = np.random.default_rng([seed, size]), set()
    while len(drawn) < count:
        drawn.add(tuple(sorted(rng.choice(len(labels), size, replace=False).tolist())))
    return [tuple(labels[i] for i in group) for group in sorted(drawn)]


def draw_swaps(
    labels: Sequence[str], group: Sequence[str], seed: int = 0
) -> list[tuple[str, str, tuple[str, ...]]]:
    """One drawn newcomer in the place of each member of a group: (leaves, enters, new group).

    Members of the new groups are in the order of `labels`, as in `draw_groups`. Raises ValueError
    if no task is left outside the group.
    """
    outside = [x for x in labels if x not in group]
    if not outside:
        raise ValueError(f"a group of all {len(labels)} tasks has no newcomer to swap in")
    rng = np.random.default_rng([seed, *(list(labels).index(x) for x in group)])
    enters = outside[rng.integers(len(outside))]
    swapped = {leaves: {*group, enters} - {leaves} for leaves in group}
    return [(x, enters, tuple(y for y in labels if y in new)) for x, new in swapped.items()]


def chebyshev_weights(
    d2x: np.ndarray, models: Sequence[str], owner: Sequence[str], group: Sequence[str]
) -> list[float]:
    """Weights (sum 1) of the centre of the least ball around the specialists of `group`.

    `d2x` (models, models, probes) are squared distances of states; `owner` names each probe's task.
    Read on the probes of the group's own tasks. No label and no merge is needed; a pair's are 1/2.
    """
    members = [list(models).index(x) for x in group]
    on = np.isin(owner, list(group))
    return bound.minimax(d2x[np.ix_(members, members, on)].mean(2)).weights.tolist()


def merge_group(
    bench: Bench,
    group: Iterable[str],
    recipes: Mapping[str, dict],
    seed: int = 0,
    arm: str = "default",
    probe: bool = True,
) -> list[Merged]:
    """Merge the specialists of `group` by each recipe and visit every distinct delta once.

    `recipes`: name -> {"method": …, options…}; `arm` says which version of the rule they are
    (`in_arm`). Every member is scored on its test examples; with `probe`, and in the default arm
    only, hidden states are read on the probes of all members; else `states` stays empty.
    """
    group, done = tuple(group), []
    for name, recipe in recipes.items():
        report, make = _merge(bench, group, recipe, seed)
        twin = next((m for m in done if merging.same(m.report["sketch"], report["sketch"])), None)
        if twin:
            seen, same_as = (twin.examples, twin.states), twin.same_as or twin.method
        else:
            probed = group if probe and arm == "default" else ()
            seen, same_as = visit(bench, report["digest"], make, group, probed), None
        done.append(Merged(group, name, arm, recipe, report, *seen, same_as))
    return done


def merge_all(
    bench: Bench,
    group: Sequence[str],
    recipes: Mapping[str, dict],
    arms: Iterable[Sequence[str]] = (),
    seed: int = 0,
) -> list[Merged]:
    """`merge_group` by each recipe as it is, then in `arms`: (recipe, arm) as `in_arm` takes it.

    An arm of a recipe that this group does not have is left out. `recipes` holds linear, which the
    arms are matched to.
    """
    done = merge_group(bench, group, recipes, seed)
    linear = next(m.report for m in done if m.method == "linear")
    for name, arm, recipe in _in_arms(recipes, arms, linear, len(group)):
        done += merge_group(bench, group, {name: recipe}, seed, arm)
    return done


def visit_group(
    bench: Bench,
    group: Sequence[str],
    recipes: Mapping[str, dict],
    arms: Iterable[Sequence[str]],
    doses: Iterable[float],
    seed: int = 0,
) -> None:
    """Leave in the store all that notebook 02 asks of a group: its merges, and its rules alone."""
    merged = merge_all(bench, group, recipes, arms, seed)
    loss_table(bench, merged, dose_curves(bench, doses), seed)


def same_training(bench: Bench, results: Path) -> float:
    """How far apart the training losses (nats) of these specialists and the committed ones lie.

    The largest difference at any step of the tasks that both have. Raises ValueError if they have
    none, and for a specialist beyond SAME_LOSS: it is another one, not the same rounded otherwise.
    """
    committed = pd.read_csv(results / "training.csv").groupby("task")["loss"].apply(list)
    apart = {}
    for label in committed.index.intersection(list(bench.tasks)):
        log = json.loads((bench.specialists[label] / "training.json").read_text(encoding="utf-8"))
        mine, theirs = log["loss"], committed[label]
        same_steps = len(mine) == len(theirs)
        apart[label] = np.abs(np.subtract(mine, theirs)).max() if same_steps else np.inf
    if not apart:
        raise ValueError(f"{results} has none of the tasks {', '.join(bench.tasks)}")
    other = [label for label, difference in apart.items() if difference > SAME_LOSS]
    if other:
        raise ValueError(
            f"the specialists of {', '.join(other)} are not those of {results}: their training "
            "losses differ, so their merges do; take scores of the same base, recipe and seed only"
        )
    return float(max(apart.values()))


def take(
    bench: Bench,
    group: Sequence[str],
    recipes: Mapping[str, dict],
    arms: Iterable[Sequence[str]],
    results: Path,
    seed: int = 0,
) -> dict[str, float]:
    """Put into the store what the committed tables in `results` hold of the merges of `merge_all`.

    So a study that is committed in parts goes on where no store of it is left. Specialists and
    merges are made again (`same_training` has passed them); a merge whose own-direction doses all
    agree with the table's to within SAME_DOSE is the same one but for rounding, and its scores are
    taken from there, to the five decimals that they have. What no table holds is read (hidden
    states) or left undefined (option_correct). Any other merge is left to be visited. Returns the
    names of those taken, each with the largest relative difference of a dose.
    """
    group, taken = tuple(group), {}
    doses, examples = _committed(results)
    linear, _ = _merge(bench, group, recipes["linear"], seed)
    plan = [(method, "default", recipe) for method, recipe in recipes.items()]
    for method, arm, recipe in plan + [*_in_arms(recipes, arms, linear, len(group))]:
        name = merge_name(group, method, arm)
        asked = {x: examples[name, x] for x in group if (name, x) in examples}
        known = {x: list(rows["id"]) for x, rows in asked.items()}
        if known != {x: list(bench.tasks[x].splits["test"]["id"]) for x in group}:
            continue  # other examples, another study, or the same model under another name
        report, make = _merge(bench, group, recipe, seed)
        committed = np.array([doses[name, x] for x in group])
        apart = np.abs(report["own"] / committed - 1).max()
        if not apart <= SAME_DOSE:
            continue
        for x, rows in asked.items():
            key = _score_key(bench, report["digest"], x)
            records.cached(*key, partial(_write_taken, rows, results.name))
        if arm == "default":
            visit(bench, report["digest"], make, group, group)
        if taken_from(bench, report["digest"], group) == {results.name}:
            taken[name] = float(apart)
    return taken


def taken_from(bench: Bench, digest: str, labels: Iterable[str]) -> set[str]:
    """The studies whose tables told a delta's scores (`take`); "" for those that a run made."""
    files = [records.place(*_score_key(bench, digest, x)) / records.TAKEN_FROM for x in labels]
    return {file.read_text(encoding="utf-8") if file.exists() else "" for file in files}


def _write_taken(rows: pd.DataFrame, study: str, folder: Path) -> None:
    rows.to_csv(folder / "examples.csv", index=False)
    (folder / records.TAKEN_FROM).write_text(study, encoding="utf-8")


@cache
def _committed(results: Path) -> tuple[dict, dict[tuple[str, str], pd.DataFrame]]:
    """By merge and task: committed own-direction doses, and examples with a visit's columns."""
    doses = pd.read_csv(results / "losses.csv").set_index(["merge", "task"])["dose_own"].to_dict()
    table = pd.read_csv(results / "examples.csv.gz", dtype={"example": str})
    table = table.rename(columns={"example": "id"}).assign(option_correct=np.nan)
    told = ["id", "correct", "nll", "option_correct", "invalid"]
    cells = {cell: rows[told] for cell, rows in table.groupby(["merge", "task"], sort=False)}
    return doses, cells


def swap_losses(
    bench: Bench,
    groups: Iterable[Sequence[str]],
    recipes: Mapping[str, dict],
    seed: int = 0,
) -> pd.DataFrame:
    """What each group loses before and after every swap of `draw_swaps`, merged by each recipe.

    Columns method, n, group, leaves, enters, swapped (the new group), before, after: mean merging
    loss (%) of the members on their test examples.
    """
    labels, rows = list(bench.tasks), []

    @cache
    def own(label: str) -> float:
        return at_dose(bench, label, 1.0)[0]["correct"].mean()

    def losses(group: Sequence[str]) -> list[float]:
        scores = (
            merged.examples.groupby("task")["correct"].mean()
            for merged in merge_group(bench, group, recipes, seed, probe=False)
        )
        return [np.mean([merging_loss(of[x], own(x)) for x in group]) for of in scores]

    for group in tqdm(list(groups), desc="swaps", unit="group", mininterval=5):
        before = losses(group)
        for leaves, enters, new in draw_swaps(labels, group, seed):
            told = len(group), "+".join(group), leaves, enters, "+".join(new)
            rows += [
                (name, *told, *of) for name, *of in zip(recipes, before, losses(new), strict=True)
            ]
    columns = ["method", "n", "group", "leaves", "enters", "swapped", "before", "after"]
    return pd.DataFrame(rows, columns=columns).sort_values("method", kind="stable")


def in_arm(recipe: dict, arm: str, linear: dict, n: int) -> dict:
    """A recipe for n models in another version.

    Another scale, so that rules can differ in direction alone: "norm": as long as the linear
    average; "dose": mean own-direction dose as the linear average; "sum": n times itself (the total
    weight of task arithmetic). "mask1", "mask2": the next draws of a rule that drops entries at
    random. "bfloat16": base and result rounded to that grid. `linear` is the report of the group's
    linear average. Raises ValueError for an unknown arm and for a mask of a rule that draws none.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: choose one of {', '.join(ARMS)}")
    if arm == "sum":
        return recipe | {"scale": float(n)}
    if arm == "bfloat16":
        return recipe | {"grid": arm}
    if arm.startswith("mask"):
        if not merging.METHODS[recipe["method"]].random:
            raise ValueError(f"{recipe['method']} drops nothing at random: it has no arm {arm!r}")
        return recipe | {"mask": int(arm.removeprefix("mask"))}
    asked = linear["effective_scale" if arm == "norm" else "own_mean"]
    return recipe | {"match": arm, "scale": asked}


def _in_arms(
    recipes: Mapping[str, dict], arms: Iterable[Sequence[str]], linear: dict, n: int
) -> Iterator[tuple[str, str, dict]]:
    """(recipe's name, arm, recipe in that arm) for the arms of those recipes that are there."""
    for name, arm in arms:
        if name in recipes:
            yield name, arm, in_arm(recipes[name], arm, linear, n)


def _merge(
    bench: Bench, group: Sequence[str], recipe: dict, seed: int
) -> tuple[dict, Callable[[], Delta]]:
    """The report of a merge (with its digest), and a maker of its delta.

    On a grid the delta leads from the base in fp32 to the rounded result; the report is that of the
    merge before rounding, but for the own-direction doses, which are those realised on the grid.
    """
    grid = recipe.get("grid")
    seed, options = _drawn(recipe, seed)

    def make() -> tuple[Delta, dict]:
        rows = bench.rows(group)
        delta, report = merging.merge(rows, labels=group, seed=seed, **options)
        told = report.as_dict()
        if grid:
            base = bench.sources([])[0].tensors
            delta, own = merging.rounded(base, rows, delta, getattr(torch, grid))
            told |= {"own": own}
        return delta, told

    what = _merge_key(bench, group, group, options, seed) | ({"grid": grid} if grid else {})
    return _known("merge", what, make)


def _drawn(recipe: Mapping, seed: int) -> tuple[int, dict]:
    """Seed and options of the merge of a recipe: what `mask` and `grid` ask for is not its own."""
    options = {name: value for name, value in recipe.items() if name not in ("mask", "grid")}
    return seed + recipe.get("mask", 0), options


def segment(
    bench: Bench, pair: Sequence[str], alphas: Iterable[float], seed: int = 0
) -> pd.DataFrame:
    """Scores along the straight line theta_0 + (1 - alpha) tau_1 + alpha tau_2 of two specialists.

    Columns task (each of the pair), alpha (0: the first specialist, 1: the second), score, nll.
    """
    out = []
    for alpha in alphas:
        recipe = {"method": "task_arithmetic", "weights": [1 - alpha, alpha]}
        report, make = _merge(bench, pair, recipe, seed)
        examples, _ = visit(bench, report["digest"], make, pair)
        for x, rows in examples.groupby("task", sort=False):
            mean = rows[["correct", "nll"]].mean()
            out.append({"task": x, "alpha": alpha, "score": mean["correct"], "nll": mean["nll"]})
    return pd.DataFrame(out)


def trained_twice(bench: Bench, label: str) -> tuple[Bench, tuple[np.ndarray, np.ndarray], float]:
    """A task's specialist beside one of the next seed: what a merge of equal aims looks like.

    Returns a bench of the two (its labels are `once` and `twice`, both with the task of `label`),
    their states on the task's probes (probes, layers, d), and the merging loss (%) of their linear
    average against the mean of their own scores.
    """
    first = bench.specialists[label]
    recipe = specialists.recipe_of(first)
    again = train(bench, label, replace(recipe, seed=recipe.seed + 1))
    both = {"once": first, "twice": again}
    two = replace(bench, tasks=dict.fromkeys(both, bench.tasks[label]), specialists=both)
    (average,) = merge_group(two, both, {"linear": {"method": "linear"}})
    own, states = zip(*(at_dose(two, x, 1.0, [x]) for x in both), strict=True)
    score = np.mean([examples["correct"].mean() for examples in own])
    loss = merging_loss(average.examples["correct"].mean(), score)
    once, twice = (of[x].double().numpy() for x, of in zip(both, states, strict=True))
    return two, (once, twice), loss


def _merge_key(
    bench: Bench, parents: Sequence[str], labels: Sequence[str], recipe: Mapping, seed: int
) -> dict:
    """What identifies a merge; the recipe with its defaults filled in, as those may change."""
    planned = {name: value for name, value in recipe.items() if name != "match"}
    plan = merging.plan(labels=labels, seed=seed, **planned)._asdict()
    what = {"plan": plan, "match": recipe.get("match")}
    return bench.parents(parents) | bench.machine() | what


def at_solo(bench: Bench, label: str, n: int, recipe: dict, seed: int = 0) -> pd.DataFrame:
    """The method's own loss: its merge of `label` with n - 1 partners that changed nothing."""
    labels = [label, *(f"unchanged {i}" for i in range(1, n))]
    seed, recipe = _drawn(recipe, seed)
    what = _merge_key(bench, [label], labels, recipe, seed)

    def make() -> tuple[Delta, dict]:
        rows = [
            merging.Row(name, base, [tau] + [merging.zero(tau.shape, tau.device)] * (n - 1))
            for name, base, (tau,) in bench.rows([label])
        ]
        return merging.merge(rows, labels=labels, seed=seed, **recipe)[0], {}

    record, make_delta = _known("solo", what, make)
    return visit(bench, record["digest"], make_delta, [label])[0]


# --- what was lost ---------------------------------------------------------------------------


def references(bench: Bench) -> pd.DataFrame:
    """What each task's losses are measured against; one row per task, on its test examples.

    specialist, nll_specialist: at dose 1; base: `base_ability`; nll_base: of the base from bare
    prompts (an encoder's: of its linear probe); chance: score of the commonest training answer.
    """
    bare = at_base(bench)[0].groupby("task")["nll"].mean()
    rows = []
    for label, task in bench.tasks.items():
        own = at_dose(bench, label, 1.0)[0]
        rows.append(
            {
                "task": label,
                "specialist": own["correct"].mean(),
                "base": base_ability(bench, label)["correct"].mean(),
                "chance": evaluate.constant_answer(task),
                "nll_specialist": own["nll"].mean(),
                "nll_base": bare[label],
            }
        )
    return pd.DataFrame(rows)


def loss_table(
    bench: Bench,
    merged: Iterable[Merged],
    doses: pd.DataFrame,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per merge and task: its losses, its controls, and the parts of its loss.

    With L the merging loss (%) and the control scores read off the task's dose-response curve in
    `doses`: dilution = L(a), a the ingredient dose; overlap = L(c) - L(a), c the own-direction
    dose; interference = L_total - L(c). control_solo and nll_solo, for rules that are no weighted
    sum, are the score and NLL of the same rule with partners that changed nothing, solo its loss.
    floor: a control (solo where it was run, else one of the two doses) below -90 %, where a partner
    can do no more harm.
    """
    known = references(bench).set_index("task")
    curves = dict(list(doses.groupby("task")))
    rows = []
    for m in tqdm(list(merged), desc="losses", unit="merge", mininterval=5):
        for i, x in enumerate(m.group):
            there = m.examples.loc[m.examples["task"] == x, ["correct", "nll", "invalid"]].mean()
            own, base, chance = known.loc[x, ["specialist", "base", "chance"]]
            a, c = m.report["ingredient"][i], m.report["own"][i]
            at_a, at_c = (read_dose(curves[x], dose, "score") for dose in (a, c))
            plain = merging.METHODS[m.report["method"]].coefficients is not None or m.same_as
            alone = nll_alone = np.nan
            if not plain:
                # At the scale that the merge had (matched alone, the rule would be another one), to
                # two digits: pairs of nearly one scale share a run.
                recipe = {name: value for name, value in m.recipe.items() if name != "match"}
                recipe |= {"scale": round(m.report["scale"], 2)}
                run = at_solo(bench, x, len(m.group), recipe, seed)
                alone, nll_alone = run[["correct", "nll"]].mean()
            lost = {"loss": merging_loss(there["correct"], own)}
            lost["chance_corrected"] = merging_loss(there["correct"], own, chance)
            diluted, reached, solo = (merging_loss(score, own) for score in (at_a, at_c, alone))
            controls = (diluted, reached) if plain else (solo,)
            rows.append(
                {
                    "merge": m.name,
                    "group": "+".join(m.group),
                    "n": len(m.group),
                    "method": m.method,
                    "arm": m.arm,
                    "task": x,
                    "score": there["correct"],
                    **known.loc[x],
                    **lost,
                    "nll": there["nll"],
                    "invalid": there["invalid"],
                    "dose_ingredient": a,
                    "dose_own": c,
                    "control_ingredient": at_a,
                    "control_own": at_c,
                    "control_solo": alone,
                    "nll_solo": nll_alone,
                    "solo": solo,
                    "dilution": diluted,
                    "overlap": reached - diluted,
                    "interference": lost["loss"] - reached,
                    "floor": any(loss < -90 for loss in controls),  # never where undefined
                    "same_as": m.same_as or "",
                }
            )
    return pd.DataFrame(rows)


# --- from one notebook to the next -----------------------------------------------------------


def save_bench(bench: Bench, settings: dict, file: Path) -> None:
    """Write what `open_bench` needs: `settings` of `tasks.load_tasks`, names and store folders."""
    content = {
        "base": bench.base,
        "settings": settings,
        "tasks": {label: task.name for label, task in bench.tasks.items()},
        "specialists": {
            label: folder.relative_to(records.store()).as_posix()
            for label, folder in bench.specialists.items()
        },
    }
    with records.atomic_write(file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def open_bench(file: Path, model, tokenizer, base: dict) -> Bench:
    """The bench that notebook 01 left, on a live base model.

    Raises ValueError if there is none, if it was made with another base, or if a specialist is no
    longer in the store.
    """
    if not file.is_file():
        raise ValueError(f"{file.name} is not in {file.parent}: run notebook 01 with this profile")
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["base"] != base:
        raise ValueError(
            f"the specialists of {file} were made from {content['base']['name']}, "
            f"not from {base['name']}: run notebook 01 with this model first"
        )
    specialists = {x: records.store() / path for x, path in content["specialists"].items()}
    lost = [label for label, folder in specialists.items() if not folder.is_dir()]
    if lost:
        raise ValueError(
            f"the specialists {', '.join(lost)} are gone from the store: delete {file.name} in "
            f"{file.parent.name} and run the same command again"
        )
    tasks = load_tasks(content["tasks"].values(), **content["settings"])
    return Bench(model, tokenizer, base, tasks, specialists)
