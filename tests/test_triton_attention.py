"""INT8 attention: its definition and the Triton kernel against float64; see triton_cases.py for where they run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, kernels, run_in_the_interpreter, same

from sqcompile.kernels import attention_int8 as plain

FLOAT, HALF = torch.float32, torch.bfloat16
GRANULARITIES = ["tensor", "head", "token"]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_these_kernels_in_the_interpreter():
    run_in_the_interpreter(__file__)


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
    from sqcompile.kernels.triton.attention import int8_attention

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
    from sqcompile.kernels.triton.attention import Tile

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
@pytest.mark.parametrize("values", [FLOAT, torch.int8])
@pytest.mark.parametrize("name", TILES)
def test_grouped_query_heads(name, values):
    for h, g in ((8, 2), (6, 2), (8, 1)) if name in ("shipped", "tma") else ((8, 2),):
        for sq in (1, 5, 40) if name == "shipped" else (5, 17):
            check(case((2, h, g, sq, 70, 32), values=values, diagonal=70 - sq), tile_of(name))


@kernels
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("d", [40, 64, 80, 96, 128, 256])
def test_head_sizes(d, values):
    for sq in (1, 70) if d in (80, 128) or not INTERPRETED else (40,):
        check(case((1, 2, 1, sq, 100, d), values=values, dtype=FLOAT if values == FLOAT else HALF))


@kernels
def test_values_of_another_size_than_keys():
    q, q_scale, k, k_scale, v, *rest = case((1, 4, 2, 40, 50, 64))
    for columns in (1, 40):
        check((q, q_scale, k, k_scale, v[..., :columns], *rest))


@kernels
@pytest.mark.parametrize("values", [FLOAT, torch.int8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_granularities_and_softcap(granularity, softcap, values):
    for sq, name in ((3, "shipped"), (70, "shipped"), (70, "tma"))[1 if softcap else 0 :]:
        for value_scale in ("channel", "tensor") if values == torch.int8 and not softcap else ("head",):
            arguments = case((2, 4, 2, sq, 70, 64), granularity=granularity, values=values, value_scale=value_scale,
                             softcap=softcap, diagonal=70 - sq)  # fmt: skip
            check(arguments, tile_of(name))


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


@kernels
@pytest.mark.parametrize("kind", masks(4, 4))
def test_masks_and_their_blocks(kind):
    from sqcompile.kernels.triton.mask import mask_blocks

    lengths = [(70, 260, "tma" if kind in ("window", "bias, lowest") else "shipped"), (2, 260, "shipped")]
    for sq, sk, name in [*lengths, (1, 140, "split"), (150, 150, "tma")] if kind == "window" else lengths:
        mask = masks(sq, sk)[kind].to(DEVICE)
        arguments = case((2, 2, 1, sq, sk, 32), mask=mask)
        y = check(arguments, tile_of(name))
        assert not y.isnan().any()
        blocks = mask_blocks(mask)
        same(blocks, plain.mask_blocks(mask))
        y = check((*arguments[:7], blocks, *arguments[8:]), tile_of(name))
        seen = exact((*arguments[:4], torch.ones_like(arguments[4]), *arguments[5:])) > 0  # rows that see a key
        same(y[~seen], torch.zeros_like(y[~seen]))


def test_the_plain_version_is_the_definition():
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("its operands are on the GPU")
    for kind, mask in masks(20, 150).items():
        for values, bound in ((FLOAT, 1e-5), (torch.int8, 2e-2)):
            arguments = case(
                (2, 2, 1, 20, 150, 40), mask=mask.to(DEVICE), values=values, softcap=9.0, granularity="token"
            )
            expected = exact(arguments)
            error = (plain.int8_attention(*arguments).double() - expected).norm() / expected.norm().clamp_min(1e-30)
            assert error <= bound, (kind, float(error))


@kernels
def test_empty():
    from sqcompile.kernels.triton.attention import int8_attention
    from sqcompile.kernels.triton.mask import mask_blocks

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
    from sqcompile.kernels.triton.attention import int8_attention

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
    from sqcompile.kernels.triton.attention import int8_attention

    with pytest.raises(ValueError, match="do not belong together"):
        int8_attention(*case((1, 3, 2, 4, 4, 32)))


@pytest.mark.skipif(INTERPRETED, reason="the operator runs compiled kernels")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_operators(device, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from sqcompile.kernels.ops import sqcompile_ops

    monkeypatch.setitem(globals(), "DEVICE", "cpu")
    mask = masks(20, 150)["window"].to(device)
    blocks = sqcompile_ops.mask_blocks(mask)
    torch.library.opcheck(sqcompile_ops.mask_blocks.default, (mask,))
    for values in (HALF, torch.int8):
        arguments = case((2, 4, 2, 20, 150, 32), values=values, dtype=HALF, granularity="token")
        arguments = tuple(x.to(device) if isinstance(x, Tensor) else x for x in arguments)
        arguments = (*arguments[:6], mask, blocks, *arguments[8:])
        torch.library.opcheck(sqcompile_ops.int8_attention.default, arguments)
        expected = exact(arguments)
        y = sqcompile_ops.int8_attention(*arguments)
        assert (y.double() - expected).norm() / expected.norm() < 2e-2


# GPU only ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("values", [HALF, torch.int8])
@pytest.mark.parametrize("shape", [(1, 8, 2, 2048, 2048, 128), (2, 8, 2, 1, 5000, 128), (1, 4, 4, 300, 4099, 64)])
def test_long_sequences_and_a_cuda_graph(shape, values):
    sq, sk = shape[3:5]
    arguments = case(shape, values=values, diagonal=sk - sq, dtype=HALF, granularity="token")
    check(arguments, bound=3e-2)
    from sqcompile.kernels.ops import sqcompile_ops

    mask = masks(sq, sk)["window"].cuda()

    def run() -> Tensor:
        masked = (*arguments[:6], mask, sqcompile_ops.mask_blocks(mask), None, *arguments[9:])
        return sqcompile_ops.int8_attention(*arguments) + sqcompile_ops.int8_attention(*masked)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    new = case(shape, values=values, seed=9)
    for old, x in zip(arguments[0:5:2], new[0:5:2], strict=True):  # a replay with new inputs
        old.copy_(x)
    mask.copy_(masks(sq, sk)["bool"])
    graph.replay()
    same(y, run())


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_more_than_2_to_the_31_elements():
    b, h, s, d = 17, 64, 16384, 128  # q, k and v: 2.3e9 elements each
    q = torch.ones(b, h, s, d, dtype=torch.int8, device="cuda")
    v = torch.zeros_like(q)
    v[-1, -1] = int8(s, d, seed=0).cuda()
    one = torch.ones((), device="cuda") * 0.01
    from sqcompile.kernels.triton.attention import int8_attention

    y = int8_attention(q[..., -1:, :], one, q, one, v, one, None, None, None, 1.0, 0.0, HALF)
    torch.testing.assert_close(y[-1, -1, 0].float(), v[-1, -1].float().mean(0) * 0.01, rtol=2e-2, atol=1e-3)
    assert not y[:-1].any()
