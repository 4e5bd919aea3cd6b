"""What will a run cost that nobody has measured? Its work, in units of a study that was recorded.

Units are CPU seconds of training on, merging, scoring and reading one example or probe. For another
model they grow with its parameters; a GPU is taken to do the work of many CPU cores.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.run.profiles import all_profiles, ancestry, profile_tables
from helpers.store import ROOT

# CPU minutes in a minute of a GPU: a guess, 50 TFLOP/s against the demo's 0.1
GPU = 500
# as in SmolLM2-360M or Qwen2.5-0.5B, not 8x7B
SIZE_IN_NAME = re.compile(r"(?<![\d.x])(\d+(?:\.\d+)?)([MB])(?![a-z\d])", re.I)


def lines(profile: str, asked: Mapping[str, Any]) -> list[str]:
    """Minutes, gigabytes and memory of a run with the parameters `asked`, and what they rest on.

    Nothing in a project that has recorded no study that the profile is like.
    """
    recorded = [
        name for name in ancestry(profile) if (_tables(name) / "costs.csv").is_file()
    ]
    if not recorded:
        return []
    from helpers.study import costs, design

    study, demo = recorded[0], recorded[-1]
    units = costs.unit_costs(_tables(study), all_profiles()[study])
    # older studies: no megabytes
    kept = costs.unit_costs(_tables(demo), all_profiles()[demo])
    if units is None or kept is None:
        return []
    units["megabytes"] = kept["megabytes"]
    longer = profile_tables()[profile].get("longer", 1)
    units.loc[["train", "scores", "states"], "cpu_seconds"] *= longer
    size, known = billions(profile, asked["MODEL"]), billions(study)
    larger = size / known if size else 1.0
    gpu = asked["DEVICE"] != "cpu"
    units = costs.scaled(units, larger, GPU if gpu else 1.0)
    sizes = {
        part: asked[f"{part.upper()}_EXAMPLES"] for part in ("dev", "probe", "test")
    }
    cost = design.whole(asked).cost(units, sizes)
    sentences = [f"Expected: {costs.sentence(cost, 'GPU' if gpu else 'CPU')}"]
    sentences.append(
        f"  if {'; '.join(_assumptions(study, size, larger, longer, gpu))}"
    )
    return [*sentences, _memory(_tables(demo), asked, size)]


def _assumptions(
    study: str, size: float | None, larger: float, longer: float, gpu: bool
) -> Iterator[str]:
    """What a forecast in units of `study` takes for granted."""
    yield "nothing is finished yet and every task passes screening"
    yield f"prompts are {f'{longer} times ' * (longer != 1)}as long as in {study}"
    if size is None:
        yield f"the model is no larger than that of {study}"
    elif larger != 1:
        yield (
            f"work grows with the parameters ({size:.3g} billion, {larger:.3g} times), "
            "files with their root"
        )
    yield (
        f"a GPU does the work of {GPU} cores, a guess"
        if gpu
        else f"the machine is as {study}'s"
    )


def _memory(measured: Path, asked: Mapping[str, Any], size: float | None) -> str:
    """What a process holds: as measured in training, or a larger base with one merge of it."""
    from helpers.study import memory

    trained = memory.peak_gb(measured)
    merged = memory.with_merge_gb((size or 0) * 1e9, asked["DTYPE"])
    if asked["DEVICE"] == "cpu":
        return memory.sentence(max(trained, merged), asked["WORKERS"])
    return f"The base and one merge of it take {merged:.0f} GB of the GPU, beside what it reads"


def billions(profile: str, model: str = "") -> float | None:
    """Parameters (1e9) of a profile's model, or of another as its files or else its name say.

    None if not known.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        from helpers.study import memory

        try:
            return memory.parameters(folder) / 1e9
        except ValueError:  # no safetensors, such as a GGUF file
            return None
    tables = profile_tables()
    for name in ancestry(profile):
        own = tables[name]
        if "MODEL" in own:
            if model in ("", own["MODEL"]):
                return own.get("billions")
            break
    said = SIZE_IN_NAME.search(model)
    return float(said[1]) / (1000 if said[2].upper() == "M" else 1) if said else None


def _tables(study: str) -> Path:
    return ROOT / "data" / "results" / study
