"""How long a calibration will take, as a dry run tells it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cli_cases import llama, run
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


@pytest.mark.slow
def test_a_dry_run_says_what_a_run_would(tmp_path):
    folder = llama(tmp_path / "float")
    for options, count in (([], 14), (["--lm-head"], 15), (["--skip", "*.q_proj"], 12)):
        found = json.loads(run("quantize", folder, "--dry-run", "--json", "-q", *options).stdout)
        assert found["linears"] == 15 and found["int8_linears"] == count
        (written,) = (run("quantize", folder, "--dry-run", "-q", *options).output.splitlines()[i] for i in (-3,))
        assert written.endswith(f"with {count} of 15 linears in INT8")
    fp8 = json.loads(run("quantize", folder, "--dry-run", "--json", "-q", "--recipe", "fp8").stdout)
    assert fp8["fp8_linears"] == 14 and "int8_linears" not in fp8
    for options, said in (
        (["--skip", "nope"], "nope"),
        (["--plan", tmp_path / "nofile"], "nofile"),
        (["-o", folder], "is read, and would be replaced"),
    ):
        found = run("quantize", folder, "--dry-run", "-q", *options)
        assert found.exit_code == 2 and said in found.output and found.output.count("\n") == 1, found.output
