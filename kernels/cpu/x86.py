"""INT8 linears on x86 CPUs: u8 x s8 by oneDNN, and by kernels of our own where they are faster (vnni.cpp, amx.cpp).

oneDNN multiplies uint8 activations by int8 weights; with int8 activations it falls to a reference loop on CPUs without
AMX, four orders of magnitude slower. So the activations carry a zero point of 128, taken out of the int32 sum again:
exactly the sum of `reference.int8_matmul`.

oneDNN is written for many rows: for few, its kernels leave more than half of the memory bandwidth unused. Our kernels
read oneDNN's own packed weight, so that one int8 copy serves prefill and decode.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

import torch
from torch import Tensor

from sqcompile.kernels.cpu import onednn
from sqcompile.kernels.cpu.build import built
from sqcompile.kernels.reference import UINT8_ZERO_POINT
from sqcompile.pytorch.core import has_amx, has_vnni, init_amx

BLOCK = 64  # output channels per block of the packed weight
DEPTH = 64  # input channels are padded to a multiple of this
# Up to here the VNNI kernel is faster than oneDNN on every shape measured (`python -m sqcompile.bench cpu`).
VNNI_ROWS = 32
# From here AMX tiles beat AVX512-VNNI, where the CPU has them.
AMX_ROWS = 4
# From so many queries on `flash` is faster than PyTorch's attention: with AMX, whose tiles are to be filled, and without.
FLASH_QUERIES_AMX, FLASH_QUERIES = 32, 8
# Linux's advice numbers: use huge pages from now on, and for what is there already (Linux 6.1).
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25


def available() -> bool:
    """Whether this CPU multiplies u8 by s8 without saturating between (VNNI); plain AVX2 does not."""
    return torch.backends.mkldnn.is_available() and has_vnni()


def pack(w: Tensor) -> Tensor:
    """int8 [N, K] in oneDNN's blocked layout. The result is opaque: it has no storage and cannot be saved."""
    packed = onednn.prepack(w)
    _use_huge_pages(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
    return packed


def row_sum(w: Tensor, packed: Tensor) -> Tensor:
    """int32 [N], the sum of each row of w, int8 [N, K]; empty if ``packed`` has a layout our kernels cannot read."""
    if not _readable(packed, w):
        return torch.empty(0, dtype=torch.int32)
    # A few rows at a time, in one buffer. PyTorch makes a copy in the dtype of the sum, and where each has memory of its
    # own, between results that stay, the heap grows by all of them.
    buffer = torch.empty((max(1, 2**16 // max(1, w.shape[1])), w.shape[1]), dtype=torch.int32)
    found = torch.empty(w.shape[0], dtype=torch.int32)
    for part, out in zip(w.split(len(buffer)), found.split(len(buffer)), strict=True):
        torch.sum(buffer[: len(part)].copy_(part), dim=1, dtype=torch.int32, out=out)
    return found


def pack_with_sums(w: Tensor) -> tuple[Tensor, Tensor]:
    """`pack` and `row_sum` of int8 [N, K]."""
    packed = pack(w)
    return packed, row_sum(w, packed)


def matmul(q: Tensor, packed: Tensor, w_scale: Tensor, w_sum: Tensor, dtype: torch.dtype) -> Tensor:
    """(q - 128) wᵀ · w_scale by the fastest kernel for this CPU and number of rows.

    Args:
        q: uint8 [..., K], at least one row.
        packed, w_sum: from `pack` and `row_sum`.
        w_scale: float32 [N].
        dtype: float32 or bfloat16, of the result [..., N].
    """
    rows = q.numel() // q.shape[-1]
    if w_sum.numel() and (rows <= VNNI_ROWS or amx()) and (kernels := library()) is not None:
        return _matmul(kernels, q.contiguous(), packed, w_scale, w_sum, dtype, rows)
    return onednn.qlinear(q, UINT8_ZERO_POINT, packed, w_scale, dtype)


def _matmul(
    kernels: Any, q: Tensor, packed: Tensor, w_scale: Tensor, w_sum: Tensor, dtype: torch.dtype, rows: int
) -> Tensor:
    n, k = w_scale.numel(), q.shape[-1]
    depth = _round_up(k, DEPTH)
    y = torch.empty((*q.shape[:-1], n), dtype=dtype)
    arguments = (
        q.data_ptr(), torch.ops.mkldnn.data_ptr(packed), w_scale.data_ptr(), w_sum.data_ptr(), y.data_ptr(),
        dtype == torch.bfloat16, rows, n, k, depth, torch.get_num_threads(),
    )  # fmt: skip
    if rows >= AMX_ROWS and amx():
        tiles = torch.empty(_round_up(rows, 32) * depth, dtype=torch.uint8)
        kernels.sqcompile_amx(*arguments, tiles.data_ptr())
    else:
        kernels.sqcompile_vnni(*arguments)
    return y


def flash_fits(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> bool:
    """Whether `flash` takes these: bfloat16, heads of one size, a multiple of 32 up to 256; a positive scale."""
    (batch, heads, _, d), groups = q.shape, k.shape[1]
    dense = all(t.dtype == torch.bfloat16 and t.stride(-1) == 1 and t.shape[-1] == d for t in (q, k, v))
    alike = len(k) == batch and k.shape[:3] == v.shape[:3] and groups > 0 and heads % groups == 0
    some = d % 32 == 0 and 0 < d <= 256 and q.numel() > 0 and k.numel() > 0
    return dense and alike and some and (scale is None or scale > 0) and has_flash()


def least_flash_queries() -> int:
    """From how many queries on `flash` is faster than PyTorch's attention."""
    return FLASH_QUERIES_AMX if amx() else FLASH_QUERIES


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """softmax(q kᵀ · scale) v for bfloat16 q [B, H, Sq, D], k and v [B, G, Sk, D] (`flash_fits`).

    Returns:
        bfloat16 [B, H, Sq, D], laid out as [B, Sq, H, D]. With ``causal``, query i attends to keys 0 to i.
    """
    batch, heads, queries, d = q.shape
    groups, keys = k.shape[1], k.shape[2]
    out = torch.empty((batch, queries, heads, d), dtype=torch.bfloat16)
    packed = torch.empty(2 * batch * groups * _round_up(keys, 32) * d, dtype=torch.bfloat16)
    sizes = (batch, heads, groups, queries, keys, d, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    kernels = library()
    assert kernels is not None
    kernels.sqcompile_flash(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), packed.data_ptr(), (ctypes.c_int64 * 15)(*sizes),
        d**-0.5 if scale is None else scale, causal, amx(), torch.get_num_threads(),
    )  # fmt: skip
    return out.transpose(1, 2)


@functools.cache
def has_flash() -> bool:
    """Whether this CPU multiplies bfloat16, by AMX tiles or AVX512's dot products, and the kernels are built."""
    kernels = library()
    return kernels is not None and bool(amx() or kernels.sqcompile_has_dots())


@functools.cache
def library() -> Any | None:
    """The compiled kernels; None where they do not build."""
    lib = built("u8s8.h", "vnni.cpp", "amx.cpp", "flash.cpp")
    if lib is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        lib.sqcompile_vnni.argtypes = [pointer] * 5 + [integer] * 6
        lib.sqcompile_amx.argtypes = [pointer] * 5 + [integer] * 6 + [pointer]
        lib.sqcompile_flash.argtypes = [pointer] * 6 + [ctypes.c_float, integer, integer, integer]
        lib.sqcompile_has_dots.argtypes, lib.sqcompile_has_dots.restype = [], integer
        for function in (lib.sqcompile_vnni, lib.sqcompile_amx, lib.sqcompile_flash):
            function.restype = None
    return lib


@functools.cache
def amx() -> bool:
    """Whether this process may use AMX tiles."""
    return has_amx() and init_amx()


def _readable(packed: Tensor, w: Tensor) -> bool:
    """Whether a packed weight has the layout our kernels read: compared byte by byte with w, int8 [N, K]."""
    n, k = w.shape
    rows, depth = _round_up(n, BLOCK), _round_up(k, DEPTH)
    if torch.ops.mkldnn._nbytes(packed) < rows * depth:
        return False
    raw = (ctypes.c_int8 * (rows * depth)).from_address(torch.ops.mkldnn.data_ptr(packed))
    blocks = torch.frombuffer(raw, dtype=torch.int8).view(rows // BLOCK, depth // 4, BLOCK, 4)
    for i, block in enumerate(blocks):  # one at a time: a copy of a whole weight is memory
        fours = block.view(torch.int32).squeeze(-1).t().contiguous()  # moved four bytes at a time
        plain, want = fours.view(torch.int8), w[i * BLOCK : (i + 1) * BLOCK]
        if not torch.equal(plain[: len(want), :k], want) or plain[len(want) :].any() or plain[:, k:].any():
            return False
    return True


def _use_huge_pages(address: int, size: int) -> None:
    """Asks the kernel for huge pages behind a buffer: fewer TLB misses when it is streamed. Harmless where refused."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    start, end = address // mmap.PAGESIZE * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if advise is not None:
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
