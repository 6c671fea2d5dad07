"""Plans: what is read from a file or made by hand is checked, whole, before anything is made of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re

import pytest
import torch
from backend_cases import call, compiled, mlp, outliers
from plan_cases import KEY, Attend, dynamic_plan, parts, static_plan, write
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile import Plan, PlanError, Recipe
from sqcompile.backend.options import parse
from sqcompile.plan.plan import given_plan

plan, static = pytest.fixture(dynamic_plan), pytest.fixture(static_plan)


NUMBERS = [float("nan"), float("inf"), 0.0, -1.0, True, "0.1", 1, [0.1], None, {}, 1e38, 1e-40]


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("input_scale", NUMBERS),
        ("alpha", [float("nan"), -0.1, 1.1, True, "x", [0.5], float("inf")]),
        ("sqnr_db", [float("nan"), float("-inf"), True, "30", [30.0]]),
        ("quantized", ["x", 1, None, []]),
        ("kind", ["conv", 3, None, ["linear"], "experts"]),
        ("smoothing", ["fold", None, 0, [], "none"]),
        ("reason", [None, 3, ["x"], "clear \x1b[2J", "half \ud800", "two\nlines"]),
        ("name", [None, 3, "", "other.weight", "x" * 2000, "a\x00b", []]),
        ("shape", [None, [32], [32, 32, 32], [0, 32], [-32, 32], [32, 64], [32.0, 32], [True, 32], "ab", 10**19]),
        ("bogus", [1]),
    ],
)
def test_fields_of_a_linear(where, values, static, tmp_path):
    meta, tensors = parts(static, tmp_path / "p")
    at = next(i for i, l in enumerate(meta["layers"]) if l["smoothing"] != "none")
    for value in values:
        bad = copy.deepcopy(meta)
        bad["layers"][at][where] = value
        write(tmp_path / "p", bad, tensors)
        with pytest.raises(PlanError):
            Plan.load(tmp_path / "p")
        if where != "bogus":  # and the same of a plan made by hand
            layers = list(static.layers)
            layers[at] = dataclasses.replace(layers[at], **{where: value})
            with pytest.raises(PlanError):
                given_plan(dataclasses.replace(static, layers=tuple(layers)), None, None)


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("quantized", ["pv", True, None, "qk"]),
        ("q_scale", NUMBERS),
        ("k_scale", NUMBERS),
        ("shape", [None, [2, 2], [2, 3, 16], [4, 3, 16], [2, 2, 0], [2, 0, 16], [2, 2, True]]),
        ("smoothing", ["fold", 1, None]),
        ("name", [None, "", "elsewhere"]),
    ],
)
def test_fields_of_an_attention(where, values, static, tmp_path):
    meta, tensors = parts(static, tmp_path / "p")
    for value in values:
        bad = copy.deepcopy(meta)
        bad["attention"][0][where] = value
        write(tmp_path / "p", bad, tensors)
        with pytest.raises(PlanError):
            Plan.load(tmp_path / "p")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("format"),
        lambda m: m.pop("sha256"),
        lambda m: m.update(format=True),
        lambda m: m.update(format="3"),
        lambda m: m.update(format=99),
        lambda m: m.update(sha256=None),
        lambda m: m.update(more=1),
        lambda m: m.update(layers=None),
        lambda m: m.update(layers={}),
        lambda m: m.update(layers=[]),
        lambda m: m.update(layers=[3]),
        lambda m: m["layers"].append(m["layers"][0]),
        lambda m: m["layers"][0].pop("name"),
        lambda m: [l.update(quantized=False) for l in m["layers"]],
        lambda m: m.update(attention=None),
        lambda m: m.update(attention=[[]]),
        lambda m: m["attention"].append(m["attention"][0]),
        lambda m: m.update(recipe=3),
        lambda m: m.update(recipe=None),
        lambda m: m["recipe"].update(bogus=1),
        lambda m: m["recipe"].update(skip=3),
        lambda m: m["recipe"].update(skip=[["fc"]]),
        lambda m: m["recipe"].update(alpha="x"),
        lambda m: m["recipe"].update(alpha=[[0.5]]),
        lambda m: m["recipe"].update(activation="per_tensor_static"),
        lambda m: m["recipe"].update(attention="qk_pv"),
        lambda m: m["recipe"].update(qk={}),
        lambda m: m.update(call=None),
        lambda m: m.update(call=[]),
        lambda m: m["call"].update(args={}),
        lambda m: m["call"].update(kwargs=[]),
        lambda m: m["call"].update(more=[]),
        lambda m: m["call"]["kwargs"].update(x=3),
        lambda m: m["call"]["kwargs"].update(x={}),
        lambda m: m["call"]["kwargs"].update(x={"const": float("nan")}),
        lambda m: m["call"]["kwargs"].update(x={"const": []}),
        lambda m: m["call"]["kwargs"].update(x={"dict": []}),
        lambda m: m["call"]["kwargs"].update(x={"list": 3}),
        lambda m: m["call"]["kwargs"]["x"].update(shape=[-2, 9, 32]),
        lambda m: m["call"]["kwargs"]["x"].update(shape=[2, 9.0, 32]),
        lambda m: m["call"]["kwargs"]["x"].update(shape=[2**20, 2**20]),
        lambda m: m["call"]["kwargs"]["x"].update(shape=[1] * 100),
        lambda m: m["call"]["kwargs"]["x"].update(dtype="nn"),
        lambda m: m["call"]["kwargs"]["x"].update(dtype="dtype"),
        lambda m: m["call"]["kwargs"]["x"].update(dtype=["float32"]),
        lambda m: m["call"]["kwargs"]["x"].update(device="cuda"),
    ],
)
def test_structure(change, plan, tmp_path):
    meta, tensors = parts(plan, tmp_path / "p")
    change(meta)
    if meta.get("sha256") is None:
        save_file(tensors, tmp_path / "p", {KEY: json.dumps(meta)})
    else:
        write(tmp_path / "p", meta, tensors)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "p")


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, '{"a":' * 10**5, "[]", "null", "", "{", "9" * 10**5, '{"format": 3}', '"', '"\\' * 99, "NaN", "{}"],
    ids=lambda text: text[:12],
)
def test_headers_that_are_no_plan(text, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "p", {KEY: text})
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "p")


def test_numbers_of_tensors(plan, static, tmp_path):
    meta, tensors = parts(dataclasses.replace(static, evidence=None), tmp_path / "p")
    for name, t in tensors.items():
        low_only = name.endswith("key_mean")
        wrong = [float("nan"), float("inf"), -float("inf")] + ([] if low_only else [0.0, -1.0, 1e38, 1e-38])
        bad = []
        for number in wrong:
            bad.append(t.clone())
            bad[-1].view(-1)[-1] = number
        bad += [t.double(), t.half(), t.view(torch.int32), t[:0], t[None], t.flatten()[:3], t.bool()]
        for b in bad:
            write(tmp_path / "p", meta, {**tensors, name: b.contiguous()})
            if b.shape == (3,) and (name in static.scales or name.endswith("/scale")):
                continue  # a size that only the graph knows
            with pytest.raises(PlanError):
                Plan.load(tmp_path / "p")
    for name in ("x", "columns: x", "attention: x/scale", "attention: /scale", "attention: x", "a -> b", "", "a -> "):
        write(tmp_path / "p", meta, {**tensors, name: torch.ones(16)})
        with pytest.raises(PlanError):
            Plan.load(tmp_path / "p")
    for name in plan.scales:  # the same of plans made by hand
        for s in (torch.full((32,), float("nan")), torch.ones(32, device="meta"), torch.ones(32).to_sparse(), [1.0]):
            with pytest.raises(PlanError):
                sqcompile.compile(Attend().eval(), plan=dataclasses.replace(plan, scales={name: s}))
    for change in ({"layers": list(plan.layers)}, {"scales": None}, {"recipe": "O1"}, {"attention": plan.layers}):
        with pytest.raises(PlanError):
            dataclasses.replace(plan, **change).save(tmp_path / "p")


def test_a_scale_that_takes_a_norm_out_of_float16_is_refused():
    model, x = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)).eval().half(), torch.randn(2, 5, 16).half()
    plan = sqcompile.calibrate(model, [x], recipe=sqcompile.Recipe(), progress=False)
    small = {name: torch.full_like(s, 2.0**-20) for name, s in plan.scales.items()}
    with pytest.raises(PlanError, match=r"take '0.weight' out of torch.float16"):
        sqcompile.compile(model, plan=dataclasses.replace(plan, scales=small), backend="eager")


def test_the_same_of_a_bias_that_is_shifted_before():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)).eval().half()
    x = torch.randn(2, 5, 16).half()
    plan = sqcompile.calibrate(model, [x], recipe=sqcompile.Recipe(), progress=False)
    (site,) = plan.scales
    s = plan.scales[site].clone()
    s[3] = 1e-5  # where the norm is zero, and its bias 1 by the shift alone
    with torch.no_grad():
        model[0].weight[3] = 0.0
    shift = -torch.eye(16)[3]
    wrong = dataclasses.replace(plan, scales={site: s}, columns={"1.weight": s}, shifts={"1.weight": shift})
    with pytest.raises(PlanError, match=r"take '0.bias' out of torch.float16"):
        sqcompile.compile(model, plan=wrong, backend="eager", progress=False)


class Fused(nn.Module):
    """Of one linear's output only the values may be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).split(32, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_scales_of_channels_that_are_read_elsewhere_are_refused():
    torch.manual_seed(0)
    model, x = Fused().eval(), torch.randn(2, 9, 32)
    plan = sqcompile.calibrate(model, [x], recipe=sqcompile.Recipe(), progress=False)
    (site,) = (name for name in plan.scales if name.startswith("qkv"))
    s = plan.scales[site].clone()
    assert bool((s[:64] == 1).all()) and not bool((s[64:] == 1).all())
    s[5] = 30.0
    wrong = dataclasses.replace(plan, scales={**plan.scales, site: s})
    with pytest.raises(PlanError, match=r"scales channels of 'qkv.weight -> o.weight' that this model reads elsewhere"):
        sqcompile.compile(model, plan=wrong, backend="eager", progress=False)


