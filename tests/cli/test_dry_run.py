"""How long a calibration will take, as a dry run tells it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sqcompile.cli import quantize


def test_of_a_call_that_takes_long_a_part_is_timed(monkeypatch):
    ran = []

    class Stack(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(x)
                ran.append(layer)
            return x

    stack = Stack(*(nn.Linear(8, 8) for _ in range(10)))
    now = iter(range(100))
    monkeypatch.setattr(quantize.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(quantize, "_WHILE", 2.5)
    # a second a look: at 0 it begins, after the third layer it is 3, and 4 when that is told
    assert quantize._seconds(stack, {"x": torch.zeros(8)}) == pytest.approx(4 * 10 / 3)
    assert len(ran) == 2
    monkeypatch.setattr(quantize, "_WHILE", math.inf)
    assert quantize._seconds(stack, {"x": torch.zeros(8)}) == 12 and len(ran) == 22  # every layer looks, and the end
