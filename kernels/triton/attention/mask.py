"""The lists of free and mixed blocks of an attention mask on CUDA, as `attention_int8.mask_blocks` defines them.

Bound by reading the mask once. No value comes back to the host, so that it runs in CUDA graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sqcompile.kernels.attention_parts import BLOCKED, MASK_BLOCK
from sqcompile.kernels.triton.common import on
from sqcompile.kernels.triton.launching import launch

_BLOCKED = tl.constexpr(BLOCKED)
_ELEMENTS = 16384  # of the mask a program looks at
_LIST = 256  # blocks of a row listed in one step


@triton.jit(do_not_specialize=["heads", "queries", "keys"])
def _classify(
    mask_ptr, kinds_ptr, heads, queries, keys, strides,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, BOOL: tl.constexpr,
):  # fmt: skip
    """What blocks hold: 0 nothing that is seen, 2 nothing but free entries, 1 else. A program looks at BLOCKS of them."""
    bands = tl.cdiv(queries, BLOCK_ROWS)
    listed = tl.cdiv(keys, COLUMNS)
    band = tl.program_id(0) % bands
    head = tl.program_id(0) // bands % heads
    batch = tl.program_id(0) // bands // heads
    rows = band * BLOCK_ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCKS * COLUMNS + tl.arange(0, BLOCKS * COLUMNS)
    mask_ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    ptrs = mask_ptr + rows.to(tl.int64)[:, None] * strides[2] + cols.to(tl.int64)[None, :] * strides[3]
    inside = (rows < queries)[:, None] & (cols < keys)[None, :]
    x = tl.load(ptrs, mask=inside, other=0)
    if BOOL:
        seen = x != 0
        held = (x == 0) & inside
    else:
        seen = inside & ((x.to(tl.float32) > _BLOCKED) | (x != x))
        held = x != 0
    seen = tl.max(tl.max(seen.to(tl.int32), 0).reshape(BLOCKS, COLUMNS), 1)
    held = tl.max(tl.max(held.to(tl.int32), 0).reshape(BLOCKS, COLUMNS), 1)
    j = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    free = (held == 0) & ((j + 1) * COLUMNS <= keys)
    kind = tl.where(free, 2, tl.where(seen != 0, 1, 0))
    tl.store(kinds_ptr + tl.program_id(0).to(tl.int64) * listed + j, kind.to(tl.int8), mask=j < listed)


@triton.jit(do_not_specialize=["listed"])
def _list(kinds_ptr, blocks_ptr, listed, BLOCK: tl.constexpr):
    """The lists of one row of blocks."""
    kinds_ptr += tl.program_id(0).to(tl.int64) * listed
    blocks_ptr += tl.program_id(0).to(tl.int64) * (listed + 2)
    free_so_far = 0
    mixed_so_far = 0
    for first in range(0, listed, BLOCK):
        j = first + tl.arange(0, BLOCK)
        kind = tl.load(kinds_ptr + j, mask=j < listed, other=0)
        free = (kind == 2).to(tl.int32)
        mixed = (kind == 1).to(tl.int32)
        tl.store(blocks_ptr + 1 + free_so_far + tl.cumsum(free, 0), j, mask=free != 0)
        tl.store(blocks_ptr + 2 + listed - mixed_so_far - tl.cumsum(mixed, 0), j, mask=mixed != 0)
        free_so_far += tl.sum(free, 0)
        mixed_so_far += tl.sum(mixed, 0)
    tl.store(blocks_ptr, free_so_far)
    tl.store(blocks_ptr + 1, mixed_so_far)


def mask_blocks(mask: Tensor) -> Tensor:
    """`sqcompile.kernels.attention_int8.mask_blocks` for a mask with any strides."""
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    batch, heads, queries, keys = mask.shape
    rows, columns = MASK_BLOCK
    bands, listed = triton.cdiv(queries, rows), triton.cdiv(keys, columns)
    blocks = torch.full((batch, heads, bands, 2 + listed), -1, dtype=torch.int32, device=mask.device)
    if blocks.shape[:3].numel() == 0:
        return blocks.flatten(2)
    is_bool = mask.dtype == torch.bool
    values = mask.view(torch.uint8) if is_bool else mask
    read = min(rows, triton.next_power_of_2(queries))
    step = max(1, min(triton.next_power_of_2(max(1, listed)), _ELEMENTS // (read * columns)))
    kinds = torch.empty((batch * heads * bands, listed), dtype=torch.int8, device=mask.device)
    with on(mask.device):
        if listed:
            launch(
                _classify, (len(kinds), triton.cdiv(listed, step)), values, kinds, heads, queries, keys, values.stride(), read, rows, columns, step, is_bool, num_warps=8,
            )  # fmt: skip
        launch(
            _list, (len(kinds),), kinds, blocks, listed, min(_LIST, triton.next_power_of_2(max(1, listed))), num_warps=4
        )
    return blocks.flatten(2)
