"""Tiny random models on disk, so that tests need no download: a Llama, its adapters, a BERT."""

from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from helpers.study.tasks import SPLITS, Task


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens and an end token that also pads, as SmolLM2's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)} | {"<end>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    )


def llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A two-layer Llama of 16 dimensions with tied embeddings (about 13 thousand parameters)."""
    config = LlamaConfig(
        **{
            "vocab_size": 257,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "pad_token_id": 256,
            "bos_token_id": 256,
            "eos_token_id": 256,
            "initializer_range": 0.2,
        }
        | overrides
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def save_base(
    folder: Path, seed: int = 0, max_shard_size: str = "5GB", **overrides
) -> Path:
    """The tiny Llama with its tokenizer as a transformers folder."""
    llama(seed, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_tuned(
    folder: Path, base: Path, seed: int, max_shard_size: str = "5GB"
) -> Path:
    """A full fine-tune of a tiny Llama: its weights and a little noise."""
    model = LlamaForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path, seed: int = 0) -> Path:
    """A two-layer BERT of 16 dimensions, without a head, with the byte tokenizer."""
    config = BertConfig(
        vocab_size=257,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path,
    base: Path,
    seed: int,
    rank: int = 4,
    size: float = 0.1,
    everything: bool = False,
    **options,
) -> Path:
    """A LoRA adapter of `base` with random A and B (PEFT's own start has B = 0).

    everything: noise on whatever else it trains, too.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        **{
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        }
        | options
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
        elif everything and parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + size * noise
    model.save_pretrained(folder)
    return folder


def toy(label: str, n: int = 8, options: tuple = ()) -> Task:
    """A task of `n` examples in every split."""
    rows = {
        split: Dataset.from_list(
            [
                {
                    "id": f"{split}{i}",
                    "prompt": f"{label} {split} {'long ' * (i % 3)}{i}:",
                    "answers": [options[i % len(options)] if options else str(i)],
                    "options": list(options),
                }
                for i in range(n)
            ]
        )
        for split in SPLITS
    }
    return Task(f"toy:{label}", "exact_match", DatasetDict(rows))
