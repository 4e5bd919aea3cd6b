"""What does a merge cost, beside mergekit and beside merely moving the bytes?

    python tests/benchmarks/bench_merge.py [--cells SIZE:DTYPE:METHOD:MODELS[:THREADS] ...]

Every subject merges the same synthetic checkpoints in a process of its own, one thread unless the
cell names more, inputs in the page cache: this engine; mergekit 0.1.5, in a virtual environment
that this script makes beside the checkpoints (its torch is the one in use here); and the floor,
which reads every input byte and writes as many bytes as the result has. Measured: CPU and wall
seconds of the merge itself (after imports) and of the whole process, peak anonymous memory (beside
it, what this engine said before the merge that it would need). Outputs are compared entry by entry.
Cells that the table already has are not run again: a run that was broken off goes on where it was.
"""

import argparse
import csv
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from helpers import merge as merging
from helpers.merge import shards
from helpers.store import revision

ROOT = Path(__file__).resolve().parents[2]
MERGEKIT = "mergekit==0.1.5"
# vocabulary, width, key/value width, MLP width, layers: tied embeddings, as SmolLM2
SIZES = {
    "1M": (2048, 64, 32, 128, 20),
    "135M": (49152, 576, 192, 1536, 30),
    "500M": (49152, 1024, 256, 4096, 30),
    "1B": (49152, 1024, 256, 4096, 60),
    "3B": (49152, 2560, 512, 9216, 33),
}
CELLS = [
    *(
        f"135M:float32:{m}:4"
        for m in ("linear", "task_arithmetic", "ties", "dare_ties")
    ),
    "135M:float32:slerp:2",
    *(f"135M:float32:{m}:8" for m in ("linear", "ties")),
    "135M:bfloat16:ties:4",
    *(
        f"500M:bfloat16:{m}:4"
        for m in ("linear", "task_arithmetic", "ties", "dare_ties")
    ),
    "500M:bfloat16:slerp:2",
    "500M:float32:linear:4",
]
# Of this engine alone: more models, more threads.
GROWTH = [
    f"135M:bfloat16:{m}:{n}" for m in ("linear", "ties") for n in (2, 4, 8, 16, 32)
]
CORES = [
    f"500M:float32:{m}:4{threads}" for m in ("linear", "ties") for threads in ("", ":2")
]
SETTINGS = {  # our flags, mergekit's parameters: the same formula
    "linear": ([], {"weight": 1.0}),
    "task_arithmetic": ([], {"weight": 1.0}),
    "slerp": ([], {"t": 0.5}),
    "ties": (["--density", "0.2"], {"weight": 1.0, "density": 0.2}),
    "dare_ties": (
        ["--density", "0.2", "--rescale", "l1", "--combine", "sum"],
        {"weight": 1.0, "density": 0.2},
    ),
}

# The subjects: programs that print the CPU seconds they spent before the merge and in all. Both
# engines load the model's class of transformers, ours not before it has read the config.
OURS = """
import sys, time
import transformers.models.llama.modeling_llama
from helpers import merge
start = time.process_time(), time.perf_counter()
merge.main(sys.argv[1:])
print(*start, time.process_time(), time.perf_counter())
"""
THEIRS = """
import sys, time, torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
start = time.process_time(), time.perf_counter()
run_merge(config, sys.argv[2], MergeOptions(quiet=True, copy_tokenizer=False, random_seed=0))
print(*start, time.process_time(), time.perf_counter())
"""
FLOOR = """
import sys, time
from pathlib import Path
out, size, *files = sys.argv[1:]
start = time.process_time(), time.perf_counter()
buffer = bytearray(8 << 20)
for name in files:
    with open(name, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
Path(out).mkdir()
with open(Path(out) / "bytes", "wb", buffering=0) as file:
    for _ in range(int(size) >> 23):
        file.write(buffer)
print(*start, time.process_time(), time.perf_counter())
"""


