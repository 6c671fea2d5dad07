"""INT8 linears on x86 CPUs: u8 x s8 by kernels of our own (vnni.cpp, amx.cpp), by oneDNN where those do not build.

oneDNN multiplies uint8 activations by int8 weights; with int8 activations it falls to a reference loop on CPUs without
AMX, four orders of magnitude slower. So the activations carry a zero point of 128, taken out of the int32 sum again:
exactly the sum of `reference.int8_matmul`.

oneDNN's kernels leave more than half of the memory bandwidth unused with few rows. With many, ours are as fast, and what
calls them takes less (`python -m sqcompile.bench cpu`). They read oneDNN's own packed weight, which it computes with where
it packs in another layout.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from sqcompile.kernels.cpu import onednn
from sqcompile.kernels.cpu.build import built
from sqcompile.kernels.reference import UINT8_ZERO_POINT, scale_output
from sqcompile.pytorch.core import has_amx, has_avx2, has_vnni, init_amx
from sqcompile.pytorch.core import version as version_of

FILES = ("crowd.h", "u8s8.h", "pack.cpp", "vnni.cpp", "amx.cpp", "avx2.cpp", "flash_products.cpp", "flash.cpp")
BLOCK = 64  # output channels per block of the packed weight
DEPTH = 64  # input channels are padded to a multiple of this
# From here AMX tiles beat AVX512-VNNI, where the CPU has them.
AMX_ROWS = 4
# Linux's advice numbers: use huge pages from now on, and for what is there already (Linux 6.1).
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25


def available() -> bool:
    """Whether this CPU multiplies u8 by s8 without saturating between (VNNI); plain AVX2 does not."""
    return torch.backends.mkldnn.is_available() and has_vnni()


def has_avx2_kernels() -> bool:
    """Whether this CPU has AVX2, and our kernels are built: what `pack_avx2` packs is multiplied by nothing else."""
    return has_avx2() and library() is not None


# By the shape of a weight, one that oneDNN has packed in the layout our kernels read, as long as somebody uses it.
_alike: weakref.WeakValueDictionary[tuple[int, ...], Tensor] = weakref.WeakValueDictionary()


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] in oneDNN's blocked layout, and the sums of its rows, int32 [N], if our kernels can read that layout.

    The packed weight is opaque: it has no storage and cannot be saved. The sums are empty where oneDNN has another layout, or
    our kernels do not build. The first weight of a shape is packed by oneDNN, and compared byte by byte with what we make of
    it; others of that shape are filled in by our own code, which takes a fifth of the time.
    """
    kernels, w = library(), w.contiguous()
    if kernels is None or not w.numel():
        packed = onednn.prepack(w)
        _use_huge_pages(packed)
        return packed, torch.empty(0, dtype=torch.int32)
    like = _alike.get(w.shape)
    packed = _prepack(kernels, w) if like is None else like.clone()
    _use_huge_pages(packed)
    if like is not None:
        blocks, beside = _parts(packed, w)
        w_sum = _fill(kernels, w, blocks)
        beside[: len(w)] = -w_sum
    elif (w_sum := _sums_if_readable(kernels, w, packed)).numel() and _has_sums_alone(packed, w, w_sum):
        _alike[w.shape] = packed
    return packed, w_sum


def _prepack(kernels: Any, w: Tensor) -> Tensor:
    """`onednn.prepack` as it is with one thread: with many, oneDNN has layouts of smaller blocks, which our kernels do not read.

    oneDNN itself reads either; what it gains by the smaller blocks on such machines is not measured.
    """
    torch.get_num_threads()  # PyTorch sets OpenMP's number where a thread asks for it first, and would do so in between
    before = kernels.sqcompile_set_threads(1)  # of this thread alone
    try:
        return onednn.prepack(w)
    finally:
        kernels.sqcompile_set_threads(before)


