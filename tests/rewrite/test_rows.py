"""Weights that are computed a few rows at a time: the same bits as whole, and no more than those rows."""

from __future__ import annotations

import pytest
import torch
from families import build, roughen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sqcompile
from sqcompile import Recipe
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.passes.ir.graph import evaluate, find_linears, nodes_by_name
from sqcompile.passes.ir.rows import rows_of
from sqcompile.pipeline import rewrite


class Largest(TorchDispatchMode):
    """The most elements that an operator gave."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            self.most = max(self.most, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


CASES = [
    ("llama", Recipe(0.5, rotate=16)),
    ("gpt2", Recipe(0.5)),
    pytest.param("qwen2_moe", Recipe(0.5, rotate=16), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "recipe"), CASES, ids=["llama", "gpt2", "qwen2_moe"])
def test_rows_are_those_of_the_whole_and_nothing_else_is_computed(family, recipe):
    model, call = build(family)
    roughen(model.eval()).to(torch.bfloat16)
    plan = sqcompile.calibrate(model, [call], recipe=recipe, progress=False)
    folded = rewrite(trace(model, as_call(model, call)), plan, until="folded")
    nodes, found = nodes_by_name(folded), 0
    for l in find_linears(folded):
        node = nodes[l.weight]
        whole, rows, size = evaluate(folded, node), rows_of(folded, node), -(-l.shape[0] // 4)
        for first in range(0, l.shape[0], size):
            with Largest() as seen:
                part = rows(slice(first, first + size))
            assert part.dtype == whole.dtype and torch.equal(part, whole[first : first + size]), l.name
            assert seen.most <= whole.numel() // l.shape[0] * size, l.name
        found += node.op == "call_function"
    assert found >= 8
