"""What a user sees of what was decided: reports as text, JSON, pandas and HTML, two of them compared, and reprs."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import sys
from typing import Any

import pytest
import torch
from conftest import tiny_lm, token_batches
from expecttest import assert_expected_inline
from torch import nn

import sqcompile
from sqcompile import AttentionPlan, LayerPlan, Plan, PlanError, Recipe, Report
from sqcompile.plan.names import grouped

KINDS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (112, 64), "mlp.up_proj": (112, 64), "mlp.down_proj": (64, 112),
}  # fmt: skip


def deep(layers: int = 30, **changes: Any) -> Plan:
    """The plan of a deep model: one linear of layer 13 stays in float, down_proj has no producer, costs differ by layer."""
    entries, scales = [], {}
    for i in range(layers):
        at = f"model.layers.{i}"
        for j, (kind, shape) in enumerate(KINDS.items()):
            name = f"{at}.{kind}.weight"
            l = LayerPlan(
                name, "linear", True, "folded", "folded into norm", 0.3 + 0.1 * (i % 3), 30 + i / 2 + j, shape=shape,
                rotation=32 if "mlp" in kind else None, loss=1e-4 * i,
            )  # fmt: skip
            if kind == "mlp.down_proj":
                reason = f"x·(1/s) before quantization: {at}.mlp.act joins; Δ from {1 + i / 10:.2f} x the largest value"
                l = dataclasses.replace(l, smoothing="multiplied", reason=reason)
                scales[f"input -> {name}"] = torch.ones(112)
            if i == 13 and kind == "self_attn.o_proj":
                l = LayerPlan(name, "linear", False, "none", "skipped by the recipe ('o_proj')", shape=shape)
            entries.append(dataclasses.replace(l, **changes) if l.quantized else l)
        q, k, v = (f"{at}.self_attn.{n}_proj.weight" for n in "qkv")
        scales[f"{at}.input_layernorm.weight -> {q}, {k}, {v}"] = torch.ones(64)
    head = LayerPlan("lm_head.weight", "linear", False, "none", "the projection back to the vocabulary", shape=(96, 64))
    attention = tuple(
        AttentionPlan(f"model.layers.{i}.self_attn", "qk", "folded", "s folded", 0.5, 40.0 + i, shape=(4, 2, 16))
        for i in range(layers)
    )
    return Plan(Recipe(attention="qk"), None, scales, (*entries, head), attention)


@pytest.fixture(scope="module")
def compiled() -> tuple[nn.Module, sqcompile.CompiledModel]:
    model = tiny_lm("llama")
    return model, sqcompile.compile(model, token_batches(1), recipe=Recipe(0.5), backend="eager", progress=False)


def test_a_deep_model_has_a_line_for_each_kind() -> None:
    assert_expected_inline(
        str(Report.of(deep())),
        """\
model.layers.{0..29}.self_attn.q_proj.weight          int8   folded      α 0.30..0.50        30.0..44.5 dB  folded into norm
model.layers.{0..29}.self_attn.k_proj.weight          int8   folded      α 0.30..0.50        31.0..45.5 dB  folded into norm
model.layers.{0..29}.self_attn.v_proj.weight          int8   folded      α 0.30..0.50        32.0..46.5 dB  folded into norm
model.layers.{0..12, 14..29}.self_attn.o_proj.weight  int8   folded      α 0.30..0.50        33.0..47.5 dB  folded into norm
model.layers.{0..29}.mlp.gate_proj.weight             int8   folded      α 0.30..0.50  H 32  34.0..48.5 dB  folded into norm
model.layers.{0..29}.mlp.up_proj.weight               int8   folded      α 0.30..0.50  H 32  35.0..49.5 dB  folded into norm
model.layers.{0..29}.mlp.down_proj.weight             int8   multiplied  α 0.30..0.50  H 32  36.0..50.5 dB  x·(1/s) before quantization: model.layers.{0..29}.mlp.act joins; Δ from 1.00..3.90 x the largest value
model.layers.13.self_attn.o_proj.weight               float  none                                           skipped by the recipe ('o_proj')
lm_head.weight                                        float  none                                           the projection back to the vocabulary
attention:
  model.layers.{0..29}.self_attn  int8 QKᵀ  folded      α 0.50  40.0..69.0 dB  s folded
