"""Plans from activation scales alone: the values that calibration gives, and in words what cannot be known without tokens."""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import torch
from checkpoint_cases import PLAIN, STATIC, logits, planned
from conftest import token_batches, typical_error
from families import build
from torch import nn

import sqcompile
from sqcompile import PRESETS, ArtifactError, CalibrationError, Plan, PlanError, Recipe, RecipeError

built = functools.cache(build)


@functools.cache
def scales_of(family):
    model, call = built(family)
    return sqcompile.get_act_scales(model, [call], progress=False)


def from_scales(family, recipe="default", **changes):
    """The plan of a tiny model by its scales, some of them others."""
    model, call = built(family)
    return sqcompile.calibrate(
        model, act_scales=scales_of(family) | changes, example_inputs=call, recipe=recipe, progress=False
    )


def smoothed_inputs(family, plan, path):
    """Of each linear of the folded model, as transformers loads it: the largest input."""
    from transformers import AutoModelForCausalLM

    model, call = built(family)
    sqcompile.export(model, plan, "smoothed", path)
    folded, seen = AutoModelForCausalLM.from_pretrained(path).eval(), {}
    for name, m in folded.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: float(args[0].abs().max())}))
    logits(folded, call)
    return seen


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_file_and_a_dict_give_the_scales_of_a_calibration(family, tmp_path):
    model, call, want = planned(family)
    sqcompile.write_act_scales(tmp_path / "scales.pt", scales_of(family))
    plan = sqcompile.calibrate(model, act_scales=tmp_path / "scales.pt", example_inputs=call, progress=False)
    assert plan == from_scales(family)
    assert all(l.smoothing == "folded" for l in want.layers if l.quantized)  # else the comparison says less
    assert plan.scales.keys() == want.scales.keys() and plan.columns.keys() == want.columns.keys()
    for name, s in plan.scales.items():
        torch.testing.assert_close(s, want.scales[name], rtol=1e-5, atol=0)
    assert plan.recipe == PLAIN == Recipe(0.5, rotate="none")  # what "auto" came to
    for l, w in zip(plan.layers, want.layers, strict=True):
        assert (l.name, l.quantized, l.smoothing, l.alpha, l.shape) == (
            w.name, w.quantized, w.smoothing, w.alpha, w.shape,
        )  # fmt: skip
        assert l.sqnr_db is None and l.loss is None and l.input_scale is None
        assert not l.quantized or l.reason.endswith("; by largest values without tokens, so that no α was tried")


def test_a_fixed_alpha_is_taken_where_it_hurts_too():
    """Channels without outliers, where calibration finds that smoothing costs."""
    model, call = build("opt", outlier=1.0)
    strong = Recipe(1.0, activation="per_tensor_static")
    with pytest.warns(UserWarning, match="static scales from 22 calibration tokens"):
        tried = sqcompile.calibrate(model, [call], recipe=strong, progress=False)
    assert any(l.smoothing == "none" for l in tried.layers if l.quantized)
    scales = sqcompile.get_act_scales(model, [call], progress=False)
    plan = sqcompile.calibrate(model, act_scales=scales, example_inputs=call, recipe=strong, progress=False)
    assert all(l.smoothing == "folded" and l.alpha == 1.0 for l in plan.layers if l.quantized)


def test_static_scales_are_of_the_largest_smoothed_input_without_a_margin(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of few tokens, say
        plan = from_scales("opt", STATIC)
    seen = smoothed_inputs("opt", plan, tmp_path / "folded")
    quantized = [l for l in plan.layers if l.quantized]
    assert len(quantized) == 12
    for l in quantized:
        assert l.input_scale == pytest.approx(seen[l.name.removesuffix(".weight")] / 127, rel=1e-5)
        assert l.reason.endswith("no α was tried; Δ of the largest value, without a margin")


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("opt", STATIC), ("llama", "default"), ("gpt2", STATIC), ("mixtral", "default"), ("qwen2_moe", STATIC)],
    ids=lambda x: x if isinstance(x, str) else "static",
)
def test_the_logits_are_close_to_float(family, recipe):
    model, call = built(family)
    plan = from_scales(family, recipe)
    compiled = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    assert typical_error(logits(compiled, call), logits(model, call)) < 0.1
    said = str(compiled.report)
    assert not re.search(r"\d+ (of \d+ )?calibration tokens?|no calibration token| dB", said), said


