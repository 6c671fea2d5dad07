"""INT8 attention: chains found by dataflow, scales of head channels, the quantized stage and the operator."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, token_batches
from families import FAMILIES, build
from hand_written import HAND_WRITTEN, Attend, Spelled, inputs_of
from test_families import outputs, resized, run
from torch import nn

import sqcompile
from sqcompile import PRESETS, Recipe
from sqcompile.calibrate import calibrate
from sqcompile.errors import PlanError, RecipeError
from sqcompile.inputs import as_call
from sqcompile.kernels import int8_attention as kernel
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.reference import quantize, token_scale
from sqcompile.passes.attention_chains import find_attentions
from sqcompile.passes.fold import fold
from sqcompile.passes.head_labels import match_heads
from sqcompile.plan import Plan
from sqcompile.trace import trace

# name: attentions, (heads, key heads, channels), scales of each that are free, what absorbs them
PLAIN = (2, (4, 4, 16), 64, "linear")
ROTARY = (2, (4, 2, 16), 16, "linear")  # 2 key heads x 8 pairs of channels
CHAINS = {
    "opt": PLAIN,
    "opt post-norm": PLAIN,
    "gpt2": PLAIN,
    "bloom": PLAIN,
    "llama": ROTARY,
    "mistral": ROTARY,
    "qwen2": ROTARY,
    "qwen3": (2, (4, 2, 16), 8, "scale"),  # the norm's weight serves every head
    "mixtral": ROTARY,
    "qwen2_moe": ROTARY,
    "falcon 7b": (2, (4, 1, 16), 8, "linear"),
    "falcon 40b": (2, (4, 4, 16), 16, "linear"),  # repeats its key heads before it rotates them
    "falcon alibi": PLAIN,
    "gpt_neox": (2, (4, 4, 16), 56, "linear"),  # rotates 4 of 16 channels: 2 pairs and 12 alone
    "gemma": ROTARY,
    "gemma2": ROTARY,
    "phi3": ROTARY,
    "bert": PLAIN,
    "roberta": PLAIN,
    "t5": (6, (4, 4, 16), 64, "linear"),
    "t5 gated": (6, (4, 4, 16), 64, "linear"),
    "whisper": (6, (4, 4, 16), 64, "linear"),
    "vit": PLAIN,
    "clip": (4, (4, 4, 16), 64, "linear"),
}
# those with a switch; Gemma-2 and BLOOM are spelled out as they come, Falcon never is
SPELLED_OUT = [n for n in FAMILIES if n not in ("falcon 7b", "falcon 40b", "falcon alibi", "gemma2", "bloom")]
QUICK = ("opt", "llama", "bloom", "t5")


def found(model, call):
    gm = trace(model, as_call(model, call))
    return gm, find_attentions(gm)


def fold_heads(gm, attentions, seed=0):
    """Folds random scales, far from 1, into every attention; and the sites and reasons."""
    sites, why = match_heads(gm, attentions)
    generator = torch.Generator().manual_seed(seed)
    heads = {f"{s.name}/scale": torch.exp(torch.randn(s.classes, generator=generator)) for s in sites}
    return fold(gm, [], Plan(Recipe(), None, {}, (), (), heads), sites), sites, why


def changed(before, after):
    """How many parameters of a graph another one reads through arithmetic of its own."""
    return sum(n.op == "get_attr" for n in after.graph.nodes) - sum(n.op == "get_attr" for n in before.graph.nodes)


def operators(gm, name):
    return gm.graph.find_nodes(op="call_function", target=getattr(sqcompile_ops, name).default)


def with_attention(model, call, recipe):
    return sqcompile.compile(model, [call], recipe=recipe, backend="eager", progress=False)


def check_family(name, eager):
    model, call = build(name)
    if eager:
        model.set_attn_implementation("eager")
    gm, attentions = found(model, call)
    count, shape, classes, kind = CHAINS[name]
    assert [a.refused for a in attentions] == [None] * count
    assert {(a.heads, a.groups, a.width) for a in attentions} == {shape}
    assert not any(isinstance(a.scores, str) for a in attentions)
    assert all((a.product == a.output) != (eager or name in ("gemma2", "bloom")) for a in attentions)
    assert all("attn" in a.name or "attention" in a.name.lower() for a in attentions)
    assert len({a.name for a in attentions}) == count
    folded, sites, why = fold_heads(gm, attentions)
    assert why == {} and len(sites) == count
    assert {s.classes for s in sites} == {classes}
    assert {x.kind for s in sites for x, _ in (*s.queries, *s.keys)} == {kind}
    assert changed(gm, folded) >= 2 * count
    for x in (call, resized(call)):
        for a, b in zip(outputs(folded(**x)), run(model, x), strict=False):
            assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_is_found_and_smoothed_exactly(name):
    check_family(name, eager=False)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SPELLED_OUT])
def test_every_attention_that_is_spelled_out_is_found_and_smoothed_exactly(name):
    check_family(name, eager=True)


@pytest.mark.parametrize("attention", ["qk", "qk_pv"])
@pytest.mark.parametrize(
    "name", [n if n in ("llama", "bloom", "gemma2") else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_lowered_attention_agrees_with_the_quantized_stage(name, attention):
    model, call = build(name)
    compiled = with_attention(model, call, Recipe(attention=attention))
    lowered, count = compiled.stages["lowered"], CHAINS[name][0]
    assert len(operators(lowered, "int8_attention")) == count
    assert not operators(lowered, "int8_scores") and not operators(lowered, "attention")
    values = [n.args[4].meta["val"].dtype for n in operators(lowered, "int8_attention")]
    assert values == [torch.int8 if attention == "qk_pv" else torch.float32] * count
    shapes = {(n.args[0].meta["val"].shape[1], n.args[2].meta["val"].shape[1]) for n in operators(lowered, "int8_attention")}
    assert shapes == {CHAINS[name][1][:2]}  # no key head is repeated
    x = resized(call)
    for a, b in zip(outputs(lowered(**x)), outputs(compiled.stages["quantized"](**x)), strict=True):
        assert relative_error(a, b) <= 2e-3  # a rounding that falls the other way in a later quantization
    linears = with_attention(model, call, Recipe())
    want = run(model, x)
    errors = [max(relative_error(a, b) for a, b in zip(outputs(c(**x)), want, strict=False)) for c in (compiled, linears)]
    assert errors[0] <= 2 * errors[1] + 0.01


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_attention_in_other_spellings(name):
    torch.manual_seed(0)
    model, classes, one_operator = HAND_WRITTEN[name]()
    model.eval()
    x = inputs_of(model)
    gm, attentions = found(model, x)
    assert [a.refused for a in attentions] == [None]
    assert (not isinstance(attentions[0].scores, str)) == one_operator
    folded, sites, why = fold_heads(gm, attentions)
    assert [s.classes for s in sites] == [classes] and why == {}
    with torch.no_grad():
        assert relative_error(folded(*x), model(*x)) <= 1e-5
        for attention in ("qk", "qk_pv"):
            compiled = with_attention(model, x, Recipe(attention=attention, alpha=(0.3, 0.5, 0.7)))
            assert len(operators(compiled.stages["lowered"], "int8_attention")) == one_operator
            assert relative_error(compiled.stages["quantized"](*x), model(*x)) < 0.03
            assert relative_error(compiled(*x), compiled.stages["quantized"](*x)) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_random_scales_of_head_channels_change_nothing(seed):
    torch.manual_seed(seed)
    make = list(HAND_WRITTEN.values())[seed % len(HAND_WRITTEN)]
    model = make()[0].eval()
    x = inputs_of(model, batch=1 + seed % 3, tokens=3 + seed)
    gm, attentions = found(model, x)
    folded, _, _ = fold_heads(gm, attentions, seed)
    with torch.no_grad():
        assert relative_error(folded(*x), model(*x)) <= 1e-5


class Shows(Attend):
    """Attention whose ``what`` the caller sees, too."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2)
        if self.what == "two products":
            scores = scores + v @ k.transpose(-1, -2)
        p = scores.softmax(2 if self.what == "other dim" else -1)
        out = self.join(p @ v)
        return {"weights": (out, p), "scores": (out, scores)}.get(self.what, out)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("weights", "its weights are read elsewhere, too: is an output of the model"),
        ("scores", "its scores are read elsewhere, too: is an output of the model"),
        ("two products", "its scores are a sum of several products"),
        ("other dim", "its softmax does not run over the last dim"),
    ],
)
def test_what_cannot_be_quantized_is_refused_in_words(what, reason):
    model = Shows(what).eval()
    x = inputs_of(model)
    assert [a.refused for a in found(model, x)[1]] == [reason]
    compiled = with_attention(model, x, Recipe(attention="qk_pv"))
    (plan,) = compiled.report.attention
    assert (plan.quantized, plan.reason) == ("none", reason)
    assert "0 of 1 attentions in INT8" in str(compiled.report)
    assert not operators(compiled.stages["quantized"], "int8_scores")