sites (what absorbs 1/s -> linears that absorb s):
  model.layers.{0..29}: input_layernorm -> q_proj, k_proj, v_proj
  model.layers.{0..29}: down_proj input × 1/s
words:
  folded: the parameter before the linear absorbs 1/s
  multiplied: x·(1/s) is computed before quantization, as no parameter can absorb 1/s
  H 32: the input is rotated in blocks of 32 channels
  dB: how far the output's signal is above the noise of INT8, on the calibration sample; higher is better
209 of 211 linears in INT8, 179 with smoothing folded into parameters, 30 with smoothing multiplied explicitly, 90 with rotated inputs
30 of 30 attentions in INT8""",
    )


def test_two_recipes_are_compared_by_kind() -> None:
    other = deep(alpha=0.5, rotation=None).keep_float("layers.2")
    assert_expected_inline(
        str(sqcompile.compare(deep(), other)),
        """\
                                                    a                                                b                                     SQNR
model.layers.{20 of 0..28}.self_attn.q_proj.weight  int8 folded α 0.30..0.40 30.0..44.0 dB           int8 folded α 0.50 30.0..44.0 dB      +0.0 dB
model.layers.{20 of 0..28}.self_attn.k_proj.weight  int8 folded α 0.30..0.40 31.0..45.0 dB           int8 folded α 0.50 31.0..45.0 dB      +0.0 dB
model.layers.{20 of 0..28}.self_attn.v_proj.weight  int8 folded α 0.30..0.40 32.0..46.0 dB           int8 folded α 0.50 32.0..46.0 dB      +0.0 dB
model.layers.{19 of 0..28}.self_attn.o_proj.weight  int8 folded α 0.30..0.40 33.0..47.0 dB           int8 folded α 0.50 33.0..47.0 dB      +0.0 dB
model.layers.{0..1, 3..29}.mlp.gate_proj.weight     int8 folded α 0.30..0.50 H 32 34.0..48.5 dB      int8 folded α 0.50 34.0..48.5 dB      +0.0 dB
model.layers.{0..1, 3..29}.mlp.up_proj.weight       int8 folded α 0.30..0.50 H 32 35.0..49.5 dB      int8 folded α 0.50 35.0..49.5 dB      +0.0 dB
model.layers.{0..1, 3..29}.mlp.down_proj.weight     int8 multiplied α 0.30..0.50 H 32 36.0..50.5 dB  int8 multiplied α 0.50 36.0..50.5 dB  +0.0 dB
model.layers.2.self_attn.q_proj.weight              int8 folded α 0.50 31.0 dB                       float
model.layers.2.self_attn.k_proj.weight              int8 folded α 0.50 32.0 dB                       float
model.layers.2.self_attn.v_proj.weight              int8 folded α 0.50 33.0 dB                       float
model.layers.2.self_attn.o_proj.weight              int8 folded α 0.50 34.0 dB                       float
model.layers.2.mlp.gate_proj.weight                 int8 folded α 0.50 H 32 35.0 dB                  float
model.layers.2.mlp.up_proj.weight                   int8 folded α 0.50 H 32 36.0 dB                  float
model.layers.2.mlp.down_proj.weight                 int8 multiplied α 0.50 H 32 37.0 dB              float
173 of 211 linears differ: 7 in number format, 139 in α, 87 in rotation
a: 209 linears in INT8, by Recipe(alpha=0.5, attention='qk')
b: 202 linears in INT8, by Recipe(alpha=0.5, attention='qk')
mean SQNR of the linears that are quantized by both: a 40.5 dB, b 40.5 dB""",
    )


def test_every_line_of_a_full_report_is_one_linear() -> None:
    report = Report.of(deep())
    lines = report.to_text(full=True).splitlines()
    assert [line.split()[0] for line in lines[:211]] == [l.name for l in report.layers]
    assert all(l.reason in line for l, line in zip(report.layers, lines, strict=False))
    assert len(lines) > 211 + 30 + 60 and lines[-2:] == str(report).splitlines()[-2:]


def test_what_is_said_of_layers_holds_for_each_of_them() -> None:
    """A range in a line's name stands for exactly the linears that it names."""
    names = [f"layers.{i}.experts.{j}.fc{k}" for i in range(3) for j in (0, 2) for k in (1, 2)]
    found = grouped(names[:-1])
    assert sorted(i for _, members in found for i in members) == list(range(11))
    for text, members in found:
        want = {names[i] for i in members}
        assert {n for n in names if n.rpartition(".")[2] == text.rpartition(".")[2]} >= want
    assert ("layers.{0..2}.experts.{0, 2}.fc1", [0, 2, 4, 6, 8, 10]) in found


