"""Tiny random models of the architectures that people merge, as folders in the hub's layout."""

from pathlib import Path

import tiny
import torch
import transformers

SIZES = {
    "vocab_size": 257,
    "pad_token_id": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
DECODER = SIZES | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
GROUPED = DECODER | {"num_key_value_heads": 1, "head_dim": 8}
WINDOW = GROUPED | {"sliding_window": 8}  # shorter than the prompts
GPT2 = SIZES | {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 1024,
    "initializer_range": 0.2,
}
T5 = SIZES | {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 256,
    "dropout_rate": 0.0,
    "initializer_factor": 3.0,
}
BART = SIZES | {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 512,
    "decoder_start_token_id": 256,
    "forced_eos_token_id": None,
    "dropout": 0.0,
    "init_std": 0.2,
}

# Name: class, configuration, how it is saved. `tie_word_embeddings` is the class's default unless
# it is named.
MODELS = {
    "llama": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": False}, {}),
    "llama-tied": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, {}),
    "mistral": ("MistralForCausalLM", WINDOW, {}),
    "qwen2-tied": ("Qwen2ForCausalLM", GROUPED | {"tie_word_embeddings": True}, {}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED, {}),
    "gemma2": ("Gemma2ForCausalLM", WINDOW | {"final_logit_softcapping": 2.0}, {}),
    "gemma3": ("Gemma3ForCausalLM", WINDOW | {"final_logit_softcapping": 2.0}, {}),
    "phi": ("PhiForCausalLM", DECODER, {}),
    "phi3-fused": ("Phi3ForCausalLM", GROUPED, {}),
    "gpt2": ("GPT2LMHeadModel", GPT2, {}),
    "gpt-neox": ("GPTNeoXForCausalLM", DECODER, {}),
    "t5": ("T5ForConditionalGeneration", T5, {}),
    "t5-own-head": (
        "T5ForConditionalGeneration",
        T5 | {"tie_word_embeddings": False},
        {},
    ),
    "bart": ("BartForConditionalGeneration", BART, {}),
    "qwen2-sharded": ("Qwen2ForCausalLM", GROUPED, {"max_shard_size": "20KB"}),
}


def save(folder: Path, name: str) -> Path:
    """The model of this name with the byte tokenizer."""
    architecture, settings, saving = MODELS[name]
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings))
    if name == "t5-own-head":  # as flan-t5 has it, whatever its configuration says
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(257, 16))
    model.save_pretrained(folder, **saving)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder
