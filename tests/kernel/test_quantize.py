"""The quantization arithmetic, and the two mistakes everyone makes with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqcompile.kernels import reference
from sqcompile.kernels.cpu import x86
from sqcompile.kernels.ops import sqcompile_ops

W = torch.tensor([[1.0, -2, 3, -4], [5, -6, 7, -8]])


def test_divisor_is_127_and_nothing_wraps():
    scale = reference.weight_scale(W, per_channel=True)
    assert torch.allclose(scale, torch.tensor([[4 / 127], [8 / 127]]))
    q = reference.quantize(W, scale)
    assert q.tolist() == [[32, -64, 95, -127], [79, -95, 111, -127]]
    # with 2^8 - 1 the largest value would be 255, which int8 turns into -1 without a word
    wrapped = torch.round(W / (4.0 / 255)).to(torch.int32).to(torch.int8)
    assert wrapped[0, 3] == 1
    assert reference.quantize(torch.tensor([4.0]), torch.tensor(4.0 / 127)).item() == 127


def test_per_channel_means_one_scale_per_output_channel():
    w = torch.randn(6, 10)
    assert reference.weight_scale(w, per_channel=True).shape == (6, 1)
    assert reference.weight_scale(w, per_channel=False).shape == (1, 1)
    w[2] *= 100  # an outlier row must not touch the others
    assert torch.equal(reference.weight_scale(w, True)[:2], reference.weight_scale(w[:2], True))


def test_per_token_means_every_dim_but_the_last():
    x = torch.randn(3, 5, 8)
    assert reference.token_scale(x).shape == (3, 5, 1)
    assert torch.equal(reference.token_scale(x).flatten(), reference.token_scale(x.reshape(15, 8)).flatten())
    assert reference.tensor_scale(x).shape == ()


def test_rounds_half_to_even_and_saturates():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.6, -128.4, 1e9])
    assert reference.quantize(x, torch.tensor(1.0)).tolist() == [0, 2, 2, 0, -2, 127, -127, 127]
    assert (reference.quantize(x, torch.tensor(1.0), 128).int() - 128).tolist() == [0, 2, 2, 0, -2, 127, -127, 127]


def test_zero_rows_and_non_finite_rows():
    x = torch.randn(4, 8)
    x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
    w = reference.quantize(torch.randn(5, 8), torch.tensor(0.1))
    scale = reference.token_scale(x)
    y = reference.int8_linear(reference.quantize(x, scale), scale, w, torch.ones(5), None, torch.float32)
    assert torch.equal(y[0], torch.zeros(5))
    assert y[1:3].isnan().all() and y[3].isfinite().all()
    assert reference.tensor_scale(x).isnan() and reference.finite_rows(x).isnan().flatten().tolist() == [0, 1, 1, 0]
    assert reference.quantize(x, torch.tensor(0.01))[1:3].max() == 127 and reference.quantize(x, scale)[1, 3] == 0
    assert reference.quantize(x, scale, 128)[1, 3] == 128


def test_scales_are_float32_for_half_precision():
    x = torch.full((2, 4), 6e-5, dtype=torch.float16)  # Δ = 4.7e-7 would be 0 or a denormal in float16
    scale = reference.token_scale(x)
    assert scale.dtype == torch.float32
    assert reference.quantize(x, scale).tolist() == [[127] * 4] * 2


@given(st.integers(1, 40), st.integers(1, 2500), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_reference_matmul_is_exact(m, k, n, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    assert torch.equal(reference.int8_matmul(q, w), (q.long() @ w.long().t()).int())


def test_reference_matmul_is_exact_at_the_extremes():
    q = torch.full((2, 8192), 127, dtype=torch.int8)
    assert reference.int8_matmul(q, -q).eq(-127 * 127 * 8192).all()


NEEDS = {"onednn": x86.available, "vnni": x86.available, "amx": x86.amx, "avx2": x86.has_avx2_kernels}
CPU_KERNELS = [*NEEDS]


def _cpu_matmul(monkeypatch, kernel, u8, w, scale, dtype, *epilogue):
    """x86.matmul by one of its kernels."""
    if not NEEDS[kernel]():
        pytest.skip(f"needs the instructions of {kernel}")
    if kernel == "avx2":
        packed, w_sum = x86.pack_avx2(w)
        return x86.matmul(u8, packed, scale, w_sum, dtype, *epilogue)
    packed, w_sum = x86.pack(w)
    assert w_sum.numel() == w.shape[0], "oneDNN packs in a layout that our kernels cannot read"
    monkeypatch.setattr(x86, "amx", lambda: kernel == "amx")
    monkeypatch.setattr(x86, "AMX_ROWS", 1)
    if kernel == "onednn":
        w_sum = w_sum[:0]
    return x86.matmul(u8, packed, scale, w_sum, dtype, *epilogue)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@given(st.integers(1, 70), st.integers(1, 700), st.integers(1, 140), st.integers(0, 2**31), st.booleans())
@settings(max_examples=40, deadline=None)
def test_cpu_kernels_are_the_reference_bit_for_bit(kernel, m, k, n, seed, extreme):
    _check_cpu_kernel(kernel, m, k, n, seed, extreme)


# around every tile, panel, chunk and group of the kernels
@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (17, 1024, 256),
        (31, 1025, 257),
        (33, 1088, 255),
        (511, 2048, 320),
        (513, 2111, 64),
        (1100, 1500, 1),
        (1100, 1536, 200),  # whole tiles of channels, rows behind the last 32 whole ones
        (129, 576, 130),
        (2, 8192, 70),
        (40, 8195, 70),  # channels in parts
        (513, 4099, 130),
    ],
)
def test_cpu_kernels_at_their_boundaries(kernel, m, k, n):
    _check_cpu_kernel(kernel, m, k, n, m + n, False)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_cpu_kernels_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for kernel in [kernel for kernel in CPU_KERNELS if NEEDS[kernel]()]:
            # tasks of few rows and many columns, and the other way round
            for m, k, n in ((300, 200, 1000), (700, 576, 130)):
                _check_cpu_kernel(kernel, m, k, n, threads, False)
    finally:
        torch.set_num_threads(before)


def _check_cpu_kernel(kernel, m, k, n, seed, extreme):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(127 if extreme else -127, 128, (m, k), generator=g, dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    u8, scale = (q.short() + 128).to(torch.uint8), torch.rand(n, generator=g)
    want = reference.int8_matmul(q, w).float()
    with pytest.MonkeyPatch.context() as patch:
        assert torch.equal(_cpu_matmul(patch, kernel, u8, w, torch.ones(n), torch.float32), want)
    with pytest.MonkeyPatch.context() as patch:
        got = _cpu_matmul(patch, kernel, u8, w, scale, torch.bfloat16)
    assert torch.equal(got, (want * scale).to(torch.bfloat16))
    rows = torch.rand(m, 1, generator=g).masked_fill(torch.rand(m, 1, generator=g) < 0.1, torch.nan)
    for factors, bias in ((rows, torch.randn(n, generator=g).bfloat16()), (rows[:1, 0].nan_to_num(), None)):
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.MonkeyPatch.context() as patch:
                got = _cpu_matmul(patch, kernel, u8, w, scale, dtype, factors, bias)
            exact = reference.scale_output(want * scale, factors, bias, dtype)
            assert torch.equal(got.nan_to_num(7e7), exact.nan_to_num(7e7))


@pytest.mark.skipif(not x86.available(), reason="needs AVX512-VNNI")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_and_reference_agree_with_scales(dtype, per_token, bias):
    x, w = torch.randn(2, 7, 200), torch.randn(50, 200)
    w_scale = reference.weight_scale(w, True)
    w8 = reference.quantize(w, w_scale)
    scale = reference.token_scale(x) if per_token else reference.tensor_scale(x)
    b = torch.randn(50) if bias else None
    q, u8 = reference.quantize(x, scale), reference.quantize(x, scale, 128)
    want = sqcompile_ops.int8_linear(q, scale, w8, w_scale.flatten(), b, dtype)
    assert torch.equal(sqcompile_ops.int8_linear(u8, scale, w8, w_scale.flatten(), b, dtype), want)
    w_sum = w8.sum(1, dtype=torch.int32)
    for rows in (w_sum, w_sum[:0]):  # our kernel, and oneDNN for any layout
        got = sqcompile_ops.int8_linear_packed(u8, scale, x86.pack(w8)[0], w_scale.flatten(), rows, b, dtype)
        assert got.dtype == dtype and got.shape == (2, 7, 50)
        assert torch.equal(got, want)