def test_a_plan_from_scales_is_saved_exported_and_compiled_as_any_other(tmp_path):
    model, call = built("llama")
    plan = from_scales("llama", STATIC)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan
    compiled = sqcompile.compile(model, plan=tmp_path / "plan", backend="eager", progress=False)
    direct = sqcompile.compile(
        model, act_scales=scales_of("llama"), example_inputs=call, recipe=STATIC, backend="eager", progress=False
    )
    assert direct.plan == plan
    assert typical_error(logits(compiled, call), logits(model, call)) < 0.1
    done = sqcompile.export(model, plan, "compressed-tensors", tmp_path / "w8a8")
    assert [l.input_scale for l in done.plan.layers] == [l.input_scale for l in plan.layers]


def test_linears_that_read_one_tensor_share_the_largest_of_their_entries():
    name = "model.decoder.layers.0.self_attn.{}_proj"
    more = scales_of("opt")[name.format("k")].clone()
    more[3] *= 50
    one = from_scales("opt", STATIC, **{name.format("k"): more})
    every = from_scales("opt", STATIC, **{name.format(which): more for which in "qkv"})
    assert one == every != from_scales("opt", STATIC)
    assert len({l.input_scale for l in one.layers[:3]}) == 1


def test_overrides_are_settled_as_the_recipe_is():
    settled = {"*.fc1": {"alpha": 0.8}, "*.fc2": {"alpha": 0.5, "rotate": "none"}, "*.out_proj": {"rotate": 32}}
    asked = settled | {"*.fc2": {"alpha": (0.4, 0.5), "rotate": "auto"}}
    plan = from_scales("opt", Recipe("auto", rotate="auto", overrides=asked))
    assert plan.recipe == Recipe(0.5, overrides=settled)
    found = {l.name.split(".")[-2]: (l.alpha, l.rotation) for l in plan.layers if l.quantized}
    assert found == {
        "q_proj": (0.5, None), "k_proj": (0.5, None), "v_proj": (0.5, None), "out_proj": (0.5, 32), "fc1": (0.8, None),
        "fc2": (0.5, None),
    }  # fmt: skip


def test_a_fixed_rotation_is_kept_with_scales_of_tokens():
    model, call = built("llama")
    plan = from_scales("llama", Recipe(rotate=16))
    assert {l.rotation for l in plan.layers if l.quantized} == {16}
    compiled = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    assert typical_error(logits(compiled, call), logits(model, call)) < 0.1


def test_without_smoothing_nothing_is_smoothed():
    plan = from_scales("opt", Recipe("auto", smooth=False))
    assert not plan.scales and {l.reason for l in plan.layers if l.quantized} == {"the recipe does not smooth"}


def test_an_input_of_zeros_has_no_static_scale():
    zeros = {"model.decoder.layers.0.fc2": torch.zeros(112)}
    static = {l.name: l for l in from_scales("opt", STATIC, **zeros).layers}["model.decoder.layers.0.fc2.weight"]
    assert not static.quantized
    assert static.reason == "its input was zero by its largest values: no static scale can be chosen"
    tokens = {l.name: l for l in from_scales("opt", **zeros).layers}[static.name]
    assert tokens.quantized and "its input was zero by its largest values" in tokens.reason


