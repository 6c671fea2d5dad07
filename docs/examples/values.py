"""The example of docs/ARCHITECTURE.md: values of grouped-query attention, from v to o, with 2 value heads for 4 query heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Values(nn.Module):
    """y [B, S, 8] = x + o(P · v(norm(x))), with attention weights P [B, 4, S, S] given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.v, self.o = nn.RMSNorm(8), nn.Linear(8, 4, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        v = self.v(self.norm(x)).unflatten(-1, (2, 2)).transpose(1, 2)  # [B, 2 heads, S, 2]
        v = v.repeat_interleave(2, dim=1)  # [B, 4 heads, S, 2]
        return x + self.o((p @ v).transpose(1, 2).flatten(2))


def make() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model and an example call, for ``python -m sqcompile.show``."""
    torch.manual_seed(0)
    return Values(), (torch.randn(2, 5, 8), torch.rand(2, 4, 5, 5).softmax(-1))
