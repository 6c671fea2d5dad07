"""From linear to linear on a CPU: the kernel beside its definition in plain PyTorch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sqcompile.kernels import reference, rows
from sqcompile.kernels.cpu import rows as on_cpu

FLOAT, HALF = torch.float32, torch.bfloat16


def drawn(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """All but a few integers of a thousand are the same, and those are neighbours: sums have another order."""
    assert [t.dtype for t in found] == [t.dtype for t in want] and [t.shape for t in found] == [t.shape for t in want]
    steps = (found[0].int() - want[0].int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.002
    assert torch.allclose(found[1], want[1], rtol=2e-6, atol=0)


def exact(*args):
    """Arguments of the plain versions, by which they round nothing to bfloat16 on the way, as the kernel."""
    return [a.float() if isinstance(a, Tensor) else a for a in args]


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("activation", rows.ACTIVATIONS)
def test_activations(activation, dtype):
    """Values from everyday ones to the ends of what is finite."""
    y = torch.cat([drawn(30, 64) * 3, torch.linspace(-12, 12, 640).view(64, 10).t(), drawn(3, 64) * 1e4]).to(dtype)
    for rotation, zero_point in ((0, 128), (0, 0), (32, 128)):
        args = y, None, None, 0, -1, 64, activation, None, rotation, None, zero_point
        same(on_cpu.linear_act_quantize(*args), rows.linear_act_quantize(*exact(*args)))


@pytest.mark.parametrize("activation", [a for a in rows.ACTIVATIONS if a != "none"])
def test_activations_are_as_exact_as_pytorchs(activation):
    """Channels are one to a row, so that each has all 127 steps of its own, and the factor shows the value itself."""
    x = torch.cat(
        [torch.linspace(-20, 20, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.8, -88.8, 1e30, -1e30, -3e38])]
    )
    y = torch.zeros(len(x), 16)
    y[:, 3] = x
    _, factors = on_cpu.linear_act_quantize(y, None, None, 0, -1, 16, activation, None, 0, None, 0)
    want = rows.ACTIVATIONS[activation](x.double()).abs()
    error = (factors[:, 0].double() * 127 - want).abs()
    assert (error <= 3e-7 * x.abs().double() + 1e-29).all(), (x[error.argmax()], error.max())


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("rotation", [0, 16, 64])
@pytest.mark.parametrize("static", [None, torch.tensor(0.05)])
def test_a_gated_pair_behind_a_linear(static, rotation, dtype):
    y, scale, bias = drawn(2, 7, 320, dtype=dtype), drawn(2, 7, 1, seed=1).abs() + 0.1, drawn(320, dtype=dtype, seed=2)
    multiplier = drawn(128, seed=3).abs() + 0.5
    for s, b, m, columns in itertools.product(
        (scale, scale[:1, :1]), (bias, None), (multiplier, None), ((0, 128), (160, 32))
    ):
        args = y, s, b, *columns, 128, "silu", m, rotation, static, 128
        same(on_cpu.linear_act_quantize(*args), rows.linear_act_quantize(*exact(*args)))


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("kind", ["layer", "rms", "rms rounded first"])
def test_a_norm_behind_a_linear(kind, dtype):
    y, scale, bias = drawn(10, 96, dtype=dtype), drawn(10, 1, seed=1).abs() + 0.1, drawn(96, dtype=dtype, seed=2)
    residual, weight = drawn(2, 5, 96, dtype=dtype, seed=4), drawn(96, dtype=dtype, seed=5) + 1
    shift, multiplier = drawn(96, seed=6), drawn(96, seed=7).abs() + 0.5
    rms, first = kind != "layer", kind.endswith("first")
    for r, w, m, s, rotation in itertools.product(
        (residual, None), (weight, None), (multiplier, None), (scale, None), (0, 32)
    ):
        shifts = None if rms or w is None else shift.to(dtype)
        args = y, s, bias if s is not None else None, r, w, shifts, 1e-5, rms, first, m, rotation, None, 128, True, True
        found, want = on_cpu.linear_norm_quantize(*args), rows.linear_norm_quantize(*exact(*args))
        same(found[:2], want[:2])
        for x, y_ in zip(found[2:], want[2:], strict=True):
            assert x.dtype == dtype and x.shape == y_.shape == (y if r is None else r).shape
            tolerance = {"rtol": 1e-5 if dtype == FLOAT else 2**-8, "atol": 1e-5}  # bfloat16 rounds once, at the end
            assert torch.allclose(x.float(), y_, **tolerance)
    kept = on_cpu.linear_norm_quantize(*args[:-2], False, False)
    assert kept[2].shape == kept[3].shape == (0,) and torch.equal(kept[0], found[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_row_alone(bad):
    y = drawn(4, 64)
    y[1, 5] = bad
    for static in (None, torch.tensor(0.05)):
        _, factors = on_cpu.linear_act_quantize(y, None, None, 0, -1, 64, "gelu", None, 32, static, 128)
        _, others, total, normed = on_cpu.linear_norm_quantize(
            y, torch.ones(4, 1), None, y, None, None, 1e-5, False, False, None, 0, static, 128, True, True
        )
        for f in (factors, others):
            assert f[:, 0].isfinite().tolist() == [True, False, True, True]
        assert not total[1, 5].isfinite() and normed[1].isnan().all() and normed[[0, 2, 3]].isfinite().all()


def test_a_row_whose_linear_was_not_finite():
    """Its factor says so, though its product is a number."""
    scale = torch.tensor([[1.0], [math.nan], [1.0]])
    q, factors = on_cpu.linear_act_quantize(drawn(3, 64), scale, None, 0, -1, 64, "relu", None, 0, None, 128)
    assert factors[:, 0].isfinite().tolist() == [True, False, True] and (q[1] == 128).all()


def test_bfloat16_is_rounded_to_the_nearest():
    y = torch.tensor([[1.0, 1.00390625, 1.01171875, math.pi, -math.pi, 3e38, 1e-40, -0.0] * 2])
    total = on_cpu.linear_norm_quantize(
        y.bfloat16(),
        None,
        None,
        y.bfloat16() * 0.00390625,
        None,
        None,
        1e-5,
        True,
        False,
        None,
        0,
        None,
        0,
        True,
        False,
    )[2]
    assert torch.equal(total, (y.bfloat16().float() + (y.bfloat16() * 0.00390625).float()).bfloat16())


@pytest.mark.parametrize("dtype", [FLOAT, HALF, torch.float16])
@pytest.mark.parametrize("k", [16, 24, 640])
def test_rows_are_quantized_to_the_bit(k, dtype):
    x = drawn(70, k, dtype=dtype) * torch.logspace(-4, 4, 70, dtype=dtype)[:, None]
    x[3], x[5, 1], x[7, 2], x[9] = 0, math.nan, -math.inf, torch.finfo(dtype).tiny
    x[11] = torch.finfo(dtype).max
    x[13] = (torch.arange(k) % 255 - 127).to(dtype) / 2  # halves of steps
    found = on_cpu.quantize(x)
    if k % 16 or dtype == torch.float16 or on_cpu.library() is None:
        assert found is None
        return
    q, scale = found
    want = reference.token_scale(x.float())
    assert torch.equal(scale.nan_to_num(-1), want.nan_to_num(-1)) and q.dtype == torch.int8
    assert torch.equal(q, reference.quantize(x, want))


@pytest.mark.parametrize("k, dtype", [(24, FLOAT), (32, torch.float16), (32, torch.float64)])
def test_what_the_kernel_does_not_take_is_plain(k, dtype):
    y = drawn(3, k, dtype=dtype)
    args = y, None, None, 0, -1, k, "silu", None, 0, None, 128
    assert all(map(torch.equal, on_cpu.linear_act_quantize(*args), rows.linear_act_quantize(*args)))


def test_no_rows():
    q, factors = on_cpu.linear_act_quantize(torch.empty(0, 32), None, None, 0, -1, 32, "relu", None, 0, None, 128)
    assert q.shape == (0, 32) and factors.shape == (0, 1) and q.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_operands_that_are_views(dtype):
    """A parameter may be every second number of a tensor, and the rows may lie in another order."""
    y, residual = drawn(64, 10, dtype=dtype).t(), drawn(2, 5, 128, dtype=dtype, seed=1)[..., ::2]
    weight, shift, multiplier = (drawn(128, seed=s)[::2] for s in (2, 3, 4))
    scale, bias = drawn(20, 1, seed=5).abs()[::2], drawn(128, dtype=dtype, seed=6)[::2]
    args = y, scale, bias, residual, weight, shift, 1e-5, False, False, multiplier, 32, None, 128, True, True
    found, want = (f(*a) for f, a in ((on_cpu.linear_norm_quantize, args), (rows.linear_norm_quantize, exact(*args))))
    same(found[:2], want[:2])
    args = y, scale, bias, 0, 32, 32, "silu", multiplier[:32], 16, None, 128
    same(on_cpu.linear_act_quantize(*args), rows.linear_act_quantize(*exact(*args)))
