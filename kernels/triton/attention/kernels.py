"""The attention kernel: q kᵀ and P V in INT8 or float, online softmax in float32. `attention.py` launches it.

A score costs one integer and one float instruction before its exponential. The int32 product x, |x| <= 127² · 256 <
2²², becomes a float by adding the bits of 1.5 · 2²³: read as a float, the sum is 1.5 · 2²³ + x exactly. The offset
stays in the running maximum, too, and cancels there: p = 2^(bits · f - top) is one fma, f = Δq Δk scale log2(e) of the row.
`top` need not be the exact maximum, only the same number for the whole row, so its own rounding does no harm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sqcompile.kernels.attention_parts import BLOCKED, MASK_BLOCK
from sqcompile.kernels.triton.attention.split import rows_of, scaled
from sqcompile.kernels.triton.common import ROUND, absmax, finite_of, reciprocal, scale_of, to_int8

MAGIC = tl.constexpr(0x4B400000)  # the bits of 1.5 · 2²³, `ROUND`
LOG2E = tl.constexpr(1.4426950408889634)
LOG2_127 = tl.constexpr(6.988684686772166)
BLOCKED_ABOVE = tl.constexpr(BLOCKED)
MASK_ROWS = tl.constexpr(MASK_BLOCK[0])
MASK_COLUMNS = tl.constexpr(MASK_BLOCK[1])
SMALLEST = tl.constexpr(1e-30)  # of a row's factor: -inf · 0 would be NaN, and 2^22 of them are still no score at all
ONE_ULP = tl.constexpr(2.0**-22)


@triton.jit
def _load(x, b, g, start, strides, size, N: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, EDGE: tl.constexpr,
          TMA: tl.constexpr):  # fmt: skip
    """[N, C] of x [B, G, size, WIDTH] from row ``start``, a descriptor or a pointer; zero outside."""
    if TMA:
        y = x.load([b, g, start, 0]).reshape(N, C)
    else:
        rows = start + tl.arange(0, N)
        cols = tl.arange(0, C)
        ptrs = x + rows_of(strides, b, g, rows)[:, None] + cols[None, :]
        if EDGE or WIDTH != C:
            y = tl.load(ptrs, mask=(rows < size)[:, None] & (cols < WIDTH)[None, :], other=0)
        else:
            y = tl.load(ptrs)
    return y


@triton.jit
def _load_turned(x, b, g, start, strides, size, C: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
                 EDGE: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """[C, N] of x [B, G, WIDTH, size], columns from ``start``."""
    if TMA:
        y = x.load([b, g, 0, start]).reshape(C, N)
    else:
        rows = tl.arange(0, C)
        cols = start + tl.arange(0, N)
        ptrs = x + rows_of(strides, b, g, rows)[:, None] + cols[None, :]
        if EDGE or WIDTH != C:
            y = tl.load(ptrs, mask=(rows < WIDTH)[:, None] & (cols < size)[None, :], other=0)
        else:
            y = tl.load(ptrs)
    return y


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(2.8853900817779268 * x))


@triton.jit
def _add_mask(y, mask_ptr, b, h, s, cols, strides, inside):
    """y in units of log2, plus the mask of rows (h, s)."""
    ptrs = mask_ptr + rows_of(strides, b, h, s)[:, None] + cols.to(tl.int64)[None, :] * strides[3]
    mask = tl.load(ptrs, mask=inside, other=0)
    if mask_ptr.dtype.element_ty == tl.uint8:  # a bool
        y = tl.where(mask != 0, y, -float("inf"))
    else:
        mask = mask.to(tl.float32)
        y = tl.where(mask <= BLOCKED_ABOVE, -float("inf"), y + mask * LOG2E)
    return y


@triton.jit
def _number(blocks_ptr, i, free, listed, RATIO: tl.constexpr):
    """The number of the i-th block of keys of a list (see `mask_blocks`), or i without one."""
    j = i
    if blocks_ptr is not None:
        place = i // RATIO
        inner = i - place * RATIO
        place = tl.where(place < free, place, listed - 1 - (place - free))
        j = tl.load(blocks_ptr + 2 + place) * RATIO + inner
    return j


@triton.jit
def _product(q, k, b, g, j, strides, Sk, BN: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, EDGE: tl.constexpr,
             TMA: tl.constexpr):  # fmt: skip
    """q kᵀ for block j of the keys, float32 [BM, BN]; of integers plus `ROUND`, where a tensor core's sum may start."""
    keys = _load(k, b, g, j * BN, strides, Sk, BN, C, WIDTH, EDGE, TMA)
    if q.dtype == tl.int8:
        x = (tl.dot(q, keys.T, out_dtype=tl.int32) + MAGIC).to(tl.float32, bitcast=True)
    else:
        x = tl.dot(q, keys.T)
    return x


