"""What fold makes of a graph, as text. The function stays the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from expecttest import assert_expected_inline
from golden_cases import before_after, difference, graph, only_after, planned, untrue
from torch import Tensor, fx

from sqcompile import PlanError
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.attention.head_sites import match_heads
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.labels.match import input_sites, match
from sqcompile.passes.rewrite import fold

FAR = torch.tensor([0.25, 3.0, 0.5, 7.0])  # scales, far from 1


def folded(gm: fx.GraphModule, scale: Tensor = FAR) -> tuple[str, fx.GraphModule]:
    """`fold` with one scale for each site there is."""
    sites, refusals = match(gm)
    sites += input_sites(refusals, {l.name for l in find_linears(gm)})
    plan = planned(gm, {s.name: scale for s in sites})
    text, after = before_after(lambda g: verify(fold.fold(g, sites, plan), "folded"), gm)
    assert difference(gm, after) <= 1e-5
    return text, after


NORM = """
    %x: f32[2, 3, 4] = input
    %n = aten.layer_norm(%x, [4], %g, %b)
    %q = aten.linear(%n, %wq)
    %k = aten.linear(%n, %wk)
    return [%q, %k]
"""
NORM_TENSORS = {"g": [4], "b": [4], "wq": [6, 4], "wk": [2, 4]}


def test_a_norm_is_divided_and_the_linears_that_read_it_are_multiplied():
    gm = graph(NORM, NORM_TENSORS)
    text, _ = folded(gm)
    assert_expected_inline(
        text,
        """\
before:
%x: f32[2, 3, 4] = input
%n: f32[2, 3, 4] = aten.layer_norm(%x, [4], %g, %b)
%q: f32[2, 3, 6] = aten.linear(%n, %wq)
%k: f32[2, 3, 2] = aten.linear(%n, %wk)
return [%q, %k]
after:
%x: f32[2, 3, 4] = input
%div_tensor: f32[4] = aten.div(%g, %smooth_0)
%div_tensor_1: f32[4] = aten.div(%b, %smooth_0_bias)
%n: f32[2, 3, 4] = aten.layer_norm(%x, [4], %div_tensor, %div_tensor_1)
%mul_tensor: f32[6, 4] = aten.mul(%wq, %smooth_0_columns)
%q: f32[2, 3, 6] = aten.linear(%n, %mul_tensor)
%mul_tensor_1: f32[2, 4] = aten.mul(%wk, %smooth_0_columns_2)
%k: f32[2, 3, 2] = aten.linear(%n, %mul_tensor_1)
return [%q, %k]
""",
    )
    assert untrue(fold, text + folded(graph(STREAM, {"w": [6, 4]}))[0] + rotated()) == []


def rotated() -> str:
    gm = graph("%x: f32[2, 3, 16] = input\n%y = aten.linear(%x, %w)\nreturn %y", {"w": [6, 16]})
    plan = planned(gm)
    plan = dataclasses.replace(plan, layers=tuple(dataclasses.replace(l, rotation=16) for l in plan.layers))
    text, after = before_after(lambda g: verify(fold.fold(g, [], plan), "folded"), gm)
    assert difference(gm, after) <= 1e-5
    return text


def test_an_input_and_a_weight_are_rotated():
    assert_expected_inline(
        only_after(rotated()),
        """\
%x: f32[2, 3, 16] = input
%rotate_default: f32[2, 3, 16] = sqcompile.rotate(%x, 16)
%rotate_default_1: f32[6, 16] = sqcompile.rotate(%w, 16)
%y: f32[2, 3, 6] = aten.linear(%rotate_default, %rotate_default_1)
return %y
""",
    )


def test_the_rows_of_a_linear_and_its_bias_are_divided():
    gm = graph(
        """
        %x: f32[2, 3, 8] = input
        %up = aten.linear(%x, %wu, %bu)
        %r = aten.relu(%up)
        %y = aten.linear(%r, %wd)
        return %y
        """,
        {"wu": [4, 8], "bu": [4], "wd": [8, 4]},
    )
    sites, _ = match(gm)
    plan = planned(gm, {s.name: FAR for s in sites})
    text, after = before_after(lambda g: fold.fold(g, sites, plan), gm)
    assert_expected_inline(
        only_after(text),
        """\
%x: f32[2, 3, 8] = input
%div_tensor: f32[4, 8] = aten.div(%wu, %smooth_0_rows)
%div_tensor_1: f32[4] = aten.div(%bu, %smooth_0_bias)
%up: f32[2, 3, 4] = aten.linear(%x, %div_tensor, %div_tensor_1)
%r: f32[2, 3, 4] = aten.relu(%up)
%mul_tensor: f32[8, 4] = aten.mul(%wd, %smooth_0_columns)
%y: f32[2, 3, 8] = aten.linear(%r, %mul_tensor)
return %y
""",
    )
    assert difference(gm, after) <= 1e-5


STREAM = """
    %x: f32[2, 3, 4] = input
    %y = aten.linear(%x, %w)
    return %y
"""


def test_where_no_parameter_absorbs_the_scale_the_input_is_multiplied():
    text, _ = folded(graph(STREAM, {"w": [6, 4]}))
    assert_expected_inline(
        text,
        """\
