"""Operands of INT8 attention, the exact result, and the tiles that the tests run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED

FLOAT, HALF = torch.float32, torch.bfloat16
GRANULARITIES = ["tensor", "head", "token"]


def int8(*shape: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=g, dtype=torch.int8).to(DEVICE)


def scales(granularity: str, batch: int, heads: int, tokens: int, seed: int = 0) -> Tensor:
    shape = {"tensor": (), "head": (heads, 1, 1), "token": (batch, heads, tokens, 1)}[granularity]
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).add(0.5).mul(0.02).to(DEVICE)


def case(
    shape: tuple[int, int, int, int, int, int],
    *,
    granularity: str = "head",
    values: torch.dtype = FLOAT,
    value_scale: str = "channel",
    mask: Tensor | None = None,
    diagonal: int | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype = FLOAT,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Arguments of int8_attention for shape (B, H, G, Sq, Sk, D)."""
    b, h, g, sq, sk, d = shape
    v_scale = None
    if values == torch.int8:
        v = int8(b, g, sk, d, seed=seed + 2)
        v_scale = torch.rand({"channel": (b, g, 1, d), "head": (g, 1, 1), "tensor": ()}[value_scale]).to(DEVICE) + 0.1
    else:
        v = torch.randn(b, g, sk, d, generator=torch.Generator().manual_seed(seed + 2)).to(values).to(DEVICE)
    q_scale, k_scale = scales(granularity, b, h, sq, seed), scales(granularity, b, g, sk, seed + 1)
    q, k = int8(b, h, sq, d, seed=seed), int8(b, g, sk, d, seed=seed + 1)
    return q, q_scale, k, k_scale, v, v_scale, mask, None, diagonal, d**-0.5, softcap, dtype


def exact(arguments: tuple[Any, ...]) -> Tensor:
    """Attention of the dequantized operands in float64."""
    q, q_scale, k, k_scale, v, v_scale, mask, _, diagonal, scale, softcap, _ = arguments
    q, k, v = q.double() * q_scale, k.double() * k_scale, v.double() * (1.0 if v_scale is None else v_scale)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        blocked = ~mask if mask.dtype == torch.bool else mask <= -65504
        scores = (scores if mask.dtype == torch.bool else scores + mask).masked_fill(blocked, -math.inf)
    if diagonal is not None:
        i, j = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        scores = scores.masked_fill(j > i[:, None] + diagonal, -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def check(arguments: tuple[Any, ...], tile: Any = None, bound: float | None = None) -> Tensor:
    """The kernel is as close to the exact result as the operands' types allow: relative error over the whole result."""
    from sqcompile.kernels.triton.attention.int8_attention import int8_attention

    expected = exact(arguments)
    y = int8_attention(*arguments, tile=tile)
    v, dtype = arguments[4], arguments[-1]
    if bound is None:
        bound = 2e-2 if v.dtype == torch.int8 else 1e-3 if v.dtype == FLOAT == dtype else 5e-3
    assert y.shape == expected.shape and y.dtype == dtype and y.transpose(1, 2).is_contiguous()
    error = (y.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= bound, f"relative error {float(error):.2e}"
    return y


def tiles() -> dict[str, Any]:
    from sqcompile.kernels.triton.attention.int8_attention import Tile

    found = {"shipped": None, "small": Tile(32, 32), "split": Tile(32, 32, splits=3)}
    if INTERPRETED or torch.cuda.get_device_capability() >= (9, 0):
        found["tma"] = Tile(64, 64, warps=4, tma=True)
    return found


TILES = ["shipped", "small", "split", "tma"]


def tile_of(name: str) -> Any:
    found = tiles()
    if name not in found:
        pytest.skip("not for this GPU")
    return found[name]


def masks(sq: int, sk: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    causal = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
    padding = torch.arange(sk) < torch.tensor([sk, sk // 3])[:, None, None, None]
    lowest = torch.finfo(torch.float32).min
    return {
        "bias": torch.randn(1, 2, sq, sk, generator=g),
        "bias of one row": torch.randn(2, 1, 1, sk, generator=g),
        "bias of one key": torch.randn(2, 1, sq, 1, generator=g),
        "bool": causal,
        "window": causal & ~causal.tril(-sk // 4),
        "padding": padding,
        "causal and padding": causal & padding,
        "causal, lowest": torch.zeros(1, 1, sq, sk).masked_fill(~causal, lowest),
        "bias, lowest": torch.randn(1, 2, sq, sk, generator=g) + torch.zeros(sq, sk).masked_fill(~causal, lowest),
        "nothing at all": torch.zeros(sq, sk, dtype=torch.bool),
        "some rows nothing": (torch.arange(sq) % 3 > 0)[:, None].expand(sq, sk) & causal,
        "bfloat16": torch.zeros(sq, sk, dtype=HALF).masked_fill(~causal, -math.inf),
    }