@triton.jit
def _block(acc, total, top, x, j, factor, v, b, g, h, s, seen, Sk, softcap, k_scale_ptr, k_scale_strides,
           mask_ptr, mask_strides, v_strides,
           BN: tl.constexpr, VWIDTH: tl.constexpr, CV: tl.constexpr,
           EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, SOFTCAP: tl.constexpr,
           PV: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Block j of keys: the sums so far, rescaled, and its own. acc [BM, CV], total and top [BM].

    x: its `_product`. seen: the last key each row sees. EDGE: keys may lie outside, or not be seen. EXACT: the offset
    of integer scores is taken off before the maximum, as a mask, a softcap or scales of keys need it. PV: "float",
    "int8" (v is turned) or "cast" (an int8 v, multiplied as float).
    """
    start = j * BN
    cols = start + tl.arange(0, BN)
    if k_scale_ptr is not None:
        # rounding Δk · offset moves scores by less than one unit of the integer product
        if EDGE:
            columns = tl.load(k_scale_ptr + rows_of(k_scale_strides, b, g, cols), mask=cols < Sk, other=0.0)
        else:
            columns = tl.load(k_scale_ptr + rows_of(k_scale_strides, b, g, cols))
        x = tl.fma(x, columns[None, :], (columns * -ROUND)[None, :])
    elif EXACT:
        x = x - ROUND
    if SOFTCAP or MASKED:
        x = x * factor[:, None]
        if SOFTCAP:
            x = _tanh(x * (1.0 / softcap)) * (softcap * LOG2E)
    if EDGE:
        inside = (cols < Sk)[None, :]
        if CAUSAL:
            inside = inside & (cols[None, :] <= seen[:, None])
        if MASKED:
            x = _add_mask(x, mask_ptr, b, h, s, cols, mask_strides, inside)
        x = tl.where(inside, x, -float("inf"))
    near = tl.max(x, 1)
    if not (SOFTCAP or MASKED):
        near = near * factor
    if PV == "int8":
        # so that no p exceeds 127 by half: the fma below knows the exact product
        near = tl.where(near == -float("inf"), near, near + tl.abs(near) * ONE_ULP)
    new = tl.maximum(top, near)
    # P̂ is relative to the maximum of its block, P in float to the maximum of the row so far
    origin = near if PV == "int8" else new
    origin = tl.where(origin == -float("inf"), 0.0, origin)
    safe = tl.where(new == -float("inf"), 0.0, new)
    decay = tl.exp2(top - safe)
    if PV == "int8":
        grow = tl.exp2(near - safe)
        origin = origin - LOG2_127
    if SOFTCAP or MASKED:
        p = tl.exp2(x - origin[:, None])
    else:
        p = tl.exp2(tl.fma(x, factor[:, None], -origin[:, None]))
    if PV == "int8":
        total = total * decay + tl.sum(p, 1) * grow
        p = (p + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
        values = _load_turned(v, b, g, start, v_strides, Sk, CV, BN, VWIDTH, EDGE, TMA)
        part = (tl.dot(p, values.T, out_dtype=tl.int32) + MAGIC).to(tl.float32, bitcast=True) - ROUND
        acc = acc * decay[:, None] + part * grow[:, None]
    else:
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        values = _load(v, b, g, start, v_strides, Sk, BN, CV, VWIDTH, EDGE, TMA)
        if PV == "cast":
            values = values.to(tl.float16)  # exact, and finer than bfloat16 for p
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="tf32")
    return acc, total, new


@triton.jit(do_not_specialize=["heads", "Sq", "Sk", "diagonal", "section", "splits"])
def forward(
    q_ptr, q8_ptr, k, v, out_ptr, part_ptr, q_scale_ptr, k_one_ptr, k_scale_ptr, v_scale_ptr, mask_ptr, blocks_ptr,
    q_strides, k_strides, v_strides, out_strides, q_scale_strides, k_scale_strides, v_scale_strides,
    mask_strides, blocks_strides,
    heads, Sq, Sk, diagonal, scale, softcap, section, splits,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, VWIDTH: tl.constexpr, C: tl.constexpr, CV: tl.constexpr,
    GROUP: tl.constexpr, PACK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PV: tl.constexpr,
    TMA: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """BM rows of queries against the keys, or against one of ``splits`` parts of them.

    A row is a query, int8 or quantized here (with q_scale_ptr, or with a scale of its own), or in float as the keys are
    (``FLOAT``); with PACK heads a query of one of the heads that share a key head, all of which read each key once.
    k_one_ptr: the scale of a key head; k_scale_ptr: one per key; one of them is given for int8 keys. Programs take the
    tiles with most keys first, over ``section`` heads at a time, whose keys and values stay in L2. part_ptr: where splits
    leave their sums, float32 [splits, B · H · Sq, Dv + 2], to be put together by `attention_split.combine`. q8_ptr: room
    for queries that are quantized here, int8 [B · H · Sq, C].
    """
    tiles = tl.cdiv(Sq * PACK, BM)
    key_heads = heads // GROUP
    these = key_heads if PACK > 1 else heads  # what a program takes a tile of
    pid = tl.program_id(0)
    first = pid // (section * tiles) * section
    size = tl.minimum(tl.num_programs(0) // tiles - first, section)
    inner = pid % (section * tiles)
    tile = inner // size
    if CAUSAL:
        tile = tiles - 1 - tile
    which = first + inner % size
    b = which // these
    rows = tile * BM + tl.arange(0, BM)
    if PACK > 1:
        g = which % these
        s = rows // PACK
        h = g * PACK + rows % PACK
    else:
        h = which % these
        g = h // GROUP
        s = rows
    inside = s < Sq
    held = tl.minimum(s, Sq - 1)  # rows of the mask, which has none for the rest of a tile
    part = tl.program_id(1)

    c = tl.arange(0, C)
    q_ptrs = q_ptr + rows_of(q_strides, b, h, s)[:, None] + c[None, :]
    q = tl.load(q_ptrs, mask=inside[:, None] & (c < WIDTH)[None, :], other=0)
    if FLOAT:
        q_scale = tl.full((BM,), 1.0, dtype=tl.float32)
    elif q_scale_ptr is None:
        q_scale = scale_of(absmax(q.to(tl.float32), 1))
    else:
        q_scale = tl.load(q_scale_ptr + rows_of(q_scale_strides, b, h, s), mask=inside, other=0.0)
        if q.dtype != tl.int8:
            # read apart, for the cache has it by now: values that wait in registers for two readers would spill
            again = tl.load(q_ptrs, mask=inside[:, None] & (c < WIDTH)[None, :], other=0, eviction_policy="evict_last")
            q_scale = q_scale * finite_of(absmax(again.to(tl.float32), 1))
    if q.dtype != tl.int8 and not FLOAT:
        q = to_int8(q.to(tl.float32), reciprocal(q_scale)[:, None])
        if q8_ptr is not None:
            # by way of memory: wgmma would read from registers what comes from registers, which takes a fifth longer
            q8_ptrs = q8_ptr + ((b.to(tl.int64) * heads + h) * Sq + s)[:, None] * C + c[None, :]
            tl.store(q8_ptrs, q, mask=inside[:, None])
            tl.debug_barrier()
            q = tl.load(q8_ptrs, mask=inside[:, None], other=0)
    factor = q_scale * scale
    if k_one_ptr is not None:
        factor = factor * tl.load(k_one_ptr + rows_of(k_scale_strides, b, g, 0 * g))
    if not SOFTCAP:
        factor = factor * LOG2E
    factor = tl.where(factor < SMALLEST, SMALLEST, factor)

    MASKED: tl.constexpr = mask_ptr is not None
    EXACT: tl.constexpr = (MASKED or SOFTCAP) and not FLOAT
    seen = s + diagonal
    limit = Sk
    whole = Sk
    if CAUSAL:
        limit = tl.maximum(tl.minimum(Sk, tl.minimum((tile * BM + BM - 1) // PACK, Sq - 1) + diagonal + 1), 0)
        whole = tl.maximum(tl.minimum(Sk, (tile * BM) // PACK + diagonal + 1), 0)
    end = tl.cdiv(limit, BN)
    middle = whole // BN
    if MASKED:
        middle = 0
    RATIO: tl.constexpr = MASK_COLUMNS // BN
    free = 0
    listed = tl.cdiv(Sk, MASK_COLUMNS)
    if blocks_ptr is not None:
        blocks_ptr += rows_of(blocks_strides, b, h if PACK == 1 else g * 0, (tile * BM) // PACK // MASK_ROWS)
        free = tl.load(blocks_ptr)
        middle = free * RATIO
        end = middle + tl.load(blocks_ptr + 1) * RATIO
    each = tl.cdiv(end, splits)
    low = tl.minimum(part * each, end)
    high = tl.minimum(low + each, end)
    middle = tl.minimum(tl.maximum(middle, low), high)

    acc = tl.zeros((BM, CV), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    top = tl.full((BM,), -float("inf"), dtype=tl.float32)
    for i in tl.range(low, middle):
        j = _number(blocks_ptr, i, free, listed, RATIO)
        x = _product(q, k, b, g, j, k_strides, Sk, BN, C, WIDTH, False, TMA)
        acc, total, top = _block(
            acc, total, top, x, j, factor, v, b, g, h, held, seen, Sk, softcap, k_scale_ptr, k_scale_strides,
            mask_ptr, mask_strides, v_strides, BN, VWIDTH, CV, False, False, False, EXACT, SOFTCAP, PV, TMA)  # fmt: skip
    for i in tl.range(middle, high):
        j = _number(blocks_ptr, i, free, listed, RATIO)
        x = _product(q, k, b, g, j, k_strides, Sk, BN, C, WIDTH, True, TMA)
        acc, total, top = _block(
            acc, total, top, x, j, factor, v, b, g, h, held, seen, Sk, softcap, k_scale_ptr, k_scale_strides,
            mask_ptr, mask_strides, v_strides, BN, VWIDTH, CV, True, CAUSAL, MASKED, EXACT, SOFTCAP, PV, TMA)  # fmt: skip

    cv = tl.arange(0, CV)
    stored = inside[:, None] & (cv < VWIDTH)[None, :]
    if part_ptr is not None:
        row = (part.to(tl.int64) * (tl.num_programs(0) // tiles // these) + b) * heads * Sq + h * Sq + s
        part_ptr += row * (VWIDTH + 2)
        tl.store(part_ptr[:, None] + cv[None, :], acc, mask=stored)
        tl.store(part_ptr + VWIDTH, total, mask=inside)
        tl.store(part_ptr + VWIDTH + 1, top, mask=inside)
    else:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out = scaled(out, v_scale_ptr, v_scale_strides, b, g, cv, VWIDTH)
        tl.store(
            out_ptr + rows_of(out_strides, b, h, s)[:, None] + cv[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=stored,
        )
