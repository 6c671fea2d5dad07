"""Rotation inside the Triton kernels that quantize rows, against the plain arithmetic: see triton_cases.py for where they run."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from triton_cases import DEVICE, INTERPRETED, PARTS, kernels, long, nearly, run_in_the_interpreter, same, tensor

from sqcompile.kernels import reference
from sqcompile.kernels.rotation import BLOCKS, rotate

WIDE = pytest.param(64, 64 * 260, marks=pytest.mark.slow)  # so many columns are read in pieces
DTYPES = [torch.bfloat16, long(torch.float16), torch.float32]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize("part", PARTS)
def test_these_kernels_in_the_interpreter(part):
    run_in_the_interpreter(__file__, part)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block", "k"), [*[(b, 3 * b) for b in BLOCKS], (16, 16), WIDE])
@pytest.mark.parametrize("mode", ["token", "tensor", "static"])
def test_rotated_rows_equal_the_plain_arithmetic(mode, block, k, dtype):
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    x = tensor(3, 2, k, dtype=dtype)
    y = rotate(x, block)
    static = torch.tensor(0.03, device=DEVICE) if mode == "static" else None
    q, s = quantize_rows(x, mode if static is None else "token", static, rotation=block)
    if static is not None:
        same(s, torch.ones_like(s))
        same(q, reference.quantize(y, static))
    else:
        scale = reference.token_scale(y) if mode == "token" else reference.tensor_scale(y)
        same(s, scale)
        same(q, reference.quantize(y, scale))


@kernels
@pytest.mark.parametrize("mode", ["token", "tensor"])
def test_a_multiplier_comes_before_the_rotation(mode):
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    x, m = tensor(9, 160, dtype=torch.bfloat16), tensor(160, seed=1).abs()
    y = rotate(x.float() * m, 32)
    scale = reference.token_scale(y) if mode == "token" else reference.tensor_scale(y)
    q, s = quantize_rows(x, mode, multiplier=m, rotation=32)
    torch.testing.assert_close(s, scale, rtol=1e-6, atol=0)  # a GPU rounds a product and the sum after it once
    difference = (q.int() - reference.quantize(y, s).int()).abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) < 1e-3


@kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rotated_rows_that_are_not_finite_come_out_as_nan(bad):
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    x = tensor(4, 96)
    x[2, 50] = bad
    q, s = quantize_rows(x, rotation=16)
    assert bool((q * s)[2].isnan().all()) and bool((q * s)[[0, 1, 3]].isfinite().all())
    _, s = quantize_rows(x, scale=torch.tensor(0.03, device=DEVICE), rotation=16)
    assert s.isnan().flatten().tolist() == [False, False, True, False]


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block", "k"), [(32, 96), pytest.param(128, 384, marks=pytest.mark.slow), WIDE])
@pytest.mark.parametrize("multiplied", [False, True])
def test_a_norm_and_a_rotation(multiplied, block, k, dtype):
    from sqcompile.kernels.triton.rows.norm import norm_quantize

    x, w, b = tensor(2, 3, k, dtype=dtype), tensor(k, dtype=dtype, seed=2), tensor(k, dtype=dtype, seed=3)
    m = tensor(k, seed=4).abs() if multiplied else None
    y = F.layer_norm(x.float(), (k,), w.float(), b.float(), 1e-5).to(dtype)
    q, s = norm_quantize(x, w, 1e-5, kind="layer", bias=b, multiplier=m, rotation=block)[1:3]
    y = rotate(y if m is None else y.float() * m, block)
    nearly(q, s, y, reference.token_scale(y), 1e-2)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block", "k"), [(32, 96), pytest.param(128, 384, marks=pytest.mark.slow), WIDE])
@pytest.mark.parametrize("multiplied", [False, True])
def test_an_activation_and_a_rotation(multiplied, block, k, dtype):
    from sqcompile.kernels.triton.rows.act import act_quantize

    gate, up = tensor(2, 3, 2 * k, dtype=dtype, spread=0.3).chunk(2, -1)
    m = tensor(k, seed=4).abs() if multiplied else None
    y = F.silu(gate.float()).to(dtype) * up
    q, s = act_quantize(gate, up, multiplier=m, rotation=block)
    y = rotate(y if m is None else y.float() * m, block)
    nearly(q, s, y, reference.token_scale(y), 1e-2)
