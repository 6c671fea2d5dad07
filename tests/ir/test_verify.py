"""What `verify` refuses between stages: each kind of damage, done to a graph that is in order."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_lm, token_batches
from golden_cases import graph

import sqcompile
from sqcompile import StageError
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import aten, nodes_by_name, set_tensor, value
from sqcompile.passes.ir.verify import verify

BODY = """
    %x: f32[s0, s1, 4] = input
    %y = aten.linear(%x, %w)
    %t = aten.transpose(%y, 0, 1)
    return %t
"""


def recorded(node, **other):
    """A tensor as the node's value, but for what is given."""
    v = value(node)
    with v.fake_mode:
        like = torch.empty_strided(v.shape, other.pop("stride", v.stride()), dtype=v.dtype, device=v.device)
        node.meta["val"] = like.to(**other) if other else like


def added(gm, node):
    with gm.graph.inserting_after(node):
        new = gm.graph.call_method("contiguous", (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


DAMAGE = {
    "no record": (lambda gm, n: gm.meta.clear(), "no record of what is known"),
    "no value": (lambda gm, n: n["y"].meta.pop("val"), "%y has no recorded value"),
    "dtype": (lambda gm, n: recorded(n["y"], dtype=torch.bfloat16), r"%y is recorded as torch.bfloat16 .* gives torch.float32"),
    "device": (lambda gm, n: recorded(n["y"], device="meta"), r"%y is recorded as .* meta; it gives .* cpu"),
    "strides": (
        lambda gm, n: recorded(n["t"], stride=[4, 4, 1]),
        r"%t is recorded as .*strides \[4, 4, 1\].* gives .*strides \[4, 4\*s\d+, 1\]",
    ),
    "sizes": (lambda gm, n: n["t"].update_arg(1, 2), r"%t is recorded as .*\[s\d+, s\d+, 4\].* gives .*\[s\d+, 4, s\d+\]"),
    "a tensor of another size": (lambda gm, n: set_tensor(gm, "w", torch.zeros(8, 4)), r"w is .*\[8, 4\].* expects .*\[4, 4\]"),
    "a tensor with other strides": (lambda gm, n: set_tensor(gm, "w", torch.zeros(4, 4).t()), r"w is .*\[1, 4\].* expects .*\[4, 1\]"),
    "a write": (lambda gm, n: setattr(n["y"], "target", aten.relu_.default), "%y is aten.relu_.default, which writes"),
    "a later stage": (lambda gm, n: setattr(n["y"], "target", sqcompile_ops.tensor_scale.default), "belongs to a later stage"),
    "no operator": (lambda gm, n: setattr(n["y"], "target", lambda *a: None), "%y calls .*, which is no operator"),
    "a method": (lambda gm, n: added(gm, n["t"]), "is a call_method, expected ATen operators"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_where_it_is(kind):
    gm = verify(graph(BODY, {"w": [4, 4]}), "traced")
    damage, message = DAMAGE[kind]
    damage(gm, nodes_by_name(gm))
    with pytest.raises(StageError, match=f"traced: .*{message}"):
        verify(gm, "traced")


def test_numbers_that_are_read_from_values_are_each_calls_own():
    """`item` gives a new symbol at each call, which says nothing of the one that is recorded."""

    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x, n):
            return self.fc(x) * n.max().item()

    model, inputs = Reads().eval(), (torch.randn(2, 3, 8), torch.tensor([2, 3]))
    gm = trace(model, as_call(model, inputs))
    assert verify(gm, "traced") is gm


def test_the_stride_of_a_size_of_one_says_nothing():
    """A norm in place and its folded form write such a stride in two ways."""
    gm = graph("%x: f32[s0, s1, 4] = input\n%y = aten.unsqueeze(%x, 1)\nreturn %y", {})
    y = nodes_by_name(gm)["y"]
    before = value(y).stride()
    recorded(y, stride=[before[0], 7, *before[2:]])
    assert value(y).stride() != before and verify(gm, "traced") is gm


def test_only_tests_compute_values_again(monkeypatch):
    monkeypatch.delenv("SQCOMPILE_VERIFY")
    gm = graph(BODY, {"w": [4, 4]})
    recorded(nodes_by_name(gm)["t"], stride=[4, 4, 1])
    verify(gm, "traced")


def test_a_pass_that_records_a_wrong_value_does_not_go_unnoticed(monkeypatch):
    """As of a rewrite that leaves the values of what follows as they were."""
    from sqcompile.passes.rewrite import insert_qdq_attention

    monkeypatch.setattr(insert_qdq_attention, "substitute", lambda gm, old, new: old.replace_all_uses_with(new))
    with pytest.raises(StageError, match=r"quantized: %.* is recorded as"):
        sqcompile.compile(tiny_lm("llama"), token_batches(1), recipe="O3", backend="eager", progress=False)
