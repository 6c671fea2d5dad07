"""Which expressions over weights share an INT8 weight: those that give the same value, and no others."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from backend_cases import call, compiled
from conftest import relative_error
from torch import fx, nn
from torch.nn import functional as F

import sqcompile
from sqcompile.passes.ir.graph import aten, evaluate, set_tensor
from sqcompile.passes.rewrite.weight_store import Shared

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def shared(known):
    return Shared(lambda t: known.get(id(t)), lambda key: None)


def weights():
    """Square matrices of small integers: the model's own two, and some that a pass made."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-3, 4, (2, 4, 4), generator=generator).float()
    made = torch.arange(16).view(4, 4)
    return {
        "a": a, "b": b, "int8": made.to(torch.int8), "uint8": made.to(torch.uint8), "wide": made.view(2, 8).to(torch.int8),
        "t": made.to(torch.int8).t(), "zero": torch.tensor(0.0), "minus": torch.tensor(-0.0), "one": torch.tensor(1.0),
    }  # fmt: skip


def expression(choice, gm, depth):
    """A random expression of operators, weights and numbers."""
    g = gm.graph
    if depth == 0 or choice.random() < 0.2:
        return g.get_attr(choice.choice(["a", "b"]))
    x = expression(choice, gm, depth - 1)
    number = choice.choice([0, 1, 2, 0.0, 1.0, -0.0])
    other = choice.choice([x, number, number, expression(choice, gm, depth - 1)])
    name = choice.choice(["add", "sub", "mul", "cat", "slice", "roll", "to", "alpha", "swapped", "made"])
    if name == "swapped" and isinstance(other, fx.Node):
        return g.call_function(aten.sub.Tensor, (other, x))
    if name == "made":
        return g.call_function(
            aten.mul.Tensor, (x, g.get_attr(choice.choice(["one", "zero", "minus", "int8", "uint8"])))
        )
    return {
        "add": lambda: g.call_function(aten.add.Tensor, (x, other)),
        "sub": lambda: g.call_function(aten.sub.Tensor, (x, other)),
        "mul": lambda: g.call_function(aten.mul.Tensor, (x, other)),
        "cat": lambda: g.call_function(aten.narrow.default, (g.call_function(aten.cat.default, ([x, x],)), 0, choice.randrange(4), 4)),
        "slice": lambda: g.call_function(aten.cat.default, ([g.call_function(aten.slice.Tensor, (x, 0, 0, 2))] * 2,)),
        "roll": lambda: g.call_function(aten.roll.default, (x, [choice.choice([0, 1, 2])], [choice.choice([0, 1])])),
        "to": lambda: g.call_function(aten.to.dtype, (x, choice.choice([torch.float32, torch.float64]))),
    }.get(name, lambda: g.call_function(aten.add.Tensor, (x, other), {"alpha": choice.choice([1, 2])}))()  # fmt: skip


def keyed(seed, known, tensors):
    """The key and the value of a random expression, in a graph of its own."""
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    for name, t in tensors.items():
        set_tensor(gm, name, t)
    node = expression(random.Random(seed), gm, 3)
    return shared(known).key(gm, node), evaluate(gm, node)


def test_equal_keys_mean_equal_weights():
    tensors = weights()
    known = {id(tensors["a"]): (0, 0, 0), id(tensors["b"]): (1, 0, 0)}
    found: dict = {}
    for seed in range(3000):
        key, value = keyed(seed, known, tensors)
        assert key == keyed(seed, known, tensors)[0] or seed % 50, "the same in another graph"
        before = found.setdefault(key, value)
        assert before.dtype == value.dtype and torch.equal(before, value)
        assert torch.equal(before.signbit(), value.signbit())
    assert 500 < len(found) < 2500


def test_made_tensors_are_known_by_all_that_they_are():
    tensors = weights()
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    for name, t in (*tensors.items(), ("again", tensors["int8"].clone())):
        set_tensor(gm, name, t)
    keys = {name: shared({}).key(gm, gm.graph.get_attr(name)) for name in (*tensors, "again")}
    assert keys["again"] == keys["int8"]
    for one, other in itertools.combinations(tensors, 2):
        assert keys[one] != keys[other], (one, other)


def test_expressions_of_one_weight_behind_a_graph_break():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 64) / 8)

        def forward(self, x):
            a = F.linear(x, self.w + self.w)
            torch._dynamo.graph_break()
            return a, F.linear(x, self.w + 0)

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 8, 64)
    net = compiled(model, recipe=sqcompile.Recipe(smooth=False), calibration_steps=1)
    call(net, x)
    for got, want in zip(call(net, x), call(model, x), strict=True):
        assert relative_error(got, want) < 0.02
