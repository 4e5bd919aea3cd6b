"""How do representations differ? Pooled hidden states, and measures between two models.

A state array is (n_probes, d): one row per probe input, for both models the same inputs in the same
order. The measures are NumPy in float64; only `pool` and `layer_names` see a model.
"""

import torch
from torch import Tensor, nn

HOW = ("last", "mean", "first_decoder")


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
        # masked_fill, not a product: a NaN at a padded position must not reach the sum.
        count = mask.sum(dim=1, keepdim=True)
        skipped = ~mask[..., None]
        pooled = [h.float().masked_fill(skipped, 0).sum(dim=1) / count for h in hidden_states]
    else:
        rows = torch.arange(len(mask), device=mask.device)
        position = last if how == "last" else mask.int().argmax(dim=1)
        if not mask[rows, position].all():
            raise ValueError("`last` points at an uncounted position: pass the last prompt token")
        pooled = [h[rows, position].float() for h in hidden_states]
    return torch.stack(pooled, dim=1)


def layer_names(model: nn.Module) -> list[str]:
    """Names of the entries of `hidden_states`, the final-normed state told apart from raw ones.

    Llama-type decoders return the embeddings, the raw residual stream after each block but the
    last, and then the *final-normed* state of the last; norms jump there, so a curve over layers
    must not join the two. BERT-type encoders have no final norm. Which of the two a model does is
    read off a forward pass of one token: is the last entry the output of the last block, or not?
    """
    stack = model.get_decoder()
    blocks = next(module for module in stack.modules() if isinstance(module, nn.ModuleList))
    seen = []
    handle = blocks[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        states = stack(input_ids=token, output_hidden_states=True).hidden_states
    handle.remove()
    raw = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
    final = f"block {len(blocks)}" if torch.equal(raw, states[-1]) else "final norm"
    return ["embeddings", *(f"block {i}" for i in range(1, len(blocks))), final]
