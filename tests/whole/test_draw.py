"""Drawings: which boxes there are, where they stand, and what they say."""

from __future__ import annotations

import base64
import dataclasses
import gc
import json
import re
import xml.etree.ElementTree as ET
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from conftest import tiny_lm, token_batches
from draw_cases import PostNorm
from torch import Tensor, nn

import sqcompile
from sqcompile import DrawError, StageError
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.draw import condense, draw, fragment, roles_of
from sqcompile.draw.svg import render
from sqcompile.passes.ir.text import show

SVG = "{http://www.w3.org/2000/svg}"
STEPS = {"has-db", *(f"db{i}" for i in range(6))}


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, sqcompile.CompiledModel]:
    model = tiny_lm("llama")
    return model, sqcompile.compile(
        model, token_batches(1), recipe=sqcompile.Recipe(alpha=0.5), backend="eager", progress=False
    )


def drawn(path: Path) -> tuple[dict[str, set[str]], list[ET.Element]]:
    """The classes of the drawn boxes by label, and all boxes."""
    boxes = [g for g in ET.parse(path).iter(f"{SVG}g") if g.get("data-node")]
    return {_label(g): set(str(g.get("class")).split()) for g in boxes}, boxes


def _label(g: ET.Element) -> str:
    return next(str(t.text) for t in g.iter(f"{SVG}text") if t.get("class") is None)


def title(g: ET.Element) -> str:
    return str(next(g.iter(f"{SVG}title")).text)


def graph_of(model: nn.Module, *inputs: Any) -> nx.DiGraph:
    gm = trace(model, as_call(model, inputs))
    return condense(gm, roles_of(gm))


def test_report_names_sites(llama: tuple[nn.Module, sqcompile.CompiledModel]) -> None:
    report = llama[1].report
    assert [s.key for s in report.sites] == list(llama[1].plan.scales)
    lines = [line for line in str(report).splitlines() if not line.startswith("compiled in ")]
    assert lines[lines.index("sites (what absorbs 1/s -> linears that absorb s):") + 1 :] == [
        "  model.layers.{0..1}: input_layernorm -> q_proj, k_proj, v_proj",
        "  model.layers.{0..1}: v_proj -> o_proj",
        "  model.layers.{0..1}: post_attention_layernorm -> gate_proj, up_proj",
        "  model.layers.{0..1}: up_proj -> down_proj",
        "words:",
        "  folded: the parameter before the linear absorbs 1/s",
        "  dB: how far the output's signal is above the noise of INT8, on the calibration sample; higher is better",
        "14 of 15 linears in INT8, 14 with smoothing folded into parameters",
    ]


def test_colours_say_what_was_done(llama: tuple[nn.Module, sqcompile.CompiledModel], tmp_path: Path) -> None:
    llama[1].draw(tmp_path / "g.svg")
    classes, boxes = drawn(tmp_path / "g.svg")
    assert classes["input_layernorm"] == {"node", "norm", "producer"}
    assert classes["norm"] == {"node", "norm"}
    assert classes["q_proj"] - STEPS == {"node", "linear", "balance", "quantized"}
    assert classes["v_proj"] - STEPS == {"node", "linear", "producer", "balance", "quantized"}
    assert classes["lm_head"] == {"node", "linear", "float"}
    assert classes["attention"] == {"node", "product", "attention"}
    assert Counter(map(_label, boxes))["q_proj"] == 2
    head, q = (next(g for g in boxes if _label(g) == name) for name in ("lm_head", "q_proj"))
    assert "runs in: float\nbecause: the projection back to the vocabulary" in title(head)
    assert "absorbs s of: model.layers.0: input_layernorm -> q_proj, k_proj, v_proj" in title(q)
    assert re.search(r"aten.linear\(%\w+, %model.layers.0.self_attn.q_proj.weight\)", title(q))
    assert re.search(r"smoothing: 1/s is folded into a parameter, α 0.50\nΔ of the input: per token", title(q))
    assert re.search(r"s: 64 channels, [\d.]+ to [\d.]+, median [\d.]+", title(q))
    svg = ET.parse(tmp_path / "g.svg")
    legend = [str(t.text) for t in svg.iter(f"{SVG}text")]
    assert {"1 linear stays in float", "attention", "linear in INT8", "linear that stays in float"} <= set(legend)
    link = next(svg.iter(f"{SVG}a"))
    text = "lm_head: the projection back to the vocabulary, which Recipe(lm_head=True) quantizes"
    assert [t.text for t in link.iter(f"{SVG}text")] == [text]
    assert link.get("href") == f"#{head.get('id')}"


