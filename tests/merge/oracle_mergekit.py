"""What mergekit 0.1.5 makes of the same files: recorded once, compared in every run of the tests.

mergekit pins other versions of our libraries, so the tests cannot install it. Run by hand
(`python tests/merge/oracle_mergekit.py`, minutes) this makes a virtual environment with it, merges
small models by every method of CASES, and writes inputs and outputs to mergekit.safetensors.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor

RECORD = Path(__file__).with_name("mergekit.safetensors")
MODELS = ("base", "a", "b", "c")
CASES = {  # configurations as people write them; BASE, A, B, C stand for folders
    "linear": """
merge_method: linear
models:
  - {model: A, parameters: {weight: 1}}
  - {model: B, parameters: {weight: 3}}
""",
    "task arithmetic": """
merge_method: task_arithmetic
base_model: BASE
parameters: {weight: 0.4, lambda: 1.5}
models: [{model: A}, {model: B}, {model: C}]
""",
    "task arithmetic, normalized": """
merge_method: task_arithmetic
base_model: BASE
parameters: {normalize: true}
models:
  - {model: A, parameters: {weight: 0.6}}
  - {model: B, parameters: {weight: 0.3}}
""",
    "ties": """
merge_method: ties
base_model: BASE
parameters: {density: 0.3, weight: 1.0}
models: [{model: A}, {model: B}, {model: C}]
""",
    "ties, weights and densities by model": """
merge_method: ties
base_model: BASE
models:
  - {model: A, parameters: {weight: 1.0, density: 0.2}}
  - {model: B, parameters: {weight: 2.0, density: 0.5}}
  - {model: C, parameters: {weight: 0.5, density: 0.9}}
""",
    "ties, filters and gradients": """
merge_method: ties
base_model: BASE
models:
  - model: A
    parameters: {weight: [{filter: mlp, value: [0.2, 0.8]}, {value: 1}], density: 0.5}
  - model: B
    parameters: {weight: 0.5, density: [0.1, 0.9]}
""",
    "dare_ties that drops nothing": """
merge_method: dare_ties
base_model: BASE
parameters: {density: 1.0, weight: 0.5}
models: [{model: A}, {model: B}, {model: C}]
""",
    "breadcrumbs": """
merge_method: breadcrumbs
base_model: BASE
parameters: {density: 0.5, gamma: 0.1, weight: 0.7}
models: [{model: A}, {model: B}]
""",
    "slerp": """
merge_method: slerp
base_model: A
parameters: {t: 0.3}
models: [{model: A}, {model: B}]
""",
    "nuslerp": """
merge_method: nuslerp
base_model: BASE
models:
  - {model: A, parameters: {weight: 0.3}}
  - {model: B, parameters: {weight: 0.7}}
""",
}


def written(case: str, folders: dict[str, Path], file: Path) -> Path:
    """The configuration of a case in a file, with folders for its models."""
    text = CASES[case]
    for name, folder in folders.items():
        text = text.replace(f": {name.upper()}", f": {folder}")
    file.write_text(text)
    return file


def recorded(group: str) -> dict[str, Tensor]:
    """The tensors of one model, or of mergekit's answer to one case."""
    tensors = load_file(RECORD)
    parts = {key: key.split("|") for key in tensors}
    return {
        name: tensors[key] for key, (owner, name) in parts.items() if owner == group
    }


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import bench_merge
    import torch

    # two layers: what depth does is seen
    bench_merge.SIZES["tiny"] = (48, 16, 16, 32, 2)
    with TemporaryDirectory() as name:
        work = Path(name)
        python = bench_merge.mergekit_python(work)
        folders = {
            model: bench_merge.checkpoint(work / model, "tiny", torch.float32, seed)
            for seed, model in enumerate(MODELS)
        }
        models = {
            model: load_file(folders[model] / "model.safetensors") for model in MODELS
        }
        for number, case in enumerate(CASES):
            file = written(case, folders, work / "config.yml")
            out = work / f"out-{number}"
            command = [python, "-c", bench_merge.THEIRS, file, out]
            subprocess.run(list(map(str, command)), check=True)
            models[case] = load_file(out / "model.safetensors")
        kept = {
            f"{owner}|{name}": x
            for owner, of in models.items()
            for name, x in of.items()
        }
        about = {"made by": bench_merge.MERGEKIT}
        about["config"] = (folders["base"] / "config.json").read_text()
        save_file(kept, RECORD, metadata=about)
    print(json.dumps({case: len(recorded(case)) for case in CASES}, indent=1))


if __name__ == "__main__":
    main()
