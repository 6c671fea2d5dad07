"""Attentions found by dataflow in every spelling, and scales of head channels that change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import fold_heads, relative_error
from hand_written import HAND_WRITTEN, Attend, inputs_of
from torch import nn

import sqcompile
from sqcompile import Recipe
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.attention.head_sites import match_heads


def found(model, call):
    gm = trace(model, as_call(model, call))
    return gm, find_attentions(gm)


def operators(gm, name):
    return gm.graph.find_nodes(op="call_function", target=getattr(sqcompile_ops, name).default)


def with_attention(model, call, recipe):
    return sqcompile.compile(model, [call], recipe=recipe, backend="eager", progress=False)


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
        if self.what == "sinks":  # a column of its own for each head, dropped after the softmax
            scores = torch.cat([scores, self.q.bias[:4].view(1, 4, 1, 1).expand(*scores.shape[:3], 1)], -1)
            scores = scores - scores.amax(-1, keepdim=True)
            return self.join(scores.softmax(-1)[..., :-1] @ v)
        if self.what == "grouped einsum":
            q, k, v = q.unflatten(1, (2, 2)), k[:, ::2], v[:, ::2]
            p = torch.einsum("bgrqd,bgkd->bgrqk", q, k).softmax(-1)
            return self.join(torch.einsum("bgrqk,bgkd->bgrqd", p, v).flatten(1, 2))
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
        ("sinks", "one of its scores reaches cat, which scales cannot pass"),
        ("grouped einsum", "one of its scores reaches einsum, which scales cannot pass"),
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
    def __init__(self, what, groups=None):
        super().__init__(groups=groups)
        self.what = what

    def forward(self, x):
        q, k, v = self.heads(x)
        if self.what == "tanh":
            k = torch.tanh(k)
        elif self.what == "shared":
            q = k
        elif self.what == "residual":
            k = k + v
        y = self.join(F.scaled_dot_product_attention(q, k, v, enable_gqa=self.groups != self.count))
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
def test_attention_that_no_parameter_can_smooth_is_quantized_all_the_same(what, reason):
    torch.manual_seed(0)  # of other weights, smoothing may be left out for what it does to the outputs
    model = Unsmoothable(what).eval()
    x = inputs_of(model)
    gm, attentions = found(model, x)
    sites, why = match_heads(gm, attentions)
    assert sites == [] and reason in why[attentions[0].name]
    (plan,) = with_attention(model, x, Recipe(attention="qk")).report.attention
    assert plan.quantized == "qk" and plan.smoothing != "folded" and reason in plan.reason


@pytest.mark.parametrize("groups", [4, 2])
def test_a_scale_that_nothing_absorbs_is_multiplied_where_that_pays(groups):
    """Keys that are an output of the model, with a channel 20 times as large as others."""
    torch.manual_seed(0)
    model = Unsmoothable("read", groups).eval()
    x = inputs_of(model)
    with torch.no_grad():
        model.k.weight[3::8] *= 20
        model.q.weight[3::8] /= 20
    none, smooth = (with_attention(model, x, Recipe(attention="qk", smooth=s)) for s in (False, True))
    (before,), (after,) = none.report.attention, smooth.report.attention
    assert after.smoothing == "multiplied" and after.alpha is not None
    assert "is an output of the model" in after.reason
    assert after.sqnr_db > before.sqnr_db + 6
    want, got = model(*x), smooth(*x)
    assert relative_error(got[0], want[0]) < relative_error(none(*x)[0], want[0])
    assert relative_error(got[1], want[1]) < 0.02, "the keys themselves are not scaled"


def test_a_softmax_of_a_linear_is_no_attention():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(32, 4), nn.Linear(32, 32)

        def forward(self, x):
            x = x @ x.transpose(1, 2) @ x  # a product of data, but not of the router's scores
            return self.gate(x).softmax(-1) @ torch.ones(4, 32) * self.up(x)

    assert found(Router().eval(), (torch.randn(2, 5, 32),))[1] == []


class Unmoved(Attend):
    """Heads that are left behind the tokens, or taken for tokens: one of their dims varies from call to call."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, 8)) for f in (self.q, self.k, self.v))
        if self.what == "heads":
            return self.o(F.scaled_dot_product_attention(q, k, v).flatten(2))
        q, k, v = (t.permute(0, 2, 3, 1) for t in (q, k, v))  # channels attend to channels
        return self.o(F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2).flatten(2))


@pytest.mark.parametrize("what", ["heads", "channels"])
def test_attention_over_a_dim_that_varies_is_refused_and_serves_every_size(what):
    model = Unmoved(what).eval()
    batches = [torch.randn(2, tokens, 32) for tokens in (9, 6)]
    compiled = sqcompile.compile(model, batches, recipe=Recipe(attention="qk"), backend="eager", progress=False)
    assert [a.reason for a in compiled.report.attention] == [f"its {what} are a dim that varies from call to call"]
    for x in (*batches, torch.randn(3, 5, 32)):
        with torch.no_grad():
            assert relative_error(compiled(x), model(x)) < 0.05
