"""Nothing is left of deleted models: no tensor, whatever compiled them, refused them or raised."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from backend_cases import compiled, mlp, outliers, planned
from torch import nn
from torch._subclasses import FakeTensor

import sqcompile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def tensors(fakes=True):
    """All tensors there are, packed weights among them, by kind and size; the first call of anything makes some that stay.

    Fake ones, which have no memory, count, too, but where torch.export fails: it keeps those that it failed with.
    """
    gc.collect()
    found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and (fakes or type(t) is not FakeTensor)]
    return Counter((type(t).__name__, t.is_mkldnn, t.device.type, str(tuple(t.shape))) for t in found)


def rounds(n, once, fakes=True):
    """Does something n times, and says what tensors there are more of than after the second time."""
    for i in range(n):
        once(i)
        if i == 1:
            before = tensors(fakes)
    return tensors(fakes) - before


def use(model, device, **options):
    x = outliers()[0].to(device)
    net = compiled(model.to(device), **options)
    for _ in range(4):
        try:
            with torch.no_grad():
                net(x)
        except sqcompile.SQCompileError:
            pass


def cases(plan, device):
    def compile_(backend):
        return lambda i: sqcompile.compile(
            mlp().to(device), [outliers()[0].to(device)], backend=backend, progress=False
        )(outliers()[0].to(device))

    def refused(i):
        model = nn.Sequential(mlp(), nn.Linear(64, 64))
        use(model, device, plan=plan)

    def with_gradients(i):
        net = compiled(mlp().to(device), plan=plan)
        for _ in range(2):
            with pytest.raises(sqcompile.CaptureError):
                net(outliers()[0].to(device))

    def not_captured(i):
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(64, 64)

            def forward(self, x):
                return self.fc(x) if x.sum() > 0 else x

        with pytest.raises(sqcompile.CaptureError):
            sqcompile.compile(Branch().to(device), [outliers()[0].to(device)], progress=False)

    return {
        "compile eager": compile_("eager"),
        "compile inductor": compile_("inductor"),
        "planned": lambda i: use(mlp(), device, plan=plan),
        "planned, changed": lambda i: use_changed(plan, device),
        "planned inductor": lambda i: use(mlp(), device, plan=plan, compiler="inductor"),
        "calibrating": lambda i: use(mlp(), device, calibration_steps=2),
        "calibrating inductor": lambda i: use(mlp(), device, calibration_steps=2, compiler="inductor"),
        "refused": refused,
        "with gradients": with_gradients,
        "not captured": not_captured,
    }


def use_changed(plan, device):
    model = mlp().to(device)
    net = compiled(model, plan=plan)
    for _ in range(3):
        with torch.no_grad():
            net(outliers()[0].to(device))
            model.up.weight.mul_(2)


CHEAP = ["compile eager", "planned", "planned, changed", "calibrating", "refused", "with gradients", "not captured"]
COSTLY = ["compile inductor", "planned inductor", "calibrating inductor"]


@pytest.mark.parametrize("case", CHEAP)
def test_a_few_rounds(case):
    plan, _ = planned(mlp())
    assert not rounds(5, cases(plan, "cpu")[case], case != "not captured")


@pytest.mark.slow
@pytest.mark.parametrize("case", CHEAP + COSTLY)
def test_thirty_rounds(case):
    plan, _ = planned(mlp())
    assert not rounds(30, cases(plan, "cpu")[case], case != "not captured")


@pytest.mark.slow
def test_inductor_keeps_no_packed_weight():
    plan, _ = planned(mlp())
    before = sum(n for (_, packed, *_), n in tensors().items() if packed)
    for case in COSTLY[:2]:
        cases(plan, "cpu")[case](0)
    assert sum(n for (_, packed, *_), n in tensors().items() if packed) == before


def test_a_refused_call_keeps_neither_model_nor_inputs():
    """Its error is raised anew at each call, with a traceback of that call alone."""
    plan, _ = planned(mlp())
    net, x = compiled(nn.Sequential(mlp(), nn.Linear(64, 64)), plan=plan), outliers()[0]
    lengths, errors = [], []
    for _ in range(4):
        with pytest.raises(sqcompile.PlanError) as found, torch.no_grad():
            net(x)
        lengths.append(len(found.traceback))
        errors.append(found.value)
    assert len({id(e) for e in errors}) == 4 and len({str(e) for e in errors}) == 1
    assert len(set(lengths[1:])) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", CHEAP + COSTLY)
def test_thirty_rounds_on_a_gpu(case):
    plan, _ = planned(mlp())
    found = cases(plan, "cuda")[case]
    for i in range(2):
        found(i)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    assert not rounds(30, found, case != "not captured")
    assert torch.cuda.memory_allocated() <= before + 2**16
