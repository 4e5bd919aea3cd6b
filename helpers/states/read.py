"""Hidden states of a model: all layers from one forward pass, pooled to one state a prompt."""

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from helpers.states.batch import (
    decoder_start,
    length_buckets,
    pad,
    read_shared,
    shared_length,
)

HOW = ("last", "mean", "first_decoder")


def pooling(model: nn.Module) -> str:
    """Which state stands for a prompt, as declared: an encoder-decoder's where its decoder starts
    ("first_decoder"), an encoder's "mean", a decoder's "last".
    """
    if model.config.is_encoder_decoder:
        return "first_decoder"
    return "mean" if model.get_output_embeddings() is None else "last"


@torch.no_grad()
def prompt_states(
    model: nn.Module,
    encoded: Sequence[list[int]],
    how: str | None = None,
    batch_size: int = 20,
) -> Tensor:
    """States (prompts, layers, d) of a model at prompts, all layers from one pass, fp32 on the CPU.

    Args:
        model: a decoder, an encoder or an encoder-decoder of transformers, with or without a head.
        encoded: token ids of each prompt; they are batched by length and padded on the right.
        how: as in `pool`; by default the model's own `pooling`. An encoder-decoder reads the prompt
            with its encoder: "first_decoder" is the state of its decoder's start token, "mean" the
            mean of the encoder's.

    Memory: beside the model's own activations prompts * layers * d * 4 bytes.

    Raises:
        ValueError: "first_decoder" for a model that is no encoder-decoder, "last" for one that is;
            a prompt without tokens.
    """
    how = how or pooling(model)
    if how == ("last" if model.config.is_encoder_decoder else "first_decoder"):
        usual = pooling(model)
        raise ValueError(
            f'{type(model).__name__} has no {how!r} state of a prompt: use "{usual}" or "mean"'
        )
    read = _decoder_start if how == "first_decoder" else _prompt
    batches = length_buckets([len(ids) for ids in encoded], batch_size)
    pooled = [read(model, [encoded[i] for i in batch], how).cpu() for batch in batches]
    order = torch.tensor([i for batch in batches for i in batch])
    return torch.cat(pooled)[order.argsort()].contiguous()


def _padded(model: nn.Module, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    ids, mask = pad(prompts, 0)
    return ids.to(model.device), mask.to(model.device)


def _prompt(model: nn.Module, prompts: Sequence[list[int]], how: str) -> Tensor:
    ids, mask = _padded(model, prompts)
    # below the head: logits are not wanted
    stack = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    cached, shared = {}, 0
    # a decoder: what all begin with is read once
    if how == "last" and model.can_generate():
        shared = shared_length(prompts)
        cached = {"past_key_values": read_shared(model, ids[:, :shared])}
    output = stack(
        ids[:, shared:], attention_mask=mask, output_hidden_states=True, **cached
    )
    own = mask[:, shared:]
    return pool(output.hidden_states, own, own.sum(1) - 1, how)


def _decoder_start(model: nn.Module, prompts: Sequence[list[int]], how: str) -> Tensor:
    ids, mask = _padded(model, prompts)
    start = decoder_start(model, ids)
    about = {"attention_mask": mask, "decoder_input_ids": start}
    output = model(ids, **about, output_hidden_states=True)
    first = torch.zeros_like(start[:, 0])
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
        raise ValueError(
            "an example has no counted position: give each at least one prompt token"
        )
    if how == "mean":
        return _mean(hidden_states, mask)
    rows = torch.arange(len(mask), device=mask.device)
    position = last if how == "last" else mask.int().argmax(dim=1)
    if not mask[rows, position].all():
        raise ValueError(
            "`last` points at an uncounted position: pass the last prompt token"
        )
    return torch.stack([h[rows, position].float() for h in hidden_states], dim=1)


def _mean(hidden_states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    count = mask.sum(dim=1, keepdim=True)
    padding = ~mask[..., None]
    # masked_fill, not a product: a NaN at a padded position must not reach the sum
    sums = [h.float().masked_fill(padding, 0).sum(dim=1) for h in hidden_states]
    return torch.stack([total / count for total in sums], dim=1)


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
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with blocks[-1].register_forward_hook(lambda *call: outputs.append(call[-1])):
        states = stack(input_ids=token, output_hidden_states=True).hidden_states
    raw = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    final = f"block {len(blocks)}" if torch.equal(raw, states[-1]) else "final norm"
    return ["embeddings", *(f"block {i}" for i in range(1, len(blocks))), final]


@torch.no_grad()
def logits(model: nn.Module, states: ArrayLike) -> NDArray:
    """What the model itself makes of final states (n, d): logits (n, vocabulary).

    Its own forward pass is run with the states in place of its decoder's output, so that bias,
    scale and soft cap of the head are those of its class.
    """
    stack = model.get_decoder()
    given = torch.as_tensor(states)[:, None].to(model.device, model.dtype)
    ids = torch.zeros(len(given), 1, dtype=torch.long, device=model.device)
    output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=given)
    stack.forward = lambda *args, **kwargs: output
    try:
        if model.config.is_encoder_decoder:
            read = model(encoder_outputs=(given,), decoder_input_ids=ids)
        else:
            read = model(ids)
    finally:
        del stack.forward
    return read.logits[:, 0].float().cpu().numpy()
