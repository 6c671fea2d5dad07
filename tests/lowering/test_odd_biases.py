"""Biases that are not one number for each output channel: what broadcasts in float is the same in INT8."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from torch import nn
from torch.nn import functional as F

import sqcompile


class Odd(nn.Module):
    """Two linears with an activation between; a bias of any shape."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b, self.last = (
            nn.Parameter(torch.randn(64, 32) / 6),
            nn.Parameter(3 * torch.randn(shape)),
            nn.Linear(64, 48),
        )

    def forward(self, x):
        y = F.linear(x, self.w, self.b)
        return y, self.last(F.relu(F.linear(x, self.w.flip(0), self.b)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (8, 64), (1, 64), (8, 1), (64,)])
def test_a_bias_of_any_shape(shape, dtype):
    model = Odd(shape).to(dtype)
    data = [(torch.randn(8, 32, generator=torch.Generator().manual_seed(i)).to(dtype),) for i in range(4)]
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(9)).to(dtype)
    net = sqcompile.compile(
        model, data, recipe=sqcompile.Recipe(0.5), dynamic_shapes=None, backend="eager", progress=False
    )
    assert all(layer.quantized for layer in net.plan.layers)
    with torch.no_grad():
        for y, want in zip(net(x), model(x), strict=True):
            assert relative_error(y, want) < 0.02
