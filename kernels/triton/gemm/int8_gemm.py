"""INT8 GEMM with its epilogue: `int8_gemm` checks, chooses a kernel by the number of rows, and launches it.

The choice depends on M, which a tracing compiler may hold as a symbol: register this as an opaque operator, so that one
compiled graph serves prefill and decode. The other launch functions of the package do not look at M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sqcompile.kernels.triton.common import INTERPRETED, as_rows, on
from sqcompile.kernels.triton.gemm import kernels
from sqcompile.kernels.triton.gemm.tiles import GEMV_ROWS, Config, bucket, for_epilogue, gpu_of, tiles
from sqcompile.kernels.triton.launching import launch

TL_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# Contracting · Δx + bias into one fma would round once where the reference rounds twice.
_EXACT = {"enable_fp_fusion": False}
EARLY_CAPABILITY = 90  # from here on a kernel can be launched before the one before it has ended
_ALIGNED = 16  # bytes: what TMA asks of base addresses and row strides


def aligned(t: Tensor) -> bool:
    """Whether TMA can address the rows of t [rows, columns]."""
    return t.data_ptr() % _ALIGNED == 0 and t.stride(0) * t.element_size() % _ALIGNED == 0


def int8_gemm(
    q: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """y = act(q wᵀ · Δw · Δx + bias) + residual, with the product in int32 and the rest in float32.

    Args:
        q: int8 [..., K]; the last dim is contiguous, rows may be strided.
        w: int8 [N, K], likewise.
        x_scale: float32 contiguous, one element per row of q ([..., 1]) or one for all, Δx.
        w_scale: float32 contiguous [N], or one element for all, Δw.
        bias: any float dtype [N], or None.
        dtype: float16, bfloat16 or float32, of the result.
        activation: "none", "relu", "silu", "gelu" (erf) or "gelu_tanh".
        residual: any float dtype [..., N], or None.
        out_scale: static Δ of the result, float32 of one element: the result is rounded to ``dtype``, as the graph
            it replaces does, and then quantized to int8.
        config: instead of the shipped choice.

    Returns:
        ``dtype`` [..., N], or int8 with ``out_scale``.
    """
    lead, k = q.shape[:-1], q.shape[-1]
    n = w.shape[0]
    if w.shape[1] != k:
        raise ValueError(f"q has {k} columns and w has {w.shape[1]}")
    q, w = as_rows(q), as_rows(w)
    m = q.shape[0]
    y = torch.empty((*lead, n), dtype=dtype if out_scale is None else torch.int8, device=q.device)
    if m == 0 or n == 0:
        return y
    if residual is not None:
        residual = as_rows(residual.reshape(m, n))
    rows, columns = x_scale.numel(), w_scale.numel()
    if rows not in (1, m) or columns not in (1, n):
        raise ValueError(f"{rows} row scales and {columns} column scales for a product of {m} x {n}")
    if config is None:
        whole = aligned(q) and aligned(w) and n * y.element_size() % _ALIGNED == 0
        config = for_epilogue(tiles(gpu_of(q.device), bucket(m), n, k, whole), activation, residual is not None)
    # the order of the kernels' parameters from w_scale_ptr to DTYPE
    epilogue = (
        w_scale, x_scale, bias, residual, 0 if residual is None else residual.stride(0), out_scale,
        rows == m, columns == n, activation, TL_DTYPE[dtype],
    )  # fmt: skip
    with on(q.device):
        if config.kind == "persistent":
            _persistent(q, w, y.view(m, n), config, epilogue)
        else:
            _split(q, w, y, m, n, k, config, epilogue)
    return y


def _persistent(q: Tensor, w: Tensor, y: Tensor, c: Config, epilogue: tuple[object, ...]) -> None:
    m, k = q.shape
    n = w.shape[0]
    programs = min(gpu_of(q.device).sms * c.ctas, triton.cdiv(m, c.bm) * triton.cdiv(n, c.bn))
    # Tables are measured with two-byte results; a tile of float32 is staged in twice the parts, in the same memory.
    wide = y.element_size() == 4
    sub = min(4, 2 * c.sub) if wide else c.sub
    specialize = c.specialize and not wide
    warps = 8 if c.specialize and wide else c.warps  # specialization itself adds the other four
    a: Tensor | TensorDescriptor = q
    b: Tensor | TensorDescriptor = w
    out: Tensor | TensorDescriptor = y
    if specialize:  # descriptors made by the kernel live in scratch memory that Triton asks this function for
        triton.set_allocator(_scratch)
    else:  # descriptors made on the host are kernel parameters: no allocator, and CUDA graphs capture them by value
        a = TensorDescriptor.from_tensor(q, [c.bm, c.bk])
        b = TensorDescriptor.from_tensor(w, [c.bn, c.bk])
        out = TensorDescriptor.from_tensor(y, [c.bm, c.bn // sub])
    launch(
        kernels.persistent, (programs,), a, b, out, m, n, k, q.stride(0), w.stride(0), *epilogue, c.bm, c.bn, c.bk, c.group, sub, c.flatten, specialize,
        num_stages=c.stages, num_warps=warps, **_EXACT,
    )  # fmt: skip


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _split(q: Tensor, w: Tensor, y: Tensor, m: int, n: int, k: int, c: Config, epilogue: tuple[object, ...]) -> None:
    early = gpu_of(q.device).capability >= EARLY_CAPABILITY and not INTERPRETED
    parts = y if c.split == 1 else torch.empty((c.split, m, n), dtype=torch.int32, device=q.device)
    if c.kind == "gemv":
        if m > GEMV_ROWS:
            raise ValueError(f"a gemv of {m} rows; at most {GEMV_ROWS}")
        whole = k % 4 == 0 and q.stride(0) % 4 == 0 and w.stride(0) % 4 == 0
        whole = whole and q.data_ptr() % 4 == 0 and w.data_ptr() % 4 == 0 and not INTERPRETED
        block = c.bk if whole else max(32, c.bk // 4)  # as many sums a thread either way
        launch(
            kernels.gemv, (triton.cdiv(n, c.bn), c.split), q, w, parts, n, k, q.stride(0), w.stride(0), *epilogue, m, c.bn, block, c.split, 4 if whole else 1, c.stages,
            early, launch_pdl=early, num_warps=c.warps, **_EXACT,
        )  # fmt: skip
    else:
        a = TensorDescriptor.from_tensor(q, [c.bm, c.bk]) if c.tma else q
        b = TensorDescriptor.from_tensor(w, [c.bn, c.bk]) if c.tma else w
        tiles_m = triton.cdiv(m, c.bm)
        launch(
            kernels.tile, (tiles_m * triton.cdiv(n, c.bn), c.split), a, b, parts, m, n, k, q.stride(0), w.stride(0), *epilogue,
            c.bm, c.bn, c.bk, c.group, c.split, c.swap, c.tma, k % (c.split * c.bk) == 0, tiles_m == 1, early,
            launch_pdl=early, num_stages=c.stages, num_warps=c.warps, **_EXACT,
        )  # fmt: skip
    if c.split > 1:
        launch(
            kernels.add_parts,
            (triton.cdiv(n, 512), m),
            parts,
            y,
            m,
            n,
            *epilogue,
            512,
            c.split,
            early,
            launch_pdl=early,
            num_warps=4,
            **_EXACT,
        )
