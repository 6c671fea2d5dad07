"""The GEMM kernels: y [M, N] = Δx Δw (q [M, K] · w [N, K]ᵀ) and an epilogue. `gemm.py` chooses and launches them.

Both operands are K-contiguous, which is what the s8 tensor-core instructions read. Offsets are int64.

EARLY: the kernel is launched before the one before it has ended (programmatic dependent launch, sm_90 and later), waits
for it before it touches memory (`gdc_wait`), and lets the next one be launched when its own sums are done. Not sooner:
programs that wait take places on multiprocessors, and the next kernel's would be spread unevenly.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sqcompile.kernels.triton.common import activate, reciprocal, to_int8


@triton.jit
def finish(
    acc, rm, rn, M, N, w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride, out_scale_ptr,
    X_ROWS: tl.constexpr, W_COLUMNS: tl.constexpr, ACT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """int32 acc [BM, BN] of rows rm and columns rn -> the result in DTYPE, or int8 with out_scale.

    The order is the reference's: (acc · Δw) · Δx + bias, activation, + residual, all float32, then one rounding.
    """
    y = acc.to(tl.float32)
    if W_COLUMNS:
        y = y * tl.load(w_scale_ptr + rn, mask=rn < N, other=0.0)[None, :]
    else:
        y = y * tl.load(w_scale_ptr)
    if X_ROWS:
        y = y * tl.load(x_scale_ptr + rm, mask=rm < M, other=0.0)[:, None]
    else:
        y = y * tl.load(x_scale_ptr)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACT)
    if residual_ptr is not None:
        offsets = rm.to(tl.int64)[:, None] * residual_stride + rn[None, :]
        y = y + tl.load(residual_ptr + offsets, mask=(rm < M)[:, None] & (rn < N)[None, :], other=0.0).to(tl.float32)
    y = y.to(DTYPE)
    if out_scale_ptr is not None:
        y = to_int8(y.to(tl.float32), reciprocal(tl.load(out_scale_ptr)))
    return y


@triton.jit
def _tile_of(t, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tile t in an order that walks GROUP tiles down M before it goes on in N, so that both operands stay in L2."""
    nm = tl.cdiv(M, BM)
    width = GROUP * tl.cdiv(N, BN)
    first = (t // width) * GROUP
    height = tl.minimum(nm - first, GROUP)
    return first + (t % width) % height, (t % width) // height


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """The left and right half of x [BM, BN]."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["M"])
def persistent(
    q_desc, w_desc, y_desc, M, N, K, q_stride, w_stride,
    w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride, out_scale_ptr,
    X_ROWS: tl.constexpr, W_COLUMNS: tl.constexpr, ACT: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr,
    FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Programs loop over tiles; loads and stores go through TMA, whose zero fill and clipping stand for masks.

    q_desc, w_desc, y_desc: descriptors, or pointers with SPECIALIZE.
    """
    if SPECIALIZE:
        # Triton's warp specialization for Hopper fails on descriptors that are parameters (triton issue 11587)
        q_desc = tl.make_tensor_descriptor(q_desc, [M, K], [q_stride, 1], [BM, BK])
        w_desc = tl.make_tensor_descriptor(w_desc, [N, K], [w_stride, 1], [BN, BK])
        y_desc = tl.make_tensor_descriptor(y_desc, [M, N], [N, 1], [BM, BN // SUB])
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE):
        pm, pn = _tile_of(t, M, N, BM, BN, GROUP)
        acc = tl.zeros((BM, BN), dtype=tl.int32)
        for k in range(steps):
            a = q_desc.load([pm * BM, k * BK])
            b = w_desc.load([pn * BN, k * BK])
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        rm = pm * BM + tl.arange(0, BM)
        W: tl.constexpr = BN // SUB
        rn = pn * BN + tl.arange(0, W)
        if SUB == 1:
            y = finish(acc, rm, rn, M, N, w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride,
                       out_scale_ptr, X_ROWS, W_COLUMNS, ACT, DTYPE)  # fmt: skip
            y_desc.store([pm * BM, pn * BN], y)
        elif SUB == 2:
            left, right = _halves(acc, BM, BN)
            y = finish(left, rm, rn, M, N, w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride,
                       out_scale_ptr, X_ROWS, W_COLUMNS, ACT, DTYPE)  # fmt: skip
            y_desc.store([pm * BM, pn * BN], y)
            y = finish(right, rm, rn + W, M, N, w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride,
                       out_scale_ptr, X_ROWS, W_COLUMNS, ACT, DTYPE)  # fmt: skip
            y_desc.store([pm * BM, pn * BN + W], y)
        else:
            tl.static_assert(SUB == 4)
            left, right = _halves(acc, BM, BN)
            for i in tl.static_range(4):
                if i < 2:
                    near, far = _halves(left, BM, BN // 2)
                else:
                    near, far = _halves(right, BM, BN // 2)
                part = near if i % 2 == 0 else far
                y = finish(part, rm, rn + i * W, M, N, w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr,
                           residual_stride, out_scale_ptr, X_ROWS, W_COLUMNS, ACT, DTYPE)  # fmt: skip
                y_desc.store([pm * BM, pn * BN + i * W], y)


@triton.jit(do_not_specialize=["M"])
def tile(
    q, w, y_ptr, M, N, K, q_stride, w_stride,
    w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride, out_scale_ptr,
    X_ROWS: tl.constexpr, W_COLUMNS: tl.constexpr, ACT: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, STREAM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile, or one of SPLIT parts of its sum over K as int32 y [SPLIT, M, N].

    q and w are descriptors (TMA) or pointers; EVEN: K is a multiple of SPLIT · BK, so that no load along K is masked.
    Rows outside are read as row 0 and not stored. STREAM: every weight is read once, so it need not stay in L2.
    """
    pm, pn = _tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    part = tl.program_id(1)
    steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    start = part * steps * BK
    rk = start + tl.arange(0, BK)
    policy: tl.constexpr = "evict_first" if STREAM else ""
    if not TMA:
        q_ptrs = q + tl.where(rm < M, rm, 0).to(tl.int64)[:, None] * q_stride + rk[None, :]
        w_ptrs = w + tl.where(rn < N, rn, 0).to(tl.int64)[:, None] * w_stride + rk[None, :]
    if EARLY:
        gdc_wait()
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.int32)
    for k in range(steps):
        if TMA:
            a = q.load([pm * BM, start + k * BK])
            b = w.load([pn * BN, start + k * BK])
        elif EVEN:
            a = tl.load(q_ptrs)
            b = tl.load(w_ptrs, eviction_policy=policy)
        else:
            inside = (rk + k * BK < K)[None, :]
            a = tl.load(q_ptrs, mask=inside, other=0)
            b = tl.load(w_ptrs, mask=inside, other=0, eviction_policy=policy)
        if SWAP:
            acc = tl.dot(b, a.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        if not TMA:
            q_ptrs += BK
            w_ptrs += BK
    if EARLY:
        gdc_launch_dependents()
    if SWAP:
        acc = acc.T
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    if SPLIT == 1:
        y = finish(acc, rm, rn, M, N, w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride,
                   out_scale_ptr, X_ROWS, W_COLUMNS, ACT, DTYPE)  # fmt: skip
        tl.store(y_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :], y, mask=mask)
    else:
        row = part * M.to(tl.int64) + rm.to(tl.int64)
        tl.store(y_ptr + row[:, None] * N + rn[None, :], acc, mask=mask)


@triton.jit
def _dot4(x, w, acc):
    """acc + the dot product of four int8 in each int32."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [x, w, acc], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _multiply(x_ptr, w, acc, cols, inside, BYTES: tl.constexpr):
    x = tl.load(x_ptr + cols, mask=inside, other=0)[None, :]
    if BYTES == 4:
        return _dot4(tl.broadcast_to(x, w.shape), w, acc)
    return acc + x.to(tl.int32) * w.to(tl.int32)


@triton.jit
def gemv(
    q_ptr, w_ptr, y_ptr, N, K, q_stride, w_stride,
    w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride, out_scale_ptr,
    X_ROWS: tl.constexpr, W_COLUMNS: tl.constexpr, ACT: tl.constexpr, DTYPE: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, BYTES: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """1 to 4 rows without tensor cores: int32 sums [BN, BK / BYTES] of each row, reduced at the end.

    BYTES = 4: pointers are to int32, four int8 each, and a dp4a takes four products; K and the strides are multiples
    of four and counted in int32 here. BYTES = 1 serves any K.
    """
    tl.static_assert(M <= 4)
    C: tl.constexpr = BK // BYTES
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    w_rows = w_ptr + tl.where(rn < N, rn, 0).to(tl.int64)[:, None] * w_stride
    k_end = K // BYTES
    steps = tl.cdiv(tl.cdiv(k_end, C), SPLIT)
    if EARLY:
        gdc_wait()
    if BYTES == 4:
        q_ptr = q_ptr.to(tl.pointer_type(tl.int32))
        w_rows = w_rows.to(tl.pointer_type(tl.int32))
    q_row = q_stride // BYTES
    acc0 = tl.zeros((BN, C), dtype=tl.int32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for k in tl.range(part * steps, part * steps + steps, num_stages=STAGES):
        cols = k * C + tl.arange(0, C)
        inside = cols < k_end
        w = tl.load(w_rows + cols[None, :], mask=inside[None, :], other=0, eviction_policy="evict_first")
        acc0 = _multiply(q_ptr, w, acc0, cols, inside, BYTES)
        if M > 1:
            acc1 = _multiply(q_ptr + q_row, w, acc1, cols, inside, BYTES)
        if M > 2:
            acc2 = _multiply(q_ptr + 2 * q_row, w, acc2, cols, inside, BYTES)
        if M > 3:
            acc3 = _multiply(q_ptr + 3 * q_row, w, acc3, cols, inside, BYTES)
    if EARLY:
        gdc_launch_dependents()
    for i in tl.static_range(M):
        if i == 0:
            total = tl.sum(acc0, 1)
        elif i == 1:
            total = tl.sum(acc1, 1)
        elif i == 2:
            total = tl.sum(acc2, 1)
        else:
            total = tl.sum(acc3, 1)
        if SPLIT == 1:
            rm = i + tl.arange(0, 1)
            y = finish(total[None, :], rm, rn, M, N, w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride,
                       out_scale_ptr, X_ROWS, W_COLUMNS, ACT, DTYPE)  # fmt: skip
            tl.store(y_ptr + i * N + rn[None, :], y, mask=(rn < N)[None, :])
        else:
            tl.store(y_ptr + (part * M + i) * N + rn, total, mask=rn < N)


@triton.jit(do_not_specialize=["M"])
def add_parts(
    part_ptr, y_ptr, M, N,
    w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride, out_scale_ptr,
    X_ROWS: tl.constexpr, W_COLUMNS: tl.constexpr, ACT: tl.constexpr, DTYPE: tl.constexpr,
    BN: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The sum of int32 parts [SPLIT, M, N] and the epilogue, [1, BN] a program; integers add up the same in any order."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(1)
    rm = row + tl.arange(0, 1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (rn < N)[None, :]
    acc = tl.zeros((1, BN), dtype=tl.int32)
    for i in tl.static_range(SPLIT):
        acc += tl.load(part_ptr + (i * M + row).to(tl.int64) * N + rn[None, :], mask=mask, other=0)
    y = finish(acc, rm, rn, M, N, w_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, residual_stride,
               out_scale_ptr, X_ROWS, W_COLUMNS, ACT, DTYPE)  # fmt: skip
    tl.store(y_ptr + row.to(tl.int64) * N + rn[None, :], y, mask=mask)
