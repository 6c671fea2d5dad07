"""Drawings, and ``python -m sqcompile.show``."""

from __future__ import annotations

import gc
import itertools
import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from conftest import tiny_lm, token_batches
from families import CAUSAL, OTHERS, build
from torch import Tensor, nn

import sqcompile
from sqcompile import DrawError, StageError
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.draw import draw, fold_repeats, roles_of
from sqcompile.draw.condense import condense
from sqcompile.draw.layout import layout
from sqcompile.draw.svg import render
from sqcompile.passes.ir.graph import find_linears
from sqcompile.show.__main__ import main
from sqcompile.show.load import load, parse_input

SVG = "{http://www.w3.org/2000/svg}"


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class PostNorm(nn.Module):
    """A hand-written post-norm block: its norm feeds a residual stream, its gelu a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


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


def graph_of(model: nn.Module, *inputs: Any, **named: Any) -> tuple[nx.DiGraph, list[str]]:
    gm = trace(model, as_call(model, named or inputs))
    return condense(gm, roles_of(gm)), [l.name for l in find_linears(gm)]


def test_report_names_sites(llama: tuple[nn.Module, sqcompile.CompiledModel]) -> None:
    report = llama[1].report
    assert [s.key for s in report.sites] == list(llama[1].plan.scales)
    lines = str(report).splitlines()
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
    assert classes["q_proj"] == {"node", "linear", "balance", "quantized"}
    assert classes["v_proj"] == {"node", "linear", "producer", "balance", "quantized"}
    assert classes["lm_head"] == {"node", "linear", "float"}
    assert classes["attention"] == {"node", "product"}
    assert Counter(map(_label, boxes))["q_proj"] == 2
    head, q = (next(g for g in boxes if _label(g) == name) for name in ("lm_head", "q_proj"))
    assert "float, the projection back to the vocabulary" in title(head)
    assert "absorbs s of  model.layers.0: input_layernorm -> q_proj, k_proj, v_proj" in title(q)
    assert re.search(r"aten.linear\(%\w+, %model.layers.0.self_attn.q_proj.weight\)", title(q))
    legend = [str(t.text) for t in ET.parse(tmp_path / "g.svg").iter(f"{SVG}text")]
    assert (
        "lm_head: stays in float: the projection back to the vocabulary, which Recipe(lm_head=True) quantizes" in legend
    )


def test_refused_linears_carry_their_reason(tmp_path: Path) -> None:
    model = PostNorm().eval()
    draw(tmp_path / "g.svg", trace(model, as_call(model, torch.randn(2, 16))))
    classes, boxes = drawn(tmp_path / "g.svg")
    assert classes["up"] == classes["down"] == {"node", "linear", "refused"}
    reasons = {_label(g): title(g) for g in boxes}
    assert "no parameter can absorb 1/s: norm.weight joins a residual stream" in reasons["up"]
    assert "passes gelu, which does not commute with a scale" in reasons["down"]
    compiled = sqcompile.compile(model, [torch.randn(8, 16)], backend="eager", progress=False)
    compiled.draw(tmp_path / "g.svg", stage="quantized")
    classes, _ = drawn(tmp_path / "g.svg")
    assert classes["up"] == {"node", "linear", "refused", "quantized", "explicit"}
    assert classes["× 1/s"] == {"node", "norm"}


@pytest.mark.parametrize("stage", ["traced", "folded", "quantized", "lowered"])
def test_every_linear_is_drawn_once(llama: tuple[nn.Module, sqcompile.CompiledModel], stage: str) -> None:
    traced, plan = llama[1].stages["traced"], llama[1].plan
    g = condense(llama[1].stages[stage], roles_of(traced, plan))
    found = [name for _, names in g.nodes(data="linears") for name in names]
    assert sorted(found) == sorted(l.name for l in plan.layers)
    assert nx.is_directed_acyclic_graph(g)
    assert ("quantize" in {kind for _, kind in g.nodes(data="kind")}) == (stage in ("quantized", "lowered"))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_boxes_do_not_touch_and_edges_pass_beside_them(
    family: str, llama: tuple[nn.Module, sqcompile.CompiledModel]
) -> None:
    if family == "llama":
        g = condense(llama[1].stages["lowered"], roles_of(llama[1].stages["traced"], llama[1].plan))
    else:
        model, call = build(family)
        g, linears = graph_of(model, **call)
        assert sorted(n for _, names in g.nodes(data="linears") for n in names) == sorted(linears)
    for _, data in g.nodes(data=True):
        data.update(width=12.0 * len(data["label"]), height=30.0)
    place = layout(g)
    assert sorted(n for rank in place.ranks for n in rank) == sorted(g)
    for u, v in g.edges:
        assert place.boxes[u][1] < place.boxes[v][1]
        for x, top, bottom in place.routes[u, v]:
            for n in g:
                (mx, my), w = place.boxes[n], g.nodes[n]["width"]
                assert abs(x - mx) > w / 2 or not top <= my <= bottom
    for rank in place.ranks:
        for a, b in itertools.pairwise(rank):
            assert place.boxes[b][0] - place.boxes[a][0] > (g.nodes[a]["width"] + g.nodes[b]["width"]) / 2


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
        assert classes[label] == {"node", "product", "quantized"}
        assert Counter(map(_label, boxes))[label] == 2
    last = [g for g in boxes if _label(g) == want[-1]]
    for box, how in zip(last, compiled.plan.attention, strict=True):
        assert "int8 QKᵀ, PV" in [t.text for t in box.iter(f"{SVG}text")]
        assert f"{how.name}: int8 QKᵀ, PV" in title(box) and f"{how.sqnr_db:.1f} dB" in title(box)
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
    assert (first["roles"], first["detail"]) == ({"quantized"}, "int8 QKᵀ")
    assert second["roles"] == {"float"} and "skipped by the recipe" in second["title"]


def test_long_runs_of_equal_blocks_are_drawn_once() -> None:
    blocks = nn.Sequential(*(PreNorm() for _ in range(5)), PostNorm())
    short = fold_repeats(graph_of(blocks.eval(), torch.randn(2, 16))[0])
    assert [d["label"] for _, d in short.nodes(data=True) if d["kind"] == "repeat"] == ["4 more like it"]
    drawn_ = [name for _, names in short.nodes(data="linears") for name in names]
    assert drawn_ == ["0.up.weight", "0.down.weight", "5.up.weight", "5.down.weight"]
    assert "{1..4}" in render(short)
    three, _ = graph_of(blocks[:3].eval(), torch.randn(2, 16))
    assert fold_repeats(three) is three


def test_html_is_one_file_without_references(llama: tuple[nn.Module, sqcompile.CompiledModel], tmp_path: Path) -> None:
    llama[1].draw(tmp_path / "a.svg")
    llama[1].draw(tmp_path / "g.html")
    page, svg = ((tmp_path / n).read_text(encoding="utf-8") for n in ("g.html", "a.svg"))
    assert svg in page
    rest = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not any(word in rest for word in ("http:", "https:", "src=", "href=", "url(", "@import"))


def test_text_is_escaped() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a<b>&c", nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, "a<b>&c")(x)

    boxes = [g for g in ET.fromstring(render(graph_of(Odd().eval(), torch.randn(2, 8))[0])).iter(f"{SVG}g")]
    assert "a<b>&c" in [_label(g) for g in boxes if g.get("data-node")]


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


def factory() -> tuple[nn.Module, Tensor]:
    return PostNorm().eval(), torch.randn(4, 16)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["llama", "--layers", "1", "--draw", str(tmp_path / "g.svg")])
    out = capsys.readouterr().out
    assert "8 linears, 8 of them at 5 sites where a parameter absorbs 1/s" in out
    assert "  model.layers.0: input_layernorm -> q_proj, k_proj, v_proj\n" in out
    assert drawn(tmp_path / "g.svg")[0]["q_proj"] == {"node", "linear", "balance"}
    main([f"{__name__}:factory", "--stage", "quantized"])
    out = capsys.readouterr().out
    assert "  up: norm joins a residual stream\n" in out and "sqcompile.quantize(" in out
    main([f"{__name__}:PostNorm", "--input", "f32[2, 16]", "--stage", "traced"])
    assert "%gelu: f32[s0, 32] = aten.gelu(%linear)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no_such_type"], "no tiny 'no_such_type' model"),
        (["no.such.module:factory"], "importable from here"),
        ([f"{__name__}:PostNorm"], "pass --input"),
        ([f"{__name__}:PostNorm", "--input", "16"], "write a dtype and a shape"),
        ([f"{__name__}:factory", "--draw", "graph.pdf"], r"ends in \.svg or \.html"),
    ],
)
def test_command_line_errors(argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(argv)


@pytest.mark.parametrize("kind", sorted({*(kind for kind, _ in CAUSAL.values()), *OTHERS} - {"t5 gated"}))
def test_every_family_has_a_tiny_model_and_a_call_of_it(kind: str) -> None:
    model, call = load(kind)
    with torch.no_grad():
        out = dict(model(**call))
    assert all(bool(t.isfinite().all()) for t in out.values() if isinstance(t, Tensor))


@pytest.mark.parametrize("kind", ["siglip", "llava", "wav2vec2", "dinov2"])
def test_models_that_read_pictures_or_sound_have_a_call(kind: str) -> None:
    model, call = load(kind)
    with torch.no_grad():
        model(**call)


@pytest.mark.parametrize(
    ("kind", "linears"), [("clip", 26), ("swin", 12), pytest.param("whisper", 32, marks=pytest.mark.slow)]
)
def test_command_line_on_models_that_read_no_tokens_alone(
    kind: str, linears: int, capsys: pytest.CaptureFixture[str]
) -> None:
    main([kind])
    assert capsys.readouterr().out.startswith(f"{linears} linears, ")


def test_inputs_in_the_notation_of_show() -> None:
    name, ids = parse_input("input_ids=i64[2, 16]", rows=5)
    assert (name, ids.shape, ids.dtype) == ("input_ids", (2, 16), torch.int64) and int(ids.max()) < 5
    assert parse_input("bf16[3]")[1].dtype == torch.bfloat16


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
