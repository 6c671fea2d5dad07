"""``sqcompile demo``: what it prints, and when."""

from __future__ import annotations

import math
import re

import pytest
import torch
from conftest import tiny_lm
from torch import Tensor, nn

from sqcompile import PRESETS, demo, evaluate
from sqcompile.bench import timing
from sqcompile.kernels.cpu import x86


class Louder(nn.Module):
    """A model whose logits are all some percent larger."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, input_ids: Tensor) -> object:
        out = self.model(input_ids=input_ids)
        out.logits = out.logits * self.factor
        return out


def test_every_row_is_printed_when_it_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, windows = tiny_lm("opt"), torch.randint(3, 96, (6, 12), generator=torch.Generator().manual_seed(0))
    before: list[str] = []

    def compiled(model: nn.Module, calibration: Tensor, recipe: object, backend: str) -> nn.Module:
        before.append(capsys.readouterr().out)
        return Louder(model, 1.01 if recipe.smooth else 1.1)  # type: ignore[attr-defined]

    monkeypatch.setattr(demo, "_compile", compiled)
    demo.accuracy(model, windows, windows)
    printed = [*before, capsys.readouterr().out]
    assert "| recipe |" in printed[0] and "| float |" in printed[0]
    assert [re.findall(r"^\| (\w+) \|", text, re.M) for text in printed[2::2]] == [[name] for name in PRESETS]
    plain = evaluate(Louder(model, 1.1), windows, against=model, progress=False)
    cells = re.findall(r"([\d.]+) \(([-+\d.]+) ± ([\d.]+) %\)", printed[-1])
    assert len(cells) == 2 and math.isclose(float(cells[0][0]), plain.perplexity or 0.0, abs_tol=6e-4)
    assert math.isclose(float(cells[0][1]), plain.increase or 0.0, abs_tol=6e-3)
    assert math.isclose(float(cells[0][2]), plain.increase_error or 0.0, abs_tol=6e-3) and float(cells[0][2]) > 0


def test_the_machine_says_which_kernels_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"torch {torch.__version__}" in timing.machine() and timing.kernels() in timing.machine()
    monkeypatch.setattr(x86, "available", lambda: False)
    monkeypatch.setattr(x86, "has_avx2_kernels", lambda: True)
    assert timing.kernels() == "our AVX2 kernel"
    monkeypatch.setattr(x86, "has_avx2_kernels", lambda: False)
    assert timing.kernels() == "the reference in plain PyTorch"
