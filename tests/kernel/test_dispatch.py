"""Operators of x86 CPUs that are called without Python give what they give in Python, bit for bit, for all that they take."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sqcompile.kernels.cpu import dispatch, x86
from sqcompile.kernels.ops import ON_X86, on_x86_library, sqcompile_ops

pytestmark = pytest.mark.skipif(not x86.available(), reason="for CPUs with VNNI")
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _installed():
    assert dispatch.install(ON_X86, on_x86_library)


def both(name, *args):
    """The operator, and the one in Python."""
    return (getattr(ops, name).default(*args) for ops in (sqcompile_ops, torch.ops.sqcompile_python))


def equal(name, *args):
    found, want = ((y,) if isinstance(y, Tensor) else y for y in both(name, *args))
    for y, z in zip(found, want, strict=True):
        assert y.dtype == z.dtype and y.stride() == z.stride() and torch.equal(y, z)


def drawn(*shape, dtype=FLOAT, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("rows", [(1,), (2, 9), (33,), (5, 20), (0, 4)])
@pytest.mark.parametrize(("n", "k"), [(96, 64), (50, 40)])
def test_products(n, k, rows, dtype):
    """By our kernels, by oneDNN, and of no rows."""
    r = torch.Generator().manual_seed(0)
    w = torch.randint(-127, 128, (n, k), generator=r, dtype=torch.int8)
    packed, sums = x86.pack(w)
    q = torch.randint(1, 256, (*rows, k), generator=r, dtype=torch.uint8)
    equal("matmul_u8s8", q, packed, drawn(n).abs(), sums, dtype)
    equal("matmul_u8s8", q, packed, drawn(n).abs(), sums[:0], dtype)  # of a layout that our kernels do not read
    equal("matmul_u8s8", q, x86.pack_avx2(w)[0], drawn(n).abs(), sums[:0], dtype)
    if rows[0] > 1:
        equal("matmul_u8s8", q.transpose(0, -2).contiguous().transpose(0, -2), packed, drawn(n).abs(), sums, dtype)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, torch.float16])
def test_activations(dtype):
    y = drawn(2, 7, 192, dtype=dtype)
    scales, biases = (None, drawn(2, 7, 1, seed=1).abs(), torch.tensor(0.5)), (None, drawn(192, dtype=dtype, seed=2))
    for scale, bias, static in itertools.product(scales, biases, (None, torch.tensor(0.1))):
        for activation, zero_point in (("silu", 128), ("gelu_tanh", 0)):
            equal(
                "linear_act_quantize", y, scale, bias, 0, 96, 96, activation, drawn(96, seed=3), 32, static, zero_point
            )
    equal("linear_act_quantize", y.transpose(0, 1), None, None, 0, -1, 192, "none", None, 0, None, 128)
    equal("linear_act_quantize", y[..., :40], None, None, 0, -1, 40, "relu", None, 0, None, 128)
    args = (
        y.transpose(1, 2).contiguous().transpose(1, 2),
        drawn(7, 2, 1).abs().transpose(0, 1),
        drawn(384, dtype=dtype)[::2],
    )
    equal("linear_act_quantize", *args, 0, 96, 96, "silu", drawn(192)[::2], 0, None, 128)
    equal("linear_act_quantize", y[:0], None, None, 0, -1, 192, "relu", None, 0, None, 128)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("rms", [False, True])
def test_norms(rms, dtype):
    y, residual = drawn(6, 64, dtype=dtype), drawn(2, 3, 64, dtype=dtype, seed=1)
    weight = drawn(64, seed=2)  # a folded one is float32
    for scale, r, keep in itertools.product(
        (None, drawn(6, 1, seed=3).abs()), (None, residual), ((True, False), (False, True))
    ):
        tail = 1e-5, rms, False, drawn(64, seed=4), 16, None, 128, *keep
        equal("linear_norm_quantize", y, scale, None, r, weight, None, *tail)
        equal(
            "linear_norm_quantize", y, scale, drawn(64, seed=5) if scale is not None else None, r, weight, weight, *tail
        )
    turned = residual.transpose(0, 1).contiguous().transpose(0, 1)
    equal("linear_norm_quantize", y, None, None, turned, None, None, 1e-5, rms, False, None, 0, None, 128, True, True)


def test_an_activation_that_there_is_not():
    with pytest.raises(RuntimeError, match="there is no activation tanhshrink"):
        sqcompile_ops.linear_act_quantize(drawn(2, 32), None, None, 0, -1, 32, "tanhshrink", None, 0, None, 128)


@pytest.mark.parametrize("columns", [(-16, -1), (0, 32), (16, -1)])
def test_columns_behind_the_end(columns):
    for ops in (sqcompile_ops, torch.ops.sqcompile_python):
        with pytest.raises((RuntimeError, ValueError), match="to 32 more"):
            ops.linear_act_quantize(drawn(2, 32), None, None, *columns, 32, "relu", None, 0, None, 128)


@pytest.mark.parametrize(("k", "block"), [(32, 8), (256, 256), (80, 64)])
def test_blocks_that_there_are_not(k, block):
    for ops in (sqcompile_ops, torch.ops.sqcompile_python):
        with pytest.raises((RuntimeError, ValueError), match=f"rotated by {block}"):
            ops.linear_act_quantize(drawn(2, k), None, None, 0, -1, k, "relu", None, block, None, 128)
        with pytest.raises((RuntimeError, ValueError), match=f"rotated by {block}"):
            ops.linear_norm_quantize(
                drawn(2, k), None, None, None, None, None, 1e-5, True, True, None, block, None, 128, False, True
            )
    with pytest.raises(ValueError, match=f"rotated by {block}"):
        sqcompile_ops.rotate_quantize(drawn(2, k), block, None, 128)
