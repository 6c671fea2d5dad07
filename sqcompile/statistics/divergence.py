"""divergence: how far predictions are from a reference's."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 1.0  # a log-ratio below it is computed by expm1


def divergence(reference: Tensor, log_p: Tensor) -> Tensor:
    """KL divergence of each row from the reference's: float32 [n], nats.

    Args:
        reference, log_p: log-probabilities float32 [n, V].

    With δ = reference - log_p it is Σ p δ, here as Σ p (δ + exp(-δ) - 1): the rest sums to 0. No term is negative, and an
    error of a normalizer counts by its square; of the plain sum, as of much larger terms of both signs, little is left.
    """
    p, q, delta = reference.exp(), log_p.exp(), reference - log_p
    terms = torch.where(delta.abs() < _SMALL, p * (delta + torch.expm1(-delta)), p * delta + (q - p))
    return torch.where(p > 0, terms, q).sum(-1)  # where neither has any probability, delta is no number