def test_refused_linears_carry_their_reason(tmp_path: Path) -> None:
    model = PostNorm().eval()
    draw(tmp_path / "g.svg", {"traced": trace(model, as_call(model, torch.randn(2, 16)))})
    classes, boxes = drawn(tmp_path / "g.svg")
    assert classes["up"] == classes["down"] == {"node", "linear", "refused"}
    reasons = {_label(g): title(g) for g in boxes}
    assert "no parameter can absorb 1/s: norm.weight joins a residual stream" in reasons["up"]
    words = [str(t.text) for t in ET.parse(tmp_path / "g.svg").iter(f"{SVG}text")]
    assert "2 linears whose x·(1/s) is multiplied before quantization, since no parameter can absorb 1/s" in words
    assert "passes gelu, which does not commute with a scale" in reasons["down"]
    compiled = sqcompile.compile(model, [torch.randn(8, 16)], backend="eager", progress=False)
    compiled.draw(tmp_path / "g.svg", stage="quantized")
    classes, _ = drawn(tmp_path / "g.svg")
    assert classes["up"] - STEPS == {"node", "linear", "refused", "quantized", "explicit"}
    assert classes["× 1/s"] == {"node", "norm"}
    words = [str(t.text) for t in ET.parse(tmp_path / "g.svg").iter(f"{SVG}text")]
    assert (
        "2 linears run in INT8 with x·(1/s) multiplied before quantization, since no parameter can absorb 1/s" in words
    )
    assert not any("refused" in word for word in words)


@pytest.mark.parametrize("stage", ["traced", "folded", "quantized", "lowered"])
def test_every_linear_is_drawn_once(llama: tuple[nn.Module, sqcompile.CompiledModel], stage: str) -> None:
    traced, plan = llama[1].stages["traced"], llama[1].plan
    g = condense(llama[1].stages[stage], roles_of(traced, plan))
    found = [name for _, names in g.nodes(data="linears") for name in names]
    assert sorted(found) == sorted(l.name for l in plan.layers)
    assert nx.is_directed_acyclic_graph(g)
    assert ("quantize" in {kind for _, kind in g.nodes(data="kind")}) == (stage in ("quantized", "lowered"))


def test_site_edges_and_residuals_of_a_block(llama: tuple[nn.Module, sqcompile.CompiledModel]) -> None:
    traced = llama[1].stages["traced"]
    g = condense(traced, roles_of(traced))
    label = dict(g.nodes(data="label"))
    smooth = Counter((label[u], label[v]) for u, v, s in g.edges(data="smooth") if s)
    assert smooth["input_layernorm", "v_proj"] == 2 and ("q_proj", "attention") not in smooth
    residuals = [n for n in g if label[n] == "+"]
    assert [sorted(label[p] for p in g.pred[n]) for n in residuals[:2]] == [
        ["embed_tokens", "o_proj"],
        ["+", "down_proj"],
    ]
    assert {g.nodes[n]["block"] for n in residuals} == {"model.layers.0", "model.layers.1"}


@pytest.fixture(scope="module")
def tied() -> tuple[nn.Module, sqcompile.CompiledModel]:
    """A model whose head is its embedding, with its attention in INT8."""
    model = tiny_lm("llama", tie_word_embeddings=True)
    return model, sqcompile.compile(model, token_batches(1), recipe="O3", backend="eager", progress=False)


