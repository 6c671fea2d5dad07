"""The lists of free and mixed blocks of an attention mask on CUDA, as `attention_int8.mask_blocks` defines them.

Bound by reading the mask once. No value comes back to the host, so that it runs in CUDA graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sqcompile.kernels.attention_int8 import MASK_BLOCK
from sqcompile.kernels.attention_parts import BLOCKED
from sqcompile.kernels.triton.common import on

_BLOCKED = tl.constexpr(BLOCKED)
_ROWS = 32
_ELEMENTS = 8192  # of the mask a program looks at in one step


@triton.jit(do_not_specialize=["heads", "queries", "keys"])
def _list_blocks(
    mask_ptr, blocks_ptr, heads, queries, keys, strides,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, BOOL: tl.constexpr,
):  # fmt: skip
    """One program for each [128, keys] of the mask, BLOCKS blocks of keys and ROWS rows a step."""
    bands = tl.cdiv(queries, BLOCK_ROWS)
    listed = tl.cdiv(keys, COLUMNS)
    band = tl.program_id(0) % bands
    head = tl.program_id(0) // bands % heads
    batch = tl.program_id(0) // bands // heads
    mask_ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    blocks_ptr += tl.program_id(0).to(tl.int64) * (listed + 2)
    number = tl.arange(0, BLOCKS)
    free_so_far = 0
    mixed_so_far = 0
    for first in range(0, listed, BLOCKS):
        cols = first * COLUMNS + tl.arange(0, BLOCKS * COLUMNS)
        some_seen = tl.zeros((BLOCKS * COLUMNS,), dtype=tl.int32)
        some_held = some_seen
        for row in range(band * BLOCK_ROWS, tl.minimum((band + 1) * BLOCK_ROWS, queries), ROWS):
            rows = row + tl.arange(0, ROWS)
            ptrs = mask_ptr + rows.to(tl.int64)[:, None] * strides[2] + cols.to(tl.int64)[None, :] * strides[3]
            inside = (rows < queries)[:, None] & (cols < keys)[None, :]
            x = tl.load(ptrs, mask=inside, other=0)
            if BOOL:
                seen = x != 0
                held = (x == 0) & inside
            else:
                seen = inside & ((x.to(tl.float32) > _BLOCKED) | (x != x))
                held = x != 0
            some_seen = tl.maximum(some_seen, tl.max(seen.to(tl.int32), 0))
            some_held = tl.maximum(some_held, tl.max(held.to(tl.int32), 0))
        seen = tl.max(some_seen.reshape(BLOCKS, COLUMNS), 1)
        held = tl.max(some_held.reshape(BLOCKS, COLUMNS), 1)
        j = first + number
        whole = (j + 1) * COLUMNS <= keys
        free = tl.where((held == 0) & whole, 1, 0)
        mixed = tl.where((j < listed) & (seen != 0) & (free == 0), 1, 0)
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
    read = min(_ROWS, triton.next_power_of_2(queries))
    step = max(1, min(triton.next_power_of_2(max(1, listed)), _ELEMENTS // (read * columns)))
    with on(mask.device):
        _list_blocks[(batch * heads * bands,)](
            values, blocks, heads, queries, keys, values.stride(), read, rows, columns, step, is_bool, num_warps=8,
        )  # fmt: skip
    return blocks.flatten(2)
