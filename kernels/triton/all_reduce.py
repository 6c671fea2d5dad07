"""all_reduce: the sum of what several GPUs have, each writing into the memory of the others.

    GPU r writes x into the memory of the others, says that it has, waits until they have, and adds up.

NCCL takes more than twice as long for what decoded tokens sum, and a fifth to a half more for the prompts of two GPUs. With two GPUs
no fewer bytes can be moved than x itself; with more, this moves ``count - 1`` times x, so large tensors are left to NCCL.

The memory of a GPU holds two halves, used in turns. Each has a place for what each GPU writes, and behind both halves there
is a number for each block of threads of each GPU: how often that block has been called. A block waits until the others' have
been called as often as itself. So nobody writes where somebody reads: who is at call n + 2 has seen that all are at n + 1,
which they began when call n was done. Numbers may overflow: differences of them do not.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sqcompile.kernels.triton.common import on
from sqcompile.kernels.triton.launching import launch

BLOCKS = 128  # of threads, which wait for those of other GPUs: all of them fit on a GPU at once
_WARPS = 16
_STEP = 16384  # bytes that a block moves at once: 512 threads, two accesses of 16 bytes each
_FLAG = 4  # bytes


def memory_bytes(place: int, count: int) -> int:
    """Of a GPU's memory, for ``count`` GPUs that write up to ``place`` bytes at a call; at first they are zeros."""
    return 2 * count * place + count * BLOCKS * _FLAG


@triton.jit
def _memory(memories, rank: tl.constexpr, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(memories + rank).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _all_reduce(
    x,
    out,
    memories,
    calls,
    size,
    span,
    place,
    rank: tl.constexpr,
    count: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEP: tl.constexpr,
):
    block = tl.program_id(0)
    call = tl.load(calls + block) + 1
    half = (call & 1).to(tl.int64) * count * place
    flags = 2 * count * place.to(tl.int64)  # behind the halves; in elements of x
    start = block * span
    end = tl.minimum(start + span, size)
    for i in range(start, end, STEP):
        at = i + tl.arange(0, STEP)
        values = tl.load(x + at, mask=at < end)
        for r in tl.static_range(count):
            if r != rank:
                tl.store(_memory(memories, r, x.dtype.element_ty) + half + rank * place + at, values, mask=at < end)
    tl.debug_barrier()  # all threads have written before one of them says so
    for r in tl.static_range(count):
        if r != rank:
            theirs = (_memory(memories, r, x.dtype.element_ty) + flags).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(theirs + rank * BLOCKS + block, call, sem="release", scope="sys")
    mine = _memory(memories, rank, x.dtype.element_ty)
    for r in tl.static_range(count):
        if r != rank:
            said = (mine + flags).to(tl.pointer_type(tl.int32)) + r * BLOCKS + block
            while tl.atomic_add(said, 0, sem="acquire", scope="sys") - call < 0:
                pass
    tl.debug_barrier()
    for i in range(start, end, STEP):
        at = i + tl.arange(0, STEP)
        total = tl.zeros([STEP], tl.float32)
        for r in tl.static_range(count):  # in one order on all GPUs, which get the same bits
            if r == rank:
                part = tl.load(x + at, mask=at < end, other=0.0)
            else:
                part = tl.load(mine + half + r * place + at, mask=at < end, other=0.0)
            total += part.to(tl.float32)
        tl.store(out + at, total.to(x.dtype.element_ty), mask=at < end)
    tl.store(calls + block, call)


def all_reduce(x: Tensor, out: Tensor, memories: Tensor, calls: Tensor, place: int, rank: int, count: int) -> None:
    """Writes the sum of all GPUs' x, added in float32 and rounded once, into ``out``.

    All GPUs call it in one order, each with x of one size and dtype; calls of one ``memories`` follow each other on a stream.

    Args:
        x, out: float32, bfloat16 or float16, contiguous, of at most ``place`` bytes.
        memories: int64 [count], the addresses of the GPUs' memories by rank, `memory_bytes` each.
        calls: int32 [BLOCKS], how often each block was called; at first zeros.
        place: in bytes, a multiple of 16.
        rank: of this GPU.
    """
    lanes = 16 // x.element_size()
    span = lanes * triton.cdiv(x.numel(), BLOCKS * lanes)
    step = min(triton.next_power_of_2(span), _STEP // x.element_size())
    with on(x.device):
        launch(
            _all_reduce, (BLOCKS,), x, out, memories, calls, x.numel(), span, place // x.element_size(), rank, count, BLOCKS,
            step, num_warps=_WARPS,
        )  # fmt: skip
