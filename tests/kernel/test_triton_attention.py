"""INT8 attention in Triton against exact attention of the dequantized operands: tiles, heads, sizes, scales."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import FLOAT, GRANULARITIES, HALF, TILES, case, check, exact, masks, tile_of
from triton_cases import DEVICE, INTERPRETED, PARTS, kernels, long, run_in_the_interpreter, same

from sqcompile.kernels import attention_int8 as plain
from sqcompile.kernels import reference


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize("part", PARTS)
def test_these_kernels_in_the_interpreter(part):
    run_in_the_interpreter(__file__, part)


LENGTHS = [(1, 1), (1, 33), (31, 32), (33, 65), (64, 64), (70, 130), (65, 31)]
VALUES = (
    [FLOAT, torch.float16, torch.int8] if INTERPRETED else [FLOAT, torch.float16, HALF, torch.int8]
)  # no bf16 dot there


@kernels
@pytest.mark.parametrize("values", [FLOAT, torch.int8])
@pytest.mark.parametrize("name", TILES)
def test_lengths_around_tile_boundaries(name, values):
    for sq, sk in LENGTHS if name == "shipped" else LENGTHS[-3:]:
        for diagonal in (None, 0, sk - sq) if name == "shipped" else (sk - sq,):
            check(case((1, 2, 2, sq, sk, 64), values=values, diagonal=diagonal), tile_of(name))


@kernels
@pytest.mark.parametrize("values", [long(FLOAT), torch.int8])
@pytest.mark.parametrize("name", TILES)
def test_grouped_query_heads(name, values):
    for h, g in ((8, 2), (6, 2), (8, 1)) if name in ("shipped", "tma") else ((8, 2),):
        for sq in (1, 5, 40) if name == "shipped" else (5, 17):
            check(case((2, h, g, sq, 70, 32), values=values, diagonal=70 - sq), tile_of(name))


@kernels
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("d", [40, 64, long(80), 96, 128, long(256)])
def test_head_sizes(d, values):
    for sq in (1, 70) if d in (80, 128) or not INTERPRETED else (40,):
        check(case((1, 2, 1, sq, 100, d), values=values, dtype=FLOAT if values == FLOAT else HALF))


@kernels
@pytest.mark.parametrize("granularity", ["tensor", "head", "its own"])
@pytest.mark.parametrize("dtype", [long(FLOAT), HALF])
def test_queries_quantized_by_the_kernel(dtype, granularity):
    """As quantized before, to the bit."""
    from sqcompile.kernels.triton.attention.int8_attention import int8_attention

    for shape in ((2, 4, 2, 70, 75, 64), (1, 8, 2, 1, 90, 40), (1, 2, 2, 65, 70, 160)):
        own = granularity == "its own"
        _, scale, *rest = case(shape, granularity="token" if own else granularity, diagonal=shape[4] - shape[3])
        q = torch.randn(*shape[:2], shape[3], shape[5], generator=torch.Generator().manual_seed(4)).to(dtype).to(DEVICE)
        q[..., ::7] *= 5
        q[0, 0, 0] = 0
        used = reference.token_scale(q) if own else scale
        want = check((reference.quantize(q, used), used, *rest))
        same(int8_attention(q, None if own else scale, *rest), want)
        same(
            plain.int8_attention(q, None if own else scale, *rest),
            plain.int8_attention(reference.quantize(q, used), used, *rest),
        )


@kernels
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, HALF])
@pytest.mark.parametrize("name", ["shipped", long("small"), long("split"), "tma"])
def test_queries_and_keys_in_half_precision(name, dtype):
    from sqcompile.kernels.triton.attention.int8_attention import float_attention
    from sqcompile.kernels.triton.attention.mask import mask_blocks

    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 2, 1, 140, 64), (1, 2, 2, 70, 75, 40), (2, 4, 1, 20, 260, 32))
    for b, h, g, sq, sk, d in shapes if name == "shipped" else shapes[-1:]:
        sizes = (h, sq), (g, sk), (g, sk)
        q, k, v = (torch.randn(b, n, s, d, generator=generator).to(dtype).to(DEVICE) for n, s in sizes)
        for kind in ("none", "diagonal", "window", "bias of one row") if name == "shipped" else ("window",):
            mask = masks(sq, sk)[kind].to(DEVICE) if kind in ("window", "bias of one row") else None
            mask = mask[:b] if mask is not None and mask.dim() == 4 else mask
            diagonal = sk - sq if kind == "diagonal" else None
            expected = exact((q, 1.0, k, 1.0, v, None, mask, None, diagonal, d**-0.5, 0.0, dtype))
            for blocks in (None, mask_blocks(mask)) if mask is not None else (None,):
                y = float_attention(q, k, v, mask, blocks, diagonal, d**-0.5, tile=tile_of(name))
                assert y.dtype == dtype and y.transpose(1, 2).is_contiguous()
                assert (y.double() - expected).norm() / expected.norm() < (1e-3 if dtype == torch.float16 else 6e-3), (
                    kind
                )


@kernels
def test_values_of_another_size_than_keys():
    q, q_scale, k, k_scale, v, *rest = case((1, 4, 2, 40, 50, 64))
    for columns in (1, 40):
        check((q, q_scale, k, k_scale, v[..., :columns], *rest))


@kernels
@pytest.mark.parametrize("values", [FLOAT, torch.int8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("softcap", [long(0.0), 5.0])
def test_granularities_and_softcap(granularity, softcap, values):
    for sq, name in ((3, "shipped"), (70, "shipped"), (70, "tma"))[1 if softcap else 0 :]:
        for value_scale in ("channel", "tensor") if values == torch.int8 and not softcap else ("head",):
            arguments = case((2, 4, 2, sq, 70, 64), granularity=granularity, values=values, value_scale=value_scale,
                             softcap=softcap, diagonal=70 - sq)  # fmt: skip
            check(arguments, tile_of(name))


@kernels
def test_empty():
    from sqcompile.kernels.triton.attention.int8_attention import int8_attention
    from sqcompile.kernels.triton.attention.mask import mask_blocks

    for shape in ((0, 2, 1, 3, 4, 32), (1, 2, 1, 0, 4, 32), (1, 2, 1, 3, 0, 32)):
        for values in (FLOAT, torch.int8):
            arguments = case(shape, values=values)
            y = int8_attention(*arguments)
            same(y, torch.zeros_like(y))
            same(y, plain.int8_attention(*arguments))
    for size in ((0, 3), (3, 0)):
        mask = torch.zeros(size, device=DEVICE)
        same(mask_blocks(mask), plain.mask_blocks(mask))


@kernels
@pytest.mark.parametrize("sq", [2, 70])
def test_long_rows_keep_their_weight_when_p_is_quantized(sq):
    """One score 8 larger than the rest, as that of the first token: relative to it, all other weights round to zero."""
    arguments = list(case((1, 1, 1, sq, 2000, 32), values=torch.int8))
    q, k, v = arguments[0], arguments[2], arguments[4]
    q.fill_(10), k[:, :, 0].fill_(100)
    arguments[1] = torch.full((), 8 / (10 * 100 * 32) / 0.01 * 32**0.5, device=DEVICE)
    arguments[3] = torch.full((), 0.01, device=DEVICE)
    k[:, :, 1:] //= 30
    v[:, :, 1:, :16] = v[:, :, 1:, :16].abs()
    y = check(tuple(arguments), bound=3e-2)
    assert torch.nn.functional.cosine_similarity(y.double(), exact(tuple(arguments)), -1).min() > 0.999


@kernels
def test_non_finite_scales_do_not_pass_as_numbers():
    from sqcompile.kernels.triton.attention.int8_attention import int8_attention

    arguments = list(case((1, 2, 2, 20, 20, 32), granularity="token"))
    arguments[1][0, 1, 3] = math.nan
    y = int8_attention(*arguments)
    assert y[0, 1, 3].isnan().all() and y.isnan().sum() == 32
    arguments[3][0, 0, 2] = math.inf
    assert int8_attention(*arguments)[0, 0].isnan().all()
    arguments[1].fill_(1e-33), arguments[3].fill_(1e-33)  # tensors of zeros: every weight is the same
    y = int8_attention(*arguments)
    torch.testing.assert_close(y, arguments[4].mean(2, keepdim=True).expand_as(y), rtol=1e-3, atol=1e-3)


@kernels
def test_strides_of_heads_and_of_a_cache():
    q, q_scale, k, k_scale, v, v_scale, *rest = case((2, 4, 2, 20, 48, 64), values=torch.int8)
    of = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    longer = torch.zeros(2, 2, 100, 64, dtype=torch.int8, device=DEVICE)
    longer[:, :, :48] = k
    turned = v.transpose(2, 3).contiguous().transpose(2, 3)
    for name in ("small", "tma"):
        for keys in (of(k), longer[:, :, :48]):
            for values in (of(v), turned):
                check((of(q), q_scale, keys, k_scale, values, v_scale, *rest), tile_of(name))


@kernels
def test_a_mismatch_is_an_error():
    from sqcompile.kernels.triton.attention.int8_attention import float_attention, int8_attention

    with pytest.raises(ValueError, match="do not belong together"):
        int8_attention(*case((1, 3, 2, 4, 4, 32)))
    with pytest.raises(ValueError, match="int8 q without a scale"):
        q, _, *rest = case((1, 2, 2, 4, 4, 32))
        int8_attention(q, None, *rest)
    q = torch.zeros(1, 2, 4, 32, device=DEVICE)
    with pytest.raises(ValueError, match="not all of one half precision"):
        float_attention(q, q, q.half(), None, None, None, 1.0)
