"""The attention kernels compile for sm_80, sm_90 and sm_100 without a GPU, with INT8 tensor cores and without spills."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_triton_compile import BF16, CAPABILITIES, check_resources, compile_for, empty, pytestmark  # noqa: F401

INT8, FLOAT = torch.int8, torch.float32
INSTRUCTION = {80: r"mma\.sync\S*s8\.s8", 90: r"wgmma\S*s32\.s8\.s8", 100: r"mma\S*(s8\.s8|kind::i8)"}


def attention(
    sq: int,
    sk: int,
    d: int,
    values: torch.dtype = BF16,
    *,
    heads: int = 32,
    groups: int = 8,
    per_token: bool = False,
    diagonal: int | None = 0,
    mask: torch.Tensor | None = None,
    softcap: float = 0.0,
    queries: torch.dtype = INT8,
    tile: Any = None,
) -> None:
    from sqcompile.kernels.triton.attention.int8_attention import int8_attention
    from sqcompile.kernels.triton.attention.mask import mask_blocks

    q, k = empty(1, heads, sq, d, dtype=queries), empty(1, groups, sk, d, dtype=INT8)
    v, v_scale = empty(1, groups, sk, d, dtype=values), None
    if values == INT8:
        v, v_scale = v.transpose(2, 3).contiguous().transpose(2, 3), empty(groups, 1, d, dtype=FLOAT)
    token = ((1, heads, sq, 1), (1, groups, sk, 1)) if per_token else ((heads, 1, 1), (groups, 1, 1))
    q_scale, k_scale = (empty(*s, dtype=FLOAT) for s in token)
    if queries != INT8 and per_token:
        q_scale = None
    blocks = None if mask is None else mask_blocks(mask)
    int8_attention(q, q_scale, k, k_scale, v, v_scale, mask, blocks, diagonal, 0.1, softcap, BF16, tile=tile)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("values", [BF16, INT8])
def test_the_prefill_kernels_use_int8_tensor_cores(values, capability, tmp_path):
    for d in (64, 128, 256):
        queries = BF16 if d != 64 else INT8
        kernels = compile_for(
            capability, lambda d=d, q=queries: attention(4096, 4096, d, values, per_token=d == 128, queries=q)
        )
        check_resources(kernels, capability, tmp_path)
        ptx = kernels[0].asm["ptx"]
        assert re.search(INSTRUCTION[capability], ptx), d
        assert ("cp.async.bulk.tensor" in ptx) == (capability == 90)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("values", [BF16, INT8])
def test_the_decode_kernels(values, capability, tmp_path):
    for d in (64, 128, 256):
        kernels = compile_for(capability, lambda d=d: attention(1, 8192, d, values, diagonal=8191, queries=BF16))
        check_resources(kernels, capability, tmp_path)
        assert [k.metadata.name for k in kernels] == ["forward", "combine"]
        assert re.search(r"mma\S*s8\.s8", kernels[0].asm["ptx"])


FLOAT_INSTRUCTION = {80: r"mma\.sync\S*bf16", 90: r"wgmma\S*bf16|mma\.sync\S*bf16", 100: r"mma\S*(bf16|kind::f16)"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("sq", [1, 1000])
def test_attention_in_half_precision(sq, capability, tmp_path):
    from sqcompile.kernels.triton.attention.int8_attention import float_attention
    from sqcompile.kernels.triton.attention.mask import mask_blocks

    keys, mask = 1000, empty(1, 1, sq, 1008, dtype=torch.bool)[..., :1000]

    def run(d: int) -> None:
        q, k = empty(1, 32, sq, d, dtype=BF16), empty(1, 8, keys, d, dtype=BF16)
        float_attention(q, k, k, mask, mask_blocks(mask), None, 0.1)

    for d in (64, 128, 256):
        kernels = [x for x in compile_for(capability, lambda d=d: run(d)) if x.metadata.name == "forward"]
        check_resources(kernels, capability, tmp_path)
        ptx = kernels[0].asm["ptx"]
        assert re.search(FLOAT_INSTRUCTION[capability], ptx) and not re.search(r"mma\S*s8", ptx), d
        assert ("wgmma" in ptx) == (capability == 90 and sq > 1)


ROWS = 1000, 1008  # of a mask, as aligned_mask leaves them
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"values": FLOAT},
    "mask": {"mask": empty(1, 1, *ROWS)[..., :1000], "diagonal": None},
    "mask, per token, INT8 values": {
        "mask": empty(1, 1, *ROWS)[..., :1000], "diagonal": None, "values": INT8, "per_token": True
    },
    "bool mask": {"mask": empty(*ROWS, dtype=torch.bool)[:, :1000], "diagonal": None},
    "softcap": {"softcap": 50.0, "per_token": True},
}  # fmt: skip


@pytest.mark.parametrize("d", [128, *(pytest.param(d, marks=pytest.mark.slow) for d in (80, 256))])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_fits(name, d, tmp_path):
    kernels = compile_for(90, lambda: attention(1000, 1000, d, **VARIANTS[name]))
    check_resources([k for k in kernels if k.metadata.name == "forward"], 90, tmp_path)
