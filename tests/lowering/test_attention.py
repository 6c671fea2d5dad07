"""Attention on CPUs: masks read by value, shared heads read once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, tiny_lm, token_batches
from hand_written import Attend
from torch import nn

import sqcompile
from sqcompile.kernels.attention import CAUSAL, FULL, GENERAL, _attention_triton, attention, mask_kind
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.targets import Target
from sqcompile.passes.canonical.canonicalize import canonicalize
from sqcompile.passes.ir.about import About, describe_as
from sqcompile.passes.lowering.float_attention import lower_attention

NEVER = float("-inf")


def additive(allowed, dtype=torch.float32, blocked=NEVER):
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, blocked)


def causal(queries, keys):
    return torch.arange(keys) <= torch.arange(queries)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (9, 5)])
def test_a_mask_is_what_its_values_say(dtype, shape):
    allowed = causal(*shape)
    full = torch.ones(shape, dtype=torch.bool)
    assert mask_kind(additive(full, dtype)) == FULL
    for blocked in (NEVER, torch.finfo(dtype).min):
        assert mask_kind(additive(allowed, dtype, blocked)) == CAUSAL
        assert mask_kind(additive(allowed.expand(3, 1, *shape), dtype, blocked)) == CAUSAL
    assert mask_kind(additive(allowed, dtype, -100.0)) == GENERAL  # a bias, which leaves something of the others


def test_masks_that_are_nearly_causal_are_general():
    n = 12
    sliding = causal(n, n) & (torch.arange(n) > torch.arange(n)[:, None] - 4)
    padded = causal(n, n).expand(2, 1, n, n).clone()
    padded[1, ..., :3] = False
    one_more = causal(n, n).clone()
    one_more[5, 6] = True
    one_less = causal(n, n).clone()
    one_less[n - 1, 0] = False
    bottom_right = torch.arange(9) <= torch.arange(5)[:, None] + 4
    bias = additive(causal(n, n))
    bias[4, 2] = 0.5
    one_key = (torch.arange(n) < 1).expand(2, 1, 1, n)  # padding, the same for every query: its one row looks causal
    for mask in (sliding, padded, one_more, one_less, bottom_right, one_key):
        assert mask_kind(additive(mask)) == GENERAL
    assert mask_kind(bias) == GENERAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("kind", ["none", "causal", "full", "padding", "per head"])
def test_the_operator_is_scaled_dot_product_attention(dtype, queries, groups, kind):
    batch, heads, keys, d = 3, 6, queries + 4 if kind == "per head" else max(queries, 2), 32
    q = torch.randn(batch, queries, heads, d).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, groups, keys, d).to(dtype) for _ in range(2))
    mask = {
        "none": None,
        "causal": additive(causal(queries, keys), dtype),
        "full": torch.zeros(1, 1, queries, keys, dtype=dtype),
        "padding": additive(torch.rand(batch, 1, queries, keys) < 0.7, dtype, -1e4),
        "per head": torch.randn(1, heads, queries, keys).to(dtype),
    }[kind]
    want = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=groups != heads)
    got = attention(q, k, v, mask, None if mask is None else mask_kind(mask), False, None)
    fake = torch.library.opcheck(
        sqcompile_ops.attention.default,
        (q, k, v, mask, None if mask is None else mask_kind(mask), False, None),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(fake.values()) == {"SUCCESS"}
    assert relative_error(got, want) < (1e-6 if dtype == torch.float32 else 6e-3)


def test_what_our_gpu_kernel_is_not_faster_at_goes_to_pytorch(monkeypatch):
    """Many queries: small heads of their own keys, or a GPU it was not measured on, whose shared heads are repeated."""
    pytest.importorskip("triton")
    from sqcompile.kernels.triton.gemm import tiles

    for groups, capability in ((6, 90), (2, 80)):
        monkeypatch.setattr(tiles, "CPU_STANDS_FOR", tiles.Gpu("", capability, 100))
        q, k = (torch.randn(2, n, 70, 32) for n in (6, groups))
        mask = causal(70, 70)
        want = F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)
        got = _attention_triton(q, k, k, mask, None, False, None)
        assert relative_error(got, want) < 1e-6 and got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", ["mask", "heads", "causal", "past", "columns", "queries"])
def test_what_is_rewritten_for_gpus(case):
    """Tensors without data stand for a GPU's. A size that varies from call to call stays what it is."""

    class Model(nn.Module):
        def forward(self, q, k, mask):
            k = k[:, :, None].expand(2, 2, 3, k.shape[2], k.shape[3]).reshape(2, 6, *k.shape[2:])
            mask = mask if case in ("mask", "columns", "queries") else None
            return F.scaled_dot_product_attention(q, k, k, mask, is_causal=case in ("causal", "past"))

    s, d = torch.export.Dim("s", min=2, max=999), torch.export.Dim("d", min=2, max=200)
    q = torch.randn(2, 1 if case == "queries" else 6, 12, 16, dtype=torch.bfloat16, device="meta")
    k = torch.randn(2, 2, 20 if case == "past" else 12, 16, dtype=torch.bfloat16, device="meta")
    mask = torch.ones(12, 12, dtype=torch.bool, device="meta")
    sizes = {"columns": ({3: d}, {3: d}, {}), "past": ({}, {}, {})}.get(case, ({2: s}, {2: s}, {0: s, 1: s}))
    gm = torch.export.export(Model(), (q, k, mask), dynamic_shapes=sizes).module()
    describe_as(gm, About(next(n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder").fake_mode))
    canonicalize(gm)
    lower_attention(gm, lambda device: Target.named("cuda-sm90"))
    ours = gm.graph.find_nodes(op="call_function", target=sqcompile_ops.attention.default)
    theirs = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    heads = [n.args[1].meta["val"].shape[1] for n in (*ours, *theirs)]
    shared = [bool(n.kwargs.get("enable_gqa")) for n in theirs]
    assert (heads, shared) == {
        "mask": ([2], []),
        "heads": ([2], [True]),
        "causal": ([2], [True]),
        "past": ([6], [False]),  # flash attention knows no diagonal but the first
        "columns": ([6], [False]),
        "queries": ([6], [False]),  # one head, for all keys
    }[case]
    if case == "columns":
        assert isinstance(theirs[0].meta["val"].shape[3], torch.SymInt)


def attention_nodes(compiled):
    graph = compiled.stages["lowered"].graph
    return graph.find_nodes(op="call_function", target=sqcompile_ops.attention.default)


def test_repeated_heads_and_masks_reach_attention_once():
    model = tiny_lm("llama")
    compiled = sqcompile.compile(model, token_batches(), backend="eager")
    nodes = attention_nodes(compiled)
    assert len(nodes) == 2
    for node in nodes:
        q, k, v = (a.meta["val"] for a in node.args[:3])
        assert (q.shape[1], k.shape[1], v.shape[1]) == (4, 2, 2)
    assert len({(node.args[3], node.args[4]) for node in nodes}) == 1


class Sliding(nn.Module):
    """Attention that sees the last ``window`` tokens, its key heads repeated as models do it."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window, self.qkv, self.out = window, nn.Linear(64, 128), nn.Linear(64, 64)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = self.qkv(x).split([64, 32, 32], -1)
        q = q.view(b, s, 4, 16).transpose(1, 2)
        k, v = (t.view(b, s, 2, 16).transpose(1, 2)[:, :, None].expand(b, 2, 2, s, 16) for t in (k, v))
        k, v = k.reshape(b, 4, s, 16), v.reshape(b, 4, s, 16)
        at = torch.arange(s)
        mask = (at <= at[:, None]) & (at > at[:, None] - self.window)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, s, 64))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_sliding_window_is_not_taken_for_causal(backend):
    """Causal for short inputs, a window for long ones: one compiled module, the right answer for both."""
    torch.manual_seed(0)
    model = Sliding(window=20).eval()
    batches, dynamic = [torch.randn(2, 8, 64) for _ in range(3)], torch.export.Dim.AUTO
    compiled = sqcompile.compile(model, batches, backend=backend, dynamic_shapes={"x": {0: dynamic, 1: dynamic}})
    assert attention_nodes(compiled)[0].args[1].meta["val"].shape[1] == 2
    for s in (1, 8, 20, 21, 50):
        x = torch.randn(3, s, 64)
        assert relative_error(compiled(x), compiled.stages["quantized"](x)) < 1e-2, s


class Cross(Attend):
    """Attention to other tokens, of which some are padding."""

    def forward(self, x, memory, keep):
        q = self.q(x).unflatten(-1, (-1, self.d)).transpose(1, 2)
        k, v = (f(memory).unflatten(-1, (-1, self.d)).transpose(1, 2) for f in (self.k, self.v))
        return self.join(F.scaled_dot_product_attention(q, k, v, keep[:, None, None, :]))


def test_padding_that_leaves_one_key_is_not_taken_for_causal():
    torch.manual_seed(0)
    model = Cross().eval()
    x, memory, keep = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.arange(7).expand(2, 7) < 4
    compiled = sqcompile.compile(model, [(x, memory, keep)], backend="eager")
    assert len(attention_nodes(compiled)) == 1
    for kept in (4, 1):
        keep = torch.arange(7).expand(2, 7) < kept
        assert relative_error(compiled(x, memory, keep), compiled.stages["quantized"](x, memory, keep)) < 1e-5, kept


class Broadcasts(Attend):
    """Attention in which something is the same for every sequence, or for every head."""

    def __init__(self, what):
        super().__init__()
        self.what, self.learned = what, nn.Parameter(torch.randn(1, 6, 32))

    def forward(self, x):
        (q, k, v), (learned_q, *learned) = self.heads(x), self.heads(self.learned)
        if self.what == "one head of values":
            return self.join(F.scaled_dot_product_attention(q, k, v[:, :1]))
        return self.join(F.scaled_dot_product_attention(*((q, *learned) if self.what == "keys" else (learned_q, k, v))))


@pytest.mark.parametrize("what", ["keys", "queries", "one head of values"])
def test_attention_whose_operands_broadcast_is_left_to_torch(what):
    torch.manual_seed(0)
    model = Broadcasts(what).eval()
    compiled = sqcompile.compile(model, [(torch.randn(2, 5, 32),)], backend="eager")
    assert not attention_nodes(compiled)
    x = torch.randn(3, 5, 32)
    assert relative_error(compiled(x), compiled.stages["quantized"](x)) < 1e-5


def test_left_padding_through_a_compiled_model():
    model = tiny_lm("llama")
    ids = token_batches(1, (2, 17))[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    compiled = sqcompile.compile(model, [{"input_ids": ids, "attention_mask": mask}], backend="eager")
    got = compiled(input_ids=ids, attention_mask=mask).logits
    want = compiled.stages["quantized"](input_ids=ids, attention_mask=mask).logits
    assert relative_error(got[mask.bool()], want[mask.bool()]) < 1e-5
    everywhere = torch.ones_like(mask)
    got = compiled(input_ids=ids, attention_mask=everywhere).logits
    assert relative_error(got, compiled.stages["quantized"](input_ids=ids, attention_mask=everywhere).logits) < 1e-5
