"""INT8 attention in Triton: masks, the lists of their blocks, the operators, long sequences."""

from __future__ import annotations

import attention_cases
import pytest
import torch
from attention_cases import FLOAT, HALF, case, check, exact, int8, masks, tile_of
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, PARTS, kernels, long, run_in_the_interpreter, same

from sqcompile.kernels import attention_int8 as plain


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize("part", PARTS)
def test_these_kernels_in_the_interpreter(part):
    run_in_the_interpreter(__file__, part)


@kernels
@pytest.mark.parametrize(
    "kind", [kind if kind in ("window", "padding", "bias, lowest") else long(kind) for kind in masks(4, 4)]
)
def test_masks_and_their_blocks(kind):
    from sqcompile.kernels.triton.attention.mask import mask_blocks

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


@kernels
def test_a_mask_of_one_key_has_a_list_of_its_own_length():
    """Two bands of one block of a mask [130, 1] are as long a list as four blocks of 390 keys."""
    from sqcompile.kernels.triton.attention.mask import mask_blocks

    mask = torch.randn(1, 1, 130, 1, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments = case((1, 1, 1, 130, 390, 32), mask=mask)
    check((*arguments[:7], mask_blocks(mask), *arguments[8:]))


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


@pytest.mark.skipif(INTERPRETED, reason="the operator runs compiled kernels")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_operators(device, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from sqcompile.kernels.ops import sqcompile_ops

    monkeypatch.setattr(attention_cases, "DEVICE", "cpu")
    mask = masks(20, 150)["window"].to(device)
    torch.library.opcheck(sqcompile_ops.aligned_mask.default, (mask,))
    mask = sqcompile_ops.aligned_mask(mask)
    assert mask.shape == (20, 150) and mask.stride() == (160, 1) and torch.equal(mask.cpu(), masks(20, 150)["window"])
    blocks = sqcompile_ops.mask_blocks(mask)
    torch.library.opcheck(sqcompile_ops.mask_blocks.default, (mask,))
    q, k = (torch.randn(2, n, s, 32, dtype=HALF, device=device) for n, s in ((4, 20), (2, 150)))
    bias = mask if device == "cuda" else torch.zeros(20, 150, dtype=HALF).masked_fill(~mask, -torch.inf)
    about = blocks if device == "cuda" else None
    torch.library.opcheck(sqcompile_ops.attention.default, (q, k, k, bias, about, False, None))
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
    from sqcompile.kernels.triton.attention.int8_attention import int8_attention

    y = int8_attention(q[..., -1:, :], one, q, one, v, one, None, None, None, 1.0, 0.0, HALF)
    torch.testing.assert_close(y[-1, -1, 0].float(), v[-1, -1].float().mean(0) * 0.01, rtol=2e-2, atol=1e-3)
    assert not y[:-1].any()