class Unsmoothable(Attend):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        q, k, v = self.heads(x)
        if self.what == "tanh":
            k = torch.tanh(k)
        elif self.what == "shared":
            q = k
        elif self.what == "residual":
            k = k + v
        y = self.join(F.scaled_dot_product_attention(q, k, v))
        return (y, k) if self.what == "read" else y


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("tanh", "its keys: passes tanh, which does not commute with a scale"),
        ("shared", "is query and key at once"),
        ("residual", "joins a residual stream"),
        ("read", "is an output of the model"),
    ],
)
def test_attention_that_cannot_be_smoothed_is_quantized_all_the_same(what, reason):
    model = Unsmoothable(what).eval()
    x = inputs_of(model)
    gm, attentions = found(model, x)
    sites, why = match_heads(gm, attentions)
    assert sites == [] and reason in why[attentions[0].name]
    (plan,) = with_attention(model, x, Recipe(attention="qk")).report.attention
    assert plan.quantized == "qk" and plan.smoothing == "none" and reason in plan.reason


def test_a_softmax_of_a_linear_is_no_attention():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(32, 4), nn.Linear(32, 32)

        def forward(self, x):
            return self.gate(x).softmax(-1) @ torch.ones(4, 32) * self.up(x)

    assert found(Router().eval(), (torch.randn(2, 5, 32),))[1] == []


