"""Attention on CUDA: `int8_attention` and `float_attention` choose tiles by the number of queries, and launch.

The choice depends on the lengths, which a tracing compiler may hold as symbols: register this as an opaque operator, so
that one compiled graph serves prefill and decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sqcompile.kernels.attention_parts import MASK_BLOCK, aligned
from sqcompile.kernels.triton.attention import kernels
from sqcompile.kernels.triton.attention import split as attention_split
from sqcompile.kernels.triton.common import on
from sqcompile.kernels.triton.gemm.tiles import Gpu, gpu_of
from sqcompile.kernels.triton.launching import launch

FEW_ROWS = 64  # up to as many rows of queries a key head, all of its query heads share a tile
_MOST_SPLITS = 64
_KEYS_PER_SPLIT = 256  # at least
_ALIGNED = 16  # bytes: what TMA asks of base addresses and strides
_L2 = 24 * 2**20  # bytes of keys and values that programs at work should share; about half of an H100's L2


@dataclass(frozen=True)
class Tile:
    """BM rows of queries against BN keys at a time.

    tma: load keys and values through descriptors (sm_90 and later, aligned rows).
    registers: most of them a thread, so that more programs fit a multiprocessor.
    splits: parts of the keys, put together by a second kernel; 0: as many as fill the GPU.
    """

    bm: int
    bn: int
    stages: int = 2
    warps: int = 4
    tma: bool = False
    splits: int = 1
    registers: int | None = None


def default_tile(gpu: Gpu, rows: int, width: int, keys: torch.dtype, values: torch.dtype, masked: bool) -> Tile:
    """The tile for a number of rows that share a key head: the largest that leaves the sums in registers.

    Args:
        rows: queries times the query heads of a key head.
        width: D or Dv, the larger one, rounded up to a power of two.
        keys, values: dtypes of k and v.
        masked: a mask tensor, whose values take registers too.
    """
    wide, integer = values == torch.float32, values == torch.int8
    if rows <= FEW_ROWS:
        bm = max(16, triton.next_power_of_2(rows))
        bn = 32 if wide else 64 if width > 128 else 128
        if keys != torch.int8 and not gpu.large:
            bn //= 2  # of 99 KiB of shared memory
        deep = gpu.large and not wide and (keys == torch.int8 or width <= 64)
        return Tile(bm, bn, 3 if deep else 2, 4, splits=0)
    if wide:
        return Tile(64, 32, 2, 4)
    if gpu.capability != 90:
        if width > 128 or masked:
            return Tile(64, 32, 2, 8)
        return Tile(128, 32 if integer else 64, 2, 8)
    if width > 128:
        return Tile(64 if integer else 128, 64, 2, 8, tma=True)
    if masked and keys != torch.int8 and width > 64:
        return Tile(128, 128, 2, 8, tma=True)
    return Tile(64, 128, 2, 4, tma=True)  # two programs a multiprocessor: one multiplies, one takes exponentials


def int8_attention(
    q: Tensor,
    q_scale: Tensor | None,
    k: Tensor,
    k_scale: Tensor | None,
    v: Tensor,
    v_scale: Tensor | None,
    mask: Tensor | None,
    blocks: Tensor | None,
    diagonal: int | None,
    scale: float,
    softcap: float,
    dtype: torch.dtype,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """`sqcompile.kernels.attention_int8.int8_attention`, with a tile instead of the rule's.

    Batches, heads and rows may be strided; D and Dv should be contiguous. An int8 v is best laid out as [B, G, Dv, Sk]
    with Sk a multiple of 16, as s8 tensor cores contract over contiguous bytes: any other is copied to that layout,
    but where queries are few, which multiply a v with contiguous Dv as bfloat16 and do not quantize P. Without k_scale, q
    and k are in float (`float_attention`).
    """
    if q_scale is None and q.dtype == torch.int8:
        raise ValueError("an int8 q without a scale")
    if k_scale is None and k.dtype == torch.int8:
        raise ValueError("an int8 k without a scale")
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    if heads % groups or k.shape[3] != width or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not belong together")
    if scale < 0:
        raise ValueError(f"a scale of {scale}")
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=dtype, device=q.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    if keys == 0:
        return out.zero_()
    dv, group = v.shape[3], heads // groups
    gpu = gpu_of(q.device)
    few = queries * group <= FEW_ROWS
    pack = group if few else 1
    pv = "float" if v_scale is None else "cast" if few and v.stride(3) == 1 else "int8"
    c, cv = (max(32, triton.next_power_of_2(x)) for x in (width, dv))
    tile = tile or default_tile(gpu, queries * group, max(c, cv), k.dtype, v.dtype, mask is not None)
    q, k, v = _contiguous(q), _contiguous(k), _turned(v) if pv == "int8" else _contiguous(v)
    tma = tile.tma and _fits_tma(k) and _fits_tma(v)
    programs = triton.cdiv(queries * pack, tile.bm) * batch * heads // pack
    splits = tile.splits or _splits(gpu, programs, keys)
    rows = batch * heads * queries
    q8 = None if few or q.dtype == k.dtype else torch.empty((rows, c), dtype=torch.int8, device=q.device)
    part = torch.empty((splits, rows, dv + 2), dtype=torch.float32, device=q.device) if splits > 1 else None
    k_one, k_each = (
        (None, k_scale) if k_scale is not None and k_scale.shape[-2:-1] not in ((), (1,)) else (k_scale, None)
    )
    q_scale = None if q_scale is None else q_scale.expand(batch, heads, queries, 1)
    k_scale = None if k_scale is None else k_scale.expand(batch, groups, keys, 1)
    v_scale = None if v_scale is None else v_scale.expand(batch, groups, 1, dv).transpose(2, 3)
    mask, blocks = _expanded(mask, blocks, (batch, heads, queries, keys), diagonal, tile, pack)
    with on(q.device):
        launch(
            kernels.forward, (programs, splits), q, q8,
            _descriptor(k, (1, 1, tile.bn, c)) if tma else k,
            _descriptor(v, (1, 1, cv, tile.bn) if pv == "int8" else (1, 1, tile.bn, cv)) if tma else v,
            out, part, q_scale, k_one, k_each, v_scale, mask, blocks,
            *(_strides(x) for x in (q, k, v, out, q_scale, k_scale, v_scale, mask, blocks)),
            heads, queries, keys, diagonal or 0, scale, softcap, _section(k, v, group // pack), splits,
            tile.bm, tile.bn, width, dv, c, cv, group, pack, diagonal is not None, softcap > 0, pv, tma,
            k_scale is None,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
            enable_fp_fusion=True,
        )  # fmt: skip
        if part is not None:
            launch(
                attention_split.combine, (rows,), part, out, v_scale, _strides(out), _strides(v_scale), heads, groups, queries, splits,
                triton.next_power_of_2(splits), dv, cv, num_warps=4,
            )  # fmt: skip
    return out


def float_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    blocks: Tensor | None,
    diagonal: int | None,
    scale: float,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """`int8_attention` of q, k and v that are all float16 or all bfloat16, as the result is; nothing is quantized."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all of one half precision")
    return int8_attention(q, None, k, None, v, None, mask, blocks, diagonal, scale, 0.0, q.dtype, tile=tile)


