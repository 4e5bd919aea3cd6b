"""Which of my models can be merged? Distances before a merge, and what measured merges say of them.

Every specialist of one base reads the same probes in one forward pass. How far apart their hidden
states lie gives a ranking (Merging Difficulty Score, arXiv:2603.09463), the fewest merged models
that keep every task within a distortion, and minimax weights (`bound`); a line calibrated on
committed studies (`choose`) turns a distance into an expected loss with a prediction interval.
Nothing here is certain, so every number comes with what limits it.
"""

import argparse
import base64
import html
import json
import math
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import yaml
from numpy.typing import NDArray
from scipy.stats import rankdata
from tokenizers import Tokenizer
from tqdm import tqdm

from helpers import figures
from helpers import merge as merging
from helpers.advise import choices as choose
from helpers.states import bound
from helpers.states import measures as hidden
from helpers.states.batch import encode_prompt
from helpers.store import ROOT, atomic_write
from helpers.study import assets, tasks
from helpers.study import scores as evaluate

NEUTRAL = ROOT / "data" / "neutral_probes.txt"
TASK_PROBES = 64  # probes that are taken of a task that is named
LONGEST = 2000  # characters of a probe that are read
FAR = 0.5  # of the base's own norm: further away lies no model fine-tuned from it
STABLE = 0.9  # mean rank correlation of bootstrap rankings below which a ranking is called unstable
KEPT = 0.9  # share of a specialist's score that a merge should keep
DOSES = (0.0, 0.25, 0.5, 0.75, 1.0)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } figure { margin: 2rem 0 } figcaption { color: #444 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { text-align: left }
td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
"""


# --- what is given -------------------------------------------------------------------------------


def read_probes(sources: Sequence[str] = ()) -> pd.DataFrame:
    """Probe texts, each once: columns source and text.

    A source is a JSONL file (field prompt or text), a text file (one probe a line) or a task
    ("bigbench:…", "glue:…"); without any, the neutral sentences that come with the project. Raises
    ValueError for a source that cannot be read and unless two texts differ.
    """
    rows = []
    for source in sources or [str(NEUTRAL)]:
        file = Path(source).expanduser()
        if file.is_file():
            texts = _texts(file)
        elif source.partition(":")[0] in tasks.READERS:
            task = tasks.load_task(source, tasks.Sizes(1, 1, TASK_PROBES, 1), prompt="bare")
            texts = task.splits["probe"]["prompt"]
        else:
            raise ValueError(f"probes {source!r} are neither a file nor a task (source:name)")
        name = file.stem if file.is_file() else tasks.short(source)
        rows += [(name, text.strip()[:LONGEST]) for text in texts if text.strip()]
    probes = pd.DataFrame(rows, columns=["source", "text"]).drop_duplicates("text")
    if len(probes) < 2:
        raise ValueError("the probes are all the same: give texts that differ, 50 or more")
    return probes.reset_index(drop=True)


def _texts(file: Path) -> list[str]:
    """The texts of a file: its lines or, of a .jsonl file, each line's `prompt` or else its `text`.

    Empty lines do not count. Raises ValueError naming the file, and the line, that is no such text.
    """
    if file.suffix != ".jsonl":
        texts = file.read_text(encoding="utf-8").split("\n")
    else:
        rows = [row if isinstance(row, dict) else {} for row in _json_lines(file)]
        texts = [row.get("prompt", row.get("text")) for row in rows]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f"{file}, line {number}: no prompt or text is given as a string")
    if not any(text.strip() for text in texts):
        raise ValueError(f"{file} holds no text: give a text a line, or JSONL with prompt or text")
    return [text for text in texts if text.strip()]


def _json_lines(file: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
    return rows


def read_labelled(file: Path) -> list[dict]:
    """Solved examples of a task from JSONL: prompt, answer (or answers), and options if it has any.

    Raises ValueError for a line without a prompt or an answer and for an empty file.
    """
    out = []
    for number, row in enumerate(_json_lines(file), 1):
        answers = row.get("answers", row.get("answer"))
        answers = [answers] if isinstance(answers, str) else answers
        if not (isinstance(row.get("prompt"), str) and answers):
            raise ValueError(f"{file}, line {number}: an example needs a prompt and an answer")
        about = {"id": str(number), "prompt": row["prompt"], "answers": answers}
        out.append(about | {"options": row.get("options", [])})
    if not out:
        raise ValueError(f"{file} holds no examples")
    return out


def names_of(models: Sequence[str]) -> list[str]:
    """What tables call the models: the last part of each path or id, or all of it if two agree.

    Raises ValueError for fewer than two models and for one that is given twice.
    """
    if len(models) < 2:
        raise ValueError(f"advice needs two models or more, not {len(models)}")
    if len(set(models)) < len(models):
        raise ValueError("a model is given twice: name each once")
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(short) else list(models)


def _folder(model: str) -> Path:
    """A folder as it is (an adapter, or a checkpoint without config); else a model by its name."""
    path = Path(model).expanduser()
    return path if path.is_dir() else assets.model_folder(model)


def is_decoder(base: str) -> bool:
    """Whether a model's configuration names an architecture that writes text from left to right."""
    config = json.loads((assets.model_folder(base) / "config.json").read_text(encoding="utf-8"))
    return any(kind.endswith("CausalLM") for kind in config.get("architectures") or [])


def open_models(base: str, models: Mapping[str, str]) -> list[merging.Row]:
    """The task vectors of `models` (by label), as rows that hold no data yet.

    Raises ValueError, with the first reason, for models that cannot be merged into this base:
    other shapes or tensors, another vocabulary, adapters whose recorded base is not this one.
    """
    if not is_decoder(base):
        raise ValueError(f"{base} is no decoder: advice reads the state of a prompt's last token")
    folder = assets.model_folder(base)
    source = merging.open_base(folder)
    specialists = [merging.open_specialist(_folder(model), x) for x, model in models.items()]
    if any(s.base_digest for s in specialists) and not source.base_digest:
        source = source._replace(base_digest=assets.model_digest(folder))
    merging.check(source, specialists)
    ours = _vocabulary(folder)
    for label, model in models.items():
        theirs = _vocabulary(_folder(model))
        for number in sorted(ours.keys() & theirs.keys()):
            if ours[number] != theirs[number]:
                raise ValueError(
                    f"{label} has another vocabulary than the base (token {number} is "
                    f"{theirs[number]!r}, not {ours[number]!r}): they do not read the same input"
                )
    rows = merging.views(source, specialists)
    if not rows:
        raise ValueError("no model differs from the base: there is nothing to merge")
    return rows


def _vocabulary(folder: Path) -> dict[int, str]:
    """Token by number; empty where no tokenizer lies beside the weights, as with most adapters."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    return {number: token for token, number in Tokenizer.from_file(str(file)).get_vocab().items()}


def weight_distances(rows: Iterable[merging.Row], labels: Sequence[str]) -> NDArray:
    """||tau_i|| / ||theta_0|| over the tensors that some model changed, (models,).

    A fine-tuned model stays near its base (well below 0.1); an unrelated one of the same shape lies
    further away than the base's own norm. Raises ValueError for NaN or infinite weights.
    """
    moved, norm = np.zeros(len(labels)), 0.0
    for row in rows:
        norm += _square_norm(row.base)
        for i, tau in enumerate(row.taus):
            square = _square_norm(tau)
            if not math.isfinite(square):
                raise ValueError(f"{labels[i]}: {row.name} holds NaN or infinite values")
            moved[i] += square
    return np.sqrt(moved / norm)


def _square_norm(tensor: merging.Lazy) -> float:
    if tensor.factors is not None:  # ||s B A||^2 = s^2 <B'B, AA'>: no dense matrix is made
        scaling, B, A = tensor.factors
        B, A = B.double(), A.double()
        return float(scaling**2 * ((B.T @ B) * (A @ A.T)).sum())
    blocks = merging.row_blocks(tensor.shape, tensor.device)
    return sum(float(torch.linalg.vector_norm(tensor[block.rows])) ** 2 for block in blocks)


# --- one pass per model --------------------------------------------------------------------------


class Reading(NamedTuple):
    """What was read of the models: `states` (1 + models, probes, d), the base first, last layer,
    last token; `moved`, their relative distances in weight space; `doses`, dose-response curves of
    those with labelled examples (columns task, dose, score)."""

    labels: list[str]
    states: NDArray
    moved: NDArray
    doses: pd.DataFrame


def read(
    base: str,
    models: Mapping[str, str],
    probes: pd.DataFrame,
    labelled: Mapping[str, list[dict]] | None = None,
    device: str = "cpu",
    batch_size: int = 20,
) -> Reading:
    """Forward passes over the probes: one of the base, one of each model (by label).

    Says first what it will cost. The base is loaded once, in float32; each model is its base plus
    its task vector while it is read. Raises ValueError, before any pass, for what `open_models` and
    `weight_distances` refuse and for examples of a model that is not there.
    """
    labelled = labelled or {}
    for name in labelled.keys() - models.keys():
        raise ValueError(f"labelled examples of {name}, which is none of {', '.join(models)}")
    labels = list(models)
    rows = open_models(base, models)
    moved = weight_distances(rows, labels)
    model, tokenizer = assets.load_model(base, device=device)
    encoded = [encode_prompt(tokenizer, text) for text in probes["text"]]
    _print_cost(model, rows, encoded, labels, labelled, batch_size)

    def last_layer() -> NDArray:
        return hidden.prompt_states(model, encoded, batch_size=batch_size)[:, -1].numpy()

    def score(label: str) -> float:
        return evaluate.score(model, tokenizer, labelled[label])["correct"].mean()

    states, curves = [last_layer()], []
    for i, label in enumerate(tqdm(labels, desc="reading", unit="model", disable=None)):
        with merging.applied(model, merging.dose(rows, i, 1.0)):
            states.append(last_layer())
        for dose in DOSES if label in labelled else ():
            with merging.applied(model, merging.dose(rows, i, dose)):
                curves.append({"task": label, "dose": dose, "score": score(label)})
    doses = pd.DataFrame(curves, columns=["task", "dose", "score"])
    return Reading(labels, np.array(states), moved, doses)


def _print_cost(model, rows, encoded, labels, labelled, batch_size: int) -> None:
    """Passes, tokens, memory, and minutes at the speed of a first batch."""
    first = sorted(encoded, key=len)[len(encoded) // 2 :][:batch_size]  # of ordinary length
    start = time.perf_counter()
    hidden.prompt_states(model, first, batch_size=batch_size)
    rate = (time.perf_counter() - start) / sum(map(len, first))
    tokens = sum(map(len, encoded)) * (1 + len(labels))
    parameters = sum(p.numel() for p in model.parameters())
    dense = 2 * sum(row.base.shape.numel() for row in rows)  # a task vector, and base + task vector
    solved = sum(map(len, labelled.values())) * len(DOSES)
    examples = f" and {solved} labelled examples" if solved else ""
    print(
        f"{1 + len(labels)} passes over {len(encoded)} probes{examples}: {tokens:,} tokens, about "
        f"{rate * tokens / 60:.1f} minutes{' and the examples' if solved else ''}, "
        f"{4 * (parameters + dense) / 1e9:.1f} GB of memory",
        file=sys.stderr,  # like progress bars: it differs between machines
    )


# --- from states to tables -----------------------------------------------------------------------


def distance_tables(
    states: NDArray, labels: Sequence[str], source: Sequence[str], draws: int = 1000, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, float]:
    """HiddenSim of every pair, difficulty of every model, and how stable the ranking is.

    `states`: (models, probes, d), without the base. pairs: task_a, task_b, distance, low, high.
    models: model, mds (mean distance to the others), low, high, rank (1: hardest to merge) and its
    range rank_low to rank_high. Intervals are 90 %, over probes resampled within their source,
    jointly for all models. Stability: mean rank correlation of the resampled rankings with the
    ranking (nan for two models, which have no ranking).
    """
    names = list(combinations(labels, 2))
    at = np.array(list(combinations(range(len(labels)), 2)))
    by_probe = np.array([hidden.probe_distances(states[i], states[j]) for i, j in at])
    rng = np.random.default_rng(seed)
    weight = np.zeros((draws, by_probe.shape[1]))
    for part in (np.flatnonzero(np.asarray(source) == name) for name in dict.fromkeys(source)):
        weight[:, part] = rng.multinomial(len(part), np.full(len(part), 1 / len(part)), size=draws)
    share = np.zeros((len(labels), len(names)))  # each model's mean over its own pairs
    for column, ends in enumerate(at):
        share[ends, column] = 1 / (len(labels) - 1)
    distance, drawn = by_probe.mean(1), weight @ by_probe.T / by_probe.shape[1]
    mds, drawn_mds = share @ distance, drawn @ share.T

    pairs = pd.DataFrame(names, columns=["task_a", "task_b"]).assign(distance=distance)
    pairs["low"], pairs["high"] = np.quantile(drawn, [0.05, 0.95], axis=0)
    models = pd.DataFrame({"model": labels, "mds": mds})
    models["low"], models["high"] = np.quantile(drawn_mds, [0.05, 0.95], axis=0)
    ranks, drawn_ranks = rankdata(-mds), rankdata(-drawn_mds, axis=1)
    models["rank"] = ranks
    models["rank_low"], models["rank_high"] = np.quantile(drawn_ranks, [0.05, 0.95], axis=0)
    stability = math.nan
    if len(labels) > 2:
        centred, moving = ranks - ranks.mean(), drawn_ranks - ranks.mean()
        size = np.linalg.norm(moving, axis=1) * np.linalg.norm(centred)
        stability = float(np.mean(moving @ centred / np.where(size > 0, size, 1)))
    return pairs, models, stability


def doses_kept(doses: pd.DataFrame, share: float = KEPT) -> pd.Series:
    """The least dose at which each model keeps `share` of its score at dose 1, by its curve.

    `doses`: columns task, dose, score. Linear between the doses measured; nan for a model that
    scores 0 at dose 1. A merge that gives a model less than this dose loses more than the rest
    without any partner.
    """
    out = {}
    for task, curve in doses.sort_values("dose").groupby("task", sort=False):
        grid = np.linspace(0, 1, 101)
        score = np.interp(grid, curve["dose"], curve["score"])
        enough = grid[score >= share * score[-1] - 1e-9]
        out[task] = float(enough[0]) if score[-1] > 0 else math.nan
    return pd.Series(out, name="dose_kept", dtype=float)


# --- advice --------------------------------------------------------------------------------------


class Recommendation(NamedTuple):
    """One merge to make: `models` (labels), rule and weights (None: the rule's default), why, and
    the predicted loss (%) of the worst pair among them with its 90 % interval."""

    title: str
    models: tuple[str, ...]
    method: str
    weights: list[float] | None
    why: str
    predicted: float = math.nan
    low: float = math.nan
    high: float = math.nan


class Advice(NamedTuple):
    """Everything that is told.

    models, pairs: `distance_tables`; models with `weights`, their relative distance from the base,
    and `dose_kept` where examples are labelled. expected: `choose.expected_losses`. steps: for each
    number of merged models the least worst-task distortion, as a share of the mean squared distance
    that fine-tuning moved the states, and who shares a model. sources: where each model is.
    """

    base: str
    sources: dict[str, str]
    probes: int
    models: pd.DataFrame
    pairs: pd.DataFrame
    expected: pd.DataFrame
    steps: pd.DataFrame
    doses: pd.DataFrame
    recommendations: list[Recommendation]
    limits: list[str]


def advice(
    reading: Reading,
    source: Sequence[str],
    known: choose.Known,
    base: str,
    sources: Mapping[str, str],
    keep: int | None = None,
    distortion: float = 0.25,
    draws: int = 1000,
    seed: int = 0,
) -> Advice:
    """What a reading says: no model is needed any more.

    `source` of each probe; `keep`: size of the subset asked for (default: all models but one);
    `distortion`: how far a merge may move the worst task's states, as a share of the mean squared
    distance that fine-tuning moved them.
    """
    labels = reading.labels
    pairs, models, stability = distance_tables(reading.states[1:], labels, source, draws, seed)
    models["weights"] = reading.moved
    if len(reading.doses):
        models["dose_kept"] = doses_kept(reading.doses).reindex(labels).to_numpy()
    expected = choose.expected_losses(pairs, known)
    d2 = bound.squared_distances(reading.states[1:]).mean(-1)
    moved2 = bound.distortion_x(reading.states[1:], reading.states[0]).mean()
    steps = bound.staircase(d2)
    table = pd.DataFrame(
        {
            "models": [step.models for step in steps],
            "distortion": [step.distortion / moved2 for step in steps],
            "lower": [step.lower / moved2 for step in steps],
            "shared": [[[labels[i] for i in group] for group in step.groups] for step in steps],
        }
    )
    made = [_together("all", labels, known, f"one model for all {len(labels)} tasks")]
    if len(labels) > 2:
        made += [_subset(labels, pairs, expected, known, keep or len(labels) - 1)]
        made += [_minimax(labels, d2)]
        made += _partition(table, bound.models_needed(steps, distortion * moved2)[1], known)
    if "dose_kept" in models and models["dose_kept"].notna().all():
        made += [_kept_doses(models)]
    made = [_with_prediction(r, expected) for r in made]
    limits = limits_of(models, pairs, expected, known, stability, len(source))
    return Advice(
        base, dict(sources), len(source), models.sort_values("rank"), pairs, expected, table,
        reading.doses, made, limits,
    )  # fmt: skip


def _together(title: str, group: Sequence[str], known: choose.Known, why: str) -> Recommendation:
    rule = choose.best_rule(known.groups, len(group))
    return Recommendation(title, tuple(group), rule, None, why)


def _subset(
    labels: Sequence[str],
    pairs: pd.DataFrame,
    expected: pd.DataFrame,
    known: choose.Known,
    keep: int,
) -> Recommendation:
    mine = expected[expected["method"] == choose.best_rule(known.groups, keep)]
    values = mine["predicted"] if len(mine) else -pairs["distance"]
    score = choose.by_pair(pairs, values, lambda inside: (min(inside), sum(inside)))
    chosen = choose.best_subset(labels, keep, score)
    left = ", ".join(x for x in labels if x not in chosen) or "none"
    by = "least predicted worst loss" if len(mine) else "least largest distance (nothing measured)"
    return _together(f"keep {keep}", chosen, known, f"{by}; left out: {left}")


def _minimax(labels: Sequence[str], d2: NDArray) -> Recommendation:
    weights = [round(float(w), 4) for w in bound.minimax(d2).weights]
    inside = [x for x, w in zip(labels, weights, strict=True) if w == 0]
    why = "weights that minimise the worst task's distance from an average of the states"
    if inside:
        why += f"; weight 0 leaves out {', '.join(inside)}, who lie among the others"
    return Recommendation("minimax", tuple(labels), "linear", weights, why)


def _partition(steps: pd.DataFrame, count: int, known: choose.Known) -> list[Recommendation]:
    step = steps.set_index("models").loc[count]
    groups = [group for group in step["shared"] if len(group) > 1] if count > 1 else []
    why = f"one of {count} models that keep every task within {step['distortion']:.2f} of the move"
    return [_together(f"share {i}", group, known, why) for i, group in enumerate(groups, 1)]


def _kept_doses(models: pd.DataFrame) -> Recommendation:
    by_name = models.set_index("model")["dose_kept"]
    why = f"each model at the least dose that alone keeps {KEPT:.0%} of its score"
    weights = [round(float(w), 2) for w in by_name]
    return Recommendation("doses", tuple(by_name.index), "task_arithmetic", weights, why)


def _with_prediction(made: Recommendation, expected: pd.DataFrame) -> Recommendation:
    inside = expected["task_a"].isin(made.models) & expected["task_b"].isin(made.models)
    mine = expected[inside & (expected["method"] == made.method)]
    if mine.empty or made.weights is not None:  # predictions are for a rule's default weights
        return made
    worst = mine.loc[mine["predicted"].idxmin()]
    return made._replace(**{x: float(worst[x]) for x in ("predicted", "low", "high")})


def limits_of(
    models: pd.DataFrame,
    pairs: pd.DataFrame,
    expected: pd.DataFrame,
    known: choose.Known,
    stability: float,
    probes: int,
) -> list[str]:
    """What the advice cannot carry, in sentences: read before acting on it."""
    out = [
        f"{row.model} lies {row.weights:.2f} of the base's own norm away from it: it was hardly "
        "fine-tuned from this base, and no average of unrelated models works"
        for row in models.itertuples()
        if row.weights > FAR
    ]
    if stability < STABLE:
        out.append(
            f"the ranking is not stable on {probes} probes (mean rank correlation of resampled "
            f"rankings {stability:.2f}, below {STABLE}): give more probes, or do not rank"
        )
    if pairs["distance"].max() == 0:
        out.append("all models give the same states on these probes: they tell nothing apart")
    studied = sorted(set(known.pairs["task_a"]) | set(known.pairs["task_b"]))
    if expected.empty:
        out.append("the studies have too few pairs of other tasks to predict a loss")
        return out
    outside = expected.groupby(["task_a", "task_b"])["outside"].max()
    beyond = (outside > 0).sum()
    if beyond:
        low, high = known.pairs[known.distance].min(), known.pairs[known.distance].max()
        out.append(
            f"{beyond} of {len(pairs)} distances lie outside what the studies saw ({low:.2f} to "
            f"{high:.2f}), by up to {outside.max():.1f} times that range: predictions extrapolate"
        )
    if expected["low"].isna().any():
        out.append(
            f"{len(studied)} calibration tasks are too few for prediction intervals (5 are needed)"
        )
    out.append(
        f"predictions come from pairs of {len(studied)} tasks, LoRA adapters of one small model "
        f"({', '.join(known.names)}) read on {choose.READ_ON[known.distance]}: how far they carry "
        "to other models and texts is not known"
    )
    larger = known.groups[(known.groups["n"] > 2) & known.groups["method"].isin(choose.RULES)]
    if len(models) > 2 and len(larger):
        seen = larger.groupby("n")["loss"].mean().round(0)
        said = ", ".join(f"{loss:.0f} % at {n}" for n, loss in seen.items())
        out.append(f"predictions are for pairs; larger merges lost more there: on average {said}")
    return out


def merge_command(made: Recommendation, base: str, sources: Mapping[str, str]) -> str:
    """The command line that carries a recommendation out."""
    words = ["python", "-m", "helpers", "merge", "--method", made.method, "--base", base]
    words += ["--models", *(sources[x] for x in made.models)]
    if made.weights is not None:
        words += ["--weights", *map(str, made.weights)]
    return shlex.join([*words, "--out", f"merged-{made.title.replace(' ', '-')}"])


def mergekit_yaml(made: Recommendation, base: str, sources: Mapping[str, str]) -> str:
    """The same merge as a mergekit configuration.

    Averaging is stated as task arithmetic at weights of sum 1: the same model, and mergekit's
    `linear` would take the base for one more.
    """
    weights = made.weights or [1.0] * len(made.models)
    if made.method == "linear":
        weights = [w / math.fsum(weights) for w in weights]
    adapter = {x: (_folder(sources[x]) / "adapter_config.json").is_file() for x in made.models}
    listed = [
        {
            "model": f"{base}+{sources[x]}" if adapter[x] else sources[x],
            "parameters": {"weight": w},
        }
        for x, w in zip(made.models, weights, strict=True)
    ]
    name = "task_arithmetic" if made.method == "linear" else made.method
    config = {"merge_method": name, "base_model": base, "models": listed}
    if made.method == "ties":
        config["parameters"] = {"density": merging.options_of("ties")["density"].default}
    return yaml.safe_dump(config, sort_keys=False)


def advise(
    base: str,
    models: Sequence[str],
    probes: Sequence[str] = (),
    labelled: Mapping[str, Path] | None = None,
    studies: Iterable[Path] | None = None,
    keep: int | None = None,
    distortion: float = 0.25,
    device: str = "cpu",
    seed: int = 0,
) -> Advice:
    """Advice on models of one base: folders, adapters, hub ids or embedded names.

    `probes` as in `read_probes`; `labelled`: files of solved examples by model name; `studies`:
    folders of tables to calibrate on (default: all committed ones), where tasks named like one of
    the models take no part. Raises ValueError for anything that cannot be advised on.
    """
    sources = dict(zip(names_of(models), models, strict=True))
    if keep is not None and not 2 <= keep <= len(sources):
        raise ValueError(f"keep between 2 and {len(sources)} of the models, not {keep}")
    texts = read_probes(probes)
    known = choose.known_merges(studies, without=sources, neutral=not probes)
    solved = {name: read_labelled(Path(file)) for name, file in (labelled or {}).items()}
    reading = read(base, sources, texts, solved, device)
    return advice(
        reading, texts["source"].tolist(), known, base, sources, keep, distortion, seed=seed
    )


# --- what is shown -------------------------------------------------------------------------------


def draw(told: Advice) -> plt.Figure:
    """Distances of each model to the others and its MDS; dose-response curves where known."""
    panels = 2 if len(told.doses) else 1
    fig, axes = plt.subplots(
        1, panels, squeeze=False, figsize=(6.5 * panels, 1.5 + 0.5 * len(told.models))
    )
    ax = axes[0, 0]
    for at, row in enumerate(told.models.iloc[::-1].itertuples()):
        mine = told.pairs[(told.pairs["task_a"] == row.model) | (told.pairs["task_b"] == row.model)]
        for shift, pair in zip(np.linspace(-0.25, 0.25, len(mine)), mine.itertuples(), strict=True):
            ax.plot([pair.low, pair.high], [at + shift] * 2, color=figures.GREY, lw=0.8)
            ax.plot(pair.distance, at + shift, ".", color=figures.GREY)
        ax.plot([row.low, row.high], [at, at], color=figures.BLUE, lw=2.5)
        ax.plot(row.mds, at, "D", color=figures.BLUE)
    ax.set_yticks(range(len(told.models)), told.models["model"].iloc[::-1])
    ax.set_xlabel("HiddenSim distance (0: same direction, 2: opposite)")
    if panels == 2:
        figures.dose_curves(axes[0, 1], told.doses)
    return fig


CAPTION = """Distances of each model to every other (grey) and their mean, its Merging Difficulty
Score (blue diamond), hardest at the top. Bars: 90 % intervals over {n} probes, resampled."""
ALT = "One row per model: grey dots for its distances to the others, a blue diamond at their mean."


def text(told: Advice) -> str:
    """The advice as it is printed."""
    rounded = {"float_format": "{:.3g}".format, "index": False}
    shown = told.pairs.sort_values("distance", ascending=False)
    parts = ["Models, hardest to merge first", told.models.to_string(**rounded)]
    parts += ["Pairs, furthest first (all of them are in the report)"]
    parts += [shown.head(15).to_string(**rounded), "How many merged models keep every task near?"]
    for step in told.steps.itertuples():
        shared = " | ".join(" + ".join(group) for group in step.shared)
        parts.append(f"  {step.models}: worst task {step.distortion:.2f} of the move: {shared}")
    for made in told.recommendations:
        parts += [f"{made.title}: {' + '.join(made.models)}: {made.why}{_loss(made)}"]
        parts += ["  " + merge_command(made, told.base, told.sources)]
    return "\n".join([*parts, "Limits", *(f"- {limit}" for limit in told.limits)])


def _loss(made: Recommendation) -> str:
    if math.isnan(made.predicted):
        return ""
    span = "" if math.isnan(made.low) else f" [{made.low:.0f}, {made.high:.0f}]"
    return f"; predicted loss of its worst pair {made.predicted:.0f} %{span}"


def write_report(
    told: Advice, file: Path, more: Mapping[str, pd.DataFrame] | None = None
) -> list[Path]:
    """The advice as `file` (HTML, whole in itself) and, beside it, as JSON and a figure.

    `more`: further tables for the page, by heading.
    """
    with plt.style.context(figures.STYLE):
        caption = " ".join(CAPTION.format(n=told.probes).split())
        drawn = draw(told)
        picture = figures.save(drawn, f"{file.stem}_distances", caption, ALT, folder=file.parent)
        plt.close(drawn)
    frames = {
        name: getattr(told, name) for name in ("models", "pairs", "expected", "steps", "doses")
    }
    made = [
        r._asdict()
        | {
            "command": merge_command(r, told.base, told.sources),
            "mergekit": mergekit_yaml(r, told.base, told.sources),
        }
        for r in told.recommendations
    ]
    content = {name: json.loads(frame.to_json(orient="records")) for name, frame in frames.items()}
    content |= {"base": told.base, "sources": told.sources, "probes": told.probes}
    content |= {"recommendations": made, "limits": told.limits}
    with atomic_write(file.with_suffix(".json")) as part:
        part.write_text(json.dumps(_defined(content), indent=1) + "\n", encoding="utf-8")
    with atomic_write(file) as part:
        part.write_text(
            _page(told, frames | (more or {}), made, picture, caption), encoding="utf-8"
        )
    return [file, file.with_suffix(".json"), picture]


def _defined(content):
    """NaN, which JSON has not, as null."""
    if isinstance(content, dict):
        return {key: _defined(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_defined(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def _page(told: Advice, frames, made: list[dict], picture: Path, caption: str) -> str:
    code = base64.b64encode(picture.read_bytes()).decode()
    title = f"Which models of {told.base} can be merged?"
    titles = {
        "models": "Models, hardest to merge first",
        "pairs": "Distances between pairs",
        "expected": "Predicted loss of each pair (%)",
        "steps": "How many merged models keep every task near?",
        "doses": "Dose-response of each model",
    }
    parts = [f"<h1>{html.escape(title)}</h1>", "<h2>Recommendations</h2>"]
    for r, named in zip(told.recommendations, made, strict=True):
        head = f"{r.title}: {' + '.join(r.models)}"
        parts += [f"<h3>{html.escape(head)}</h3><p>{html.escape(r.why + _loss(r))}</p>"]
        parts += [f"<pre>{html.escape(named[kind])}</pre>" for kind in ("command", "mergekit")]
    limits = "".join(f"<li>{html.escape(limit)}</li>" for limit in told.limits)
    parts += ["<h2>Limits</h2>", f"<ul>{limits}</ul>"]
    parts += [f'<figure><img src="data:image/png;base64,{code}" alt="{ALT}">']
    parts += [f"<figcaption>{caption}</figcaption></figure>"]
    for name, frame in frames.items():
        if len(frame):
            cells = frame.to_html(index=False, border=0, float_format=lambda x: f"{x:.3f}")
            parts += [f"<h2>{html.escape(titles.get(name, name))}</h2>", cells]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">\n<title>{html.escape(title)}'
        f"</title>\n<style>{STYLE} pre {{ white-space: pre-wrap }}</style>\n{body}\n</html>\n"
    )


# --- the command ---------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """`python -m helpers advise`: parse, read, advise; ValueError if it cannot."""
    description = "Say before merging which models of one base will go together."
    parser = argparse.ArgumentParser(prog="python -m helpers advise", description=description)
    parser.add_argument("--base", required=True, help="the base model: a name or a folder")
    parser.add_argument(
        "--models", nargs="+", required=True, help="two or more adapters or checkpoints of it"
    )
    parser.add_argument(
        "--probes",
        nargs="+",
        default=[],
        help="texts or JSONL of your own, or tasks; default: neutral sentences",
    )
    parser.add_argument("--keep", type=int, metavar="K", help="size of the subset to choose")
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME", help="models to leave out"
    )
    parser.add_argument(
        "--labelled",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="solved examples of a model's task (JSONL: prompt, answer): doses it needs",
    )
    parser.add_argument(
        "--distortion",
        type=float,
        default=0.25,
        help="how far a shared model may move the worst task, as a share of fine-tuning's own move",
    )
    parser.add_argument("--report", type=Path, default=Path("advice.html"), metavar="OUT.html")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling of probes")
    given = parser.parse_args(argv)
    if given.report.suffix != ".html":
        raise ValueError(f"{given.report} must end in .html")
    labels = dict(zip(names_of(given.models), given.models, strict=True))
    for name in given.exclude:
        if name not in labels:
            raise ValueError(f"--exclude {name}: the models are {', '.join(labels)}")
    kept = [model for label, model in labels.items() if label not in given.exclude]
    labelled = dict(_named_file(item) for item in given.labelled)
    told = advise(
        given.base, kept, given.probes, labelled, None, given.keep, given.distortion,
        given.device, given.seed,
    )  # fmt: skip
    print(text(told))
    written = write_report(told, given.report)
    print("written: " + ", ".join(map(str, written)))


def _named_file(item: str) -> tuple[str, Path]:
    name, equals, file = item.partition("=")
    if not (equals and Path(file).is_file()):
        raise ValueError(f"--labelled {item!r} is not NAME=FILE with a file that is there")
    return name, Path(file)
