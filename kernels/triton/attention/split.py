"""What attention leaves in parts of its keys, put together; and what both kernels share of addresses and scales."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(strides, b, h, s):
    """int64 offset of rows s of heads h (either may be a vector) for strides (batch, head, row)."""
    return b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + s.to(tl.int64) * strides[2]


@triton.jit
def scaled(out, v_scale_ptr, strides, b, g, cv, VWIDTH: tl.constexpr):
    """out [rows, CV] · Δv, one per channel."""
    if v_scale_ptr is not None:
        out = out * tl.load(v_scale_ptr + rows_of(strides, b, g, cv), mask=cv < VWIDTH, other=0.0)[None, :]
    return out


@triton.jit(do_not_specialize=["heads", "groups", "Sq", "splits"])
def combine(
    part_ptr, out_ptr, v_scale_ptr, out_strides, v_scale_strides, heads, groups, Sq, splits,
    SPLITS: tl.constexpr, VWIDTH: tl.constexpr, CV: tl.constexpr,
):  # fmt: skip
    """The sums of all parts of one row, weighted by their maxima: one program a row of [B, H, Sq]."""
    row = tl.program_id(0)
    s = row % Sq
    h = row // Sq % heads
    b = row // Sq // heads
    parts = tl.arange(0, SPLITS)
    cv = tl.arange(0, CV)
    there = parts < splits
    ptrs = part_ptr + (parts.to(tl.int64) * tl.num_programs(0) + row) * (VWIDTH + 2)
    top = tl.load(ptrs + VWIDTH + 1, mask=there, other=-float("inf"))
    best = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(best == -float("inf"), 0.0, best))
    total = tl.sum(tl.load(ptrs + VWIDTH, mask=there, other=0.0) * weight, 0)
    acc = tl.load(ptrs[:, None] + cv[None, :], mask=there[:, None] & (cv < VWIDTH)[None, :], other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out = scaled(out[None, :], v_scale_ptr, v_scale_strides, b, h // (heads // groups), cv, VWIDTH)
    offsets = rows_of(out_strides, b, h, s) + cv[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=(cv < VWIDTH)[None, :])
