"""What belongs to a model beside its weights, and do the specialists' agree with the base's?

What makes a merge meaningless is refused unless it is forced: another vocabulary, another function
of the same weights, a model that no fine-tuning led to. What the merge loses is said.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from helpers.merge.anatomy import config_of
from helpers.merge.blocks import products
from helpers.merge.sources import Source
from helpers.merge.vocabulary import words_of
from helpers.merge.weights import json_if_there, read_text

TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
BELONGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "*sentence*_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
# Of a configuration, what does not change the function of the weights, or is compared apart.
HARMLESS = re.compile(
    r"_.*|architectures|auto_map|(torch_)?dtype|transformers_(version|weights)|use_cache"
    r"|tie_word_embeddings|vocab_size|max_position_embeddings|initializer_\w+|quantization_config"
    r"|\w+_token_id|id2label|label2id|num_labels|problem_type|finetuning_task|output_\w+|return_\w+"
    r"|\w*dropout\w*|\w*layerdrop|\w*pdrop|drop_path\w*|gradient_checkpointing|pretraining_tp"
    r"|router_\w*coef|task_specific_params|unsloth\w*"
)
# cosine to the base's weights below which a model was not fine-tuned from it
RELATED = 0.5
SAMPLED = 16  # rows of a tensor, by which that is told
QUANTISED = re.compile(r"(4|8)-?bit|bnb|gptq|awq|int[48]|fp8", re.IGNORECASE)


# Copying -----------------------------------------------------------------------------------------


def belonging(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """A folder's files that match, relative to it, sorted; of folders in it one level."""
    files = [
        file.relative_to(folder) for file in (*folder.glob("*"), *folder.glob("*/*"))
    ]
    return sorted(
        file
        for file in files
        if (folder / file).is_file()
        and any(fnmatch(file.as_posix(), x) for x in patterns)
    )


def copy_surroundings(
    base: Path, tokenizer: Path, out: Path, dtype: str | None, vocabulary: int | None
) -> None:
    """Config, licence and the like of the base, and a model's tokenizer with the ids that it ends
    answers with: only what belongs. vocabulary: how many rows the merge's embedding has.
    """
    for folder, patterns in (
        (base, BELONGS),
        (tokenizer, (*TOKENIZER, "generation_config.json")),
    ):
        for file in belonging(folder, patterns):
            (out / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / file, out / file)
    config = config_of(out)
    stale = ["auto_map", "quantization_config", "transformers_weights"]
    changes = {
        key: x for key, x in config_of(tokenizer).items() if key.endswith("_token_id")
    }
    if dtype is not None:
        changes["dtype"] = dtype
        stale.append("torch_dtype")
    if vocabulary is not None and "vocab_size" in config:
        changes["vocab_size"] = vocabulary
    text = config.get("text_config")
    if vocabulary is not None and isinstance(text, dict) and "vocab_size" in text:
        changes["text_config"] = text | {"vocab_size": vocabulary}
    edit(out / "config.json", changes, stale)


def edit(file: Path, changes: dict[str, Any], without: Sequence[str] = ()) -> None:
    """Change a configuration; where there is nothing to change, its bytes stay."""
    config = config_of(file.parent)
    changed = {
        key: value for key, value in config.items() if key not in without
    } | changes
    if file.is_file() and changed != config:
        file.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


# Comparing ---------------------------------------------------------------------------------------


Models = Sequence[tuple[str, Path, Source]]  # name, folder and weights of each


def objections(
    base: Source, base_folder: Path, models: Models, heads: str, by_token: bool = False
) -> Iterator[str]:
    """Why a merge with these models would mean nothing: one sentence for each reason.

    by_token: whether rows of embeddings are matched by token.
    """
    for name, folder, source in models:
        if not by_token:
            yield from _other_vocabulary(name, base_folder, folder)
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
        yield from _other_labels(models)


def _other_vocabulary(name: str, base: Path, folder: Path) -> Iterator[str]:
    vocabularies = [words_of(place) for place in (base, folder)]
    tokens, others = (
        {number: token for token, number in x.items()} for x in vocabularies
    )
    for number in sorted(tokens.keys() & others.keys()):
        if tokens[number] != others[number]:
            yield (
                f"{name} has another vocabulary than the base (token {number} is "
                f"{others[number]!r}, not {tokens[number]!r}): --tokenizer base, or a model's "
                "name, matches rows by token"
            )
            return


def _other_function(
    name: str, base: dict[str, Any], other: dict[str, Any]
) -> Iterator[str]:
    for key in sorted(base.keys() & other.keys()):
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
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _other_labels(models: Models) -> Iterator[str]:
    """Heads of one size can be of two tasks."""
    first = None
    for name, folder, source in models:
        config = config_of(folder)
        if source.adapter is not None or "Classification" not in str(
            config.get("architectures")
        ):
            continue
        labels = config.get("id2label")
        if first is None:
            first = name, labels
        elif labels != first[1]:
            yield (
                f"{name} has the labels {labels}, {first[0]} {first[1]}: their heads mean other "
                "things; --heads base leaves the base's"
            )


def _unrelated(name: str, base: Source, source: Source) -> Iterator[str]:
    """By the cosine of a sample of rows of every matrix: near 1 after fine-tuning, else near 0."""
    total = np.zeros((2, 2))
    for key in sorted(base.tensors.keys() & source.tensors.keys()):
        origin, tuned = base.tensors[key], source.tensors[key]
        if (
            origin.ndim != 2
            or origin.shape != tuned.shape
            or not origin.is_floating_point()
        ):
            continue
        step = max(1, origin.shape[0] // SAMPLED)
        total += products([origin[::step], tuned[::step]])
    lengths = np.sqrt(total[0, 0] * total[1, 1])
    if total[0, 1] < RELATED * lengths:
        cosine = total[0, 1] / lengths
        yield (
            f"{name} is no fine-tuned version of the base: the cosine of their weights is "
            f"{cosine:.2f}, after fine-tuning it is near 1"
        )


def losses(
    weights: Source, base: Path, tokenizer: Path, models: Models
) -> Iterator[str]:
    """What a merge leaves behind, or what is odd about its models: one sentence each."""
    template = _template(tokenizer)
    for name, folder, source in models:
        if _template(folder) not in (None, template):
            yield (
                f"{name} has a chat template that is not the merge's: --tokenizer {name} takes its "
                "tokenizer, template and end tokens"
            )
        for file in ("generation_config.json", "config.json"):
            merged, own = _eos(tokenizer / file), _eos(folder / file)
            if merged is None:
                merged = _eos(base / file)
            if own is not None and own != merged:
                yield f"{name} ends answers with token {own}, the merge with {merged} ({file})"
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
        return read_text(file)
    return json_if_there(folder / "tokenizer_config.json").get("chat_template")


def _eos(file: Path) -> Any:
    return json_if_there(file).get("eos_token_id")


def _other_base(name: str, recorded: Any, base: Path) -> Iterator[str]:
    if not isinstance(recorded, str) or not recorded:
        return
    if QUANTISED.search(recorded):
        yield f"{name} was trained on {recorded}, rounded to few bits: on this base it may do less"
    elif Path(recorded).name.lower() != base.resolve().name.lower():
        yield f"{name} says that it was trained on {recorded}, not on {base.name}"
