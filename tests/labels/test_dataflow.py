"""Hand-written modules, and random ones: every module folds exactly or is refused; a wrong rule is caught."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import fold_everything, relative_error
from families import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_programs import wrong_fold
from torch import nn

import sqcompile
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.labels import rules as label_rules
from sqcompile.passes.labels.match import match


class Einsum(nn.Module):
    """Attention with its projections as einsums over 3-D parameters."""

    def __init__(self, d=32, heads=4):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Parameter(torch.randn(3, d, heads, d // heads) / d**0.5)
        self.out = nn.Parameter(torch.randn(heads, d // heads, d) / d**0.5)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (torch.einsum("bsd,dhe->bhse", h, w) for w in self.qkv)
        p = (torch.einsum("bhqe,bhke->bhqk", q, k) / 8**0.5).softmax(-1)
        return x + torch.einsum("...hse,hed->...sd", p @ v, self.out)


class Sliced(nn.Module):
    """Rows of one parameter as separate linears, a tied embedding, one weight in two layers."""

    def __init__(self, d=32):
        super().__init__()
        self.embed = nn.Embedding(40, d)
        self.n1, self.n2, self.last = nn.LayerNorm(d), nn.RMSNorm(d), nn.LayerNorm(d)
        self.w = nn.Parameter(torch.randn(3 * d, d) / d**0.5)
        self.shared = nn.Linear(d, d)

    def forward(self, ids):
        x = self.embed(ids)
        h = self.n1(x)
        a, b, c = F.linear(h, self.w[:32]), F.linear(h, self.w[32:64]), F.linear(h, self.w[64:])
        x = x + self.shared(torch.relu(a) * b) + c
        x = x + self.shared(self.n2(x))
        return F.linear(self.last(x), self.embed.weight)


class Spelled(nn.Module):
    """Linears as addmm, mm and matmul, on strided and 4-D inputs."""

    def __init__(self, d=32):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.randn(d, d) / d**0.5) for _ in range(3))
        self.b = nn.Parameter(torch.randn(d))

    def forward(self, x):
        h = self.norm(x)
        flat = h.flatten(0, 1)
        y = torch.addmm(self.b, flat, self.w1).view_as(h)
        z = torch.mm(torch.relu(y).flatten(0, 1), self.w2.t()).view(h.shape)
        four = h.unsqueeze(1).expand(h.shape[0], 2, *h.shape[1:])
        return (four[..., ::1] @ self.w3).sum(1) + z.transpose(0, 1).contiguous().transpose(0, 1)


class Batched(nn.Module):
    """Every expert over every token: a parameter with a matrix for each, by bmm, matmul and einsum."""

    def __init__(self, d=32, experts=3):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up, self.gate = (nn.Parameter(torch.randn(experts, d, 48) / d**0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(experts, 48, d) / 48**0.5)
        self.heads = nn.Parameter(torch.randn(4, d, d // 4, 8) / d**0.5)

    def forward(self, x):
        h = self.norm(x)
        wide = h.flatten(0, 1).expand(self.up.shape[0], -1, -1)
        y = (torch.relu(torch.bmm(wide, self.up)) * (wide @ self.gate)).relu()
        y = torch.einsum("etf,efd->etd", y, self.down).sum(0).view(x.shape)
        four = h.unsqueeze(1).expand(-1, 4, -1, -1)  # [batch, head, token, channel]
        z = torch.einsum("bhtd,hdef->bthef", four, self.heads)
        return x + y + z.flatten(2)[..., :32]


def mha(batch_first=True):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mha = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=batch_first)

        def forward(self, x):
            h = self.norm(x)
            return x + self.mha(h, h, h, need_weights=False)[0]

    return Attention()


# module, input, linears, sites by kind, refused linears
HAND_WRITTEN = {
    "einsum": (Einsum, None, 4, {"norm": 1, "linear": 1}, 0),
    "sliced, tied, shared": (Sliced, (40,), 6, {"norm": 3, "linear": 1}, 0),
    "addmm, mm, matmul": (Spelled, None, 3, {"norm": 1, "linear": 1}, 0),
    "bmm, matmul, einsum of experts": (Batched, None, 4, {"norm": 1, "linear": 1}, 0),
    "MultiheadAttention": (mha, None, 2, {"norm": 1, "linear": 1}, 0),
    "TransformerEncoderLayer pre-norm": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, norm_first=True, batch_first=True), None, 4, {"norm": 2, "linear": 2}, 0,
    ),
    "TransformerEncoderLayer post-norm": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), None, 4, {"linear": 2}, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_modules(name):
    make, vocab, linears, kinds, refused = HAND_WRITTEN[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    x = torch.randint(0, *vocab, (2, 5)) if vocab else torch.randn(2, 5, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded, sites, refusals = fold_everything(model, x)
    with torch.no_grad():
        assert relative_error(folded(x), model(x)) <= 1e-5
    assert len(find_linears(folded)) == linears
    found = {k: sum(s.kind == k for s in sites) for k in kinds}
    assert (found, len(refusals)) == (kinds, refused), [(s.name, s.kind) for s in sites] + [r.reason for r in refusals]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@given(st.integers(0, 2**31))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_modules_fold_exactly(seed):
    error = wrong_fold(seed)
    assert error is None or error <= 1e-5


@pytest.mark.slow
@given(st.integers(0, 2**31))
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_hundreds_of_random_modules_fold_exactly(seed):
    error = wrong_fold(seed)
    assert error is None or error <= 1e-5


def _passes(ctx, n, out, flow, operands):
    """The wrong rule: labels pass, whatever the operation does to the values."""
    return next(iter(operands.values())).broadcast_to(out.shape)


aten = torch.ops.aten
# the first three are caught by one of the first 30 modules, the others by one of the first 100
WRONG = [aten.add.Tensor, aten.mul.Tensor, aten.silu.default, aten.gelu.default, aten.sub.Tensor, aten.tanh.default]


@pytest.mark.parametrize("target", [*WRONG[:3], *(pytest.param(t, marks=pytest.mark.slow) for t in WRONG[3:])], ids=str)
def test_an_unsound_rule_is_caught(monkeypatch, target):
    """The random modules are worth something: with one wrong rule they find a wrong fold."""
    monkeypatch.setitem(label_rules.RULES, target, _passes)
    assert any((wrong_fold(seed) or 0.0) > 1e-5 for seed in range(300))


def test_a_fault_of_a_rule_is_no_refusal(monkeypatch):
    """An operation that labels cannot pass is refused with a reason; a rule that fails is a fault of ours, and raises."""

    def fails(*args):
        raise TypeError("no such thing")

    model, call = build("llama")
    monkeypatch.setitem(label_rules.RULES, torch.ops.aten.mul.Tensor, fails)
    with pytest.raises(
        sqcompile.InternalError, match=r"the rule of aten\.mul\.Tensor failed at mul.*no such thing.*report it"
    ):
        match(trace(model, as_call(model, call)))


EMPTY = {
    "joined channels": lambda h: torch.cat([h[..., :0], h], -1),
    "joined tokens": lambda h: torch.cat([h[:, :0].clamp(min=0), h], 1),
    "padded": lambda h: F.pad(h[:, :0], (0, 0, 0, 3)).sum(1, keepdim=True) + h,
    "summed": lambda h: h + h[:, :0].sum(1, keepdim=True),
    "contracted": lambda h: h + torch.zeros(h.shape[1], 0) @ h[:, :0],
    "picked": lambda h: h + h[:, torch.zeros(0, dtype=torch.long)].sum(1, keepdim=True),
}


@pytest.mark.parametrize("name", EMPTY)
def test_parts_without_entries_are_no_fault(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            h = self.a(self.norm(x))
            return self.b(EMPTY[name](h)) + self.b(h[:, :0]).sum(1, keepdim=True)

    model, x = Net().eval(), torch.randn(2, 5, 8)
    folded, sites, _ = fold_everything(model, x)
    assert "norm.weight -> a.weight" in [s.name for s in sites]
    with torch.no_grad():
        assert relative_error(folded(x), model(x)) <= 1e-5