def test_what_the_graph_knows_is_checked_before_anything_is_quantized(static, tmp_path):
    def refused(plan, match):
        with pytest.raises(PlanError, match=match):
            sqcompile.compile(Attend().eval(), plan=plan, backend="eager")

    site, s = next(iter(static.scales.items()))
    refused(dataclasses.replace(static, scales={**static.scales, site: s[:3]}), "which this model does not have")
    first = static.layers[0].name
    (a,) = static.attention
    value = f"{a.name}/value_scale"
    refused(dataclasses.replace(static, heads={**static.heads, value: static.heads[value][:, :5]}), "another width")
    columns = {l.name: torch.ones(l.shape[-1]) for l in static.layers}
    smoothed = tuple(dataclasses.replace(l, smoothing="folded") for l in static.layers)
    refused(dataclasses.replace(static, scales={}, layers=smoothed, columns=columns), f"{first}.*no scales for it")
    plain = [dataclasses.replace(l, smoothing="none") for l in static.layers]
    for wrong in ({"name": "other.weight"}, {"shape": (32, 31)}):
        layers = (dataclasses.replace(plain[0], **wrong), *plain[1:])
        refused(dataclasses.replace(static, layers=layers, scales={}, columns={}), f"no linear {first!r} of shape")
    wrong = {"args": [], "kwargs": {"y": {"shape": [2, 9, 32], "dtype": "float32"}}}
    for call_, kind in ((wrong, sqcompile.SQCompileError), ({**wrong, "kwargs": {}}, sqcompile.SQCompileError)):
        with pytest.raises(kind):
            sqcompile.compile(Attend().eval(), plan=dataclasses.replace(static, call=call_), backend="eager")


