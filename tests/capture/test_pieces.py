"""All calls together, piece by piece or operation by operation: the same numbers, and each weight read or made once."""

from __future__ import annotations

import dataclasses
import weakref
from functools import partial

import pytest
import torch
from checkpoint_cases import equal
from families import build, token_ids
from torch import nn

import sqcompile
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.errors import CalibrationError
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.ir import pieces
from sqcompile.passes.ir.about import about
from sqcompile.pipeline import rewrite
from sqcompile.statistics import observe
from sqcompile.statistics.together import run_together


def batches_of(call):
    """Batches of several sizes; the last one has padding, where the model takes a mask."""
    found = [{**call, "input_ids": token_ids(shape, seed)} for seed, shape in enumerate([(2, 11), (3, 11), (2, 11)])]
    for batch in found:
        if "attention_mask" in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "attention_mask" in call:
        found[-1]["attention_mask"][:, 7:] = 0
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "bert", "t5"])
def test_the_same_statistics_as_batch_by_batch(family, monkeypatch):
    model, call = build(family)
    batches = batches_of(call) if "decoder_input_ids" not in call else [call, call]
    gm = trace(model, as_call(model, call))
    want = observe.calibrate(gm, model, batches, find_attentions(gm))
    monkeypatch.setattr(pieces, "PIECE", 3)
    for most in (pieces.MOST, 0):
        monkeypatch.setattr(pieces, "MOST", most)
        monkeypatch.setattr(pieces, "_SMALL", 1)
        with sqcompile.memory_limit(2**40):
            found = observe.calibrate(gm, model, batches, find_attentions(gm))
        assert found.batches == want.batches == len(batches) and found.inputs
        for name in ("inputs", "heads", "sample"):
            assert equal(getattr(found, name), getattr(want, name)), name


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(20))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


def test_a_weight_is_read_in_one_go_and_spilled_values_are_those_of_the_model(monkeypatch):
    model, seen = Net().eval(), []
    gm = trace(model, as_call(model, (torch.randn(4, 8),)))
    batches = [torch.randn(4, 8) for _ in range(3)]
    read = observe.Observer.run_node

    def run_node(self, n):
        if n.target == torch.ops.aten.linear.default:
            seen.append((n.name, self.index))
        return read(self, n)

    monkeypatch.setattr(observe.Observer, "run_node", run_node)
    monkeypatch.setattr(pieces, "MOST", 0)
    monkeypatch.setattr(pieces, "_SMALL", 1)
    reused = torch.empty(4, 8)  # loaders may give the same memory each time

    def loader():
        for batch in batches:
            yield reused.copy_(batch)

    with sqcompile.memory_limit(2**40):
        found = observe.calibrate(gm, model, loader())
    linears = [n.name for n in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)]
    want = [(n, i) for piece in (linears[:8], linears[8:16], linears[16:]) for i in range(3) for n in piece]
    assert seen == want
    with torch.no_grad():
        for call, batch in zip(found.sample.calls, batches, strict=True):
            assert torch.equal(call.rows[0][1], model(batch))


def test_a_batch_that_is_refused_is_named():
    model = Net().eval()
    gm = trace(model, as_call(model, (torch.randn(4, 8),)))
    batches = [torch.randn(4, 8), torch.full((4, 8), torch.inf)]
    with sqcompile.memory_limit(2**40), pytest.raises(CalibrationError, match="is not finite in calibration batch 1"):
        observe.calibrate(gm, model, batches)
    batches[1] = torch.randn(4, 9)
    with sqcompile.memory_limit(2**40), pytest.raises(CalibrationError, match="calibration batch 1: "):
        observe.calibrate(gm, model, batches)


def test_int8_weights_are_made_once_as_they_are_reached_and_are_gone_afterwards():
    model, batches = Net().eval(), [torch.randn(4, 8) for _ in range(3)]
    plan = sqcompile.calibrate(model, batches, recipe=sqcompile.Recipe(0.5), progress=False)
    traced = trace(model, as_call(model, (batches[0],)))
    eager = rewrite(traced, plan, until="quantized")
    lazy = rewrite(traced, plan, until="quantized", lazy=True)
    assert lazy.graph.python_code("self").src == eager.graph.python_code("self").src
    made, most, found = [], [], [None] * 3

    def watched(make):
        q, scale = make()
        made.append(weakref.ref(q))
        return q, scale

    for name, entry in about(lazy).lazy.items():
        about(lazy).lazy[name] = dataclasses.replace(entry, make=partial(watched, entry.make))

    def see(call, n, y):
        most.append(sum(ref() is not None for ref in made))
        found[call] = y

    with torch.no_grad():
        run_together(lazy, [(x,) for x in batches], see)
        assert len(made) == 20 and max(most) == 1 and all(ref() is None for ref in made)
        assert all(torch.equal(y, eager(x)) for y, x in zip(found, batches, strict=True))
