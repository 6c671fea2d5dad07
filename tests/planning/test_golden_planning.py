"""What planning says of a graph's linears, as text: which stay in float and why, and how a plan fits part of a model."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from expecttest import assert_expected_inline
from golden_cases import graph, said, untrue
from torch import fx

from sqcompile import Recipe
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.ir.text import show
from sqcompile.passes.labels.match import match
from sqcompile.passes.planning import adapters, routers, split, stay_float, uses
from sqcompile.plan.plan import AttentionPlan, LayerPlan, Plan


def told(gm: fx.GraphModule, *lines: str) -> str:
    return "\n".join([show(gm), "->", *lines]) + "\n"


ROUTED = """
    %x: f32[s0, 4] = input
    %l = aten.linear(%x, %router)
    %p = aten.softmax(%l, -1)
    %top = aten.topk(%p, 2)
    %i = getitem(%top, 1)
    %one = aten.one_hot(%i, 8)
    %m = aten.sum(%one, [-2])
    %e = aten.linear(%x, %experts)
    %y = aten.mul(%m, %e)
    return %y
"""
ROUTED_TENSORS = {"router": [8, 4], "experts": [8, 4]}


def test_a_linear_whose_output_picks_experts_is_a_router():
    gm = graph(ROUTED, ROUTED_TENSORS)
    text = told(gm, *(f"router: %{node}" for node in sorted(routers.find_routers(gm, find_linears(gm)))))
    assert_expected_inline(
        text,
        """\
%x: f32[s0, 4] = input
%l: f32[s0, 8] = aten.linear(%x, %router)
%p: f32[s0, 8] = aten.softmax(%l, -1)
%top: (f32[s0, 2], i64[s0, 2]) = aten.topk(%p, 2)
%i: i64[s0, 2] = getitem(%top, 1)
%one: i64[s0, 2, 8] = aten.one_hot(%i, 8)
%m: i64[s0, 8] = aten.sum(%one, [-2])
%e: f32[s0, 8] = aten.linear(%x, %experts)
%y: f32[s0, 8] = aten.mul(%m, %e)
return %y
->
router: %l
""",
    )
    assert untrue(routers, text) == []


def test_a_gate_without_a_choice_and_the_argmax_of_logits_are_none():
    gate = ROUTED.replace("%one = aten.one_hot(%i, 8)", "%one = aten.relu(%p)").replace(
        "aten.sum(%one, [-2])", "aten.relu(%one)"
    )
    argmax = "%x: f32[s0, 4] = input\n%l = aten.linear(%x, %router)\n%i = aten.argmax(%l, -1)\nreturn [%l, %i]"
    activation = (
        "%x: f32[s0, 4] = input\n%l = aten.linear(%x, %router)\n%i = aten.gt(%l, 0)\n%y = aten.mul(%l, %i)\nreturn %y"
    )
    for text in (gate, argmax, activation):
        gm = graph(text, ROUTED_TENSORS)
        assert routers.find_routers(gm, find_linears(gm)) == set()


ADAPTED = """
    %x: f32[s0, s1, 16] = input
    %y = aten.linear(%x, %w)
    %down = aten.linear(%x, %lora.A)
    %up = aten.linear(%down, %lora.B)
    %scaled = aten.mul(%up, 2.0)
    %z = aten.add(%y, %scaled)
    return %z
"""
ADAPTED_TENSORS = {"w": [12, 16], "lora.A": [2, 16], "lora.B": [12, 2]}


def test_two_small_linears_beside_a_large_one_are_its_adapter():
    gm = graph(ADAPTED, ADAPTED_TENSORS)
    text = told(gm, *(f"%{name}: {why}" for name, why in adapters.find_adapters(gm, find_linears(gm)).items()))
    assert_expected_inline(
        text,
        """\
