"""What goes with a merged model? Files of the base and of a tokenizer: only what belongs."""

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from helpers.merge.anatomy import config_of
from helpers.merge.weights import json_if_there

TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "*vocab*.json",
    "*vocab*.txt",
    "merges.txt",
    "bpe.codes",
    "*.model",
    "*.spm",
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
    "[0-9]_*/*.safetensors",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


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
    if not (tokenizer / "generation_config.json").is_file():
        edit(out / "generation_config.json", changes)
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
    config = json_if_there(file)
    changed = {key: value for key, value in config.items() if key not in without}
    changed |= changes
    if file.is_file() and changed != config:
        text = json.dumps(changed, indent=2)
        file.write_text(text + "\n", encoding="utf-8")
