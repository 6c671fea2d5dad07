"""Plans: what is read from a file or made by hand is checked, whole, before anything is made of it."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import random
import re
import stat
import threading
from types import SimpleNamespace

import pytest
import torch
from backend_cases import call, compiled, mlp, outliers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sqcompile
from sqcompile import Plan, PlanError, Recipe, plan_file
from sqcompile.backend.options import parse
from sqcompile.plan import AttentionPlan, LayerPlan, given_plan

KEY = "sqcompile_plan"


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(32), nn.Linear(32, 16)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.mlp(y.transpose(1, 2).flatten(2))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)).eval()


@pytest.fixture(scope="module")
def plan():
    """Of a dynamic recipe, with tensors of every kind but static ones."""
    torch.manual_seed(0)
    recipe = Recipe(attention="qk")
    return sqcompile.calibrate(Attend().eval(), [torch.randn(2, 9, 32)], recipe=recipe, progress=False)


@pytest.fixture(scope="module")
def static():
    torch.manual_seed(0)
    return sqcompile.calibrate(Attend().eval(), [torch.randn(2, 9, 32)], recipe="O3", progress=False)


def parts(plan, path):
    """JSON and tensors of a saved plan."""
    plan.save(path)
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()[KEY]), load_file(path)


def write(path, meta, tensors):
    """A file with a right checksum, whatever is in it."""
    if isinstance(meta, dict) and "sha256" in meta:
        meta = {k: v for k, v in meta.items() if k != "sha256"}
        meta["sha256"] = plan_file.checksum(meta, tensors)
    save_file(tensors, path, {KEY: meta if isinstance(meta, str) else json.dumps(meta)})


def test_a_saved_plan_is_equal_by_value(plan, static, tmp_path):
    for p in (plan, static):
        p.save(tmp_path / "a")
        one, two = Plan.load(tmp_path / "a"), Plan.load(str(tmp_path / "a"))
        assert p == p and one == two == p and hash(one) == hash(two) == hash(p) and one is not two
        one.save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert plan != static and plan != 3
    name, s = next(iter(plan.scales.items()))
    assert plan != dataclasses.replace(plan, scales={**plan.scales, name: s * 2})
    assert plan != dataclasses.replace(plan, scales={**plan.scales, name: s.double()})
    assert plan != dataclasses.replace(plan, columns={})
    assert plan != dataclasses.replace(plan, call={"args": [], "kwargs": {}})


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
    meta, tensors = parts(static, tmp_path / "p")
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


def _inside(x, rng):
    """A random place in nested JSON: its container and key."""
    while True:
        key = rng.choice(list(x) if isinstance(x, dict) else range(len(x)))
        if not isinstance(x[key], (dict, list)) or not x[key] or rng.random() < 0.2:
            return x, key
        x = x[key]


def fuzz(plan, path, rounds, seed):
    """Random damage to JSON, to header and body, and cuts: PlanError, or an equal plan."""
    rng = random.Random(seed)
    meta, tensors = parts(plan, path)
    data = path.read_bytes()
    values = [None, True, 0, -1, 1e38, float("nan"), "x", "", [], {}, [[]], {"a": 1}, 10**18, "\ud800", 0.5]
    equal = 0
    for i in range(rounds):
        if i % 2:
            bad = copy.deepcopy(meta)
            for _ in range(rng.randint(1, 3)):
                where, key = _inside(bad, rng)
                kind = rng.randrange(3)
                if kind == 0:
                    where[key] = copy.deepcopy(rng.choice(values))
                elif kind == 1:
                    del where[key]
                elif isinstance(where, dict):
                    where[rng.choice(["bogus", "shape", "name"])] = copy.deepcopy(where[key])
                if not bad:
                    break
            save_file(tensors, path, {KEY: json.dumps(bad)})
        else:
            bits = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
            for _ in range(rng.randint(1, 4) if bits else 0):
                end = len(bits) if rng.random() < 0.3 else min(len(bits), 4000)
                bits[rng.randrange(end)] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(bits))
        try:
            assert Plan.load(path) == plan
            equal += 1
        except PlanError as e:
            assert len(str(e)) < 2000
    return equal


def test_damaged_files_are_refused_or_equal(plan, static, tmp_path):
    for i, p in enumerate((plan, static)):
        assert fuzz(p, tmp_path / "p", 150, i) < 60


@pytest.mark.slow
def test_thousands_of_damaged_files(plan, static, tmp_path):
    for i, p in enumerate((plan, static)):
        fuzz(p, tmp_path / "p", 2000, 10 + i)


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


def old_file(plan, path, skip):
    """The plan as format 2 kept it."""
    meta, tensors = parts(plan, path)
    recipe = {k: v for k, v in meta["recipe"].items() if k != "lm_head"}
    meta = {k: v for k, v in meta.items() if k != "sha256"} | {"format": 2, "recipe": {**recipe, "skip": skip}}
    write(path, meta, tensors)


@pytest.mark.parametrize(
    ("old", "skip", "lm_head"),
    [(["lm_head"], (), False), ([], (), True), (["fc"], ("fc",), True), (["fc", "lm_head"], ("fc",), False)],
)
def test_plans_of_format_2_keep_what_their_skip_meant(old, skip, lm_head, plan, tmp_path):
    old_file(plan, tmp_path / "old", old)
    found = Plan.load(tmp_path / "old")
    assert found.recipe == Recipe(attention="qk", skip=skip, lm_head=lm_head)
    assert dataclasses.replace(found, recipe=plan.recipe) == plan


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


# Files: regular ones alone, whole or not at all.


def test_nothing_but_a_regular_file_is_read_or_replaced(plan, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    os.symlink(pipe, tmp_path / "link")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for path in (pipe, tmp_path / "link", tmp_path, tmp_path / "loop"):
        for use in (Plan.load, plan.save):
            with pytest.raises(PlanError):
                use(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and sorted(p.name for p in tmp_path.iterdir()) == ["link", "loop", "pipe"]
    for path in (0, None, 3.5):
        with pytest.raises(PlanError, match="pass a string or a"):
            Plan.load(path)


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFIFO, stat.S_IFDIR])
def test_devices_are_not_opened(kind, plan, tmp_path, monkeypatch):
    plan.save(tmp_path / "p")
    before, opened = (tmp_path / "p").read_bytes(), []
    monkeypatch.setattr(plan_file.os, "stat", lambda path: SimpleNamespace(st_mode=kind | 0o666, st_size=0))
    monkeypatch.setattr(plan_file.os, "open", lambda *args: opened.append(args))
    for use in (Plan.load, plan.save):
        with pytest.raises(PlanError, match="not a regular file"):
            use(tmp_path / "p")
    monkeypatch.undo()
    assert not opened and (tmp_path / "p").read_bytes() == before


def test_saving_keeps_permissions_and_links(plan, tmp_path):
    target, link = tmp_path / "p", tmp_path / "link"
    before = os.umask(0o027)
    try:
        plan.save(target)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    target.chmod(0o604)
    os.symlink(target, link)
    plan.save(link)
    assert link.is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o604 and Plan.load(target) == plan
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "p"]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("fsync", OSError(errno.ENOSPC, "No space left on device")),
        ("open", PermissionError(errno.EACCES, "Permission denied")),
        ("replace", OSError(errno.EROFS, "Read-only file system")),
        ("fsync", KeyboardInterrupt()),
    ],
)
def test_a_save_that_fails_leaves_the_old_file(what, error, plan, static, tmp_path, monkeypatch):
    plan.save(tmp_path / "p")

    def fail(*args):
        raise error

    monkeypatch.setattr(plan_file.os, what, fail)
    with pytest.raises(PlanError if isinstance(error, OSError) else KeyboardInterrupt) as found:
        static.save(tmp_path / "p")
    monkeypatch.undo()
    assert getattr(error, "strerror", "") in str(found.value)
    assert Plan.load(tmp_path / "p") == plan and [p.name for p in tmp_path.iterdir()] == ["p"]


def test_where_no_file_can_be(plan, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "p", tmp_path / "file" / "p", "", "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(PlanError, match=r"cannot be written|not a regular file"):
            plan.save(path)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_plans_saved_at_once_are_whole(plan, static, tmp_path):
    def work(p):
        for _ in range(10):
            p.save(tmp_path / "p")
            assert Plan.load(tmp_path / "p") in (plan, static)

    threads = [threading.Thread(target=work, args=(p,)) for p in (plan, static) * 2]
    failed = []
    threading.excepthook, before = lambda args: failed.append(args.exc_value), threading.excepthook
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        threading.excepthook = before
    assert not failed and [p.name for p in tmp_path.iterdir()] == ["p"]


def test_tensors_that_share_memory_are_saved(tmp_path):
    layers = tuple(LayerPlan(n, "linear", True, "multiplied", "", shape=(4, 8)) for n in ("a", "b"))
    s = torch.arange(1, 9).float()
    both = Plan(Recipe(), {"args": [], "kwargs": {}}, {"input -> a, b": s}, layers, (), {}, {"a": s, "b": s})
    both.save(tmp_path / "p")
    assert Plan.load(tmp_path / "p") == both
    assert AttentionPlan("x", "none", "none", "") == AttentionPlan("x", "none", "none", "")
