"""Every architecture family: what is found, folded and refused, in numbers; and that folding changes nothing."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import fold_everything, fold_heads, fold_sites, relative_error
from families import (
    CHAINS,
    COVERAGE,
    DENOISERS,
    DIFFUSERS,
    FAMILIES,
    GATED,
    OUTPUT,
    build,
    build_diffusers,
    causal_lm,
    outputs,
    resized,
    run,
    some_slow,
    token_ids,
)
from torch import nn

import sqcompile
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.labels.match import match

# those with a switch; Gemma-2 and BLOOM are spelled out as they come, Falcon never is
SPELLED_OUT = [n for n in FAMILIES if n not in ("falcon 7b", "falcon 40b", "falcon alibi", "gemma2", "bloom")]
QUICK = ("opt", "llama", "phi3", "bert", "vit")


@functools.cache
def traced(name):
    """A family's model, a call, and its traced graph, which passes do not change."""
    model, call = build(name)
    return model, call, trace(model, as_call(model, call))


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_is_exact_and_covers(name):
    model, call, gm = traced(name)
    folded, sites, refusals = fold_sites(gm, as_call(model, call))
    for x in (call, resized(call)):
        got, want = outputs(folded(**x)), run(model, x)
        assert len(got) >= 1
        for a, b in zip(got, want, strict=False):
            assert relative_error(a, b) <= 1e-5
    linears, kinds, refused = COVERAGE[name]
    assert len(find_linears(folded)) == linears
    assert Counter(s.kind for s in sites) == kinds
    assert sum(len(s.balance) for s in sites) + len(refusals) == linears
    found = Counter(next((r for r in refused if r in x.reason), x.reason) for x in refusals)
    assert found == refused


@functools.cache
def denoiser(name):
    model, call = build_diffusers(name)
    return model, call, trace(model, as_call(model, call))


def sample(model, call):
    with torch.no_grad():
        return model(**call).sample


def with_batch(call, n):
    """The call with another batch; positions have none."""
    return {k: v if k.endswith("_ids") else torch.cat([v, v.flip(0)])[:n] for k, v in call.items()}


@pytest.mark.parametrize("name", some_slow(DIFFUSERS, ("dit",)))
def test_folding_of_denoisers_is_exact_and_covers(name):
    model, call, gm = denoiser(name)
    folded, sites, refusals = fold_sites(gm, as_call(model, call))
    for x in (call, with_batch(call, 1), with_batch(call, 3)):
        assert relative_error(sample(folded, x), sample(model, x)) <= 1e-5
    linears, kinds, refused, attentions, heads = DENOISERS[name]
    assert len(find_linears(folded)) == linears
    assert Counter(s.kind for s in sites) == kinds
    assert Counter(next((r for r in refused if r in x.reason), x.reason) for x in refusals) == refused
    found = find_attentions(gm)
    assert [a.refused for a in found] == [None] * attentions
    folded, sites, _ = fold_heads(gm, found)
    assert len(sites) == heads and relative_error(sample(folded, call), sample(model, call)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(DIFFUSERS, ("dit",)))
def test_denoisers_compile_and_their_configuration_is_left_alone(name):
    model, call, _ = denoiser(name)
    config = dict(model.config)
    compiled = sqcompile.compile(model, [call], backend="eager", progress=False)
    assert all(l.quantized for l in compiled.report.layers) and dict(model.config) == config
    for x in (call, with_batch(call, 1), with_batch(call, 3)):
        assert relative_error(sample(compiled, x), sample(model, x)) < 0.05


def changed(before, after):
    """How many parameters of a graph another one reads through arithmetic of its own."""
    return sum(n.op == "get_attr" for n in after.graph.nodes) - sum(n.op == "get_attr" for n in before.graph.nodes)


def check_attention(name, model, call, gm, eager):
    attentions = find_attentions(gm)
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
        got = outputs(folded(**x))
        assert len(got) >= 1
        for a, b in zip(got, run(model, x), strict=False):  # which may give a cache, too
            assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_is_found_and_smoothed_exactly(name):
    check_attention(name, *traced(name), eager=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(SPELLED_OUT, QUICK))
