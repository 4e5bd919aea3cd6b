"""Does what lies beside the specialists' weights agree with what lies beside the base's?

What makes a merge meaningless is refused unless it is forced: another vocabulary, another function
of the same weights, a model that no fine-tuning led to. What the merge loses is said.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.merge.anatomy import config_of
from helpers.merge.blocks import gram_matrix
from helpers.merge.card import name_of
from helpers.merge.sources import Source
from helpers.merge.vocabulary import words_of
from helpers.merge.weights import json_if_there, read_text

# Of a configuration, what does not change the function of the weights, or is compared apart.
HARMLESS = re.compile(
    r"_.*|architectures|auto_map|(torch_)?dtype|transformers_(version|weights)|use_cache"
    r"|tie_word_embeddings|vocab_size|max_position_embeddings|initializer_\w+|quantization_config"
    r"|\w+_token_id|id2label|label2id|num_labels|problem_type|finetuning_task|output_\w+|return_\w+"
    r"|\w*dropout\w*|\w*layerdrop|\w*pdrop|drop_path\w*|gradient_checkpointing|pretraining_tp"
    r"|router_\w*coef|task_specific_params|unsloth\w*|tokenizer_class|deterministic_\w+"
    r"|ctc_\w+|apply_spec_augment|mask_(time|feature)_\w+|sparse_\w+|forced_\w+"
    r"|(begin_)?suppress_tokens"
)
# What tensors' shapes say as well: without it a class works it out.
SHAPES = ("head_dim", "n_inner")
WINDOWS = ("max_window_layers", "sliding_window")  # of use, if windows are used
ENDS = ("generation_config.json", "config.json")  # where a model's end token stands
# cosine to the base's weights below which a model was not fine-tuned from it
RELATED = 0.5
SAMPLED = 16  # matrices and rows of each, by which that is told
QUANTISED = re.compile(r"(4|8)-?bit|bnb|gptq|awq|int[48]|fp8", re.IGNORECASE)


Models = Sequence[tuple[str, Path, Source]]  # name, folder and weights of each


def objections(
    base: Source, base_folder: Path, models: Models, heads: str, by_token: bool = False
) -> Iterator[str]:
    """Why a merge with these models would mean nothing: one sentence for each reason.

    by_token: whether rows of embeddings are matched by token.
    """
    known = {
        number: (token, "the base") for token, number in words_of(base_folder).items()
    }
    for name, folder, source in models:
        if not by_token:
            yield from _other_vocabulary(name, known, words_of(folder))
        if source.adapter is None:
            # as classes read them, with their defaults
            read = base.anatomy and source.anatomy
            pairs = ((base, base_folder), (source, folder))
            configs = [
                x.anatomy.settings if read else config_of(place) for x, place in pairs
            ]
            yield from _other_function(
                name, *(dict(_flat(config)) for config in configs)
            )
            yield from _unrelated(name, base, source)
    if heads == "merge":
        yield from _other_labels(base, base_folder, models)


def _other_vocabulary(
    name: str, known: dict[int, tuple[str, str]], words: dict[str, int]
) -> Iterator[str]:
    """known: of each row its token, and who has it; the model's own rows are added."""
    for token, number in sorted(words.items(), key=lambda pair: pair[1]):
        there, whose = known.setdefault(number, (token, name))
        if there != token:
            yield (
                f"{name} has another vocabulary than {whose} (token {number} is {token!r}, "
                f"not {there!r}): --tokenizer base, or a model's name, matches rows by token"
            )
            return


def _other_function(
    name: str, base: dict[str, Any], other: dict[str, Any]
) -> Iterator[str]:
    for key in sorted(base.keys() & other.keys()):
        if key.endswith(SHAPES) and None in (base[key], other[key]):
            continue
        if base[key] != other[key]:
            yield (
                f"{name} computes something else with the same weights: {key} of its config is "
                f"{other[key]!r}, the base's {base[key]!r}"
            )
            return


