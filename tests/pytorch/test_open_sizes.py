"""open_sizes: sizes stay open where nothing depends on them, and PyTorch's own functions are back afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import relative_error
from torch import nn
from torch._inductor.codegen.cpp import CppKernel

import sqcompile
from sqcompile import Recipe, StageError
from sqcompile.pytorch.inductor import open_sizes


def replaced():
    return torch._C._select_conv_backend, CppKernel.need_use_acc_helper


def test_threads_and_errors_leave_pytorch_as_it_was():
    before, inside, errors = replaced(), threading.Barrier(2), []

    def other():
        inside.wait()
        with open_sizes():
            if any(a is b for a, b in zip(replaced(), before, strict=True)):
                errors.append("not in place")

    thread = threading.Thread(target=other)
    with pytest.raises(ZeroDivisionError), open_sizes(), open_sizes():
        thread.start()
        inside.wait()  # the other one begins before this one ends
        raise ZeroDivisionError
    thread.join()
    assert not errors and replaced() == before


class Sums(nn.Module):
    """Sums over the sequence in float32, which Inductor adds up in parts where they are long."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        h = self.down(torch.relu(self.up(self.norm(x))))
        pooled = torch.softmax(h[..., :1], 1) * h
        scores = torch.softmax(h[:, :8] @ h.transpose(1, 2) / 8, -1) @ h
        return h.mean(1), pooled.sum(1), h / h.norm(dim=1, keepdim=True), scores


@pytest.mark.slow
@pytest.mark.parametrize("spelled", ["compile", "backend"])
def test_sums_over_a_dynamic_size(spelled):
    torch.manual_seed(0)
    model = Sums().eval()
    batches = [torch.randn(2, 11, 32), torch.randn(3, 18, 32)]
    plan = sqcompile.calibrate(model, batches, recipe=Recipe(0.5), progress=False)
    eager = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    if spelled == "compile":
        net = sqcompile.compile(model, plan=plan, progress=False)
    else:
        torch._dynamo.reset()
        net = torch.compile(model, backend="smoothquant", dynamic=True, options={"plan": plan})
    for shape in ((2, 11, 32), (1, 8, 32), (2, 5000, 32)):
        x = torch.randn(shape)
        with torch.no_grad():
            for y, want in zip(net(x), eager(x), strict=True):
                assert relative_error(y, want) < 1e-3


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 32)

    def forward(self, x):
        return self.up(self.conv(x).flatten(2).transpose(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_convolutions_leave_the_batch_open(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        model = Depthwise().eval()
        net = sqcompile.compile(model, [torch.randn(2, 8, 12, 12)], recipe=Recipe(0.5), progress=False)
        for batch in (1, 2, 20):
            x = torch.randn(batch, 8, 12, 12)
            with torch.no_grad():
                assert relative_error(net(x), model(x)) < 0.03
    finally:
        torch.set_num_threads(before)


def test_what_inductor_cannot_compile_is_one_sentence(monkeypatch):
    import sqcompile.pytorch.inductor as ours

    def fails(*_):
        raise ValueError("Attempting to permute\na tensor")

    monkeypatch.setattr(ours, "compile_fx", fails)
    with pytest.raises(
        StageError, match=r"Inductor cannot compile the graph \(ValueError: Attempting to permute\): run it as"
    ):
        sqcompile.compile(
            nn.Sequential(nn.Linear(16, 16)).eval(), [torch.randn(4, 16)], recipe=Recipe(0.5), progress=False
        )