def cosine(a, b):
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("spelling", ["whole", "eager"])
@pytest.mark.parametrize("attention", ["qk", "qk_pv"])
def test_smoothing_saves_attention_with_outlier_channels_in_k(spelling, attention):
    """K's channels 3 and 7 are 20 times the others; Q's are as much smaller, so that the function stays what it was."""
    torch.manual_seed(0)
    model = Spelled(spelling, width=64, heads=2).eval()
    with torch.no_grad():
        for head in range(2):
            for channel in (3, 7):
                model.k.weight[32 * head + channel] *= 20
                model.q.weight[32 * head + channel] /= 4
    batches = [(3 * torch.randn(4, 48, 64),) for _ in range(4)]
    x = 3 * torch.randn(4, 48, 64)
    with torch.no_grad():
        want = model.double()(x.double())
        model.float()
    got = {}
    for granularity in ("per_token", "per_head", "per_tensor", "per_tensor_static"):
        for smooth in (True, False):
            recipe = Recipe(alpha=(0.3, 0.5, 0.7), attention=attention, qk=granularity, smooth=smooth)
            compiled = sqcompile.compile(model, batches, recipe=recipe, backend="eager", progress=False)
            got[granularity, smooth] = cosine(compiled(x), want)
    for granularity in ("per_token", "per_head", "per_tensor", "per_tensor_static"):
        assert got[granularity, True] >= 0.999, got
    assert got["per_tensor", False] < 0.999 and got["per_tensor_static", False] < 0.999, got


def test_keys_less_their_mean_leave_the_function_and_lower_the_error():
    """A bias of the key projection is the same for every key: softmax does not see it, quantization does."""
    torch.manual_seed(0)
    model = Spelled("whole").eval()
    with torch.no_grad():
        model.k.bias += 5 * torch.randn(32)
    batches, x = [(torch.randn(2, 20, 32),) for _ in range(4)], torch.randn(2, 20, 32)
    error = {}
    for qk in ("per_token", "per_tensor_static"):
        recipe = Recipe(attention="qk", qk=qk, alpha=0.0)
        compiled = sqcompile.compile(model, batches, recipe=recipe, backend="eager", progress=False)
        (plan,) = compiled.report.attention
        assert ("K less its mean" in plan.reason) == (qk == "per_token")
        error[qk] = -plan.sqnr_db
        if qk == "per_token":
            means = compiled.plan.heads[f"{plan.name}/key_mean"]
            mean, bias = means.flatten(), model.k.bias.detach()
            assert means.shape == (4, 8) and torch.nn.functional.cosine_similarity(mean, bias, dim=0).abs() > 0.5
    assert error["per_token"] < error["per_tensor_static"] - 10