def test_json_has_every_field_and_no_nan() -> None:
    plan = deep(2, loss=math.inf)
    layers = (dataclasses.replace(plan.layers[0], sqnr_db=math.inf), *plan.layers[1:])
    text = Report.of(dataclasses.replace(plan, layers=layers)).to_json()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(text, parse_constant=refuse)
    lists = {"layers", "attention", "sites", "gemms", "int8_attention"}
    assert found.keys() == {"format", "dtype", "summary", "seconds", *lists} and found["seconds"] == {}
    assert found["summary"] == {"linears": 15, "quantized": 14, "folded": 12, "multiplied": 2, "rotated": 6}
    first, second = found["layers"][:2]
    assert first.keys() == {f.name for f in dataclasses.fields(LayerPlan)} and first["loss"] is first["sqnr_db"] is None
    assert LayerPlan(**{**second, "shape": tuple(second["shape"]), "loss": math.inf}) == plan.layers[1]
    assert [s["key"] for s in found["sites"]] == [s.key for s in Report.of(plan).sites]
    assert found["attention"][1]["name"] == "model.layers.1.self_attn"


def test_the_seconds_of_each_stage_are_said(compiled: tuple[nn.Module, sqcompile.CompiledModel]) -> None:
    report = compiled[1].report
    stages = ["trace", "calibrate", "match", "plan", "fold", "insert_qdq", "lower", "emit"]
    assert [name for name in report.seconds if ":" not in name] == stages and min(report.seconds.values()) >= 0
    assert 0 < report.seconds["plan: choose"] <= report.seconds["plan"]
    assert json.loads(report.to_json())["seconds"] == report.seconds
    spent = {"trace": 2.0, "plan: choose": 5.0, "plan: compare": 0.1, "plan": 5.2, "lower": 0.04}
    said = "compiled in 7.2 s: trace 2.0, plan 5.2 (choose 5.0), lower 0.0"
    lines = str(dataclasses.replace(report, seconds=spent)).splitlines()
    assert lines[-2] == said and "compiled in" not in str(dataclasses.replace(report, seconds={}))


def test_gains_of_kernels_are_lists_in_json() -> None:
    from sqcompile.compiled.report import Gemm, Int8Attention

    gemms, attention = (Gemm(2, 64, 128, {1: 1.5}),), (Int8Attention(1, "qk", 64, {(1, 2, 3): 0.9}, "cpu"),)
    found = json.loads(Report((), (), gemms, (), attention).to_json(indent=1))
    assert found["gemms"] == [
        {"count": 2, "in_features": 64, "out_features": 128, "gains": [{"rows": 1, "gain": 1.5}], "against": "bf16"}
    ]
    assert found["int8_attention"][0]["gains"] == [{"batch": 1, "queries": 2, "keys": 3, "gain": 0.9}]


def test_pandas_has_a_row_for_each_linear() -> None:
    pandas = pytest.importorskip("pandas")
    report = Report.of(deep())
    found = report.to_pandas()
    assert list(found["name"]) == [l.name for l in report.layers] and found["quantized"].sum() == 209
    assert {n: str(found[n].dtype) for n in ("alpha", "rotation", "quantized", "smoothing", "in_features")} == {
        "alpha": "float64", "rotation": "Int64", "quantized": "bool", "smoothing": "category", "in_features": "int64"
    }  # fmt: skip
    assert pandas.isna(found["alpha"].iloc[-1]) and found["label"].iloc[0] == "model.layers.0: q_proj"
    assert found.groupby("smoothing", observed=True)["sqnr_db"].mean()["multiplied"] == pytest.approx(43.25)


def test_without_pandas_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(sqcompile.ReportError, match=r'needs pandas: pip install "pandas>=2.2"$'):
        Report.of(deep(1)).to_pandas()


