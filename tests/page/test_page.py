"""The page of a report as a file: what it says, how large it is, and what is refused in a sentence."""

from __future__ import annotations

import base64
import copy
import dataclasses
import gc
import json
import pickle
import re
import weakref
import zlib

import page_browser
import page_cases
import pytest
import torch
from plan_cases import dynamic_plan
from torch import nn

import sqcompile
from sqcompile import Evaluation, Plan, Recipe, ReportError
from sqcompile.cli.report import read_evaluation
from sqcompile.cli.terminal import CommandError
from sqcompile.compiled.report import Report
from sqcompile.page.data import data_of
from sqcompile.page.facts import Subject, facts_of, memory_of
from sqcompile.plan.evidence import Curve, Tried

pytest.importorskip("altair", reason="altair is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
pytestmark = pytest.mark.usefixtures("without_vega")
without_vega = pytest.fixture(scope="module")(page_browser.without_vega)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


@pytest.fixture(scope="module")
def compiled():
    model = Tiny().eval()
    found = sqcompile.compile(model, [torch.randn(40, 32)], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    found.model_is_kept = model
    return found


def data(text, name="data"):
    found = re.search(rf'<script type="(\S+)" id="{name}">(.*?)</script>', text, re.S)
    return json.loads(found[2] if found[1] == "application/json" else zlib.decompress(base64.b64decode(found[2])))


def test_a_page_of_a_compiled_model_has_its_graph(compiled, tmp_path):
    compiled.report.to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    drawing = data(text, "drawing")
    assert [f'data-stage="{name}"' in drawing for name in ("traced", "folded", "quantized", "lowered")] == [True] * 4
    assert "<svg" in drawing and data(text)["layers"]["name"] == ["up.weight", "down.weight"]
    assert "2 of 2" in text and "Tiny" in text and "href=" in text and "http-equiv" in text
    page = text.partition('<script type="text/plain" id="vega-bundle">')[0]
    assert not re.search(r'(src|href)="(?!#)', page)  # nothing of elsewhere
    want = sum(b.numel() * b.element_size() for b in compiled.lowered.buffers())
    assert compiled.report.weight_bytes == want and memory_of(compiled.plan, want).model == (
        compiled.plan.evidence.bytes,
        want,
    )


def test_a_report_is_copied_and_pickled_without_its_graph(compiled, tmp_path):
    for again in (copy.deepcopy(compiled.report), pickle.loads(pickle.dumps(compiled.report))):
        assert again == compiled.report and again.stages is None
        again.to_html(tmp_path / "r.html")
        assert 'id="graph"' not in (tmp_path / "r.html").read_text()


def test_without_the_float_model_the_page_says_why_there_is_no_graph(tmp_path):
    found = sqcompile.compile(
        Tiny().eval(), [torch.randn(40, 32)], recipe=Recipe(alpha=0.5), backend="eager", progress=False
    )
    gc.collect()
    found.report.to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert 'id="graph"' not in text and "not drawn: the float model was freed" in text


def test_a_report_keeps_no_weights_of_a_model_that_is_gone(tmp_path):
    model = Tiny().eval()
    found = sqcompile.compile(model, [torch.randn(40, 32)], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    report, lowered = found.report, weakref.ref(found.lowered)
    assert [*report.stages] == ["traced", "folded", "quantized", "lowered"]
    del found
    gc.collect()
    assert lowered() is None and [*report.stages] == ["traced", "folded", "quantized"] and len(report.stages) == 3
    with pytest.raises(KeyError, match="the compiled model is gone"):
        report.stages["lowered"]
    report.to_html(tmp_path / "r.html")
    drawing = data((tmp_path / "r.html").read_text(), "drawing")
    assert 'data-stage="quantized"' in drawing and 'data-stage="lowered"' not in drawing


def test_attentions_in_float_have_their_reasons():
    plan = dynamic_plan()
    attention = tuple(dataclasses.replace(a, quantized="none", reason="has no kernel") for a in plan.attention)
    lines = facts_of(Subject(dataclasses.replace(plan, attention=attention))).floats
    assert f"{plan.attention[0].name}: attention: has no kernel" in lines and len(attention) == 1


def test_a_page_of_a_plan_alone(compiled, tmp_path):
    compiled.plan.save(tmp_path / "p")
    Report.of(Plan.load(tmp_path / "p")).to_html(str(tmp_path / "r.HTML"), title="Mine")
    text = (tmp_path / "r.HTML").read_text()
    assert 'id="graph"' not in text and "<h1>Mine</h1>" in text and len(data(text)["sites"]) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"p", "r.HTML"}


def test_a_plan_without_evidence_says_what_is_missing(compiled, tmp_path):
    plan = dataclasses.replace(compiled.plan, evidence=None)
    Report.of(plan).to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "This plan has no evidence" in text and data(text)["sites"] == [] and len(data(text)["layers"]["name"]) == 2
    scales = {"up": torch.ones(32), "down": torch.ones(64)}
    plan = sqcompile.calibrate(Tiny().eval(), act_scales=scales, example_inputs=(torch.randn(4, 32),), progress=False)
    Report.of(plan).to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "made from activation scales alone" in text and data(text)["sites"][0]["rows"] == 0


def test_80_layers_are_less_than_3_mb(tmp_path):
    """With vega's scripts, which stand for themselves in the test with a browser, and a drawing of 0.7 MB."""
    plan = page_cases.synthetic(80)
    Report.of(plan).to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size + 410_000 + 700_000 < 2_000_000
    text = (tmp_path / "r.html").read_text()
    assert (
        len(data(text)["sites"]) == 320
        and "model.layers.{3, 10, 17, 24, 31, 38, 45, 52, 59, 66, 73}: down_proj" in text
    )
    assert memory_of(plan, None).linears[0] == 2 * sum(l.shape[0] * l.shape[1] for l in plan.layers if l.quantized)


def test_reasons_that_differ_in_a_cost_are_one_line():
    plan = page_cases.synthetic(8)
    costs = {f"model.layers.{i}.mlp.up_proj.weight": c for i, c in enumerate(("0.02", "1.5e-05", "0.4"))}
    layers = tuple(
        dataclasses.replace(l, quantized=False, reason=f"left in float: costs {costs[l.name]} % of perplexity, and max_degradation=0.5")
        if l.name in costs
        else l
        for l in plan.layers
    )  # fmt: skip
    found = facts_of(Subject(dataclasses.replace(plan, layers=layers))).floats
    line = "model.layers.{0..2}: up_proj: left in float: costs up to 0.4 % of perplexity, and max_degradation=0.5"
    assert line in found and len(found) == 3


def test_spikes_matter_where_tokens_share_a_scale():
    plan = page_cases.synthetic(2)
    texts = [f.text for f in facts_of(Subject(plan)).findings]
    shared = dataclasses.replace(plan, recipe=Recipe(activation="per_tensor"))
    more = [f.text for f in facts_of(Subject(shared)).findings if f.text not in texts]
    assert len(more) == 1 and more[0].startswith(
        "2 inputs of linears have one scale and a few tokens many times as large"
    )


def test_what_was_measured_decides_what_is_said():
    plan = page_cases.synthetic(2)

    def first(increase, error):
        measured = Evaluation("x", 8, 4096, 12.5, 0.4, 12.4, 0.4, increase, error)
        return facts_of(Subject(plan, evaluation=measured)).findings[0]

    assert [first(*x).level for x in ((0.5, 0.1), (0.9, 0.1), (2.0, 0.4), (2.0, 0.6))] == [
        "good",
        "look",
        "look",
        "bad",
    ]
    assert first(0.5, 0.1).text == "On 4,096 held-out tokens perplexity is +0.50 % ± 0.10 % against the float model's."
    unmeasured = facts_of(Subject(plan)).findings[0]
    assert unmeasured.level == "look" and "not measured on held-out data" in unmeasured.text
    low = dataclasses.replace(plan, layers=(dataclasses.replace(plan.layers[0], sqnr_db=9.0), *plan.layers[1:]))
    assert "bad" in [f.level for f in facts_of(Subject(low)).findings if "below 20 dB" in f.text]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none/r.html", "is no directory: name a file in one that exists"),
        ("r.pdf", "name a file that ends in .html"),
        ("r", "name a file that ends in .html"),
        ("folder.html", "cannot be written"),
    ],
)
def test_paths_that_cannot_be(path, message, compiled, tmp_path):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ReportError, match=message) as found:
        compiled.report.to_html(tmp_path / path)
    assert "\n" not in str(found.value) and [p.name for p in tmp_path.iterdir()] == ["folder.html"]


