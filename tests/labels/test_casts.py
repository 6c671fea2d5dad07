"""Casts on the way of labels: folding is exact, so it does not go through half precision inside a float32 model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import fold_everything, relative_error, sites_of, tiny_lm, token_batches
from torch import nn

from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.attention.head_sites import match_heads

HALVES = [torch.bfloat16, torch.float16]


class Net(nn.Module):
    """norm -> (cast) -> up -> relu -> (cast) -> down, in ``outer``, with casts to ``inner`` and back."""

    def __init__(self, inner: torch.dtype, outer: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        h = self.up(self.norm(x).to(self.inner).to(self.outer))
        return self.down(F.relu(h).to(self.inner).type_as(h))


class Attention(nn.Module):
    """Queries, keys and values in ``inner`` between projections in float32."""

    def __init__(self, inner: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], 2, 16).transpose(1, 2).to(self.inner) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).float())


class FloatNorm(nn.Module):
    """A norm in float32 inside a model in half precision, in the two ways of transformers."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last, self.weight = last, nn.Parameter(1 + 0.3 * torch.randn(32))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = (h * (1 + self.weight.float())).type_as(x) if self.last else self.weight * h.to(x.dtype)
        return self.down(F.relu(self.up(h)))


@pytest.mark.parametrize("inner", HALVES)
def test_folding_does_not_go_through_a_cast_to_half_precision(inner):
    _, sites, refusals = sites_of(Net(inner).eval(), torch.randn(2, 5, 32))
    assert sites == []
    name = str(inner).removeprefix("torch.")
    for r in refusals:
        assert r.reason == f"a channel is rounded to {name} on its way, which a scale would change"


@pytest.mark.parametrize("inner", HALVES)
def test_nor_do_scales_of_attention(inner):
    gm, sites, refusals = sites_of(Attention(inner).eval(), torch.randn(2, 5, 32))
    assert "o.weight" in [r.linear.name for r in refusals if "is rounded to" in r.reason]
    heads, why = match_heads(gm, find_attentions(gm))
    assert heads == [] and all("is rounded to" in reason for reason in why.values())
    gm, sites, _ = sites_of(Attention(torch.float32).eval(), torch.randn(2, 5, 32))
    assert [s.name for s in sites] == ["v.weight -> o.weight"] and match_heads(gm, find_attentions(gm))[0]


@pytest.mark.parametrize(("inner", "outer"), [(torch.float64, torch.float32), (torch.float32, torch.float32)])
@torch.no_grad()
def test_wider_casts_are_passed_and_folding_is_exact(inner, outer):
    torch.manual_seed(0)
    model, x = Net(inner, outer).eval(), torch.randn(2, 5, 32)
    folded, _ = fold_everything(model, x)[:2]
    assert len(sites_of(model, x)[1]) == 2
    assert relative_error(folded(x), model(x)) <= 1e-5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("last", [False, True])
def test_models_in_half_precision_fold_as_before(dtype, last):
    """Also with the norm's weight kept in float32."""
    torch.manual_seed(0)
    model = FloatNorm(last).eval().to(dtype)
    x = torch.randn(2, 5, 32, dtype=dtype)
    names = ["weight -> up.weight", "up.weight -> down.weight"]
    assert [s.name for s in sites_of(model, x)[1]] == names
    if last:
        model.weight = nn.Parameter(model.weight.float())
        assert [s.name for s in sites_of(model, x)[1]] == names


def test_casts_between_the_halves_are_refused():
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    _, sites, refusals = sites_of(Net(torch.float16, torch.bfloat16).eval().to(torch.bfloat16), x)
    assert sites == [] and all("is rounded to float16" in r.reason for r in refusals)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_families_in_half_precision_have_the_sites_that_they_have_in_float32(family):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_lm(family, dtype, num_hidden_layers=1)
        gm, sites, _ = sites_of(model, **token_batches(1)[0], use_cache=False)
        heads, _ = match_heads(gm, [a for a in find_attentions(gm) if not a.refused])
        found.append(([s.name for s in sites], [h.name for h in heads]))
    assert found[0] == found[1] and found[0][0]
