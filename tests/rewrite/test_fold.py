"""Folding is exact, complete where it is possible, and refused in words where it is not."""

from __future__ import annotations

import pytest
import torch
from conftest import fold_everything, relative_error, tiny_lm, token_batches
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile import Recipe
from sqcompile.passes.ir.graph import effective_weight, find_linears, nodes_by_name
from sqcompile.passes.planning.smoothing import smoothing_scale


def kinds(sites):
    return {k: sum(s.kind == k for s in sites) for k in ("norm", "scale", "linear")}


@pytest.mark.parametrize(("family", "norm", "scale", "linear"), [("opt", 5, 0, 4), ("llama", 0, 5, 4)])
def test_lm_fold_is_exact_and_complete(family, norm, scale, linear):
    model = tiny_lm(family)
    ids = token_batches(1)[0]["input_ids"]
    folded, sites, refusals = fold_everything(model, ids)
    assert kinds(sites) == {"norm": norm, "scale": scale, "linear": linear}
    assert refusals == []
    for shape in ((2, 17), (1, 1), (3, 5)):
        x = torch.randint(3, 96, shape)
        with torch.no_grad():
            want = model(x, use_cache=False).logits
            got = folded(input_ids=x).logits
        assert relative_error(got, want) <= 1e-5


def test_folded_weights_did_change_and_the_models_own_did_not():
    model = tiny_lm("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded, _, _ = fold_everything(model, token_batches(1)[0]["input_ids"])
    weights = {l.name: effective_weight(folded, l, nodes_by_name(folded)) for l in find_linears(folded)}
    changed = [name for name, w in weights.items() if not torch.equal(w, before[name])]
    assert len(changed) == len(find_linears(folded)) == 15
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Block(nn.Module):
    """A module with one smoothing site, its parts replaceable."""

    def __init__(self, norm: nn.Module, body):
        super().__init__()
        self.norm, self.body = norm, body
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.c = nn.Linear(16, 24)

    def forward(self, x):
        return self.body(self, x)


class GemmaNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16) * 0.2)

    def forward(self, x):
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * (1.0 + self.weight.float())


NORMS = {
    "layer_norm": lambda: nn.LayerNorm(16),
    "layer_norm without affine": lambda: nn.LayerNorm(16, elementwise_affine=False),
    "layer_norm without bias": lambda: nn.LayerNorm(16, bias=False),
    "rms_norm": lambda: nn.RMSNorm(16),
    "gemma (1 + w)": GemmaNorm,
}


@pytest.mark.parametrize("norm", NORMS)
def test_every_spelling_of_a_norm(norm):
    torch.manual_seed(0)
    model = Block(NORMS[norm](), lambda m, x: m.b(F.relu(m.a(m.norm(x)))) + x).eval()
    x = torch.randn(3, 5, 16)
    folded, sites, refusals = fold_everything(model, x)
    assert [s.name.split(" -> ")[1] for s in sites] == ["a.weight", "b.weight"] and not refusals
    assert relative_error(folded(x), model(x)) <= 1e-5