@pytest.mark.parametrize("stage", ["traced", "quantized", "lowered"])
def test_int8_attention_and_a_tied_embedding_are_drawn_in_every_stage(
    tied: tuple[nn.Module, sqcompile.CompiledModel], tmp_path: Path, stage: str
) -> None:
    compiled = tied[1]
    compiled.draw(tmp_path / "g.svg", stage=stage)
    classes, boxes = drawn(tmp_path / "g.svg")
    assert {"embed_tokens", "lm_head"} <= classes.keys()
    assert Counter(map(_label, boxes))["lm_head"] == 1
    want = {"quantized": ["QKᵀ", "softmax, PV"]}.get(stage, ["attention"])
    for label in want:
        assert classes[label] - STEPS == {"node", "product", "attention", "quantized"}
        assert Counter(map(_label, boxes))[label] == 2
    last = [g for g in boxes if _label(g) == want[-1]]
    for box, how in zip(last, compiled.plan.attention, strict=True):
        assert "int8 QKᵀ, PV" in [t.text for t in box.iter(f"{SVG}text")]
        assert f"attention of: {how.name}\nruns in: INT8 QKᵀ, PV" in title(box)
        assert f"SQNR of the scores: {how.sqnr_db:.1f} dB" in title(box)
    assert "attention in INT8" in [t.text for t in ET.parse(tmp_path / "g.svg").iter(f"{SVG}text")]
    g = condense(compiled.stages[stage], roles_of(compiled.stages["traced"], compiled.plan))
    label = nx.get_node_attributes(g, "label")
    for n in (n for n in g if label[n] == want[-1]):
        assert any("q_proj" in label[a] for a in nx.ancestors(g, n))
        assert any("o_proj" in label[d] for d in nx.descendants(g, n))


def test_operators_fused_for_a_gpu_are_drawn(tied: tuple[nn.Module, sqcompile.CompiledModel]) -> None:
    compiled = sqcompile.compile(tied[0], plan=tied[1].plan, backend="eager", target="cuda-sm90")
    g = condense(compiled.lowered, roles_of(compiled.stages["traced"], compiled.plan))
    drawn_ = Counter(label for _, label in g.nodes(data="label"))
    assert drawn_["attention"] == 2 and drawn_["norm, quantize"] == 4 and drawn_["activation, quantize"] == 2
    norm = next(n for n, label in g.nodes(data="label") if label == "norm, quantize")
    assert [g.nodes[n]["label"] for n in g.succ[norm]] == ["q_proj, k_proj, v_proj"]


def test_attention_that_stays_in_float_is_drawn_with_its_reason() -> None:
    recipe = sqcompile.Recipe(attention="qk", skip=("lm_head", "model.layers.1.self_attn"))
    model = tiny_lm("llama")
    compiled = sqcompile.compile(model, token_batches(1), recipe=recipe, backend="eager", progress=False)
    g = condense(compiled.stages["traced"], roles_of(compiled.stages["traced"], compiled.plan))
    first, second = (d for _, d in g.nodes(data=True) if d["label"] == "attention")
    assert (first["roles"], first["detail"]) == ({"attention", "quantized"}, "int8 QKᵀ")
    assert second["roles"] == {"attention", "float"}
    assert any(term == "because" and "skipped by the recipe" in text for term, text in second["facts"])


def test_each_line_of_a_stage_is_read_at_one_box(llama: tuple[nn.Module, sqcompile.CompiledModel]) -> None:
    roles = roles_of(llama[1].stages["traced"], llama[1].plan)
    for stage in ("traced", "folded", "quantized", "lowered"):
        gm = llama[1].stages[stage]
        lines = [line for _, own in condense(gm, roles).nodes(data="lines") for line in own]
        assert sorted(lines) == sorted(show(gm).splitlines())
    folded = condense(llama[1].stages["folded"], roles)
    norm = next(d for _, d in folded.nodes(data=True) if d["label"] == "input_layernorm")
    assert any("aten.div(%model.layers.0.input_layernorm.weight, %smooth_" in line for line in norm["lines"])


