"""What does a study of a 7B model cost on a GPU? A random model of Mistral-7B's shape, 8 adapters.

    python tests/benchmarks/bench_gpu.py            # on a GPU, about five minutes
    python tests/benchmarks/bench_gpu.py --tiny     # the same on the CPU, at tiny shapes

Prints one JSON object: the measured bf16 matmul rate, its share that reading states reaches, merges
a minute by rule (in place, and taken back), seconds of a group's visit, peak memory.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers import merge
from helpers.states import prompt_states
from helpers.study import memory
from helpers.study.bench import Bench

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
RULES = ("linear", "task_arithmetic", "ties")


def synchronised(device: str) -> float:
    """Seconds on a clock, when all work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(
    device: str,
    n: int,
    repeats: int = 20,
) -> float:
    """Floating-point operations a second of a square product in bf16."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    _ = a @ b
    seconds = []
    for _ in range(repeats):
        start = synchronised(device)
        _ = a @ b
        seconds.append(synchronised(device) - start)
    return 2 * n**3 / min(seconds)  # other work on the machine can only slow it down


def adapters(
    model: torch.nn.Module,
    folder: Path,
    count: int,
) -> dict[str, Path]:
    """Random rank-16 adapters of queries, keys and values, as Lots-of-LoRAs has them."""
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"]
    )
    adapted = get_peft_model(model, config)
    for i in range(count):
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        adapted.save_pretrained(folder / f"task{i}")
    adapted.unload()
    return {f"task{i}": folder / f"task{i}" for i in range(count)}


def measure(
    device: str,
    shape: dict,
    tokens: int,
    prompts: int,
    members: int = 8,
) -> dict:
    """The figures, of a random model of this shape."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = MistralForCausalLM(MistralConfig(**shape)).eval()
    torch.set_default_dtype(torch.float32)
    rate = matmul_rate(device, 8192 if device == "cuda" else 256)
    ids = torch.randint(0, model.config.vocab_size, (prompts, tokens)).tolist()
    prompt_states(model, ids[:2])
    start = synchronised(device)
    prompt_states(model, ids, batch_size=16)
    reading = synchronised(device) - start
    body = sum(p.numel() for p in model.model.layers.parameters())
    out = {"matmul_tflops": rate / 1e12, "reading_seconds": reading}
    out["share_of_matmul"] = 2 * body * prompts * tokens / reading / rate
    with tempfile.TemporaryDirectory() as folder:
        trained = adapters(model, Path(folder), members)
        base = {"name": "random", "digest": "random"}
        bench = Bench(model, None, base, {}, trained)
        out["forecast"] = memory.forecast(bench, members)
        for rule in RULES:
            out[f"{rule}_seconds"] = merging(bench, rule, device)
    if device == "cuda":
        out["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return out


def merging(
    bench: Bench,
    rule: str,
    device: str,
) -> float:
    """Seconds to merge every specialist into the live model, and to take the merge back."""
    labels = list(bench.specialists)
    chosen = merge.plan(rule, labels)
    start = synchronised(device)
    changes = merge.merge_tensors(bench.rows(labels), chosen)
    with merge.applied(bench.model, ((row.name, change) for row, change, _ in changes)):
        pass
    return synchronised(device) - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        raise SystemExit(
            "torch finds no GPU on this machine: --tiny shows that the script runs"
        )
    if tiny:
        found = measure("cpu", TINY, tokens=16, prompts=4)
    else:
        found = measure("cuda", {"num_key_value_heads": 8}, tokens=512, prompts=64)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
