"""Rotation by Hadamard matrices in blocks: what it is, and the CPU kernel beside the plain arithmetic, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sqcompile.kernels import rotation
from sqcompile.kernels.cpu import rows as on_cpu
from sqcompile.kernels.ops import sqcompile_ops


def sylvester(size: int) -> Tensor:
    """The orthonormal matrix by its definition, H_2n = [[H_n, H_n], [H_n, -H_n]]: float64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5


@pytest.mark.parametrize("block", rotation.BLOCKS)
def test_a_rotation_is_sylvesters_matrix_in_blocks(block):
    x = torch.randn(3, 5, 3 * block)
    want = torch.cat([part.double() @ sylvester(block) for part in x.split(block, -1)], -1)
    got = rotation.rotate(x, block)
    assert got.dtype == torch.float32 and float((got - want).abs().max()) < 1e-6 * float(want.abs().max()) * 4
    assert float((rotation.rotate(x.double(), block) - want).abs().max()) < 1e-14
    again = rotation.rotate(got, block)  # its own inverse
    assert float((again - x).abs().max()) < 1e-5


def test_the_blocks_that_channels_allow():
    assert rotation.blocks_of(96) == (16, 32) and rotation.blocks_of(640) == (16, 32, 64, 128)
    assert rotation.blocks_of(100) == () and rotation.blocks_of(8) == ()


@pytest.mark.parametrize("static", [None, 0.05])
@pytest.mark.parametrize("zero_point", [0, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", rotation.BLOCKS)
def test_the_cpu_kernel_is_the_plain_arithmetic_bit_for_bit(block, dtype, zero_point, static):
    x = torch.randn(9, 5 * block).to(dtype) * torch.randn(5 * block).exp().to(dtype)
    x[1, 3], x[2, 7], x[3] = float("nan"), float("-inf"), 0
    scale = None if static is None else torch.tensor([static])
    (q, rows), (want, factors) = (
        f(x, block, scale, zero_point) for f in (on_cpu.rotate_quantize, rotation.rotate_quantize)
    )
    assert q.dtype == want.dtype and torch.equal(q, want)
    assert torch.equal(rows.isnan(), factors.isnan()) and torch.equal(rows.nan_to_num(7), factors.nan_to_num(7))
    assert rows[1:3].isnan().all() and rows[4:].isfinite().all()


@pytest.mark.parametrize(
    "lay", [lambda x: x.t(), lambda x: x[::2, :64], lambda x: x[None, :, :64], lambda x: x[:0, :64]]
)
def test_the_cpu_kernel_takes_rows_that_lie_in_any_way(lay):
    x = lay(torch.randn(64, 96))
    (q, rows), (want, factors) = (f(x, 32, None, 0) for f in (on_cpu.rotate_quantize, rotation.rotate_quantize))
    assert torch.equal(q, want) and torch.equal(rows, factors) and q.shape == x.shape


def test_fake_tensors_are_as_the_real_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for x in (torch.randn(2, 3, 32), torch.randn(3, 2, 32).bfloat16().transpose(0, 1), torch.randn(4, 32).double()):
        for op, args in (
            (sqcompile_ops.rotate.default, (16,)),
            (sqcompile_ops.rotate_quantize.default, (16, None, 128)),
        ):
            real, mode = op(x, *args), FakeTensorMode()
            with mode:
                fake = op(mode.from_tensor(x), *args)
            for r, f in zip(*(v if isinstance(v, tuple) else (v,) for v in (real, fake)), strict=True):
                assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", rotation.BLOCKS)
def test_the_operator_alone_is_its_definition_to_the_bit(block, dtype):
    """By C++ where that builds: of few and of many values, of none, of views, and of what is not finite."""
    g = torch.Generator().manual_seed(block)
    for shape in ((128,), (3, 256), (2, 5, 384), (0, 128), (70, 2048)):
        x = (100 * torch.randn(shape, generator=g)).to(dtype)
        assert torch.equal(sqcompile_ops.rotate(x, block), rotation.rotate(x, block))
    turned = torch.randn(256, 7, generator=g).to(dtype).t()
    assert torch.equal(sqcompile_ops.rotate(turned, block), rotation.rotate(turned, block))
    x[1, 5], x[2, 200] = math.inf, math.nan
    assert torch.equal(sqcompile_ops.rotate(x, block).isfinite(), rotation.rotate(x, block).isfinite())