def test_coloured_by_sqnr(llama: tuple[nn.Module, sqcompile.CompiledModel], tmp_path: Path) -> None:
    llama[1].draw(tmp_path / "g.svg", colour="sqnr")
    classes_, boxes = drawn(tmp_path / "g.svg")
    for layer in llama[1].plan.layers:
        if layer.sqnr_db is not None:
            box = next(b for b in boxes if title(b).startswith(layer.name))
            steps = [20, 25, 30, 35, 40]
            assert f"db{sum(layer.sqnr_db >= step for step in steps)}" in str(box.get("class")).split()
            assert f"{layer.sqnr_db:.1f} dB" in [t.text for t in box.iter(f"{SVG}text")]
    assert not classes_["lm_head"] & STEPS
    words = [t.text for t in ET.parse(tmp_path / "g.svg").iter(f"{SVG}text")]
    assert "below 20 dB" in words and "linear in INT8" not in words


@pytest.mark.parametrize(
    ("name", "shown"), [("a<b>&c", "a<b>&c"), ("a\x01\u2028b", "a\ufffd\u2028b")]
)  # XML has no \x01
def test_text_is_escaped(name: str, shown: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, name)(x)

    boxes = [g for g in ET.fromstring(render(graph_of(Odd().eval(), torch.randn(2, 8)))).iter(f"{SVG}g")]
    assert shown in [_label(g) for g in boxes if g.get("data-node")]


def test_a_drawing_says_the_number_format() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval()
    recipe = sqcompile.Recipe(alpha=0.5, dtype="fp8")
    plan = sqcompile.calibrate(model, [torch.randn(16, 8)], recipe=recipe, progress=False)
    gm = trace(model, as_call(model, (torch.randn(4, 8),)))
    found = {"fp8": fragment({"traced": gm}, plan), "int8": fragment({"traced": gm}, plan_as_int8(plan))}
    for dtype, text in found.items():
        assert f"linear in {dtype.upper()}" in text and "8 → 8" in text
        assert ("INT8" in text, "FP8" in text) == (dtype == "int8", dtype == "fp8")
    spoken = {dtype: unpacked(text)["stages"]["traced"]["nodes"]["linear"]["says"] for dtype, text in found.items()}
    assert all(f"in {dtype.upper()}" in says for dtype, says in spoken.items())


def plan_as_int8(plan: sqcompile.Plan) -> sqcompile.Plan:
    return dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, dtype="int8"))


def unpacked(text: str) -> Any:
    packed = re.search(r'class="sqd-data">([^<]*)<', text)
    assert packed is not None
    return json.loads(zlib.decompress(base64.b64decode(packed[1])))


def test_errors_name_what_to_do(tmp_path: Path) -> None:
    model = PostNorm().eval()
    compiled = sqcompile.compile(model, [torch.randn(8, 16)], backend="eager", progress=False)
    with pytest.raises(DrawError, match=r"ends in \.svg or \.html"):
        compiled.draw(tmp_path / "graph.png")
    with pytest.raises(DrawError, match="a folder you can write"):
        compiled.draw(tmp_path / "none" / "graph.svg")


def test_a_freed_model_cannot_be_drawn(tmp_path: Path) -> None:
    compiled = sqcompile.compile(PostNorm().eval(), [torch.randn(8, 16)], backend="eager", progress=False)
    gc.collect()
    with pytest.raises(StageError, match="freed"):
        compiled.draw(tmp_path / "graph.svg")


def test_every_use_of_a_shared_weight_keeps_its_name_in_later_stages() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.a(self.a(x).relu()).relu())

    model = Shared().eval()
    compiled = sqcompile.compile(model, [torch.randn(3, 4, 16)], backend="eager", progress=False)
    roles = roles_of(compiled.stages["traced"], compiled.plan)
    for stage in ("traced", "quantized", "lowered"):
        names = [n for _, linears in condense(compiled.stages[stage], roles).nodes(data="linears") for n in linears]
        assert names == ["a.weight", "a.weight#2", "a.weight#3"]