def test_reports_of_other_models_are_not_compared(compiled: tuple[nn.Module, sqcompile.CompiledModel]) -> None:
    model, net = compiled
    with pytest.raises(
        PlanError, match=r"of different models: only the first one has 'model.layers.2.self_attn.q_proj"
    ):
        sqcompile.compare(deep(3), deep(2))
    with pytest.raises(PlanError, match="of different models: only the second one has"):
        sqcompile.compare(Report.of(deep(2)), deep(3))
    with pytest.raises(PlanError, match=r"'model.layers.0.self_attn.q_proj.weight' is 64 x 64 and 8 x 8"):
        sqcompile.compare(deep(1), deep(1, shape=(8, 8)))
    with pytest.raises(sqcompile.StageError, match="no plan yet"):
        sqcompile.compare(net, model)
    same = sqcompile.compare(net, net.report)
    assert same.differences == () and str(same).splitlines()[0] == "none of 15 linears differs"


def test_a_comparison_is_data(compiled: tuple[nn.Module, sqcompile.CompiledModel]) -> None:
    net = compiled[1]
    kept = net.plan.keep_float("o_proj")
    found = sqcompile.compare(net, kept)
    assert [d.name for d in found.differences] == [l.name for l in net.plan.layers if "o_proj" in l.name]
    assert found.quantized == (14, 12) and found.recipes == (net.plan.recipe, net.plan.recipe)
    assert all(d.gain_db is None and d.a.quantized and not d.b.quantized for d in found.differences)
    louder = dataclasses.replace(kept, layers=tuple(
        dataclasses.replace(l, sqnr_db=l.sqnr_db + 1) if l.sqnr_db else l for l in kept.layers
    ))  # fmt: skip
    found = sqcompile.compare(kept, louder)
    assert [d.gain_db for d in found.differences] == pytest.approx([1.0] * 12)
    assert str(found).splitlines()[-4].endswith("differ, in SQNR alone")
    assert repr(found) == "Comparison(12 of 15 linears differ, in SQNR alone)"


class _Page(html.parser.HTMLParser):
    """Looks whether every element is closed in its turn, and which there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.every: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.every.add(tag)
        assert not any(name.startswith("on") or name in ("color", "bgcolor") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_notebooks_show_tables_and_reprs_are_one_line(compiled: tuple[nn.Module, sqcompile.CompiledModel]) -> None:
    model, net = compiled
    ids = torch.cat([b["input_ids"] for b in token_batches(2)])
    measured = sqcompile.evaluate(net, ids, against=model, progress=False)
    things = (
        net,
        net.report,
        net.plan,
        net.plan.recipe,
        measured,
        sqcompile.compare(net, net.plan.keep_float("o_proj")),
    )
    for x in things:
        shown: str = x._repr_html_()  # type: ignore[attr-defined]
        page = _Page(shown)
        assert not page.open and "table" in page.every and len(shown) < 20_000, type(x)
        said = repr(x)
        assert said.startswith(f"{type(x).__name__}(") and "\n" not in said and 10 < len(said) < 400, said
    assert repr(net).startswith("CompiledModel(LlamaForCausalLM, 14 of 15 linears in INT8, 0.1 MB on cpu")
    assert repr(nn.Sequential(net)).count("\n") == 2  # a part of another module is one line of it
    assert repr(net.report) == "Report(14 of 15 linears in INT8, 14 with smoothing folded into parameters)"
    assert "perplexity increase" in repr(measured) and len(repr(deep(100))) < 400
    assert eval(repr(Recipe("auto", rotate="auto", skip=("a",)))) == Recipe("auto", rotate="auto", skip=("a",))
    assert repr(Recipe()) == "Recipe(alpha=0.5)"
    assert repr(Recipe(overrides={"*.a": {"alpha": 0.8}})) == "Recipe(alpha=0.5, overrides={'*.a': {'alpha': 0.8}})"


def test_html_is_escaped() -> None:
    name = "<script>alert(1)</script>"
    layer = LayerPlan(name, "linear", True, "none", '"a" <b> & c', shape=(2, 2), sqnr_db=30.0)
    plan = Plan(Recipe(skip=("<i>",)), None, {}, (layer,))
    for x in (
        plan,
        Report.of(plan),
        plan.recipe,
        sqcompile.compare(plan, Plan(Recipe(), None, {}, (dataclasses.replace(layer, sqnr_db=9.0),))),
    ):
        assert not {"script", "b>", "i"} & _Page(x._repr_html_()).every
        assert "&lt;" in x._repr_html_()
