"""Models whose norms have means, as trained ones do."""

from __future__ import annotations

import torch
from torch import nn


def far(model, seed=0):
    """The model with biases of LayerNorms far from zero in a few channels, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.LayerNorm) and m.bias is not None:
                m.bias.add_(torch.randn(m.bias.shape, generator=generator) + 12 * (torch.arange(len(m.bias)) % 16 == 3))
    return model
