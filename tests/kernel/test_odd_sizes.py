"""Sizes of 0 and 1, and default dtypes other than float32: the float model's own results."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from torch import nn
from torch.nn import functional as F

import sqcompile


class Attention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (
            f(h).view(*x.shape[:2], self.heads, 32 // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)
        return self.o(y.transpose(1, 2).flatten(2))


def attention(heads=4):
    torch.manual_seed(0)
    return Attention(heads).eval()


RECIPES = ("default", "O1", "O2", "O3", sqcompile.Recipe(attention="qk_pv", qk="per_head"))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_no_tokens_give_no_tokens(recipe):
    model = attention()
    c = sqcompile.compile(model, [torch.randn(2, 9, 32)], recipe=recipe, backend="eager", progress=False)
    assert c(torch.randn(2, 0, 32)).shape == (2, 0, 32) and c(torch.randn(0, 9, 32)).shape == (0, 9, 32)
    assert c.stages["quantized"](torch.randn(2, 0, 32)).shape == (2, 0, 32)


@pytest.mark.slow
def test_no_tokens_through_inductor():
    model, x = attention(), torch.randn(2, 9, 32)
    c = sqcompile.compile(model, [x], recipe="O1", progress=False)
    assert c(torch.randn(2, 0, 32)).shape == (2, 0, 32)
    assert relative_error(c(x[:1]), model(x[:1])) < 0.05


@pytest.mark.parametrize("heads", [1, 4])
def test_a_batch_of_one_is_served_whatever_the_number_of_heads(heads):
    model = attention(heads)
    c = sqcompile.compile(model, [torch.randn(2, 9, 32)], backend="eager", progress=False)
    for shape in ((1, 5, 32), (1, 1, 32), (3, 1, 32), (3, 5, 32)):
        x = torch.randn(shape)
        assert relative_error(c(x), model(x)) < 0.03


class Einsum(nn.Module):
    def __init__(self, equation, weight, change):
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(16), nn.Parameter(torch.randn(*weight))
        self.equation, self.change = equation, change
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return torch.einsum(self.equation, self.change(self.norm(x)), self.weight)


@pytest.mark.parametrize(
    ("equation", "weight", "change"),
    [
        ("etd,edf->etf", (3, 16, 16), lambda h: h.flatten(0, 1)[None]),  # one group of rows for each of 3 experts
        ("bsd,fd->bsf", (8, 16), lambda h: h[..., :1]),  # one channel for each of 16
        ("bsd,fd->bsf", (8, 1), lambda h: h),  # one weight for each of 16
        ("sbd,bdf->sbf", (2, 1, 8), lambda h: h.flatten(0, 1).unflatten(1, (2, 8))),  # one row for each of 8
        ("bsd,bdf->bsf", (1, 16, 16), lambda h: h),  # one matrix for any batch
        ("bsd,...df->...bsf", (1, 16, 16), lambda h: h),
    ],
)
def test_an_einsum_expands_sizes_of_one(equation, weight, change):
    torch.manual_seed(0)
    model, x = Einsum(equation, weight, change).eval(), torch.randn(2, 5, 16)
    model = nn.Sequential(model, nn.LayerNorm(model(x).shape[-1]), nn.Linear(model(x).shape[-1], 8)).eval()
    c = sqcompile.compile(model, [x], backend="eager", progress=False)
    for y in (x, torch.randn(4, 7, 16)):
        assert relative_error(c(y), model(y)) < 0.03


def test_operands_of_data_that_an_einsum_expands():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(5, 8)

        def forward(self, x):
            return self.o(torch.einsum("bqd,bkd->bqk", self.q(x)[..., :1], self.k(x[:, :5])))

    torch.manual_seed(0)
    model, x = Pool().eval(), torch.randn(2, 9, 16)
    c = sqcompile.compile(model, [x], backend="eager", progress=False)
    assert relative_error(c(x), model(x)) < 0.03


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("recipe", ["default", "O3"])
def test_the_default_dtype_changes_no_scale(recipe, default_dtype):
    x = torch.randn(2, 9, 32, dtype=torch.float32)
    model = attention().float()
    plan = sqcompile.calibrate(model, [x], recipe=recipe, progress=False)
    c = sqcompile.compile(model, plan=plan, backend="eager")
    got = c(x)
    torch.set_default_dtype(torch.float32)
    want = sqcompile.compile(model, [x], recipe=recipe, backend="eager", progress=False)
    assert all(s.dtype == torch.float32 and torch.equal(s, want.plan.scales[k]) for k, s in plan.scales.items())
    assert [l.input_scale for l in plan.layers] == [l.input_scale for l in want.plan.layers]
    assert got.dtype == torch.float32 and torch.equal(got, want(x))


def test_a_model_in_the_default_dtype(default_dtype):
    model, x = attention().to(default_dtype), torch.randn(2, 9, 32, dtype=default_dtype)
    c = sqcompile.compile(model, [x], backend="eager", progress=False)
    assert c(x).dtype == default_dtype and relative_error(c(x), model(x)) < 0.03
