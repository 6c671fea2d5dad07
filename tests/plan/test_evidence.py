"""Evidence: what a plan keeps beside its decisions is right, small, the same every time, and checked as it is read."""

from __future__ import annotations

import copy
import dataclasses
import json

import page_cases
import pytest
import torch
from plan_cases import dynamic_plan, parts, static_plan, write
from torch import nn

import sqcompile
from sqcompile import Plan, PlanError, Recipe
from sqcompile.kernels.reference import quantize, token_scale, weight_scale
from sqcompile.kernels.rotation import rotate
from sqcompile.plan.evidence import Evidence
from sqcompile.plan.evidence_file import check_evidence, decoded, encoded


class Mlp(nn.Module):
    """[B, 64] of [B, 64], with outliers in two channels and one channel that is dead."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)
        with torch.no_grad():
            self.norm.weight[[3, 40]] = torch.tensor([30.0, 50.0])
            self.norm.weight[7] = self.norm.bias[7] = 0.0

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def made(**recipe):
    model, x = Mlp().eval(), torch.randn(60, 64, generator=torch.Generator().manual_seed(1))
    return model, x, sqcompile.calibrate(model, [x], recipe=Recipe(**recipe), progress=False)


@pytest.mark.parametrize("rotate_by", ["none", 32])
def test_numbers_are_those_of_the_model(rotate_by):
    model, x, plan = made(alpha=0.5, rotate=rotate_by)
    found = plan.evidence.inputs[0]
    with torch.no_grad():
        h = model.norm(x)
    s, w = plan.columns["up.weight"], model.up.weight.detach()
    after, turned = h / s, w * s
    if rotate_by != "none":
        after, turned = rotate(after, 32), rotate(turned, 32)
    turned = turned / plan.scales["up.weight -> down.weight"][:, None]
    assert (found.linears, found.channels, found.width, found.tokens) == (("up.weight",), 64, 1, 60)
    assert (found.dead, found.dead_in.nonzero().flatten().tolist()) == (1, [7])
    assert found.largest[:2].tolist() == [40, 3] and len(found.largest) == 16
    want = torch.stack([t.abs().amax(0) for t in (h, after, w, turned)])
    torch.testing.assert_close(found.values, want[:, found.largest.long()], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.absmax.float(), want, rtol=2**-7, atol=0)
    awake = want[0][want[0] > 0]
    assert found.ratio[0] == pytest.approx(float(awake.max() / awake.median()), rel=1e-3) and found.ratio[1] < 8
    q = quantize(after, token_scale(after)).float(), quantize(turned, weight_scale(turned, True)).float()
    for counts, codes in zip(found.codes, q, strict=True):
        exact = [int(((codes >= c) & (codes < c + 5)).sum()) for c in range(-127, 128, 5)]
        assert sum(abs(a - b) for a, b in zip(counts.tolist(), exact, strict=True)) <= 0.01 * codes.numel()
        assert int(counts.sum()) == codes.numel()
    assert found.heat.shape == (2, 32, 64) and found.heat[0].max() == found.heat[1].max() == 255
    octaves = (255 - found.heat[0, :, 40].float()) * 12 / 254
    size = found.tops[0] * torch.exp2(-octaves)
    assert float(size.max()) == pytest.approx(float(h.abs().max()), rel=1e-3)
    assert all(min((h[:, 40].abs() - v).abs()) < 0.03 * v for v in size)


def test_curves_have_what_was_tried_and_the_choice():
    _, _, plan = made(alpha=(0.3, 0.5, 0.7), rotate="auto")
    layers = {l.name: l for l in plan.layers}
    for site, curve in plan.evidence.curves.items():
        l = layers[site.rpartition(" -> ")[2]]
        assert any((t.alpha, t.rotation) == (l.alpha, l.rotation) for t in curve.tried)
        assert {t.rotation for t in curve.tried} >= {None, 16, 32} and not curve.by_loss
    auto = made(alpha="auto")[2].evidence
    assert all(c.by_loss for c in auto.curves.values()) and not auto.logits and auto.model == "Mlp"
    assert auto.bytes == 4 * sum(p.numel() for p in Mlp().parameters()) and auto.dtype == "float32"


def test_linears_in_float_are_known_as_they_are():
    _, _, plan = made(alpha=0.5, skip=("down",))
    up, down = plan.evidence.inputs
    assert down.linears == ("down.weight",) and down.site == "" and int(down.codes.sum()) == 0 and down.zeros is None
    assert torch.equal(down.absmax[0], down.absmax[1]) and int(up.codes[0].sum()) == 60 * 64


def test_evidence_is_no_decision_and_is_saved(tmp_path):
    _, _, plan = made()
    bare = dataclasses.replace(plan, evidence=None)
    assert bare == plan and hash(bare) == hash(plan) and "evidence" not in repr(plan)
    plan.save(tmp_path / "p")
    again = Plan.load(tmp_path / "p")
    assert again.encoded() == plan.encoded() == made()[2].encoded() and again.evidence.curves == plan.evidence.curves
    bare.save(tmp_path / "p")
    assert Plan.load(tmp_path / "p").evidence is None


def test_largest_values_alone_are_evidence_too():
    scales = {"up": torch.ones(64), "down": torch.ones(128)}
    plan = sqcompile.calibrate(Mlp().eval(), act_scales=scales, example_inputs=(torch.randn(2, 64),), progress=False)
    found = plan.evidence.inputs[0]
    assert (
        found.tokens == 0 and found.heat.shape == (2, 0, 0) and found.clipped is None and int(found.codes[0].sum()) == 0
    )
    assert Plan.decoded(plan.encoded()).encoded() == plan.encoded()


def test_sizes_are_bounded():
    """80 layers of four inputs each: under 2 MB."""
    plan = page_cases.synthetic(80)
    bare = dataclasses.replace(plan, evidence=None)
    assert len(plan.evidence.inputs) == 320 and len(plan.layers) == 561
    assert len(plan.encoded()) - len(bare.encoded()) < 2e6
    plan.check()


BAD = [None, True, -1, 1.5, "x\n", [], {}, float("nan"), float("inf"), 10**18, [1], [[]], "\ud800"]


def test_every_field_is_checked(tmp_path):
    """PlanError, or evidence that can be kept."""
    meta, tensors = encoded(static_plan().evidence)
    meta = json.loads(json.dumps(meta))
    places = [(lambda m: m, key) for key in meta] + [(lambda m: m["inputs"][0], key) for key in meta["inputs"][0]]
    site = next(iter(meta["curves"]))
    places += [(lambda m: m["curves"], site), (lambda m: m["curves"][site], 1)]
    places += [(lambda m: m["curves"][site][1][0], i) for i in range(4)]
    refused = 0
    for at, key in places:
        for value in BAD:
            bad = copy.deepcopy(meta)
            at(bad)[key] = value
            try:
                found = decoded(bad, tensors)
                check_evidence(found)
                assert encoded(found)[0].keys() == meta.keys()
            except PlanError as e:
                refused += 1
                assert len(str(e)) < 2000
    assert refused > 0.8 * len(places) * len(BAD)
    evidence = dynamic_plan().evidence
    assert evidence is not None
    first = evidence.inputs[0]
    for inputs in (
        (first, first),
        (dataclasses.replace(first, itemsize=2**40),),
        (dataclasses.replace(first, undivided=("nobody",)),),
    ):
        with pytest.raises(
            PlanError,
            match=r"a linear is there twice|undivided is \('nobody',\)|itemsize is 1099511627776, not 1, 2, 4 or 8 bytes",
        ):
            check_evidence(dataclasses.replace(evidence, inputs=inputs))
    meta, tensors = parts(dynamic_plan(), tmp_path / "p")
    for wrong in (3, meta):
        with pytest.raises(PlanError):
            dataclasses.replace(dynamic_plan(), evidence=wrong).check()
    for wrong in (None, [], {**meta["evidence"], "more": 1}, {**meta["evidence"], "bytes": -1}):
        write(tmp_path / "p", {**meta, "evidence": wrong}, tensors)
        with pytest.raises(PlanError):
            Plan.load(tmp_path / "p")
    write(tmp_path / "p", {**meta, "format": 4}, tensors)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "p")


def test_every_tensor_is_checked(tmp_path):
    meta, tensors = parts(dynamic_plan(), tmp_path / "p")
    seen = [n for n in tensors if n.startswith("evidence: ")]
    assert len(seen) == 6
    for name in seen:
        t = tensors[name]
        bad = [t[:-1], torch.cat([t, t[:1]]), t[None], t.double(), None]
        if t.dtype.is_floating_point:
            bad += [t.clone().fill_(x) for x in (float("nan"), float("inf"), -1.0)]
        elif t.dtype == torch.int32:
            bad += [torch.full_like(t, -1)]
        for b in bad:
            others = {n: x for n, x in tensors.items() if n != name}
            write(tmp_path / "p", meta, others if b is None else {**others, name: b.contiguous()})
            with pytest.raises(PlanError):
                Plan.load(tmp_path / "p")


def test_of_two_graphs_the_first_counts():
    one, other = made()[2].evidence, made(skip=("down",))[2].evidence
    both = one.joined(other)
    assert both.inputs == one.inputs and Evidence().joined(one).inputs == one.inputs and both.curves == one.curves


def test_plans_of_two_versions_are_equal_and_their_files_are_not(tmp_path):
    plan = dynamic_plan()
    other = dataclasses.replace(
        plan, evidence=dataclasses.replace(plan.evidence, versions="sqcompile 0.1.0, torch 9.0")
    )
    for p, name in ((plan, "a"), (plan, "b"), (other, "c")):
        p.save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c and Plan.load(tmp_path / "a") == Plan.load(tmp_path / "c")