@pytest.mark.parametrize("attention", ["qk", "qk_pv"])
@pytest.mark.parametrize("blocked", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("spelling", ["whole", "eager"])
def test_a_row_that_sees_no_key_gives_zeros(spelling, blocked, attention):
    torch.manual_seed(0)
    model = Spelled(spelling, masked=True).eval()
    mask = torch.zeros(2, 1, 9, 9)
    mask[1, 0, 4] = blocked
    x = torch.randn(2, 9, 32)
    compiled = with_attention(model, (x, torch.zeros_like(mask)), Recipe(attention=attention))
    for stage in ("quantized", "lowered"):
        y = compiled.stages[stage](x, mask)
        assert y.isfinite().all()
        assert torch.allclose(y[1, 4], model.o.bias, atol=1e-6)  # zeros before the last projection
        with torch.no_grad():
            assert relative_error(y[0], model(x, mask)[0]) < 0.03


def test_calibration_excludes_padding_from_the_statistics_of_heads():
    model, call = build("bert")
    gm, attentions = found(model, call)
    ids = call["input_ids"].clone()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    stats = calibrate(gm, model, [padded], False, attentions).heads
    other = ids.clone()
    other[1, 6:] = 90
    again = calibrate(gm, model, [{**padded, "input_ids": other}], False, attentions).heads
    assert len(stats) == 3 * len(attentions)
    for name, s in stats.items():
        assert s.count == int(mask.sum()) and s.rows.shape[1] == 64
        assert torch.allclose(s.absmax, again[name].absmax)


def test_calibration_keeps_a_bounded_sample_of_heads_and_leaves_linears_samples_alone():
    model, call = build("opt")
    gm, attentions = found(model, call)
    batches = token_batches(8, (4, 30))
    with_heads, without = calibrate(gm, model, batches, False, attentions), calibrate(gm, model, batches, False)
    assert without.heads == {} and all(len(s.rows) == 128 for s in with_heads.heads.values())
    assert all(torch.equal(s.rows, without.inputs[name].rows) for name, s in with_heads.inputs.items())


def test_static_recipes_have_constant_scales():
    model, call = build("llama")
    compiled = with_attention(model, call, Recipe(activation="per_tensor_static", attention="qk_pv"))
    for plan in compiled.plan.attention:
        assert plan.q_scale is not None and plan.q_scale > 0 and plan.k_scale is not None
        assert compiled.plan.heads[f"{plan.name}/value_scale"].shape == (2, 16)
    quantized = compiled.stages["quantized"]
    for node in operators(quantized, "int8_scores"):
        assert node.args[1].op == node.args[3].op == "get_attr"
    assert all(n.args[2].op == "get_attr" for n in operators(quantized, "int8_attend"))
    assert not operators(quantized, "token_scale") and not operators(quantized, "scale_over")


@pytest.mark.parametrize(("qk", "shape"), [("per_token", (2, 4, 11, 1)), ("per_head", (2, 4, 1, 1)), ("per_tensor", ())])
def test_granularity_of_queries(qk, shape):
    model, call = build("opt")
    compiled = with_attention(model, call, Recipe(attention="qk", qk=qk))
    (node, *_) = operators(compiled.stages["quantized"], "int8_scores")
    scale = node.args[1].meta["val"]
    assert scale.dtype == torch.float32 and scale.dim() == len(shape)
    assert all(isinstance(s, torch.SymInt) or s == want for s, want in zip(scale.shape, shape, strict=True))


def test_bad_recipes():
    for bad in (dict(attention="pv"), dict(attention="qk", qk="per_channel"), dict(qk="per_head")):
        with pytest.raises(RecipeError, match=next(reversed(bad))):
            Recipe(**bad)
    assert Recipe(attention="qk").granularity == "per_token"
    assert Recipe(attention="qk", activation="per_tensor_static").granularity == "per_tensor_static"
    assert PRESETS["default"].attention == "none"


def test_the_default_leaves_attention_alone():
    model, call = build("opt")
    compiled = with_attention(model, call, "default")
    assert compiled.plan.attention == () and compiled.plan.heads == {}
    assert "attention" not in [line.strip(":") for line in str(compiled.report).splitlines()]
    assert not operators(compiled.stages["lowered"], "int8_attention")


def test_skipping_a_module_keeps_its_attention_in_float():
    model, call = build("opt")
    recipe = Recipe(attention="qk", skip=("model.decoder.layers.1.self_attn",))
    compiled = with_attention(model, call, recipe)
    assert [a.quantized for a in compiled.plan.attention] == ["qk", "none"]
    assert "skipped by the recipe" in compiled.plan.attention[1].reason


def test_a_plan_keeps_what_was_decided_about_attention(tmp_path):
    model, call = build("llama")
    recipe = Recipe(activation="per_tensor_static", attention="qk_pv", alpha=(0.3, 0.5))
    compiled = with_attention(model, call, recipe)
    compiled.plan.save(tmp_path / "plan")
    plan = Plan.load(tmp_path / "plan")
    assert plan.attention == compiled.plan.attention and plan.recipe == recipe
    assert plan.heads.keys() == compiled.plan.heads.keys()
    assert all(torch.equal(t, compiled.plan.heads[k]) for k, t in plan.heads.items())
    again = sqcompile.compile(model, plan=plan, backend="eager")
    x = resized(call)
    assert torch.equal(again(**x).logits, compiled(**x).logits)
    other, _ = build("opt")
    with pytest.raises(PlanError):
        sqcompile.compile(other, plan=dataclasses.replace(plan, layers=compiled.plan.layers), example_inputs=call)


def test_the_report_has_a_line_for_each_attention():
    model, call = build("bert")
    compiled = with_attention(model, call, Recipe(attention="qk", alpha=(0.3, 0.5, 0.7)))
    lines = str(compiled.report).splitlines()
    at = lines.index("attention:")
    assert len(compiled.report.attention) == 2 and lines[-1] == "2 of 2 attentions in INT8"
    for i, plan in enumerate(compiled.report.attention):
        assert lines[at + 1 + i].strip().startswith(f"{plan.name}  int8 QKᵀ")
        assert plan.reason in lines[at + 1 + i] and f"{plan.sqnr_db:.1f} dB" in lines[at + 1 + i]


def test_the_operator_is_its_definition_and_its_fake_agrees():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 150, 16), torch.randn(2, 3, 200, 16), torch.randn(2, 3, 200, 24)
    qs, ks, vs = token_scale(q), token_scale(k), kernel.scale_over(v, [-2])
    qi, ki, vi = quantize(q, qs), quantize(k, ks), quantize(v, vs)
    mask = torch.randn(2, 1, 150, 200)
    for values, v_scale in ((v, None), (vi, vs)):
        args = (qi, qs, ki, ks, values, v_scale, mask, None, False, 0.25, 5.0, torch.float32)
        got = sqcompile_ops.int8_attention(*args)
        scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) * 0.25
        want = (5 * torch.tanh(scores / 5) + mask).softmax(-1) @ v.double().repeat_interleave(2, 1)
        assert cosine(got, want) >= 0.999
        assert got.transpose(1, 2).is_contiguous()
        tests = torch.library.opcheck(
            sqcompile_ops.int8_attention.default, args, test_utils=("test_schema", "test_faketensor")
        )
        assert set(tests.values()) == {"SUCCESS"}


