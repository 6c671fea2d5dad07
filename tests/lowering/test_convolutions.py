"""Models with convolutions through Inductor: one code for every batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import nn

import sqcompile


class Convolved(nn.Module):
    """A convolution over time or over a picture without a stride, as speech and vision models begin, and a linear."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        kind = nn.Conv1d if dims == 1 else nn.Conv2d
        self.convolution, self.norm, self.linear = kind(8, 16, 3, padding=1), nn.LayerNorm(16), nn.Linear(16, 32)

    def forward(self, x):
        return self.linear(self.norm(F.gelu(self.convolution(x)).flatten(2).transpose(1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_convolution_does_not_fix_the_batch(dims, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # PyTorch chooses a kernel by it, too
    try:
        torch.manual_seed(0)
        model, size = Convolved(dims).eval(), (8, *(10,) * dims)
        layouts = [torch.contiguous_format, torch.channels_last] if dims == 2 else [torch.contiguous_format]
        for layout in layouts:
            batches = [torch.randn(3, *size).contiguous(memory_format=layout) for _ in range(4)]
            compiled = sqcompile.compile(model, batches, progress=False)
            for batch in (1, 3, 16, 40):
                x = torch.randn(batch, *size).contiguous(memory_format=layout)
                with torch.no_grad():
                    assert relative_error(compiled(x), model(x)) < 0.02
    finally:
        torch.set_num_threads(before)
