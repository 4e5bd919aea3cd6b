"""How likely are right answers? The loss that training lowers and that gradients are taken of."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from helpers.states.batch import IGNORED, pad, read_shared, shared_length

Example = tuple[list[int], list[int]]  # token ids of a prompt and of its answer


def answer_loss(
    model: nn.Module, examples: Sequence[Example], share: bool = False
) -> Tensor:
    """Sum over all answer tokens of their negative log-likelihood, in nats.

    `model` is a decoder or an encoder-decoder, which reads prompts with its encoder. `share`: what
    a decoder's prompts all begin with is read once, in a pass of its own.
    """
    if model.config.is_encoder_decoder:
        logits, labels = _translated(model, examples)
    else:
        prompts = [prompt for prompt, _ in examples]
        logits, labels = _continued(
            model, examples, shared_length(prompts) if share else 0
        )
    return cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten().to(logits.device),
        ignore_index=IGNORED,
        reduction="sum",
    )


def _continued(
    model: nn.Module, examples: Sequence[Example], shared: int
) -> tuple[Tensor, Tensor]:
    """Logits and labels (batch, positions) where some example has an answer token to predict."""
    ids, mask = pad([prompt + answer for prompt, answer in examples], 0)
    # labels by position, never by id: the padding id may be that of the end token
    hidden = [[IGNORED] * len(prompt) + answer for prompt, answer in examples]
    labels, _ = pad(hidden, IGNORED)
    # the head is a fifth of the work
    counted = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
    ids, mask, kept = (x.to(model.device) for x in (ids, mask, counted - shared))
    output = model(
        ids[:, shared:],
        attention_mask=mask,
        past_key_values=read_shared(model, ids[:, :shared]),
        logits_to_keep=kept,
        use_cache=shared > 0,
    )
    return output.logits, labels[:, counted + 1]


def _translated(model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    prompts, answers = zip(*examples, strict=True)
    ids, mask = pad(prompts, 0)
    labels, _ = pad(answers, IGNORED)
    start = model.config.decoder_start_token_id
    before, _ = pad([[start, *answer[:-1]] for answer in answers], 0)
    output = model(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        decoder_input_ids=before.to(model.device),
        use_cache=False,
    )
    return output.logits, labels
