"""Attention on Hopper with separate warps for loading and for computing, in Gluon, which makes both explicit.

Two groups of four warps compute 64 rows of queries each, and neither waits for the other, so that the tensor cores
multiply for one while the other takes exponentials; a further warp keeps the ring of keys and values full. Programs
are persistent: the next tile's operands are loaded while the last one's are stored. The arithmetic is that of
`attention_kernels._block`; causal or not, no mask tensor and no softcap.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sqcompile.kernels.triton import attention_kernels

# its name since Triton 3.7, and before
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

HALF_ROWS = gl.constexpr(64)  # of a tile, to each group
MAGIC = gl.constexpr(attention_kernels.MAGIC.value)
ROUND = gl.constexpr(attention_kernels.ROUND.value)
LOG2E = gl.constexpr(attention_kernels.LOG2E.value)
SMALLEST = gl.constexpr(attention_kernels.SMALLEST.value)


@gluon.jit
def _place(t, tiles, all_heads, section, CAUSAL: gl.constexpr):
    """(tile, batch and head) of the t-th piece of work, in the order of `attention_kernels.forward`."""
    first = t // (section * tiles) * section
    size = gl.minimum(all_heads - first, section)
    inner = t - first * tiles
    tile = inner // size
    if CAUSAL:
        tile = tiles - 1 - tile
    return tile, first + inner % size


@gluon.jit
def _turns(work):
    """How many tiles this program takes of ``work``: one of each round, in which every program takes one."""
    full = work // gl.num_programs(0)
    last = _turn(full) - full * gl.num_programs(0)
    return full + gl.where(last < work % gl.num_programs(0), 1, 0)


@gluon.jit
def _turn(n):
    """The piece of work of the n-th round: rounds go back and forth, as pieces get smaller from each to the next."""
    programs = gl.num_programs(0)
    return n * programs + gl.where(n % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))


@gluon.jit
def _blocks(tile, Sq, Sk, diagonal, BN: gl.constexpr, CAUSAL: gl.constexpr):
    """How many blocks of keys the rows of a tile see."""
    limit = Sk
    if CAUSAL:
        last = gl.minimum((tile + 1) * (2 * HALF_ROWS), Sq) + diagonal
        limit = gl.maximum(gl.minimum(Sk, last), 0)
    return gl.cdiv(limit, BN)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, Sq, Sk, diagonal, section, tiles, work,
    GROUP: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries of each tile, two tiles ahead at most, and keys and values through a ring of STAGES buffers."""
    n = 0
    for turn in range(_turns(work)):
        tile, which = _place(_turn(turn), tiles, work // tiles, section, CAUSAL)
        b = which // heads
        h = which % heads
        g = h // GROUP
        for half in gl.static_range(2):
            place = turn % 2 * 2 + half
            mbarrier.wait(q_empty.index(place), (turn // 2 & 1) ^ 1)
            mbarrier.expect(q_full.index(place), q_desc.block_type.nbytes)
            row = tile * (2 * HALF_ROWS) + half * HALF_ROWS
            async_load(q_desc, [b, h, row, 0], q_full.index(place), q_smem.index(place))
        for i in range(_blocks(tile, Sq, Sk, diagonal, BN, CAUSAL)):
            stage = n % STAGES
            phase = (n // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            async_load(k_desc, [b, g, i * BN, 0], k_full.index(stage), k_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            async_load(v_desc, [b, g, i * BN, 0], v_full.index(stage), v_smem.index(stage))
            n += 1


@gluon.jit
def _block(
    acc, total, top, n, start, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, factor, seen, Sk,
    k_scale_ptr, C: gl.constexpr, CV: gl.constexpr, BN: gl.constexpr, EDGE: gl.constexpr,
    CAUSAL: gl.constexpr, PER_KEY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The n-th block of keys since the kernel began, from key ``start``; acc: P V of the one before may be under way."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CV, 16])
    stage = n % STAGES
    phase = n // STAGES & 1
    cols = start + gl.arange(0, BN, gl.SliceLayout(0, scores))
    if PER_KEY:
        if EDGE:
            columns = gl.load(k_scale_ptr + cols, mask=cols < Sk, other=0.0)
        else:
            columns = gl.load(k_scale_ptr + cols)
    offset = gl.full([HALF_ROWS, BN], MAGIC, gl.int32, scores)
    mbarrier.wait(k_full.index(stage), phase)
    keys = k_smem.index(stage).reshape([BN, C]).permute([1, 0])
    x = warpgroup_mma(q, keys, offset, is_async=True)
    x, acc = warpgroup_mma_wait(0, [x, acc])
    mbarrier.arrive(k_empty.index(stage))
    mbarrier.arrive(v_empty.index((n + STAGES - 1) % STAGES), pred=n > 0)
    x = x.to(gl.float32, bitcast=True)
    if PER_KEY:
        x = (x - ROUND) * gl.expand_dims(columns, 0)
    if EDGE:
        inside = gl.expand_dims(cols < Sk, 0)
        if CAUSAL:
            inside = inside & (gl.expand_dims(cols, 0) <= gl.expand_dims(seen, 1))
        x = gl.where(inside, x, -float("inf"))
    new = gl.maximum(top, gl.max(x, 1) * factor)
    safe = new
    if EDGE:
        safe = gl.where(new == -float("inf"), 0.0, new)
    decay = gl.exp2(top - safe)
    p = gl.exp2(gl.fma(x, gl.expand_dims(factor, 1), gl.expand_dims(-safe, 1)))
    total = total * decay + gl.sum(p, 1)
    acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, outputs)), 1)
    p = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, outputs, 2))
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([BN, CV]), acc, is_async=True)
    return acc, total, new