BODIES = {
    # name: (forward, folded balance layers, refusal reasons by linear)
    "gate": (lambda m, x: m.b(F.silu(m.a(m.norm(x))) * m.c(m.norm(x))), {"a.weight", "b.weight", "c.weight"}, {}),
    "gelu": (lambda m, x: m.b(F.gelu(m.a(m.norm(x)))), {"a.weight"}, {"b.weight": "gelu"}),
    "norm feeds residual": (lambda m, x: (n := m.norm(x)) + m.b(F.relu(m.a(n))), {"b.weight"}, {"a.weight": "residual"}),
    "norm is an output": (lambda m, x: (n := m.norm(x), m.a(n)), set(), {"a.weight": "output"}),
    "residual is read": (lambda m, x: m.a(x + m.norm(x)), set(), {"a.weight": "residual"}),
    "squared": (lambda m, x: m.b((y := m.a(m.norm(x))) * y), {"a.weight"}, {"b.weight": "squared"}),
    "subtracted bias": (lambda m, x: m.b(m.a(m.norm(x)) - m.c.bias), {"a.weight", "b.weight"}, {}),
    "shifted": (lambda m, x: m.b(m.a(m.norm(x)) + 1.0), {"a.weight"}, {"b.weight": "shifted"}),
    "summed over channels": (
        lambda m, x: m.b(m.a(m.norm(x)) - m.a(m.norm(x)).mean(-1, keepdim=True)), {"a.weight"}, {"b.weight": "residual"}
    ),
    "flattened, transposed, cut and joined": (
        lambda m, x: m.b(torch.cat([(y := m.a(m.norm(x)).flatten(0, 1))[:, 12:], y[:, :12].t().contiguous().t()], -1)),
        {"a.weight", "b.weight"}, {},
    ),
    "dropouts": (
        lambda m, x: m.a(F.feature_alpha_dropout(F.dropout1d(F.alpha_dropout(m.norm(x)), training=False))),
        {"a.weight"}, {},
    ),
    "padded tokens": (lambda m, x: m.b(F.relu(m.a(F.pad(m.norm(x), (0, 0, 1, 2))))), {"a.weight", "b.weight"}, {}),
    "padded by nothing": (lambda m, x: m.a(F.pad(m.norm(x), (0, 0, 0, 0))), {"a.weight"}, {}),
    "padded and cut": (
        lambda m, x: m.b(F.pad(m.a(m.norm(x)).repeat(1, 1, 2), (-20, -4, -2, 5))), {"a.weight", "b.weight"}, {}
    ),
    "padded channels": (
        lambda m, x: m.b(F.pad(m.a(m.norm(x))[..., 2:], (0, 2))), {"a.weight"}, {"b.weight": "covers only part"}
    ),
    "padded windows": (
        lambda m, x: m.a(F.pad(m.norm(x).view(x.shape[0], 4, 6, 16), (0, 0, 0, -x.shape[0] % 4, 0, 2)).flatten(1, 2)),
        {"a.weight"}, {},
    ),
    "padded by a number": (lambda m, x: m.a(F.pad(m.norm(x), (0, 0, 1, 2), value=1.0)), set(), {"a.weight": "number"}),
    "padded by itself": (lambda m, x: m.a(F.pad(m.norm(x), (0, 0, 1, 2), "replicate")), set(), {"a.weight": "pad"}),
    "mixed with positions": (
        lambda m, x: m.b(m.a(m.norm(x)).transpose(1, 2).reshape(x.shape[0], -1, 24)), {"a.weight"}, {"b.weight": "column"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_bodies_fold_or_are_refused_with_the_reason(body):
    torch.manual_seed(0)
    forward, smoothed, reasons = BODIES[body]
    model = Block(nn.LayerNorm(16), forward).eval()
    x = torch.randn(2, 24, 16)
    folded, sites, refusals = fold_everything(model, x)
    got = {l.name.split("#")[0] for s in sites for l, _ in s.balance}
    assert got - set(reasons) == smoothed - set(reasons)
    for name, word in reasons.items():
        assert any(r.linear.name.split("#")[0] == name and word in r.reason for r in refusals), refusals
    out, want = folded(x), model(x)
    for y, w in zip(out, want, strict=True) if isinstance(want, tuple) else [(out, want)]:
        assert relative_error(y, w) <= 1e-5


ALIASES = {
    "mT": lambda h: h.mT.mT,
    "T": lambda h: h[0].T.T,
    "mH": lambda h: h.mH.mH,
    "adjoint": lambda h: h.adjoint().adjoint(),
    "matrix_H": lambda h: h[0].H.H,
    "concat": lambda h: torch.concat([h, h], 1),
    "concatenate": lambda h: torch.concatenate([h, h], -1)[..., 8:24],
    "hstack": lambda h: torch.hstack([h, h]),
    "hstack of vectors": lambda h: torch.hstack([*h[0, :3]]).view(3, 16),
    "tile": lambda h: h.tile(2, 1),
    "broadcast_to": lambda h: h[None].broadcast_to(3, *h.shape),
    "swapdims": lambda h: h.swapdims(0, 1),
    "swapaxes": lambda h: h.swapaxes(1, 2).swapaxes(-1, -2),
    "moveaxis": lambda h: h.moveaxis(0, 1),
    "moveaxis of several": lambda h: h.moveaxis((0, 1), (1, 0)),
    "ravel": lambda h: h.ravel().view(-1, 16),
    "tensor_split": lambda h: h.tensor_split(3, 1)[1],
    "tensor_split at": lambda h: torch.cat(h.tensor_split([3, 5], -1), -1),
    "arithmetic": lambda h: torch.multiply(torch.divide(h.negative(), 2.0), 3.0).absolute().clip(0.0),
}


@pytest.mark.parametrize("name", ALIASES)
def test_labels_pass_operations_by_all_their_names(name):
    torch.manual_seed(0)
    model = Block(nn.LayerNorm(16), lambda m, x: m.a(ALIASES[name](m.norm(x)))).eval()
    x = torch.randn(2, 24, 16)
    folded, sites, refusals = fold_everything(model, x)
    assert [len(s.balance) for s in sites] == [1] and not refusals
    with torch.no_grad():
        assert relative_error(folded(x), model(x)) <= 1e-5


def test_inputs_of_one_batch_size_that_their_shapes_do_not_tell():
    """PyTorch's attention views keys of another input by the batch of the queries: export ties products of sizes alone."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mha = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x, memory, padding):
            return x + self.mha(self.norm(x), memory, memory, padding, need_weights=False)[0]

    def inputs(batch, tokens, keys):
        padding = torch.arange(keys) >= torch.arange(batch)[:, None] + 2
        return torch.randn(batch, tokens, 16), torch.randn(batch, keys, 16), padding

    torch.manual_seed(0)
    model = Cross().eval()
    folded, sites, _ = fold_everything(model, *inputs(2, 7, 5))
    assert [s.kind for s in sites] == ["norm", "linear"]
    for call in (inputs(2, 7, 5), inputs(3, 4, 6)):
        with torch.no_grad():
            assert relative_error(folded(*call), model(*call)) <= 1e-5


def test_shared_weight_is_changed_for_its_site_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            h = self.down(F.relu(self.up(self.norm(x))))
            return self.down(F.relu(self.up(self.norm(h)))) + self.up(x)

    torch.manual_seed(0)
    model = Shared().eval()
    x = torch.randn(2, 4, 16)
    folded, sites, refusals = fold_everything(model, x)
    assert len(sites) == 4 and [r.linear.name for r in refusals] == ["up.weight#3"]
    assert relative_error(folded(x), model(x)) <= 1e-5


def test_the_wrong_axis_gives_another_function():
    """max|W_:j| is per input channel: over dim 0 of [out, in], whatever the shape."""
    x_absmax, w = torch.rand(3) + 0.5, torch.randn(5, 3)
    s = smoothing_scale(x_absmax, w.abs().amax(0), 0.5)
    expected = torch.stack([x_absmax[j] ** 0.5 / w[:, j].abs().max() ** 0.5 for j in range(3)])
    assert torch.allclose(s, expected)
    with pytest.raises(RuntimeError):
        smoothing_scale(x_absmax, w.abs().amax(1), 0.5)


def test_silent_channels_get_a_bounded_scale():
    x = torch.tensor([0.0, 1e-9, 1.0, 2.0, 4.0, 100.0])
    s = smoothing_scale(x, torch.ones(6), 0.5)
    assert s.isfinite().all() and (s > 0).all()
    assert torch.allclose(s[2:], x[2:].sqrt())  # the formula, where there is something to go by
    assert torch.allclose(s[:2], x[x > 0].median().sqrt())  # counted as a typical channel where there is not
    assert torch.equal(smoothing_scale(torch.zeros(4), torch.ones(4), 0.5), torch.ones(4))
    assert torch.equal(smoothing_scale(torch.ones(4), torch.zeros(4), 0.5), torch.ones(4))


def test_alpha_moves_the_difficulty():
    x, w = torch.tensor([30.0, 64.0]), torch.tensor([2.0, 4.0])
    assert torch.allclose(smoothing_scale(x, w, 1.0), x)
    assert torch.allclose(smoothing_scale(x, w, 0.0), 1 / w)


def test_refused_sites_are_multiplied_where_that_helps():
    torch.manual_seed(0)
    model = Block(nn.LayerNorm(16), lambda m, x: m.b(F.gelu(m.a(m.norm(x))))).eval()
    with torch.no_grad():
        model.a.weight[3] *= 40  # an outlier channel after the gelu, which nothing upstream can absorb
        model.b.weight[:, 3] /= 40
    batches = [torch.randn(4, 32, 16) for _ in range(2)]
    compiled = sqcompile.compile(model, batches, recipe="O3", backend="eager", progress=False)
    layers = {l.name: l for l in compiled.report.layers}
    assert layers["b.weight"].smoothing == "multiplied" and "gelu" in layers["b.weight"].reason
    plain = sqcompile.compile(
        model,
        batches,
        recipe=Recipe(activation="per_tensor_static", weight="per_tensor", smooth=False),
        backend="eager",
        progress=False,
    )
    assert layers["b.weight"].sqnr_db > {l.name: l for l in plain.report.layers}["b.weight"].sqnr_db + 6
    x = torch.randn(2, 8, 16)
    assert relative_error(compiled.stages["folded"](x), model(x)) <= 1e-5
