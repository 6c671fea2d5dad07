"""bisect names the lowered operator that is wrong, and nothing else."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
from conftest import ALL_INT8, tiny_lm, token_batches
from debug_cases import TOKENS, Attending, Net, bisect, wrong
from hand_written import Spelled
from torch.nn import functional as F

from sqcompile import Recipe
from sqcompile.passes.lowering import int8_attention, lower, quantized


def off_by(factor, part, columns=lower._columns):
    """Scales of output channels that are wrong for one layer."""
    return lambda gm, g, merged: columns(gm, g, merged) * (factor if part in str(g.weight.target) else 1.0)


def test_a_wrong_lowered_linear_is_named(monkeypatch):
    monkeypatch.setattr(lower, "_columns", off_by(1.0001, "layers.1.b"))
    found = bisect(Net(F.relu, F.gelu, F.relu))
    assert wrong(found) == ["layers.1: b"] and found.first_wrong_fold is None and not found.right
    node = found.first_wrong_node
    # on CPUs with kernels of our own, what ends in the input of the next linear shows in its scale
    assert node.name == "layers.1.b.weight" and node.operator.startswith(("int8_linear", "linear_norm_quantize"))
    assert 5e-5 < node.error < 1e-4  # the bias, which is right, has a part in the result
    assert f"first wrong node: {node.label}" in str(found)


def test_a_wrong_part_of_a_merged_linear_is_named_alone(monkeypatch):
    made = lower._columns

    def columns(gm, g, merged):
        scale = made(gm, g, merged).clone()
        if "layers.1.q" in str(g.weight.target):
            scale[32:36] *= 1.5  # queries have 32, keys come next
        return scale

    monkeypatch.setattr(lower, "_columns", columns)
    found = bisect(Attending(Spelled("whole"), Spelled("whole")), TOKENS)
    assert wrong(found) == ["layers.1: k"]


def test_a_wrong_lowered_attention_is_named(monkeypatch):
    read = int8_attention.read_scores

    def misread(*args):
        scores = read(*args)
        return dataclasses.replace(scores, scale=scores.scale * 1.1)

    monkeypatch.setattr(int8_attention, "read_scores", misread)
    found = bisect(Attending(Spelled("whole"), Spelled("whole")), TOKENS, recipe=Recipe(attention="qk"))
    assert wrong(found) == ["layers.0", "layers.1"]
    assert found.first_wrong_node.operator == "int8_attention"


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("opt", "O3"), ("llama", ALL_INT8), pytest.param("mixtral", ALL_INT8, marks=pytest.mark.slow)],
    ids=["opt-O3", "llama-default", "mixtral-default"],
)
def test_operators_fused_for_gpus_are_compared_where_they_end(monkeypatch, family, recipe):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "static scales from")
        found = bisect(tiny_lm(family), token_batches(1)[0], recipe=recipe, target="cuda-sm90")
        assert found.right and {"int8_gemm"} <= {n.operator for n in found.lowering}
        assert len(found.lowering) == {"opt": 2 * 7, "llama": 2 * 7, "mixtral": 2 * 6}[family]
        monkeypatch.setattr(lower, "_columns", off_by(1.01, "layers.1.fc1" if family == "opt" else "layers.1."))
        found = bisect(tiny_lm(family), token_batches(1)[0], recipe=recipe, target="cuda-sm90")
    assert found.first_wrong_fold is None and all("layers.1" in label for label in wrong(found))
    # fc1 ends in the int8 input of fc2
    assert found.first_wrong_node.label.endswith("layers.1: fc1" if family == "opt" else "layers.1: q_proj")


def test_a_wrong_node_that_is_no_linear_is_named_by_the_node(monkeypatch):
    act = quantized.act_of
    monkeypatch.setattr(quantized, "act_of", lambda x, const: (f := act(x, const)) and (*f[:2], "relu"))
    found = bisect(tiny_lm("llama"), token_batches(1)[0], target="cuda-sm90")
    assert found.first_wrong_node.operator == "act_quantize"
    assert {n.operator for n in found.lowering if n.wrong} == {"act_quantize"}  # whose readers get the right values
