"""scores: from logits to the next token, as transformers' logits processors do it in their order, on the device alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.generation.settings import Kind, Settings


class Values:
    """The numbers of a call where a recorded step reads them. All lie on the device, so that a call may change them.

    Attributes:
        minimum: int64 [1].
        eos: int64 [ends].
        pad: int64 [1].
        temperature, penalty: float32 [].
        tail: float32 [], 1 - top_p.
    """

    def __init__(self, ends: int, device: torch.device) -> None:
        self.minimum, self.pad = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self.eos = torch.zeros(ends, dtype=torch.int64, device=device)
        self.temperature, self.penalty, self.tail = (torch.ones((), device=device) for _ in range(3))

    def fill(self, settings: Settings) -> None:
        """With those of a call."""
        self.minimum.fill_(settings.minimum)
        self.pad.fill_(settings.pad)
        self.eos.copy_(torch.tensor(settings.eos, dtype=torch.int64))
        self.temperature.fill_(settings.temperature)
        self.penalty.fill_(settings.penalty)
        self.tail.fill_(1 - settings.top_p)


def next_tokens(
    logits: Tensor,
    kind: Kind,
    values: Values,
    length: Tensor,
    seen: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The next token of each sequence.

    Args:
        logits: float32 [batch, vocabulary].
        kind: what there is to do.
        values: with which numbers.
        length: tokens of prompt and text so far, int64 [1].
        seen: which tokens a sequence has, bool [batch, vocabulary]; for a penalty.
        generator: of what is drawn; None for the device's own.

    Returns:
        int64 [batch].
    """
    scores = logits
    if kind.penalty:
        assert seen is not None
        scores = torch.where(seen, torch.where(scores < 0, scores * values.penalty, scores / values.penalty), scores)
    if kind.minimum:
        ids = torch.arange(scores.shape[-1], device=scores.device)
        ends = (ids[:, None] == values.eos).any(-1)
        scores = scores.masked_fill(ends & (length < values.minimum), -torch.inf)
    if not kind.sample:
        return scores.argmax(-1)
    if kind.temperature:
        scores = scores / values.temperature
    if kind.top_k:
        kept = scores.topk(min(kind.top_k, scores.shape[-1])).values
        scores = scores.masked_fill(scores < kept[:, -1:], -torch.inf)
    if kind.top_p:
        ordered, order = scores.sort()
        gone = ordered.softmax(-1).cumsum(-1) <= values.tail
        gone[:, -1:] = False
        scores = scores.masked_fill(gone.scatter(1, order, gone), -torch.inf)
    # the race of exponential variables that torch.multinomial runs, without the check of its argument, which waits
    probabilities = scores.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)
