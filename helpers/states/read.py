"""Hidden states of a model: all layers from one forward pass, pooled to one state a prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from helpers.states.batch import length_buckets, pad

HOW = ("last", "mean", "first_decoder")


@torch.no_grad()
def prompt_states(
    model: nn.Module, encoded: Sequence[list[int]], how: str = "last", batch_size: int = 20
) -> Tensor:
    """States (prompts, layers, d) of a model at prompts, all layers from one pass, fp32 on the CPU.

    Args:
        model: a decoder, an encoder or an encoder-decoder of transformers, with or without a head.
        encoded: token ids of each prompt; they are batched by length and padded on the right.
        how: as in `pool`. An encoder-decoder reads the prompt with its encoder; its state is that
            of the decoder's start token, "first_decoder", which no other model has.

    Memory: beside the model's own activations prompts * layers * d * 4 bytes.

    Raises:
        ValueError: "first_decoder" for a model that is no encoder-decoder, or the reverse; a prompt
            without tokens.
    """
    two_stacks = model.config.is_encoder_decoder
    if (how == "first_decoder") != two_stacks:
        possible = '"first_decoder"' if two_stacks else '"last" or "mean"'
        raise ValueError(f"{type(model).__name__} has no {how!r} state of a prompt: use {possible}")
    read = _decoder_start if two_stacks else _prompt
    lengths = [len(ids) for ids in encoded]
    batches = length_buckets(lengths, batch_size)
    pooled = []
    for batch in batches:
        ids, mask = pad([encoded[i] for i in batch], 0)
        states = read(model, ids.to(model.device), mask.to(model.device), how)
        pooled.append(states.cpu())
    order = torch.tensor([i for batch in batches for i in batch])
    return torch.cat(pooled)[order.argsort()].contiguous()


def _prompt(model: nn.Module, ids: Tensor, mask: Tensor, how: str) -> Tensor:
    stack = model.base_model  # below the head: logits are not wanted
    states = stack(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return pool(states, mask, mask.sum(1) - 1, how)


def _decoder_start(model: nn.Module, ids: Tensor, mask: Tensor, how: str) -> Tensor:
    start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
    output = model(ids, attention_mask=mask, decoder_input_ids=start, output_hidden_states=True)
    first = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    return pool(output.decoder_hidden_states, torch.ones_like(start), first, how)


def pool(
    hidden_states: tuple[Tensor, ...], mask: Tensor, last: Tensor, how: str = "last"
) -> Tensor:
    """One state per example and layer from the `hidden_states` of a forward pass, in float32.

    Args:
        hidden_states: per layer a (batch, length, d) tensor; of the decoder for an encoder-decoder.
        mask: (batch, length), true at the positions that count: prompt tokens, neither padding nor,
            under teacher forcing, the answer. Padding may be left or right.
        last: (batch,) index of the last prompt token.
        how: "last": the state at `last`; "mean": mean over counted positions (encoders);
            "first_decoder": first counted position (encoder-decoders).

    Returns:
        (batch, layers, d), layers in the order of `layer_names`: batch * layers * d * 4 bytes.

    Raises:
        ValueError: unknown `how`; an example that counts no position; `last` on an uncounted one.
    """
    if how not in HOW:
        raise ValueError(f"unknown pooling {how!r}: choose one of {', '.join(HOW)}")
    mask = mask.bool()
    if not mask.any(dim=1).all():
        raise ValueError("an example has no counted position: give each at least one prompt token")
    if how == "mean":
        return _mean(hidden_states, mask)
    rows = torch.arange(len(mask), device=mask.device)
    position = last if how == "last" else mask.int().argmax(dim=1)
    if not mask[rows, position].all():
        raise ValueError("`last` points at an uncounted position: pass the last prompt token")
    return torch.stack([h[rows, position].float() for h in hidden_states], dim=1)


def _mean(hidden_states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    count = mask.sum(dim=1, keepdim=True)
    padding = ~mask[..., None]
    means = []
    for h in hidden_states:
        # masked_fill, not a product: a NaN at a padded position must not reach the sum
        counted = h.float().masked_fill(padding, 0)
        means.append(counted.sum(dim=1) / count)
    return torch.stack(means, dim=1)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model, first to last; of the decoder of an encoder-decoder."""
    modules = model.get_decoder().modules()
    return next(module for module in modules if isinstance(module, nn.ModuleList))


@torch.no_grad()
def layer_names(model: nn.Module) -> list[str]:
    """Names of the entries of `hidden_states`, the final-normed state told apart from raw ones.

    Llama-type decoders return the embeddings, the raw residual stream after each block but the
    last, and then the *final-normed* state of the last; norms jump there, so a curve over layers
    must not join the two. BERT-type encoders have no final norm. Which of the two a model does is
    read off a forward pass of one token: is the last entry the output of the last block, or not?
    """
    stack, blocks = model.get_decoder(), blocks_of(model)
    outputs = []
    handle = blocks[-1].register_forward_hook(lambda *call: outputs.append(call[-1]))
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    states = stack(input_ids=token, output_hidden_states=True).hidden_states
    handle.remove()
    raw = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    final = f"block {len(blocks)}" if torch.equal(raw, states[-1]) else "final norm"
    return ["embeddings", *(f"block {i}" for i in range(1, len(blocks))), final]