def test_weights_in_int8_survive_a_large_score():
    """A first token that takes most of the weight must not round the others' to nothing."""
    torch.manual_seed(0)
    scores, v = torch.randn(1, 1, 8, 4096), torch.randn(1, 1, 4096, 16)
    scores[..., 0] += 9
    vs = kernel.scale_over(v, [-2])
    got = kernel.int8_attend(scores, quantize(v, vs), vs, torch.float32)
    assert cosine(got, scores.double().softmax(-1) @ v.double()) >= 0.999


@pytest.fixture(scope="module")
def lm_perplexity(lm, lm_windows):
    from sqcompile.lm import perplexity

    def of(recipe):
        compiled = sqcompile.compile(
            lm[0], list(lm_windows[0].split(4)), recipe=recipe, backend="eager", progress=False
        )
        assert all(a.quantized == recipe.attention for a in compiled.plan.attention)
        return perplexity(compiled, lm_windows[1])

    return of


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_attention_costs_the_shipped_lm_next_to_nothing(lm_perplexity, preset):
    linears, qk, qk_pv = (
        lm_perplexity(dataclasses.replace(PRESETS[preset], attention=a)) for a in ("none", "qk", "qk_pv")
    )
    assert qk / linears - 1 < 0.001
    assert qk_pv / linears - 1 < 0.005