class Twice(nn.Module):
    """One linear used twice, and two of one weight."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b, self.c = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(3))
        self.c.weight = self.b.weight

    def forward(self, x):
        h = self.a(torch.relu(self.a(self.norm(x))))
        return self.c(torch.relu(self.b(torch.relu(h))))


def test_uses_of_one_weight_take_its_entries_by_any_name():
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(4, 7, 16)
    scales = {"a": torch.full((16,), 3.0), "b": torch.full((16,), 2.0), "c": torch.full((16,), 5.0)}

    def found(scales):
        plan = sqcompile.calibrate(
            model, act_scales=scales, example_inputs=x, recipe=Recipe(smooth=False, activation="per_tensor_static"),
            progress=False,
        )  # fmt: skip
        return {l.name: round(l.input_scale * 127, 5) for l in plan.layers}

    assert found(scales) == {"a.weight": 3.0, "a.weight#2": 3.0, "c.weight": 5.0, "c.weight#2": 5.0}
    del scales["c"]
    assert found(scales) == {"a.weight": 3.0, "a.weight#2": 3.0, "c.weight": 2.0, "c.weight#2": 2.0}


def test_what_the_model_lacks_is_left_out_and_what_stays_in_float_needs_no_entry():
    scales = {n: s for n, s in scales_of("opt").items() if n != "lm_head" and ".1." not in n}
    model, call = built("opt")
    plan = sqcompile.calibrate(
        model, act_scales=scales | {"another": torch.ones(3)}, example_inputs=call, recipe=Recipe(skip=("layers.1",)),
        progress=False,
    )  # fmt: skip
    assert [l.quantized for l in plan.layers] == [True] * 6 + [False] * 7
    kept = from_scales("opt").scales
    assert plan.scales and all(torch.equal(s, kept[name]) for name, s in plan.scales.items())


FIRST = "model.decoder.layers.0.self_attn"


@pytest.mark.parametrize(
    ("left_out", "others", "message"),
    [
        (
            ".", {},
            rf"do not fit 12 of the 12 linears to be quantized \({FIRST}.q_proj has no entry, {FIRST}.k_proj has no entry, "
            rf"{FIRST}.v_proj has no entry, \.\.\.\): pass those of this model, or leave these linears in float",
        ),
        ("layers.1.fc2", {}, r"do not fit 1 of the 12 linears to be quantized \(model.decoder.layers.1.fc2 has no entry\):"),
        ("-", {f"{FIRST}.k_proj": torch.ones(32)}, r"1 of the 12 .*k_proj has one of 32 channels and reads 64\)"),
    ],
)  # fmt: skip
def test_scales_of_another_model_are_refused(left_out, others, message):
    model, call = built("opt")
    scales = {n: s for n, s in scales_of("opt").items() if left_out not in n} | others or {"x": torch.ones(3)}
    with pytest.raises(CalibrationError, match=message):
        sqcompile.calibrate(model, act_scales=scales, example_inputs=call, progress=False)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("O3", r"attention='qk_pv' with act_scales, which say nothing of queries.*: pass a Recipe with attention='none'"),
        (Recipe(max_degradation=1.0), r"max_degradation=1\.0 with act_scales, which have no tokens .*: leave it out"),
        (Recipe((0.2, 0.8)), r"alpha=\(0\.2, 0\.8\) with act_scales, which have no tokens .*: pass one of them"),
        (Recipe(overrides={"*.fc1": {"alpha": (0.2, 0.8)}}), r"alpha=\(0\.2, 0\.8\) with act_scales"),
        (Recipe(activation="per_tensor_static", rotate=16), r"rotate=16 with a static scale for .*q_proj.weight: act_scal"),
        (
            Recipe(rotate=16, overrides={"*.fc2": {"activation": "per_tensor_static"}}),
            r"rotate=16 with a static scale for .*0\.fc2\.weight: .*Pass rotate='none', activation='per_token', or calib",
        ),
    ],
)  # fmt: skip
def test_what_needs_tokens_is_refused(recipe, message):
    with pytest.raises(RecipeError, match=message):
        from_scales("opt", recipe)


def test_presets_without_attention_are_taken():
    assert from_scales("opt", PRESETS["fp8"]).recipe == Recipe(0.5, dtype="fp8")


def test_what_is_passed_beside_scales_is_refused():
    model, call, plan = planned("opt")
    scales = scales_of("opt")

    def refused(error, message, act_scales=scales, **kwargs):
        for make in (sqcompile.calibrate, sqcompile.compile):
            with pytest.raises(error, match=message):
                make(model, act_scales=act_scales, progress=False, **kwargs)

    refused(CalibrationError, "calib_loader and act_scales: either is a calibration", calib_loader=[call])
    refused(CalibrationError, "act_scales without example_inputs: pass a batch to capture the model with")
    refused(CalibrationError, r"pass calib_loader .*, act_scales with example_inputs, or a plan", act_scales=None)
    refused(RecipeError, "evaluate with act_scales", example_inputs=call, evaluate=lambda m: 1.0)
    refused(ArtifactError, "these are no activation scales", act_scales={"a": -torch.ones(3)}, example_inputs=call)
    refused(ArtifactError, "none.pt has no activation scales", act_scales="none.pt", example_inputs=call)
    refused(ArtifactError, "the path is 3", act_scales=3, example_inputs=call)
    with pytest.raises(PlanError, match="plan and act_scales: a plan needs no calibration"):
        sqcompile.compile(model, plan=plan, act_scales=scales, progress=False)


def test_scales_are_the_largest_of_all_batches_and_leave_padding_out():
    model, _ = built("opt")
    batches = token_batches(2)
    found = sqcompile.get_act_scales(model, batches, progress=False)
    each = [sqcompile.get_act_scales(model, [b], progress=False) for b in batches]
    assert found.keys() == each[0].keys()
    for name, s in found.items():
        assert s.dtype == torch.float32
        torch.testing.assert_close(s, torch.maximum(each[0][name], each[1][name]), rtol=1e-5, atol=1e-6)
    ids, mask = batches[0]["input_ids"].clone(), torch.ones(2, 17, dtype=torch.long)
    mask[:, 12:] = 0
    short = sqcompile.get_act_scales(model, [ids[:, :12]], progress=False)
    padded = sqcompile.get_act_scales(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    for name, s in short.items():
        torch.testing.assert_close(padded[name], s, rtol=1e-4, atol=1e-5)