def test_every_attention_that_is_spelled_out_is_found_and_smoothed_exactly(name):
    model, call = build(name)
    model.set_attn_implementation("eager")
    check_attention(name, model, call, trace(model, as_call(model, call)), eager=True)


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.bfloat16, 2**-8), pytest.param(torch.float16, 2**-11, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", some_slow(FAMILIES, (*QUICK, "mixtral")))
def test_folding_is_exact_within_half_precision(name, dtype, eps):
    """No further from the float32 function than a few times the half-precision model is itself."""
    model, call = build(name, outlier=4.0)
    want = run(model, call)
    half = model.to(dtype)
    call = {k: v.to(dtype) if v.is_floating_point() else v for k, v in call.items()}
    own = run(half, call)
    folded, _, _ = fold_everything(half, **call)
    got = outputs(folded(**call))
    assert len(got) >= 1
    for a, b, w in zip(got, own, want, strict=False):
        assert relative_error(a, w) <= 3 * relative_error(b, w) + 4 * eps


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(FAMILIES, QUICK))
def test_quantized_outputs_are_close_and_closer_than_without_smoothing(name):
    model, call = build(name)
    generator = torch.Generator().manual_seed(5)
    calls = [call]
    for _ in range(3):
        calls.append({
            k: torch.randint(3, 96, v.shape, generator=generator) if k.endswith("ids")
            else torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
            for k, v in call.items()
        })  # fmt: skip
    want = run(model, call)[0].double()
    sqnr = {}
    for smooth in (True, False):
        recipe = sqcompile.PRESETS["default"]
        if not smooth:  # nor rotation, nor shifts
            recipe = dataclasses.replace(recipe, smooth=False, rotate="none", shift=False, alpha=0.5)
        compiled = sqcompile.compile(model, calls[1:], recipe=recipe, backend="eager", progress=False)
        noise = outputs(compiled(**call))[0].double() - want
        sqnr[smooth] = float(10 * torch.log10(want.square().sum() / noise.square().sum()))
    assert sqnr[True] >= 25 and sqnr[True] > sqnr[False]


class LogitsOnly(nn.Module):
    """An encoder-decoder that does not show its encoder's output to the caller."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features, decoder_input_ids):
        name = "input_features" if features.is_floating_point() else "input_ids"
        call = {name: features, "decoder_input_ids": decoder_input_ids}
        return self.model(**call, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", some_slow(["t5", "whisper"], ["whisper"]))
def test_an_encoders_last_norm_serves_every_cross_attention(name):
    model, call = build(name)
    model = LogitsOnly(model).eval()
    x = tuple(call.values())
    folded, sites, refusals = fold_everything(model, *x)
    assert max(len(s.balance) for s in sites) == 4  # keys and values of both decoder layers
    assert not any(OUTPUT in r.reason for r in refusals)
    with torch.no_grad():
        assert relative_error(folded(*x), model(*x)) <= 1e-5


def test_only_the_value_and_up_rows_of_fused_projections_are_smoothed():
    model, call = build("phi3")
    _, sites, _ = fold_everything(model, **call)
    by_balance = {s.balance[0][0].name.split(".")[-2]: s for s in sites if s.kind == "linear"}
    v_rows, up_rows = by_balance["o_proj"].free, by_balance["down_proj"].free
    assert v_rows.nonzero().flatten().tolist() == list(range(64 + 32, 128))  # q 64, k 32, v 32
    assert up_rows.nonzero().flatten().tolist() == list(range(112, 224))  # gate 112, up 112


def test_labels_that_pass_rotary_embeddings_are_refused_with_that_reason():
    from sqcompile.passes.labels.match import _flows

    model, call = build("phi3")
    gm = trace(model, as_call(model, call))
    flows = [f for f in _flows(gm, find_linears(gm)).values() if f.kind == "linear" and f.channels == 128]
    assert len(flows) == 2
    for flow in flows:
        assert set(flow.refused) == set(range(96))
        assert all("rotary" in flow.refused[c] for c in range(64))


def llama_graph(layers):
    torch.manual_seed(0)
    model = causal_lm("llama", dict(GATED, num_hidden_layers=layers)).eval()
    return trace(model, as_call(model, {"input_ids": token_ids()}))


@pytest.mark.slow
def test_matching_time_grows_linearly():
    def calls(layers):
        """Function calls of a matching: what time is made of, and the same on a busy machine."""
        gm, count = llama_graph(layers), 0

        def profile(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        match(gm)  # fills PyTorch's caches
        sys.setprofile(profile)
        try:
            match(gm)
        finally:
            sys.setprofile(None)
        return count

    at = {layers: calls(layers) for layers in (3, 6, 12)}
    assert at[12] - at[6] == pytest.approx(2 * (at[6] - at[3]), rel=0.05)


@pytest.mark.slow
def test_thirty_two_layers_match_in_seconds():
    gm = llama_graph(32)
    start = time.process_time()
    sites, refusals = match(gm)
    assert time.process_time() - start < 5
    assert len(sites) == 4 * 32 + 1 and refusals == []


def test_labels_live_no_longer_than_their_values():
    from sqcompile.passes.labels import interpreter as labels

    peak = {}
    for layers in (2, 6):
        gm = llama_graph(layers)
        most = 0

        class Counting(labels.LabelInterpreter):
            def run_node(self, n):
                nonlocal most
                out = super().run_node(n)
                most = max(most, sum(len(per_value) for per_value in self.labels.values()))
                return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(labels, "LabelInterpreter", Counting)
            match(gm)
        peak[layers] = most
    assert peak[6] == peak[2]
