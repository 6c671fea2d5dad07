"""The decode kernel of x86 CPUs: u8 x s8 for few rows, at the memory's bandwidth (vnni.cpp).

oneDNN is written for many rows: for one row its AMX and VNNI kernels leave more than half of the memory bandwidth
unused. This kernel reads oneDNN's own packed weight, so that one int8 copy serves prefill and decode.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # output channels per block of the packed weight
DEPTH = 64  # input channels are padded to a multiple of this
# Up to here the kernel is faster than oneDNN on every shape measured (README, bench cpu).
MAX_ROWS = 16
# From here AMX tiles beat AVX512-VNNI, where the CPU has them.
AMX_ROWS = 4


@functools.cache
def library() -> Any | None:
    """The compiled kernel, built once per machine by the compiler that Inductor uses; None where that fails."""
    from torch._inductor.codecache import CppCodeCache

    try:
        lib = CppCodeCache.load((Path(__file__).parent / "vnni.cpp").read_text(), device_type="cpu")
        function = lib.sqcompile_matmul_u8s8
    except Exception as e:
        warnings.warn(f"sqcompile's decode kernel does not build here, oneDNN serves all shapes: {e}", stacklevel=2)
        return None
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 7
    function.restype = None
    return function


@functools.cache
def amx() -> bool:
    """Whether this process may use AMX tiles."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def readable(packed: Tensor, w: Tensor) -> bool:
    """Whether a packed weight has the layout the kernel reads: compared byte by byte with w, int8 [N, K]."""
    n, k = w.shape
    rows, depth = _round_up(n, BLOCK), _round_up(k, DEPTH)
    if torch.ops.mkldnn._nbytes(packed) < rows * depth:
        return False
    raw = (ctypes.c_int8 * (rows * depth)).from_address(torch.ops.mkldnn.data_ptr(packed))
    blocks = torch.frombuffer(raw, dtype=torch.int8).view(rows // BLOCK, depth // 4, BLOCK, 4)
    plain = blocks.permute(0, 2, 1, 3).reshape(rows, depth)
    return bool(torch.equal(plain[:n, :k], w)) and not plain[n:].any() and not plain[:, k:].any()


def matmul(q: Tensor, packed: Tensor, w_scale: Tensor, w_sum: Tensor, dtype: torch.dtype) -> Tensor:
    """(q - 128) wᵀ · w_scale for uint8 q [..., K]: float32 or bfloat16 [..., N]."""
    q = q.contiguous()
    n, k = w_scale.numel(), q.shape[-1]
    rows = q.numel() // k
    y = torch.empty((*q.shape[:-1], n), dtype=dtype)
    function = library()
    assert function is not None
    function(
        q.data_ptr(), torch.ops.mkldnn.data_ptr(packed), w_scale.data_ptr(), w_sum.data_ptr(), y.data_ptr(),
        dtype == torch.bfloat16, rows, n, k, _round_up(k, DEPTH), torch.get_num_threads(), rows >= AMX_ROWS and amx(),
    )  # fmt: skip
    return y


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