def _parts(packed: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The memory of a packed weight of the size ours has: blocks int8, and what oneDNN keeps beside them, int32 [N] with padding."""
    size, length = _size(w), torch.ops.mkldnn._nbytes(packed)
    raw = (ctypes.c_int8 * length).from_address(torch.ops.mkldnn.data_ptr(packed))
    every = torch.frombuffer(raw, dtype=torch.int8)
    return every[:size], every[size:].view(torch.int32)


def _size(w: Tensor) -> int:
    return _round_up(w.shape[0], BLOCK) * _round_up(w.shape[1], DEPTH)


def _sums_if_readable(kernels: Any, w: Tensor, packed: Tensor) -> Tensor:
    """The sums of the rows of w if the blocks of a packed weight are what we would make of it, byte by byte; else nothing."""
    (n, k), depth = w.shape, _round_up(w.shape[1], DEPTH)
    w_sum, buffer = torch.empty(n, dtype=torch.int32), torch.empty(BLOCK * depth, dtype=torch.int8)
    address, large = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed) >= _size(w)
    pointers = w.data_ptr(), address, w_sum.data_ptr(), buffer.data_ptr()
    return w_sum if large and kernels.sqcompile_is_packed(*pointers, n, k, depth) else w_sum[:0].clone()


def _has_sums_alone(packed: Tensor, w: Tensor, w_sum: Tensor) -> bool:
    """Whether oneDNN keeps nothing but the sums of rows, with a minus sign, beside the blocks of a weight."""
    if torch.ops.mkldnn._nbytes(packed) != _size(w) + 4 * _round_up(len(w), BLOCK):
        return False
    beside = _parts(packed, w)[1]
    return torch.equal(beside[: len(w)], -w_sum) and not beside[len(w) :].any()


def _fill(kernels: Any, w: Tensor, blocks: Tensor) -> Tensor:
    """Packs w, int8 [N, K], into int8 [`_size`]; the sums of its rows, int32 [N]."""
    (n, k), w_sum = w.shape, torch.empty(len(w), dtype=torch.int32)
    kernels.sqcompile_pack(
        w.data_ptr(), blocks.data_ptr(), w_sum.data_ptr(), n, k, _round_up(k, DEPTH), torch.get_num_threads()
    )
    return w_sum


def pack_avx2(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] in the layout of avx2.cpp: int8 [N / 16, K / 2, 32], both rounded up. Its kernel needs no sums."""
    kernels, (n, k), w = library(), w.shape, w.contiguous()
    assert kernels is not None
    packed = torch.empty((-(-n // 16), -(-k // 2), 32), dtype=torch.int8)
    kernels.sqcompile_pack_avx2(w.data_ptr(), packed.data_ptr(), n, k, torch.get_num_threads())
    return packed, torch.empty(0, dtype=torch.int32)


def matmul(
    q: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """(q - 128) wᵀ · w_scale · scale + bias by the fastest kernel for this CPU and number of rows.

    Args:
        q: uint8 [..., K].
        packed, w_sum: from `pack`, or `pack_avx2`.
        w_scale: float32 [N].
        dtype: float32 or bfloat16, of the result [..., N].
        scale: float32, one for each row [..., 1], or one [] or [1]; None for 1.
        bias: float32 or bfloat16 [N], or None.
    """
    if q.numel() == 0:
        return matmul_fake(q, packed, w_scale, w_sum, dtype)
    rows = q.numel() // q.shape[-1]
    one_each = scale is None or (scale.dtype == torch.float32 and scale.numel() in (1, rows))
    if one_each and takes(packed, w_scale, w_sum, bias) and (kernels := library()) is not None:
        address = torch.ops.mkldnn.data_ptr(packed)
        return _matmul(kernels, q.contiguous(), address, w_scale, w_sum, dtype, rows, scale, bias)
    if scale is not None or bias is not None:
        wide = matmul(q, packed, w_scale, w_sum, torch.float32)
        return scale_output(wide, wide.new_ones(()) if scale is None else scale, bias, dtype)
    if packed.dim() == 3:
        return _matmul_avx2(q.contiguous(), packed, w_scale, dtype, rows)
    return onednn.qlinear(q, UINT8_ZERO_POINT, packed, w_scale, dtype)


def takes(packed: Tensor, w_scale: Tensor, w_sum: Tensor, bias: Tensor | None) -> bool:
    """Whether our kernels read a packed weight, and add a bias where a product ends: none, or float32 or bfloat16 [N]."""
    fits = bias is None or (bias.dtype in (torch.float32, torch.bfloat16) and bias.shape == w_scale.shape)
    return packed.dim() == 2 and w_sum.numel() > 0 and fits


def matmul_fake(
    q: Tensor, packed: Tensor, w_scale: Tensor, w_sum: Tensor, dtype: torch.dtype, *epilogue: Tensor | None
) -> Tensor:
    """A tensor like the result of `matmul`."""
    return q.new_empty((*q.shape[:-1], w_scale.shape[0]), dtype=dtype)


def product(q: Tensor, w: Tensor) -> Tensor | None:
    """q wᵀ of int8 q [..., K] and w [N, K]: the int32 sums as float32 [..., N]; None where our kernels do not build.

    For a weight that is used once, or a few times in a row. It is packed for the product, which takes a fraction of what
    oneDNN's packing takes.
    """
    kernels, rows = library(), q.numel() // max(1, q.shape[-1])
    if kernels is None:
        return None
    if not rows or not w.numel():
        return q.new_zeros((*q.shape[:-1], len(w)), dtype=torch.float32)
    blocks, w_sum = _packed_for_now(kernels, w)
    shifted = q.contiguous().view(torch.uint8) ^ UINT8_ZERO_POINT  # of two's complement the sign bit: that adds it
    return _matmul(
        kernels, shifted, blocks.data_ptr(), torch.ones(len(w), dtype=torch.float32), w_sum, torch.float32, rows
    )


_last = threading.local()  # the weight of a thread's last product, as it was packed, as long as that weight lives


def _packed_for_now(kernels: Any, w: Tensor) -> tuple[Tensor, Tensor]:
    """`_fill`, or what it gave for the last product. Nothing tells of writes to ``w.data``, which is not done here."""
    state = None if w.is_inference() else (version_of(w), w.data_ptr())  # of one without a version nobody knows
    kept = getattr(_last, "kept", None)
    if kept is not None and state is not None and kept[0]() is w and kept[1] == state:
        return kept[2], kept[3]
    whole = w.contiguous()
    blocks = torch.empty(_size(whole), dtype=torch.int8)
    w_sum, mine = _fill(kernels, whole, blocks), _last.__dict__
    _last.kept = weakref.ref(w, lambda _: mine.pop("kept", None)), state, blocks, w_sum
    return blocks, w_sum


def _matmul(
    kernels: Any,
    q: Tensor,
    packed: int,
    w_scale: Tensor,
    w_sum: Tensor,
    dtype: torch.dtype,
    rows: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    n, k = w_scale.numel(), q.shape[-1]
    y = torch.empty((*q.shape[:-1], n), dtype=dtype)
    scale, bias = (None if t is None else t.contiguous() for t in (scale, bias))
    arrays = (
        q.data_ptr(), packed, w_scale.data_ptr(), w_sum.data_ptr(), y.data_ptr(),
        None if scale is None else scale.data_ptr(), None if bias is None else bias.data_ptr(),
    )  # fmt: skip
    numbers = (
        dtype == torch.bfloat16, rows, n, k, _round_up(k, DEPTH), scale is not None and scale.numel() == rows,
        bias is not None and bias.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    run = kernels.sqcompile_amx if rows >= AMX_ROWS and amx() else kernels.sqcompile_vnni
    run((ctypes.c_void_p * len(arrays))(*arrays), (ctypes.c_int64 * len(numbers))(*numbers))
    return y


def _matmul_avx2(q: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    kernels, n, k = library(), w_scale.numel(), q.shape[-1]
    assert kernels is not None  # which has packed the weight
    y, wide = torch.empty((*q.shape[:-1], n), dtype=dtype), torch.empty(rows * _round_up(k, 2), dtype=torch.int16)
    kernels.sqcompile_avx2(
        q.data_ptr(), packed.data_ptr(), w_scale.data_ptr(), y.data_ptr(), dtype == torch.bfloat16, rows, n, k,
        torch.get_num_threads(), wide.data_ptr(),
    )  # fmt: skip
    return y


@functools.cache
def library() -> Any | None:
    """The compiled kernels; None where they do not build."""
    lib = built(*FILES)
    if lib is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        lib.sqcompile_pack.argtypes = [pointer] * 3 + [integer] * 4
        lib.sqcompile_is_packed.argtypes, lib.sqcompile_is_packed.restype = [pointer] * 4 + [integer] * 3, integer
        lib.sqcompile_set_threads.argtypes, lib.sqcompile_set_threads.restype = [integer], integer
        lib.sqcompile_pack_avx2.argtypes, lib.sqcompile_pack_avx2.restype = [pointer] * 2 + [integer] * 3, None
        lib.sqcompile_avx2.argtypes, lib.sqcompile_avx2.restype = [pointer] * 4 + [integer] * 5 + [pointer], None
        lib.sqcompile_vnni.argtypes = lib.sqcompile_amx.argtypes = [pointer] * 2
        lib.sqcompile_flash.argtypes = [pointer] * 7 + [ctypes.c_float, integer, integer, integer]
        for asked in (lib.sqcompile_products, lib.sqcompile_has_dots):
            asked.argtypes, asked.restype = [], integer
        for function in (lib.sqcompile_pack, lib.sqcompile_vnni, lib.sqcompile_amx, lib.sqcompile_flash):
            function.restype = None
    return lib


@functools.cache
def amx() -> bool:
    """Whether this process may use AMX tiles."""
    return has_amx() and init_amx()


def _use_huge_pages(packed: Tensor) -> None:
    """Asks the kernel for huge pages behind a packed weight: fewer TLB misses when it is streamed. Harmless where refused."""
    address, size = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    start, end = address // mmap.PAGESIZE * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if advise is not None:
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
