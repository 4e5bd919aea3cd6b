"""Which copies of a tied tensor are tensors of their own, because a specialist has them apart?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.merge.sources import Source


def untied(base: Source, specialists: Sequence[Source]) -> Source:
    """The base with a tensor of its own for each copy of a tied one that a specialist has apart.

    A checkpoint has it where the two differ; an adapter where it saved another value for one alone,
    as PEFT's module is then no longer the other's. Raises ValueError where an adapter changes what
    another one has apart by factors or tokens, which mean both.
    """
    apart = {}
    for specialist in specialists:
        for copy, original in base.anatomy.ties.items() if base.anatomy else ():
            if copy not in base.tensors and _is_apart(base, specialist, copy, original):
                apart[copy] = original
    for specialist in specialists:
        tokens = specialist.adapter.tokens if specialist.adapter else {}
        both = [x for x in (*specialist.factors, *tokens) if x in apart.values()]
        if both:
            raise ValueError(
                f"specialist {specialist.label} adapts {both[0]} and its copies, which another "
                "specialist no longer ties: merge it into its base first"
            )
    if apart and not base.anatomy.settings.get("is_encoder_decoder"):
        # a class gives up all its ties at once, also that of a head's bias
        stored = base.tensors.keys()
        ties = base.anatomy.ties.items()
        apart |= {copy: x for copy, x in ties if copy not in stored and x in stored}
    own = {copy: base.tensors[original] for copy, original in apart.items()}
    return base._replace(tensors=dict(base.tensors) | own)


def _is_apart(base: Source, specialist: Source, copy: str, original: str) -> bool:
    """Whether a specialist has a value for the copy that is not the original's."""
    loaded = base.anatomy.loaded
    stored = {loaded(name): tensor for name, tensor in specialist.tensors.items()}
    pair = [stored[name] for name in (copy, original) if name in stored]
    if len(pair) == 1 and specialist.adapter is not None:
        pair.append(base.tensors[original])  # an adapter leaves what it does not save
    if len(pair) < 2:
        return False
    first, second = pair
    return not equal(second, first)


def equal(base: Tensor, tuned: Tensor) -> bool:
    """Whether a tensor holds the base's values, rounded to its own grid where that is coarser."""
    return torch.equal(base[...].to(tuned.dtype), tuned[...].to(base.device))
