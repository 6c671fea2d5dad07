"""Grouped INT8 GEMM: the rows of each expert times that expert's weight, in one launch and without reading counts back.

Rows are sorted by expert and `offsets` holds where each expert's rows end, on the device. The grid has a fixed number of
programs, each of which walks the flat list of tiles; an expert without rows has no tiles. A tile finds its expert from the
running sum of tiles per expert, one small reduction a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sqcompile.kernels.triton.common import as_rows, on
from sqcompile.kernels.triton.gemm.int8_gemm import TL_DTYPE, aligned
from sqcompile.kernels.triton.gemm.tiles import Config, Gpu, gpu_of
from sqcompile.kernels.triton.launching import launch


@triton.jit(do_not_specialize=["T"])
def _grouped(
    q, w, y_ptr, offsets_ptr, w_scale_ptr, x_scale_ptr, bias_ptr, T, E, N, K, q_stride, w_stride,
    X_ROWS: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """q, w: descriptors of [T, K] and [E · N, K], or pointers. EXPERTS: E rounded up to a power of two."""
    e_all = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + e_all, mask=e_all < E, other=0)
    starts = tl.load(offsets_ptr + e_all - 1, mask=(e_all > 0) & (e_all < E), other=0)
    columns = tl.cdiv(N, BN)
    tile_ends = tl.cumsum(tl.cdiv(tl.maximum(ends - starts, 0), BM) * columns, 0)
    steps = tl.cdiv(K, BK)
    for t in range(tl.program_id(0), tl.max(tile_ends, 0), tl.num_programs(0)):
        e = tl.sum((tile_ends <= t).to(tl.int32), 0)
        start = tl.sum(tl.where(e_all == e, starts, 0), 0)
        end = tl.sum(tl.where(e_all == e, ends, 0), 0)
        local = t - tl.max(tl.where(e_all < e, tile_ends, 0), 0)
        # consecutive tiles go down an expert's rows, so that its weight tile is read from memory once
        height = tl.cdiv(end - start, BM)
        first = start + (local % height) * BM
        pn = local // height
        rm = first + tl.arange(0, BM)
        rn = pn * BN + tl.arange(0, BN)
        rk = tl.arange(0, BK)
        if not TMA:
            q_ptrs = q + tl.where(rm < end, rm, 0).to(tl.int64)[:, None] * q_stride + rk[None, :]
            w_rows = e.to(tl.int64) * N + tl.where(rn < N, rn, 0)
            w_ptrs = w + w_rows[:, None] * w_stride + rk[None, :]
        acc = tl.zeros((BM, BN), dtype=tl.int32)
        for k in range(steps):
            if TMA:  # rows past an expert's last are the next one's, and are not stored
                a = q.load([first, k * BK])
                b = w.load([e * N + pn * BN, k * BK])
            elif EVEN:
                a = tl.load(q_ptrs)
                b = tl.load(w_ptrs)
            else:
                inside = (rk + k * BK < K)[None, :]
                a = tl.load(q_ptrs, mask=inside, other=0)
                b = tl.load(w_ptrs, mask=inside, other=0)
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
            if not TMA:
                q_ptrs += BK
                w_ptrs += BK
        y = acc.to(tl.float32) * tl.load(w_scale_ptr + e * N + rn, mask=rn < N, other=0.0)[None, :]
        if X_ROWS:
            y = y * tl.load(x_scale_ptr + rm, mask=rm < end, other=0.0)[:, None]
        else:
            y = y * tl.load(x_scale_ptr)
        if bias_ptr is not None:
            y = y + tl.load(bias_ptr + e * N + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
        mask = (rm < end)[:, None] & (rn < N)[None, :]
        tl.store(y_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def grouped_config(gpu: Gpu, t: int, e: int, n: int, tma: bool) -> Config:
    """Tiles by the mean number of rows of an expert: few rows stream the weights, many fill the tensor cores."""
    rows = t // e
    if rows <= 32:
        return Config("tile", 16 if rows <= 16 else 32, 128, 128, stages=4, warps=4, ctas=3, tma=tma)
    if rows <= 64 or n < 256 or not tma:
        return Config("tile", 64, 128, 128 if gpu.large else 64, stages=4, warps=4, ctas=2, tma=tma)
    return Config("tile", 128, 128, 128, stages=4, warps=8, ctas=1, tma=tma)


def grouped_int8_gemm(
    q: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    config: Config | None = None,
) -> Tensor:
    """y[rows of e] = q[rows of e] · w[e]ᵀ · Δw[e] · Δx + bias[e].

    Args:
        q: int8 [T, K], rows sorted by expert.
        w: int8 [E, N, K] contiguous.
        x_scale: float32 contiguous, one element per row ([T, 1]) or one for all.
        w_scale: float32 [E, N] contiguous.
        offsets: int32 [E], where the rows of each expert end: not decreasing, the last one at most T.
        bias: any float dtype [E, N] contiguous, or None.
        dtype: float16, bfloat16 or float32, of the result.
        config: instead of `grouped_config`; bm, bn, bk, stages, warps, ctas and tma count.

    Returns:
        ``dtype`` [T, N]; rows past the last offset are zeros.
    """
    t, k = q.shape
    e, n, k_w = w.shape
    if k != k_w or w_scale.shape != (e, n) or offsets.shape != (e,) or x_scale.numel() not in (1, t):
        raise ValueError(f"shapes {list(q.shape)}, {list(w.shape)}, {list(w_scale.shape)}, {list(offsets.shape)}")
    if dtype not in TL_DTYPE:
        raise ValueError(f"dtype {dtype}")
    y = torch.zeros((t, n), dtype=dtype, device=q.device)  # rows past the last offset stay zeros
    if t == 0 or n == 0:
        return y
    q, w = as_rows(q), w.contiguous()
    gpu = gpu_of(q.device)
    flat = w.view(e * n, k)
    c = config or grouped_config(gpu, t, e, n, gpu.large and aligned(q) and aligned(flat))
    a = TensorDescriptor.from_tensor(q, [c.bm, c.bk]) if c.tma else q
    b = TensorDescriptor.from_tensor(flat, [c.bn, c.bk]) if c.tma else flat
    programs = min(gpu.sms * c.ctas, (triton.cdiv(t, c.bm) + e) * triton.cdiv(n, c.bn))
    with on(q.device):
        launch(
            _grouped, (programs,), a, b, y, offsets, w_scale, x_scale, bias, t, e, n, k, q.stride(0), k, x_scale.numel() == t,
            triton.next_power_of_2(e), c.bm, c.bn, c.bk, c.tma, k % c.bk == 0,
            num_stages=c.stages, num_warps=c.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return y