%x: f32[s0, s1, 16] = input
%y: f32[s0, s1, 12] = aten.linear(%x, %w)
%down: f32[s0, s1, 2] = aten.linear(%x, %lora.A)
%up: f32[s0, s1, 12] = aten.linear(%down, %lora.B)
%scaled: f32[s0, s1, 12] = aten.mul(%up, 2)
%z: f32[s0, s1, 12] = aten.add(%y, %scaled)
return %z
->
%lora.A: low-rank adapter of w (rank 2): small, and swapped at run time
%lora.B: low-rank adapter of w (rank 2): small, and swapped at run time
""",
    )
    assert untrue(adapters, text) == []


def test_a_bottleneck_that_is_not_beside_a_linear_is_no_adapter():
    gm = graph(
        ADAPTED.replace("aten.add(%y, %scaled)", "aten.add(%x, %scaled)"), {**ADAPTED_TENSORS, "lora.B": [16, 2]}
    )
    assert adapters.find_adapters(gm, find_linears(gm)) == {}


MODEL = """
    %ids: i64[s0, s1] = input
    %h = aten.embedding(%embed.weight, %ids)
    %a = aten.linear(%h, %mlp.up.weight)
    %b = aten.relu(%a)
    %c = aten.linear(%b, %mlp.down.weight)
    %d = aten.linear(%c, %rare.weight)
    %e = aten.linear(%d, %still.weight)
    %logits = aten.linear(%e, %head.weight)
    return %logits
"""
SHAPES = {"embed.weight": [32, 8], "mlp.up.weight": [16, 8], "mlp.down.weight": [8, 16], "rare.weight": [8, 8],
          "still.weight": [8, 8], "head.weight": [32, 8]}  # fmt: skip


def test_why_linears_stay_in_float():
    gm = graph(MODEL, SHAPES)
    seen = {
        name: SimpleNamespace(unvarying=lambda why=("zero" if name == "still.weight" else None): why) for name in SHAPES
    }
    del seen["rare.weight"]
    recipe = Recipe(skip=("mlp.up",), activation="per_tensor_static")
    linears = find_linears(gm)
    found = stay_float.stay_float(gm, linears, SimpleNamespace(inputs=seen), recipe)  # type: ignore[arg-type]
    text = told(gm, *(f"%{l.name}: {found.get(l.name, 'quantized')}" for l in linears))
    assert_expected_inline(
        text,
        """\
%ids: i64[s0, s1] = input
%h: f32[s0, s1, 8] = aten.embedding(%embed.weight, %ids)
%a: f32[s0, s1, 16] = aten.linear(%h, %mlp.up.weight)
%b: f32[s0, s1, 16] = aten.relu(%a)
%c: f32[s0, s1, 8] = aten.linear(%b, %mlp.down.weight)
%d: f32[s0, s1, 8] = aten.linear(%c, %rare.weight)
%e: f32[s0, s1, 8] = aten.linear(%d, %still.weight)
%logits: f32[s0, s1, 32] = aten.linear(%e, %head.weight)
return %logits
->
%mlp.up.weight: skipped by the recipe ('mlp.up')
%mlp.down.weight: quantized
%rare.weight: no calibration token reached it
%still.weight: its input was zero: no static scale can be chosen
%head.weight: the projection back to the vocabulary, which Recipe(lm_head=True) quantizes
""",
    )
    assert untrue(stay_float, text) == []


def layer(name: str, **changes: object) -> LayerPlan:
    return LayerPlan(**{"name": name, "kind": "linear", "quantized": True, "smoothing": "folded", "reason": "",
                        "shape": (4, 4), **changes})  # fmt: skip


def test_one_of_two_uses_of_a_weight_is_treated_as_both():
    gm = graph("%x: f32[s0, 4] = input\n%a = aten.linear(%x, %w)\nreturn %a", {"w": [4, 4]})
    layers = layer("w", input_scale=0.25), layer("w#2", input_scale=0.3125)
    columns = {"w": torch.tensor([1.0, 2, 3, 4]), "w#2": torch.tensor([4.0, 3, 2, 1])}
    plan = Plan(Recipe(), None, {"g -> w": columns["w"], "h -> w#2": columns["w#2"]}, layers, columns=columns)
    new = uses.as_used(plan, find_linears(gm), [])
    text = told(
        gm,
        f"layers: {', '.join(map(said, new.layers))}",
        f"columns: {said(new.columns)}",
        f"scales: {said(new.scales)}",
    )
    assert_expected_inline(
        text,
        """\
