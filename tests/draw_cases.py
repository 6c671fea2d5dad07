"""Blocks that tests of drawings and of `show` share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class PostNorm(nn.Module):
    """A hand-written post-norm block: its norm feeds a residual stream, its gelu a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))