def test_names_with_the_marks_of_a_site_in_them():
    model = nn.ModuleDict({"a, b": nn.Linear(16, 16), "b": nn.Linear(16, 16)}).eval()
    model.forward = lambda x: model["b"](torch.relu(model["a, b"](x)))
    x = torch.randn(2, 5, 16)
    plan = sqcompile.calibrate(model, [x], progress=False)
    sqcompile.compile(model, plan=plan, backend="eager")(x)


# What is passed beside a plan, and where it may be.


def refusals(plan, **beside):
    """What compile(plan=...) and the backend's options say of a plan."""
    with pytest.raises(PlanError) as one:
        sqcompile.compile(mlp(), plan=plan, **beside)
    with pytest.raises(PlanError) as two:
        parse({"plan": plan, **beside}, None)
    assert str(one.value) == str(two.value)
    return str(one.value)


def test_both_entry_points_take_the_same_plans(tmp_path):
    model, x = mlp(), outliers()[0]
    plan = sqcompile.calibrate(model, outliers(), recipe="O1", progress=False)
    plan.save(tmp_path / "plan")
    os.symlink(tmp_path / "plan", tmp_path / "link")
    want = sqcompile.compile(model, plan=plan, backend="eager")(x)
    assert torch.equal(sqcompile.compile(model, plan=tmp_path / "plan", recipe="O1", backend="eager")(x), want)
    assert torch.equal(call(compiled(model, plan=str(tmp_path / "link"), recipe="O1"), x), want)
    for given in (plan, tmp_path / "plan", str(tmp_path / "link")):
        for beside in ({}, {"recipe": "O1"}, {"recipe": None}, {"recipe": plan.recipe}):
            assert (
                parse({"plan": given, **beside}, None).plan
                == plan
                == given_plan(given, **{"recipe": None} | beside, data=None)
            )
    name = next(iter(plan.scales))
    bad = dataclasses.replace(plan, scales={name: plan.scales[name] * float("nan")})
    os.mkfifo(tmp_path / "pipe")
    for given, beside, match in [
        (plan, {"recipe": "default"}, "plan and recipe disagree: the plan is of Recipe"),
        (plan, {"recipe": Recipe(alpha=0.3)}, "plan and recipe disagree"),
        (tmp_path / "plan", {"recipe": "O2"}, "plan and recipe disagree"),
        (3, {}, "plan=3: pass what sqcompile.calibrate gives, or the path"),
        ({}, {}, "plan={}: pass what"),
        (model, {}, r"plan=.{1,40}: pass what"),
        (bad, {}, "nan, and must lie in"),
        (tmp_path / "none", {}, "is not a sqcompile plan .*make one with Plan.save"),
        ("a\0b", {}, "is not a sqcompile plan"),
        (tmp_path, {}, "is not a regular file"),
        (tmp_path / "pipe", {}, "is not a regular file"),
    ]:
        assert re.search(match, refusals(given, **beside))
    with pytest.raises(PlanError, match="plan and calib_loader: a plan needs no calibration"):
        sqcompile.compile(model, outliers(), plan=plan)
    with pytest.raises(PlanError, match="plan and calibration_steps: a plan needs no calibration"):
        parse({"plan": plan, "calibration_steps": 2}, None)