def checkpoint(folder: Path, size: str, dtype: torch.dtype, seed: int) -> Path:
    """A synthetic base (seed 0) or a specialist of it: heavy-tailed changes of 2 % of the norm."""
    if (folder / "config.json").exists():
        return folder
    vocabulary, width, kv, mlp, layers = SIZES[size]
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (width, width),
            f"{layer}.self_attn.k_proj.weight": (kv, width),
            f"{layer}.self_attn.v_proj.weight": (kv, width),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.mlp.gate_proj.weight": (mlp, width),
            f"{layer}.mlp.up_proj.weight": (mlp, width),
            f"{layer}.mlp.down_proj.weight": (width, mlp),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    base, change = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    parts, places = shards.shards(sizes, 4_000_000_000), {}
    for i, names in enumerate(parts):
        file = f"model-{i}.safetensors" if len(parts) > 1 else "model.safetensors"
        places |= dict.fromkeys(names, file)
        tensors = {}
        for name in names:
            tensor = 0.02 * torch.randn(shapes[name], generator=base)
            if seed:
                noise = torch.randn(shapes[name], generator=change)
                # cubed: kurtosis 46
                tensor += noise.pow_(3).mul_(0.02 * 0.02 / 15**0.5)
            tensors[name] = tensor.to(dtype)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
    }
    config |= {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
    }
    config |= {"num_attention_heads": max(1, width // 64)}
    config |= {"num_key_value_heads": max(1, kv // 64)}
    config |= {"tie_word_embeddings": True, "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mergekit_python(work: Path) -> Path:
    """The interpreter of a virtual environment with mergekit and, for the rest, our packages."""
    python = work / "mergekit" / "bin" / "python"
    if not (work / "mergekit" / "ready").exists():
        venv.create(work / "mergekit", with_pip=True)
        packages = next((work / "mergekit" / "lib").glob("python*/site-packages"))
        (packages / "ours.pth").write_text(sysconfig.get_paths()["purelib"])
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", MERGEKIT], check=True
        )
        (work / "mergekit" / "ready").touch()
    return python


def measured(command: list, threads: str) -> dict[str, float]:
    """Run a subject with so many threads; CPU, wall and peak anonymous memory."""
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"
    started, peak = time.perf_counter(), 0
    child = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict.fromkeys(names, threads),
        cwd=ROOT,
    )
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        found = [x for x in status.read_text().splitlines() if x.startswith("RssAnon")]
        peak = max([peak, *(int(x.split()[1]) for x in found)])
        time.sleep(0.02)
    wall = time.perf_counter() - started
    output = child.stdout.read()
    if child.returncode:
        raise SystemExit(f"{command[0]} failed:\n{output}")
    cpu_before, before, cpu, after = map(float, output.split()[-4:])
    figures = {"cpu_merge": cpu - cpu_before, "wall_merge": after - before, "cpu": cpu}
    figures |= {"wall": wall, "anonymous_gb": peak * 1024 / 1e9}
    stated = re.search(r"([\d.]+) GB of memory", output)
    return figures | ({"stated_gb": float(stated[1])} if stated else {})


def compared(ours: Path, theirs: Path) -> dict[str, float]:
    """How far two merged models are apart, relative to the second; share of differing entries."""
    apart = square = differing = entries = 0.0
    mine, reference = merging.read_folder(ours), merging.read_folder(theirs)
    for name, tensor in reference.items():
        a, b = mine[name].float(), tensor.float()
        apart += float((a - b).square().sum())
        square += float(b.square().sum())
        differing += float((a != b).sum())
        entries += a.numel()
    return {"difference": (apart / square) ** 0.5, "differing": differing / entries}


def cell(name: str, work: Path, repeats: int, others: bool) -> list[dict]:
    """All subjects on one cell, interleaved `repeats` times; medians."""
    size, dtype, method, n, *rest = name.split(":")
    threads = rest[0] if rest else "1"
    models = [
        checkpoint(
            work / f"{size}-{dtype}" / str(seed), size, getattr(torch, dtype), seed
        )
        for seed in range(int(n) + 1)
    ]
    flags, parameters = SETTINGS[method]
    merged = models[1:] if method != "slerp" else models[:2]
    config = work / "config.yml"
    used = [{"model": str(m)} for m in merged]
    stated = {
        "merge_method": method,
        "models": used,
        "parameters": parameters,
        "dtype": dtype,
    }
    if method != "linear":  # whose base_model mergekit would count as one more model
        stated["base_model"] = str(models[0])
    config.write_text(yaml.safe_dump(stated))
    inputs = [f for m in {models[0], *merged} for f in sorted(m.glob("*.safetensors"))]
    ours = [
        "--method",
        method,
        "--base",
        models[0],
        "--models",
        *merged,
        *flags,
        "--out",
    ]
    subjects = {"ours": [sys.executable, "-c", OURS, *ours, work / "ours"]}
    if others:
        theirs = [mergekit_python(work), "-c", THEIRS, config, work / "mergekit-out"]
        size_out = sum(f.stat().st_size for f in models[0].glob("*.safetensors"))
        floor = [sys.executable, "-c", FLOOR, work / "floor", size_out, *inputs]
        subjects |= {"mergekit": theirs, "floor": floor}
    load = round(os.getloadavg()[0], 1)  # of others' work: CPU seconds grow with it too
    runs: dict[str, list[dict]] = {subject: [] for subject in subjects}
    for _ in range(repeats):
        for subject, command in subjects.items():
            remove(work / command_out(subject))
            runs[subject].append(measured(command, threads))
    same = compared(work / "ours", work / "mergekit-out") if others else {}
    rows = []
    for subject, measurements in runs.items():
        medians = {
            k: statistics.median(m[k] for m in measurements) for k in measurements[0]
        }
        cell_of = {"size": size, "dtype": dtype, "method": method, "models": int(n)}
        cell_of |= {
            "threads": int(threads),
            "repeats": repeats,
            "torch": torch.__version__,
        }
        cell_of |= {"load": load, "machine": machine(), "revision": revision()}
        rows.append(
            cell_of
            | {"subject": subject}
            | medians
            | (same if subject == "ours" else {})
        )
        remove(work / command_out(subject))
    return rows


def machine() -> str:
    """What the figures hang on: processor and number of cores."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines()
        if sys.platform == "linux"
        else []
    )
    models = [
        line.partition(": ")[2] for line in lines if line.startswith("model name")
    ]
    return f"{os.cpu_count()} x {models[0] if models else platform.processor()}"


def command_out(subject: str) -> str:
    return {"ours": "ours", "mergekit": "mergekit-out", "floor": "floor"}[subject]


def remove(folder: Path) -> None:
    for file in folder.glob("*"):
        file.unlink()
    if folder.exists():
        folder.rmdir()


def table(rows: list[dict]) -> str:
    """Markdown: one line per cell, CPU seconds of the merge and how often we are faster."""
    head = (
        "| cell | floor | ours | mergekit | ratio | ours / floor "
        "| GB stated | GB ours | GB mergekit | apart |"
    )
    lines = [head, "|" + "---|" * 10]
    cells: dict[str, dict[str, dict]] = {}
    for row in rows:
        cells.setdefault(cell_name(row).replace(":", " "), {})[row["subject"]] = row
    for name, found in cells.items():
        ours = found["ours"]
        memory = f"{ours['stated_gb']:.2f} | {ours['anonymous_gb']:.2f}"
        if "wall_merge" in ours:  # not of rows that an earlier version measured
            name = f"{name}, {ours['wall_merge']:.2f} s of wall time"
        if "mergekit" not in found:
            lines.append(f"| {name} | | {ours['cpu_merge']:.2f} | | | | {memory} | | |")
            continue
        floor, theirs = found["floor"], found["mergekit"]
        lines.append(
            f"| {name} | {floor['cpu_merge']:.2f} | {ours['cpu_merge']:.2f} | "
            f"{theirs['cpu_merge']:.2f} | {theirs['cpu_merge'] / ours['cpu_merge']:.1f} | "
            f"{ours['cpu_merge'] / floor['cpu_merge']:.1f} | {memory} | "
            f"{theirs['anonymous_gb']:.2f} | {ours['difference']:.0e} |"
        )
    return "\n".join(lines)


def read(file: Path) -> list[dict]:
    """The rows of a table that `write` wrote, its figures as numbers again."""
    kinds = dict.fromkeys(
        ("size", "dtype", "method", "subject", "torch", "machine", "revision"), str
    )
    kinds |= dict.fromkeys(("models", "threads", "repeats"), int)
    with file.open(newline="") as table:
        return [
            {key: kinds.get(key, float)(x) for key, x in row.items() if x}
            for row in csv.DictReader(table)
        ]


def cell_name(row: dict) -> str:
    threads = f":{row['threads']:g}" if row["threads"] > 1 else ""
    return f"{row['size']}:{row['dtype']}:{row['method']}:{row['models']:g}{threads}"


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(
            out, list(dict.fromkeys(key for row in rows for key in row))
        )
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=[*CELLS, *CORES, *GROWTH])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "data" / "runs" / "bench")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "data" / "results" / "bench_merge.csv"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = read(arguments.out) if arguments.out.exists() else []
    done = {cell_name(row) for row in rows}
    for name in arguments.cells:
        if name in done:
            continue
        found = cell(name, arguments.work, arguments.repeats, name in CELLS)
        print(table(found).splitlines()[-1], flush=True)
        rows = [row for row in rows if cell_name(row) != name] + found
        write(arguments.out, rows)  # after every cell: a long run may be broken off
    print(
        f"\nCPU seconds of the merge itself, torch {torch.__version__}\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