def _contiguous(x: Tensor) -> Tensor:
    """x with a contiguous last dim; a view where it is one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _turned(v: Tensor) -> Tensor:
    """int8 v [B, G, Sk, Dv] as [B, G, Dv, Sk] with contiguous, aligned tokens, which s8 tensor cores contract over."""
    turned = v.transpose(2, 3)
    return turned if turned.stride(3) == 1 and _fits_tma(turned) else aligned(turned)


def _fits_tma(x: Tensor) -> bool:
    """Whether TMA can address x [B, G, rows, columns]."""
    strides = [s * x.element_size() for s, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    return x.data_ptr() % _ALIGNED == 0 and all(s > 0 and s % _ALIGNED == 0 for s in strides)


def _descriptor(x: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    strides = [s if size > 1 else _ALIGNED for s, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], list(block))


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def _splits(gpu: Gpu, programs: int, keys: int) -> int:
    """Parts of the keys: about one program a multiprocessor, but none so short that putting them together counts."""
    return max(1, min(3 * gpu.sms // (2 * programs), -(-keys // _KEYS_PER_SPLIT), _MOST_SPLITS))


def _section(k: Tensor, v: Tensor, tiles_per_key_head: int) -> int:
    """How many (packed) query heads to work on at a time."""
    nbytes = k.shape[2] * (k.shape[3] * k.element_size() + v.shape[2] * v.shape[3] // k.shape[2] * v.element_size())
    return max(1, _L2 // max(1, nbytes)) * tiles_per_key_head


def _expanded(
    mask: Tensor | None, blocks: Tensor | None, shape: tuple[int, ...], diagonal: int | None, tile: Tile, pack: int
) -> tuple[Tensor | None, Tensor | None]:
    """The mask as strided [B, H, Sq, Sk], and its blocks [B, H, ., .] where the kernel can go by them."""
    if mask is None:
        return None, None
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    rows, columns = MASK_BLOCK
    mask_rows, mask_columns = (1, 1, *mask.shape)[-2:]
    if blocks is not None:
        of_tile = rows % tile.bm == 0 if pack == 1 else shape[2] <= rows and blocks.shape[1] == 1
        width = 2 + -(-shape[3] // columns)
        # a mask of one column has a list of its own sizes, which may be as long
        whole = mask_columns == shape[3] and blocks.shape[2] == -(-mask_rows // rows) * width
        if diagonal is None and of_tile and whole and columns % tile.bn == 0:
            blocks = blocks.unflatten(2, (-1, width)).expand(*shape[:2], -1, -1)
            # one row of blocks for all queries
            blocks = blocks if blocks.shape[2] > 1 else blocks.as_strided(blocks.shape, (*blocks.stride()[:2], 0, 1))
        else:
            blocks = None
    return mask.expand(shape), blocks
