"""A user's prompts: files of text or JSONL, read, checked and turned into token ids."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import store
from helpers.states.batch import encode_input, encode_prompt

NEUTRAL = store.ROOT / "data" / "neutral_probes.txt"
FEWEST = 8  # prompts of a model: fewer say nothing
LONGEST = 1024  # tokens of a prompt that is read; longer ones are left out
Prompt = str | list[dict]  # a text, or the messages of a chat


def prompts_of(labels: Sequence[str], files: Sequence[Path]) -> dict[str, list[Prompt]]:
    """Prompts by model: a file each, in order, or one for all; neutral sentences without any.

    Raises ValueError for another number of files, and what `read_prompts` does.
    """
    files = list(files) or [NEUTRAL]
    if len(files) not in (1, len(labels)):
        raise ValueError(
            f"{len(files)} files of prompts for {len(labels)} models: give one for each, in order"
        )
    texts = [read_prompts(file) for file in files]
    if len(texts) == 1:
        texts *= len(labels)
    return dict(zip(labels, texts, strict=True))


def read_prompts(file: Path) -> list[Prompt]:
    """Each prompt of a file once: its lines or, of a .jsonl file, each line's object.

    An object has `prompt` or `text` (a string) or `messages` (a chat). Raises ValueError, naming
    the file and the line, for what is no prompt, for fewer than FEWEST, and for a text that repeats
    its lines, as prompts of several lines do.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise ValueError(
            f"there is no file of prompts {file}: name a .txt or .jsonl file"
        )
    if file.suffix == ".json":
        raise ValueError(f"{file} is one JSON value: write .jsonl, an object a line")
    prompts = []
    for number, line in enumerate(_lines(file), 1):
        line = line.strip()
        if line and file.suffix == ".jsonl":
            prompts.append(_prompt(line, f"{file}, line {number}"))
        elif line:
            prompts.append(line)
    unique = {store.canonical(prompt): prompt for prompt in prompts}
    if file.suffix != ".jsonl" and len(unique) < len(prompts) / 2:
        raise ValueError(
            f"{file}: most of its {len(prompts)} lines are repeats: each line is a prompt, so "
            'write prompts of several lines as .jsonl, a {"prompt": "…"} a line'
        )
    if len(unique) < FEWEST:
        raise ValueError(
            f"{file} holds {len(unique)} different prompts: give {FEWEST} or more, better 64"
        )
    return list(unique.values())


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{file} holds NUL bytes: it is no text")
    return text.split("\n")


def _prompt(line: str, where: str) -> Prompt:
    """The prompt of a line of JSONL."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    row = row if isinstance(row, dict) else {}
    text = row.get("prompt", row.get("text"))
    chat = row.get("messages")
    if isinstance(text, str) and text.strip():
        return text.strip()
    if isinstance(chat, list) and chat and all(map(_is_message, chat)):
        return chat
    raise ValueError(
        f'{where}: an object needs "prompt", "text" or "messages" (of a chat)'
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()


def encode(
    prompts: Sequence[Prompt], label: str, tokenizer: Any, encoder: bool, limit: int
) -> list[list[int]]:
    """Token ids of a model's prompts that have at most `limit` tokens.

    Raises ValueError, naming the model, if fewer than FEWEST do, and for chats without a template.
    """
    chats = any(not isinstance(prompt, str) for prompt in prompts)
    if chats and not tokenizer.chat_template:
        raise ValueError(
            f"prompts of {label} are chats, but the base has no chat template"
        )
    read = (_token_ids(prompt, tokenizer, encoder) for prompt in prompts)
    encoded = [ids for ids in read if 0 < len(ids) <= limit]
    if len(encoded) < FEWEST:
        raise ValueError(
            f"{label}: {len(encoded)} of {len(prompts)} prompts have at most {limit} tokens, "
            f"{FEWEST} are needed: give shorter ones"
        )
    return encoded


def _token_ids(prompt: Prompt, tokenizer: Any, encoder: bool) -> list[int]:
    if isinstance(prompt, str):
        read = encode_input if encoder else encode_prompt
        return read(tokenizer, prompt)
    chat = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True
    )
    return chat["input_ids"]
