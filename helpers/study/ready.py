"""Which specialists are there already? Published adapters, checked and taken into the store."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from helpers import merge, store
from helpers.study.bench import Bench, specialist_key
from helpers.study.models import model_folder

VERSION = 1  # raised by hand whenever something else is kept of an adapter


def check(adapters: Mapping[str, str], base: str, rank: int = 0) -> dict[str, Path]:
    """Folders of ready adapters (label -> local folder or hub id), each fetched and looked at.

    Raises ValueError with a sentence for each that is missing, gated, trained on another base than
    the one called `base`, or of another rank (0: any).
    """
    return _each(adapters, lambda label: _checked(adapters[label], base, rank))


def adopt(bench: Bench, adapters: Mapping[str, str], rank: int = 0) -> dict[str, Path]:
    """Folders in the store of ready adapters (task label -> local folder or hub id), as if trained.

    Each is checked first (`check`), and every tensor against the base's. Raises ValueError with a
    sentence for each that does not fit; then nothing is kept.
    """
    unknown = adapters.keys() ^ bench.tasks.keys()
    if unknown:
        raise ValueError(
            f"SPECIALISTS and TASKS name other tasks: {', '.join(sorted(unknown))}"
        )
    folders = check(adapters, bench.base["name"], rank)
    base, _ = bench.sources([])
    _each(
        folders,
        lambda label: merge.views(base, [merge.open_specialist(folders[label], label)]),
    )
    return {label: _kept(bench, label, folder) for label, folder in folders.items()}


def _each(labels: Iterable[str], make: Callable[[str], Any]) -> dict[str, Any]:
    """What `make` gives for each label; ValueError with a sentence for each that it refuses."""
    found = {}
    reasons = []
    for label in labels:
        try:
            found[label] = make(label)
        except ValueError as error:
            reasons.append(f"{label}: {error}")
    if reasons:
        raise ValueError("\n".join(reasons))
    return found


def _checked(name: str, base: str, rank: int) -> Path:
    """The folder of one adapter; ValueError if it is none of this base."""
    path = Path(name).expanduser()
    folder = path if path.is_dir() else model_folder(name)
    opened = merge.open_specialist(folder, name)
    if opened.adapter is None:
        raise ValueError(
            f"{name} is no adapter: name a folder with adapter_config.json"
        )
    stated = opened.adapter.base or base
    wanted, _, _ = base.partition("@")  # a revision
    if Path(stated).name != Path(wanted).name:
        raise ValueError(f"{name} was trained on {stated}, not on {wanted}")
    ranks = {factors.A.shape[0] for factors in opened.factors.values()}
    ranks -= {rank} if rank else ranks
    if ranks:
        raise ValueError(f"{name} has rank {min(ranks)}, not {rank}")
    return folder


def _kept(bench: Bench, label: str, folder: Path) -> Path:
    """The adapter's files in the store, with the base and the (empty) log of a specialist."""
    spent = ["seconds", "cpu_seconds", "tokens_per_second", "peak_memory_mb"]
    factors = merge.open_specialist(folder, label).factors.values()
    log = {"loss": []} | dict.fromkeys(spent, 0.0)
    log["trained_parameters"] = sum(x.A.numel() + x.B.numel() for x in factors)

    def compute(place: Path) -> None:
        for file in folder.iterdir():
            if file.suffix in (".safetensors", ".json"):
                shutil.copyfile(file, place / file.name)
        (place / "base.json").write_text(json.dumps(bench.base), encoding="utf-8")
        (place / "training.json").write_text(json.dumps(log), encoding="utf-8")

    about = {
        "base": bench.base["digest"],
        "task": bench.tasks[label].name,
        "adapter": specialist_key(folder),
        "dtype": str(bench.model.dtype),
    }
    return store.cached("specialist", VERSION, about, compute)
