"""What a compiled model hands out is the caller's, who may write to it, as with the float model."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from torch import nn

import sqcompile
from sqcompile.backend import smoothquant

RECIPE = sqcompile.Recipe(alpha=0.5)


class Gains(nn.Module):
    """Returns values that are computed from parameters alone beside others: themselves, a view of them, a part, a cast."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.gain = nn.Linear(16, 16), nn.Parameter(torch.randn(16))
        self.register_buffer("mask", torch.randn(4, 4))

    def forward(self, x):
        g = self.gain.exp()
        mask = self.mask.tril() * 3
        rows = g.expand(x.shape[0], -1)  # of a size that a call brings
        y = self.fc(x) * g + mask.sum() * rows[:, None]
        spread = torch.broadcast_tensors(mask, mask[:1] * 2)
        return (
            y, g, mask.view(2, 8), rows, (g * 2)[:4], mask.to(torch.float32), torch.atleast_2d(g.type_as(x)),
            (g * 3).type_as(x).resolve_conj(), spread[0], mask.diagonal(),
        )  # fmt: skip


def compiled(backend: str, tmp_path) -> tuple[nn.Module, nn.Module]:
    model, some = Gains().eval(), [torch.randn(2, 5, 16) for _ in range(2)]
    if backend.startswith("dynamo"):
        plan = sqcompile.calibrate(model, some, recipe=RECIPE, progress=False)
        options = {"plan": plan, "model": model, "compiler": backend.split()[1], "progress": False}
        return model, torch.compile(model, backend=smoothquant, options=options)
    net = sqcompile.compile(model, some, recipe=RECIPE, backend=backend.split()[0], progress=False)
    if "loaded" in backend:
        net.save(tmp_path / "saved", progress=False)
        net = sqcompile.load(tmp_path / "saved", backend="eager")
    return model, net


@pytest.mark.parametrize("backend", ["eager", "inductor", "eager loaded", "dynamo eager", "dynamo inductor"])
def test_a_caller_may_write_to_results(backend, tmp_path):
    model, net = compiled(backend, tmp_path)
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        wanted = model(x)
        first = net(x)
        kept = [y.clone() for y in first]
        for y in first:
            y.zero_()
        for y, before, want in zip(net(x), kept, wanted, strict=True):
            assert torch.equal(y, before) and relative_error(y, want) < 0.02


def test_a_buffer_that_is_handed_out_is_one():
    """The float model hands its own out, too: who writes to it has written to the model."""

    class Own(Gains):
        def forward(self, x):
            return self.fc(x) + self.gain, self.gain

    model, x = Own().eval(), torch.randn(2, 5, 16)
    net = sqcompile.compile(model, [x], recipe=RECIPE, backend="eager", progress=False)
    before = model.gain.detach().clone()
    y, gain = net(x)
    gain.zero_()
    again, zero = net(x)
    assert torch.equal(model.gain, before) and bool((zero == 0).all())
    assert relative_error(y - again, before.expand_as(y)) < 1e-5