%x: f32[s0, 4] = input
%a: f32[s0, 4] = aten.linear(%x, %w)
return %a
->
layers: LayerPlan(name=w, kind=linear, quantized=True, smoothing=multiplied, reason=this graph does not tell it from its other uses, input_scale=0.3125, shape=[4, 4])
columns: {w: [4, 3, 3, 4]}
scales: {}
""",
    )
    assert untrue(uses, text) == []


def test_uses_whose_static_scales_are_far_apart_have_a_dynamic_one():
    gm = graph("%x: f32[s0, 4] = input\n%a = aten.linear(%x, %w)\nreturn %a", {"w": [4, 4]})
    layers = layer("w", smoothing="none", input_scale=0.25), layer("w#2", smoothing="none", input_scale=0.625)
    assert_expected_inline(
        said(uses.as_used(Plan(Recipe(), None, {}, layers), find_linears(gm), []).layers),
        """[LayerPlan(name=w, kind=linear, quantized=True, smoothing=none, reason=this graph does not tell it from its other uses, shape=[4, 4], activation=per_token)]""",
    )


def test_a_graph_that_has_all_uses_has_the_plan_as_it_is():
    both = "%x: f32[s0, 4] = input\n%a = aten.linear(%x, %w)\n%b = aten.linear(%a, %w)\nreturn %b"
    gm = graph(both, {"w": [4, 4]})
    plan = Plan(Recipe(), None, {}, (layer("w"), layer("w#2")))
    assert uses.as_used(plan, find_linears(gm), []) is plan


def test_a_linear_apart_from_its_norm_is_multiplied_explicitly():
    gm = graph("%n: f32[s0, 4] = input\n%q = aten.linear(%n, %wq)\nreturn %q", {"wq": [4, 4]})
    s = torch.tensor([1.0, 2, 3, 4])
    plan = Plan(Recipe(), None, {"g -> wq": s}, (layer("wq"),), columns={"wq": s})
    [site], new = split.split_sites(find_linears(gm), match(gm)[0], plan)
    text = told(gm, f"{site.name}: %{site.producer} * 1/s, {site.reason}", f"scales: {said(new.scales)}")
    assert_expected_inline(
        text,
        """\
%n: f32[s0, 4] = input
%q: f32[s0, 4] = aten.linear(%n, %wq)
return %q
->
input n -> wq: %n * 1/s, its producer is in another graph
scales: {input n -> wq: [1, 2, 3, 4]}
""",
    )
    assert untrue(split, text) == []


def test_an_attention_apart_from_its_projections_is_multiplied_explicitly():
    attention = AttentionPlan("attn", "qk", "folded", "", shape=(2, 1, 2)), AttentionPlan("other", "qk", "folded", "")
    heads = {f"attn/{what}": torch.ones(2, 2) for what in ("scale", "query_by", "key_by", "key_mean")}
    new = split.split_attention(["attn"], Plan(Recipe(), None, {}, (), attention, heads))
    text = "".join(f"{said(a)}\n" for a in new.attention) + f"heads: {', '.join(new.heads)}\n"
    assert_expected_inline(
        text,
        """\
AttentionPlan(name=attn, quantized=qk, smoothing=multiplied, reason=, shape=[2, 1, 2])
AttentionPlan(name=other, quantized=none, smoothing=folded, reason=)
heads: attn/query_by, attn/key_by, attn/key_mean
""",
    )
