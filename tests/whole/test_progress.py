"""Progress bars: which stage of a compilation runs."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import sqcompile


def two_linears() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()


def test_progress_says_which_stage_runs_and_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = two_linears(), [torch.randn(3, 5, 8)]
    compiled = sqcompile.compile(model, x, backend="eager", progress=True)
    shown = [capsys.readouterr().err]
    sqcompile.calibrate(model, x)
    sqcompile.compile(model, plan=compiled.plan, backend="eager")
    shown.append(capsys.readouterr().err)
    stages = [
        re.findall(r"(trace|calibrate|match|plan|fold|insert_qdq|lower|emit|compiled|planned): ", s) for s in shown
    ]
    pipeline = ["trace", "calibrate", "match", "plan", "fold", "insert_qdq", "lower", "emit", "compiled"]
    assert list(dict.fromkeys(stages[0])) == pipeline
    assert list(dict.fromkeys(stages[1])) == [*pipeline[:4], "planned", *pipeline[4:]]
    sqcompile.compile(model, x, backend="eager", progress=False)
    sqcompile.calibrate(model, x, progress=False)
    assert capsys.readouterr().err == ""
