"""What do the measures cost? Pair metrics, gradients, and states against a bare forward pass.

    python tests/benchmarks/bench_measures.py          # a few minutes on one core

Prints the tables as Markdown. Nothing is downloaded: the adapters are random LoRA factors on
the matrices of SmolLM2-135M (3 of its 30 layers), and the model that is read has its shape and
random weights.
"""

import gc
import os
import resource
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers import merge as merging
from helpers.states import batch, conflict, gradients, prompt_states

LAYERS, RANK = 3, 16
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def adapters(models: int) -> list[merging.Row]:
    """Lazy rows of random adapters, as `merging.views` gives them."""
    base = {
        f"model.layers.{layer}.{kind}.weight": torch.zeros(shape)
        for layer in range(LAYERS)
        for kind, shape in SHAPES.items()
    }
    sources = []
    for i in range(models):
        generator = torch.Generator().manual_seed(i)
        factors = {
            name: merging.Factors(
                2.0,
                0.01 * torch.randn(tensor.shape[0], RANK, generator=generator),
                0.01 * torch.randn(RANK, tensor.shape[1], generator=generator),
            )
            for name, tensor in base.items()
        }
        sources.append(merging.Source(str(i), {}, factors))
    return merging.views(merging.open_base(base), sources)


def pair_costs(counts=(2, 4, 6, 8, 10, 14, 20)) -> None:
    """CPU seconds of `pair_sums` against models and pairs, and the fit b models + c pairs."""
    rows, seconds = {}, {}
    for n in counts:
        rows[n] = adapters(n)
        labels = [str(i) for i in range(n)]
        times = []
        for _ in range(3):
            start = time.process_time()
            conflict.pair_sums(rows[n], labels)
            times.append(time.process_time() - start)
        seconds[n] = min(times)
    coordinates = sum(row.base.shape.numel() for row in rows[counts[0]])
    design = np.array([[n, n * (n - 1) / 2] for n in counts], dtype=float)
    weights = 1 / np.array([seconds[n] for n in counts])  # relative errors
    per_model, per_pair = np.linalg.lstsq(
        design * weights[:, None], np.ones(len(counts)), rcond=None
    )[0]
    print(
        f"\nPair metrics, {coordinates / 1e6:.1f} M coordinates, one thread, best of 3\n"
    )
    print("| models | pairs | CPU s | b models + c pairs |")
    print("|---|---|---|---|")
    for n, (models, pairs) in zip(counts, design, strict=True):
        fitted = per_model * models + per_pair * pairs
        print(f"| {n} | {pairs:.0f} | {seconds[n]:.2f} | {fitted:.2f} |")
    model, pair = (1e9 * cost / coordinates for cost in (per_model, per_pair))
    print(f"\nEach coordinate costs {model:.1f} ns a model and {pair:.2f} ns a pair.")


def pair_memory(models: int = 14) -> None:
    """Growth of the peak resident memory over one pass, against models x largest tensor."""
    rows = adapters(models)
    # libraries, smaller tensor
    conflict.pair_sums(rows[:1], [str(i) for i in range(models)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    conflict.pair_sums(rows, [str(i) for i in range(models)])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    largest = 4 * max(row.base.shape.numel() for row in rows)
    print(
        f"\nPeak memory of {models} models grew by {grown / 1e6:.0f} MB; "
        f"{models} x the largest tensor is {models * largest / 1e6:.0f} MB."
    )


def llama(layers: int) -> LlamaForCausalLM:
    """A model of the shape of SmolLM2-135M with random weights."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def texts(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of `low` to `high` tokens."""
    rng = np.random.default_rng(seed)
    return [
        rng.integers(49152, size=n).tolist()
        for n in rng.integers(low, high + 1, size=count)
    ]


def state_costs(prompts: int = 120, repeats: int = 9) -> None:
    """Tokens per CPU second with all layers pooled, against a bare forward, in turn."""
    model, encoded = llama(30), texts(prompts, 20, 40)
    tokens = sum(map(len, encoded))

    @torch.no_grad()
    def bare() -> None:
        for part in batch.length_buckets([len(ids) for ids in encoded], 20):
            ids, mask = batch.pad([encoded[i] for i in part], 0)
            model(ids, attention_mask=mask, logits_to_keep=1)

    def with_states() -> None:
        prompt_states(model, encoded)

    times = {bare: [], with_states: []}
    for repeat in range(repeats + 1):
        for run in (bare, with_states) if repeat % 2 else (with_states, bare):
            gc.collect()
            start = time.process_time()
            run()
            if repeat:  # the first round warms up
                times[run].append(time.process_time() - start)
    ratios = [b / s for b, s in zip(times[bare], times[with_states], strict=True)]
    print(
        f"\nStates of all 31 layers against a bare forward, {tokens} tokens, {repeats} rounds\n"
    )
    print("| | tokens / CPU s (median) |")
    print("|---|---|")
    for run, name in (
        (bare, "bare forward"),
        (with_states, "prompt states, all layers"),
    ):
        print(f"| {name} | {tokens / statistics.median(times[run]):.0f} |")
    low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
    print(f"\nRatio: median {middle:.3f} (10-90 % of rounds: {low:.3f} to {high:.3f}).")


def gradient_costs(counts=(2, 4, 8), examples: int = 16, layers: int = 6) -> None:
    """CPU seconds and memory of the tasks' inner products, against one backward pass a task."""
    model = llama(layers)
    print(f"\nGradients of {layers} blocks, {examples} examples a task\n")
    print(
        "| tasks | streamed, CPU s | forward and backward alone, CPU s | peak grew, MB |"
    )
    print("|---|---|---|---|")
    for n in counts:
        solved = {
            str(i): [(ids[:-4], ids[-4:]) for ids in texts(examples, 20, 40, seed=i)]
            for i in range(n)
        }
        start, before = (
            time.process_time(),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )
        gradients.grams(model, solved)
        streamed = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        start = time.process_time()
        for pairs in solved.values():
            gradients.answer_loss(model, pairs).backward()
            model.zero_grad(set_to_none=True)
        alone = time.process_time() - start
        print(f"| {n} | {streamed:.1f} | {alone:.1f} | {grown / 1e6:.0f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    pair_memory()
    gradient_costs()
    pair_costs()
    state_costs()