def test_arguments_that_are_none(compiled, tmp_path):
    report = compiled.report
    for wrong in ({"evaluation": 3}, {"evaluation": "eval.json"}, {"title": ""}, {"title": 3}, {"title": "a\nb"}):
        with pytest.raises(ReportError, match="pass"):
            report.to_html(tmp_path / "r.html", **wrong)
    with pytest.raises(ReportError, match="pass a string or a"):
        report.to_html(3)
    with pytest.raises(ReportError, match="has no plan"):
        dataclasses.replace(report, plan=None).to_html(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "use"), [("altair", "to_html"), ("vl_convert", "to_html"), ("matplotlib.figure", "plot")]
)
def test_without_the_extra(missing, use, compiled, tmp_path, monkeypatch):
    from sqcompile.page import extras

    real = extras.importlib.import_module

    def imported(name):
        if name == missing:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(extras.importlib, "import_module", imported)
    with pytest.raises(ReportError, match=r"not installed: pip install 'sqcompile\[report\]'"):
        getattr(compiled.report, use)(tmp_path / "r.html" if use == "to_html" else 0)
    assert not list(tmp_path.iterdir())


def test_plot_by_matplotlib(compiled, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = compiled.report.plot("up")
    assert [a.get_title() for a in figure.axes] == [
        "activations, per channel", "weights, per channel", "tokens and channels, before", "tokens and channels, after",
        "what was tried", "codes",
    ]  # fmt: skip
    figure.savefig(tmp_path / "x.png", dpi=30)
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert compiled.report.plot(1).get_suptitle() == compiled.report.plot("down.weight").get_suptitle()
    for wrong in ("q_proj", 2, -1, None, "", "weight"):
        with pytest.raises(ReportError):
            compiled.report.plot(wrong)
    with pytest.raises(ReportError, match="no evidence to plot"):
        Report.of(dataclasses.replace(compiled.plan, evidence=None)).plot(0)


def test_a_plot_rings_what_runs_among_the_candidates_of_its_kind(compiled):
    """Of a static recipe that leaves an input a scale for each token, as the page does."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plan = compiled.plan
    site = plan.evidence.inputs[0].site
    tried = tuple(Tried(0.5, None, dynamic, 1e-3 if dynamic else 9e-3) for dynamic in (False, True))
    evidence = dataclasses.replace(plan.evidence, curves={site: Curve(False, tried)})
    first = dataclasses.replace(plan.layers[0], activation="per_token")
    plan = dataclasses.replace(
        plan,
        recipe=Recipe(alpha=0.5, activation="per_tensor_static"),
        layers=(first, *plan.layers[1:]),
        evidence=evidence,
    )
    (axes,) = (a for a in Report.of(plan).plot(0).axes if a.get_title() == "what was tried")
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[1e-3], [1e-3]]
    assert data_of(plan)["sites"][0]["dynamic"] == 1


def test_evaluations_from_files(tmp_path):
    good = {
        "compared": "x",
        "windows": 2,
        "tokens": 3,
        "perplexity": 12,
        "increase": None,
        "checksum": "a",
        "layers": None,
    }
    path = tmp_path / "e.json"
    path.write_text(json.dumps(good))
    found = read_evaluation(str(path))
    assert (found.perplexity, found.increase, found.windows, found.checksum) == (12.0, None, 2, "a")
    bad = [{**good, "windows": "2"}, {**good, "windows": True}, {**good, "perplexity": "12"}, {"windows": 2}, [], 3]
    for wrong in [
        *(json.dumps(b) for b in bad),
        "",
        "{",
        '{"compared": "x", "windows": 2, "tokens": 3, "kl": NaN}',
        "[" * 10**5,
    ]:
        path.write_text(wrong)
        with pytest.raises(CommandError, match="is no evaluation") as e:
            read_evaluation(str(path))
        assert len(str(e.value)) < 600
    with pytest.raises(CommandError):
        read_evaluation(str(tmp_path / "none.json"))