@gluon.jit
def _compute(
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    out_ptr, q_scale_ptr, k_scale_ptr, out_strides, q_scale_strides, k_scale_strides,
    heads, Sq, Sk, diagonal, scale, section, tiles, work,
    HALF: gl.constexpr, GROUP: gl.constexpr, C: gl.constexpr, CV: gl.constexpr, VWIDTH: gl.constexpr,
    BN: gl.constexpr, CAUSAL: gl.constexpr, PER_KEY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A computing group: rows HALF · 64 to HALF · 64 + 63 of each tile."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CV, 16])
    n = 0
    for turn in range(_turns(work)):
        tile, which = _place(_turn(turn), tiles, work // tiles, section, CAUSAL)
        b = (which // heads).to(gl.int64)
        h = (which % heads).to(gl.int64)
        g = h // GROUP
        row = tile * (2 * HALF_ROWS) + HALF * HALF_ROWS
        s = row + gl.arange(0, HALF_ROWS, gl.SliceLayout(1, scores))
        ptrs = q_scale_ptr + b * q_scale_strides[0] + h * q_scale_strides[1] + s.to(gl.int64) * q_scale_strides[2]
        factor = gl.load(ptrs, mask=s < Sq, other=0.0) * (scale * LOG2E)
        of_head = b * k_scale_strides[0] + g * k_scale_strides[1]
        if not PER_KEY:
            factor = factor * gl.load(k_scale_ptr + of_head)
        factor = gl.where(factor < SMALLEST, SMALLEST, factor)
        seen = s + diagonal
        end = _blocks(tile, Sq, Sk, diagonal, BN, CAUSAL)
        middle = Sk // BN
        if CAUSAL:
            middle = gl.minimum(middle, gl.maximum(row + diagonal + 1, 0) // BN)
        middle = gl.minimum(middle, end)

        acc = warpgroup_mma_init(gl.zeros([HALF_ROWS, CV], gl.float32, outputs))
        total = gl.zeros([HALF_ROWS], gl.float32, gl.SliceLayout(1, scores))
        top = gl.full([HALF_ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, scores))
        place = turn % 2 * 2 + HALF
        q = q_smem.index(place).reshape([HALF_ROWS, C])
        mbarrier.wait(q_full.index(place), turn // 2 & 1)
        for i in range(middle):
            acc, total, top = _block(
                acc, total, top, n, i * BN, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, factor, seen, Sk,
                k_scale_ptr + of_head, C, CV, BN, False, CAUSAL, PER_KEY, STAGES)  # fmt: skip
            n += 1
        for i in range(middle, end):
            acc, total, top = _block(
                acc, total, top, n, i * BN, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, factor, seen, Sk,
                k_scale_ptr + of_head, C, CV, BN, True, CAUSAL, PER_KEY, STAGES)  # fmt: skip
            n += 1
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(q_empty.index(place))

        total = gl.convert_layout(total, gl.SliceLayout(1, outputs))
        out = acc / gl.expand_dims(gl.where(total == 0.0, 1.0, total), 1)
        cv = gl.arange(0, CV, gl.SliceLayout(0, outputs))
        s = row + gl.arange(0, HALF_ROWS, gl.SliceLayout(1, outputs))
        rows = out_ptr + b * out_strides[0] + h * out_strides[1] + s.to(gl.int64) * out_strides[2]
        inside = gl.expand_dims(s < Sq, 1) & gl.expand_dims(cv < VWIDTH, 0)
        gl.store(gl.expand_dims(rows, 1) + gl.expand_dims(cv, 0), out.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit(
    do_not_specialize=[
        "qs_b",
        "qs_h",
        "qs_s",
        "ks_b",
        "ks_g",
        "heads",
        "Sq",
        "Sk",
        "diagonal",
        "section",
        "tiles",
        "work",
    ]
)
def forward(
    q_desc, k_desc, v_desc, out_ptr, q_scale_ptr, k_scale_ptr,
    out_strides, qs_b, qs_h, qs_s, ks_b, ks_g, heads, Sq, Sk, diagonal, scale, section, tiles, work,
    GROUP: gl.constexpr, VWIDTH: gl.constexpr, C: gl.constexpr, CV: gl.constexpr, BN: gl.constexpr,
    CAUSAL: gl.constexpr, PER_KEY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 rows of queries, persistent; parameters as of `attention_kernels.forward`."""
    q_smem = gl.allocate_shared_memory(gl.int8, [4, 1, 1, HALF_ROWS, C], q_desc.layout)
    k_smem = gl.allocate_shared_memory(gl.int8, [STAGES, 1, 1, BN, C], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BN, CV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)  # both groups
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    # the tuples are written out here, as constants in a tuple that has a name are none any more
    gl.warp_specialize(
        [
            (_compute, (
                q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                out_ptr, q_scale_ptr, k_scale_ptr, out_strides, (qs_b, qs_h, qs_s), (ks_b, ks_g),
                heads, Sq, Sk, diagonal, scale, section, tiles, work,
                gl.constexpr(0), GROUP, C, CV, VWIDTH, BN, CAUSAL, PER_KEY, STAGES,
            )),
            (_compute, (
                q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                out_ptr, q_scale_ptr, k_scale_ptr, out_strides, (qs_b, qs_h, qs_s), (ks_b, ks_g),
                heads, Sq, Sk, diagonal, scale, section, tiles, work,
                gl.constexpr(1), GROUP, C, CV, VWIDTH, BN, CAUSAL, PER_KEY, STAGES,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                heads, Sq, Sk, diagonal, section, tiles, work, GROUP, BN, CAUSAL, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fits(width: int, v: Tensor) -> bool:
    """Whether the registers of a group hold its outputs, and v is what its tensor cores take."""
    return max(width, v.shape[3]) <= 256 and v.element_size() == 2


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, q_scale: Tensor, k_scale: Tensor, per_key: bool, diagonal: int | None,
    scale: float, *, bn: int, stages: int, c: int, cv: int, section: int, programs: int,
) -> None:  # fmt: skip
    """q [B, H, Sq, D], k, v and out as of `attention.int8_attention`, all of them fit for TMA; scales expanded.

    per_key: k_scale [B, G, Sk, 1] has a scale for each key, and not one for each head.
    """
    if per_key and k_scale.stride(2) != 1:
        k_scale = k_scale.contiguous()
    batch, heads, queries, _ = q.shape
    tiles = -(-queries // (2 * HALF_ROWS.value))
    work = tiles * batch * heads
    forward[(min(programs, work),)](
        _descriptor(q, HALF_ROWS.value, c, gl.int8), _descriptor(k, bn, c, gl.int8),
        _descriptor(v, bn, cv, gl.float16 if str(v.dtype) == "torch.float16" else gl.bfloat16), out, q_scale, k_scale,
        out.stride()[:3], *q_scale.stride()[:3], *k_scale.stride()[:2],
        heads, queries, k.shape[2], diagonal or 0, scale, section, tiles, work,
        heads // k.shape[1], out.shape[3], c, cv, bn, diagonal is not None, per_key, stages, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _descriptor(x: Tensor, rows: int, columns: int, dtype: Any) -> TensorDescriptor:
    block = [1, 1, rows, columns]
    strides = [s if size > 1 else 16 for s, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)