before:
%x: f32[2, 3, 4] = input
%y: f32[2, 3, 6] = aten.linear(%x, %w)
return %y
after:
%x: f32[2, 3, 4] = input
%mul_tensor: f32[2, 3, 4] = aten.mul(%x, %smooth_0)
%mul_tensor_1: f32[6, 4] = aten.mul(%w, %smooth_0_columns)
%y: f32[2, 3, 6] = aten.linear(%mul_tensor, %mul_tensor_1)
return %y
""",
    )


def test_a_norm_without_a_weight_gets_one_and_a_constant_on_the_way_is_divided():
    text, _ = folded(
        graph(
            """
            %x: f32[2, 3, 4] = input
            %n = aten.rms_norm(%x, [4])
            %m = aten.add(%n, %shift)
            %y = aten.linear(%m, %w)
            return %y
            """,
            {"shift": [4], "w": [6, 4]},
        )
    )
    assert_expected_inline(
        only_after(text),
        """\
%x: f32[2, 3, 4] = input
%div_tensor: f32[4] = aten.div(%smooth_0_weight, %smooth_0)
%n: f32[2, 3, 4] = aten.rms_norm(%x, [4], %div_tensor)
%div_tensor_1: f32[4] = aten.div(%shift, %smooth_0_add)
%m: f32[2, 3, 4] = aten.add(%n, %div_tensor_1)
%mul_tensor: f32[6, 4] = aten.mul(%w, %smooth_0_columns)
%y: f32[2, 3, 6] = aten.linear(%m, %mul_tensor)
return %y
""",
    )


def test_a_folded_parameter_keeps_the_models_dtype():
    gm = graph(
        NORM.replace("f32", "bf16"),
        {n: torch.randn(s, generator=torch.Generator().manual_seed(1)).bfloat16() for n, s in NORM_TENSORS.items()},
    )
    sites, _ = match(gm)
    plan = planned(gm, {s.name: FAR for s in sites})
    text, after = before_after(lambda g: verify(fold.fold(g, sites, plan), "folded"), gm)
    assert_expected_inline(
        only_after(text),
        """\
%x: bf16[2, 3, 4] = input
%div_tensor: f32[4] = aten.div(%g, %smooth_0)
%to_dtype: bf16[4] = aten.to(%div_tensor, bfloat16)
%div_tensor_1: f32[4] = aten.div(%b, %smooth_0_bias)
%to_dtype_1: bf16[4] = aten.to(%div_tensor_1, bfloat16)
%n: bf16[2, 3, 4] = aten.layer_norm(%x, [4], %to_dtype, %to_dtype_1)
%mul_tensor: f32[6, 4] = aten.mul(%wq, %smooth_0_columns)
%to_dtype_2: bf16[6, 4] = aten.to(%mul_tensor, bfloat16)
%q: bf16[2, 3, 6] = aten.linear(%n, %to_dtype_2)
%mul_tensor_1: f32[2, 4] = aten.mul(%wk, %smooth_0_columns_2)
%to_dtype_3: bf16[2, 4] = aten.to(%mul_tensor_1, bfloat16)
%k: bf16[2, 3, 2] = aten.linear(%n, %to_dtype_3)
return [%q, %k]
""",
    )
    assert difference(gm, after) <= 2**-5  # a few roundings of bfloat16


ATTENTION = """
    %x: f32[2, 3, 4] = input
    %v: f32[2, 2, 3, 4] = input
    %lq = aten.linear(%x, %wq)
    %uq = aten.unflatten(%lq, -1, [2, 4])
    %q = aten.transpose(%uq, 1, 2)
    %lk = aten.linear(%x, %wk)
    %uk = aten.unflatten(%lk, -1, [2, 4])
    %k = aten.transpose(%uk, 1, 2)
    %y = aten.scaled_dot_product_attention(%q, %k, %v)
    return %y
"""
ATTENTION_TENSORS = {"wq": [8, 4], "wk": [8, 4]}


def test_head_channels_are_scaled_against_each_other():
    gm = graph(ATTENTION, ATTENTION_TENSORS)
    attentions = find_attentions(gm)
    sites, _ = match_heads(gm, attentions)
    scale = {f"{s.name}/scale": torch.linspace(0.2, 5, s.classes) for s in sites}
    plan = planned(gm, heads=scale, layers=())
    text, after = before_after(lambda g: verify(fold.fold(g, [], plan, sites), "folded"), gm)
    assert_expected_inline(
        only_after(text),
        """\
%x: f32[2, 3, 4] = input
%v: f32[2, 2, 3, 4] = input
%div_tensor: f32[8, 4] = aten.div(%wq, %queries_0_rows)
%lq: f32[2, 3, 8] = aten.linear(%x, %div_tensor)
%uq: f32[2, 3, 2, 4] = aten.unflatten(%lq, -1, [2, 4])
%q: f32[2, 2, 3, 4] = aten.transpose(%uq, 1, 2)
%div_tensor_1: f32[8, 4] = aten.div(%wk, %keys_0_rows)
%lk: f32[2, 3, 8] = aten.linear(%x, %div_tensor_1)
%uk: f32[2, 3, 2, 4] = aten.unflatten(%lk, -1, [2, 4])
%k: f32[2, 2, 3, 4] = aten.transpose(%uk, 1, 2)
%y: f32[2, 2, 3, 4] = aten.scaled_dot_product_attention(%q, %k, %v)
return %y
""",
    )
    assert difference(gm, after) <= 1e-5


def test_a_scale_for_a_site_that_the_graph_lacks_is_an_error():
    gm = graph(NORM, NORM_TENSORS)
    with pytest.raises(PlanError, match="smooths 'g -> other'"):
        fold.fold(gm, match(gm)[0], planned(gm, {"g -> other": FAR}))