def _flat(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The settings that change what the weights compute, those of parts by dotted names."""
    for key, value in config.items():
        if HARMLESS.fullmatch(str(key)):
            continue
        if key in WINDOWS and not config.get("use_sliding_window", True):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _other_labels(base: Source, folder: Path, models: Models) -> Iterator[str]:
    """Heads of one size can be of two tasks."""
    named = [("the base", labels_of(base, folder))]
    named += [(name, labels_of(source, place)) for name, place, source in models]
    stated = [(name, labels) for name, labels in named if labels is not None]
    for name, labels in stated[1:]:
        first, others = stated[0]
        if labels != others:
            yield (
                f"{name} has the labels {labels}, {first} {others}: their heads mean other "
                "things; --heads base leaves the base's"
            )


def labels_of(source: Source, folder: Path) -> dict[str, str] | None:
    """What a model's classification head tells apart; None without one, or without names."""
    config = config_of(folder)
    if source.adapter is not None or "Classification" not in str(
        config.get("architectures")
    ):
        return None
    read = source.anatomy.settings if source.anatomy else config
    labels = {str(key): name for key, name in (read.get("id2label") or {}).items()}
    unnamed = {key: f"LABEL_{key}" for key in labels}
    return None if labels == unnamed else labels


def _unrelated(name: str, base: Source, source: Source) -> Iterator[str]:
    """By the cosine of a sample of rows of some matrices: near 1 after fine-tuning, else near 0."""
    matrices = []
    for key in sorted(base.tensors.keys() & source.tensors.keys()):
        origin, tuned = base.tensors[key], source.tensors[key]
        alike = origin.ndim == 2 and origin.shape == tuned.shape
        if alike and origin.is_floating_point():
            matrices.append((origin, tuned))
    total = np.zeros((2, 2))
    for origin, tuned in matrices[:: max(1, len(matrices) // SAMPLED)]:
        step = max(1, origin.shape[0] // SAMPLED)
        total += gram_matrix([origin[::step], tuned[::step]])
    lengths = np.sqrt(total[0, 0] * total[1, 1])
    if total[0, 1] < RELATED * lengths:
        cosine = total[0, 1] / lengths
        yield (
            f"{name} is no fine-tuned version of the base: the cosine of their weights is "
            f"{cosine:.2f}, after fine-tuning it is near 1"
        )


def losses(
    weights: Source,
    base: Path,
    tokenizer: Path,
    words: Collection[str],
    models: Models,
) -> Iterator[str]:
    """What a merge leaves behind, or what is odd about its models: one sentence each.

    tokenizer: the folder whose tokenizer the merge has; words: all of the merge's tokens.
    """
    template = _template(tokenizer)
    for name, folder, source in models:
        if _template(folder) not in (None, template):
            yield (
                f"{name} has a chat template that is not the merge's: --tokenizer {name} takes its "
                "tokenizer, template and end tokens"
            )
        for i, file in enumerate(ENDS):
            own = _eos([folder], [file])
            ends = _eos([tokenizer, base], ENDS[i:])
            if own is not None and own != ends:
                yield f"{name} ends answers with token {own}, the merge with {ends} ({file})"
        lacking = words_of(folder).keys() - words
        if words and lacking:
            yield (
                f"{name} has tokens that the merge's tokenizer lacks, {min(lacking)!r} among "
                "them: --tokenizer union keeps them"
            )
        if source.adapter is not None:
            yield from _other_base(name, source.adapter.base, base)
        if source.adapter is None and _is_coarser(source, weights):
            yield f"{name} is stored more coarsely than the base: what that rounds off is no change"
    if config_of(base).get("auto_map"):
        yield "the base's own code is not copied, and auto_map is left out of the config"


def _is_coarser(source: Source, base: Source) -> bool:
    shared = source.tensors.keys() & base.tensors.keys()
    return any(
        source.tensors[x].dtype.itemsize < base.tensors[x].dtype.itemsize
        for x in shared
    )


def _template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return "\n".join(read_text(file).splitlines())
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = json_if_there(folder / name).get("chat_template")
        if template is not None:
            return template
    return None


def _eos(folders: Sequence[Path], files: Sequence[str]) -> Any:
    """The first token stated to end answers."""
    stated = (json_if_there(folder / file) for folder in folders for file in files)
    ends = (content.get("eos_token_id") for content in stated)
    return next((token for token in ends if token is not None), None)


def _other_base(name: str, recorded: Any, base: Path) -> Iterator[str]:
    if not isinstance(recorded, str) or not recorded:
        return
    if QUANTISED.search(recorded):
        yield f"{name} was trained on {recorded}, rounded to few bits: on this base it may do less"
    elif Path(recorded).name.lower() != Path(name_of(str(base))).name.lower():
        yield f"{name} says that it was trained on {recorded}, not on {name_of(str(base))}"
