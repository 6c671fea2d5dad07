"""The Triton GEMMs against the integer reference, bit for bit: see triton_cases.py for where they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import (
    ACTIVATIONS,
    DEVICE,
    INTERPRETED,
    PARTS,
    int8,
    kernels,
    long,
    run_in_the_interpreter,
    same,
    tensor,
)

from sqcompile.kernels import reference


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize("part", PARTS)
def test_these_kernels_in_the_interpreter(part):
    run_in_the_interpreter(__file__, part)


# GEMM ----------------------------------------------------------------------------------------------------------------


def configs() -> dict[str, Any]:
    from sqcompile.kernels.triton.gemm.tiles import Config, gpu_of, specializes

    found = {
        "shipped": None,
        "tile": Config("tile", 32, 32, 32, group=2),
        "tile split": Config("tile", 16, 32, 32, split=3),
        "tile swapped": Config("tile", 16, 64, 32, split=2, swap=True),
        "gemv": Config("gemv", 4, 8, 64, stages=2),
        "gemv split": Config("gemv", 4, 8, 64, stages=1, split=2),
    }
    if INTERPRETED or torch.cuda.get_device_capability() >= (9, 0):
        found |= {
            "persistent": Config("persistent", 64, 32, 32, group=2),
            "persistent halves": Config("persistent", 64, 64, 32, sub=2, flatten=True),
            "persistent quarters": Config("persistent", 64, 128, 64, sub=4, warps=8),
            "tile tma": Config("tile", 32, 64, 64, tma=True, swap=True, split=2),
        }
    if not INTERPRETED and specializes(gpu_of(torch.device("cuda", 0))):
        found["persistent specialized"] = Config("persistent", 128, 256, 128, stages=3, warps=4, specialize=True)
    return found


CONFIGS = [
    "shipped", "tile", "tile split", "tile swapped", "gemv", "gemv split",
    "persistent", "persistent halves", "persistent quarters", "tile tma",
    "persistent specialized",
]  # fmt: skip


def config(name: str) -> Any:
    found = configs()
    if name not in found:
        pytest.skip("not for this GPU, or not for this Triton")
    return found[name]


def sizes(name: str) -> list[tuple[int, int, int]]:
    """(M, N, K) around every tile boundary; odd and prime where the kernel takes them."""
    if name.startswith("gemv"):
        return [(m, n, k) for m in (1, 2, 3, 4) for n, k in ((1, 1), (7, 63), (8, 64), (9, 65), (17, 200), (31, 127))]
    if "persistent" in name or "tma" in name:
        return [(m, n, k) for m in (1, 64, 65) for n, k in ((32, 32), (136, 48), (56, 80))]
    if name == "shipped":
        return [(1, 7, 33), (3, 16, 64), (16, 48, 64), (33, 31, 37), (65, 8, 16), (100, 129, 48), (130, 17, 101)]
    return [(m, n, k) for m in (1, 16, 33) for n, k in ((1, 1), (31, 31), (32, 32), (65, 101))]


@kernels
@pytest.mark.parametrize("name", CONFIGS)
def test_gemm_is_exact(name):
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm

    one = torch.ones((), device=DEVICE)
    for m, n, k in sizes(name):
        q, w = int8(m, k), int8(n, k, seed=1)
        y = int8_gemm(q, w, one, one, dtype=torch.float32, config=config(name))
        same(y, reference.int8_matmul(q.cpu(), w.cpu()).float().to(DEVICE))  # below 2^24: float32 holds it


@kernels
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [long(torch.float16), torch.bfloat16, long(torch.float32)])
def test_the_epilogue_equals_the_reference(name, dtype):
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm

    if dtype == torch.float16 and INTERPRETED and name != "shipped":
        pytest.skip("the interpreter is slow")
    m, n, k = (3 if name.startswith("gemv") else 17), 72, 80
    q, w, x_scale, w_scale = int8(m, k), int8(n, k, seed=1), tensor(m, 1, seed=2).abs(), tensor(n, seed=3).abs()
    bias, residual = tensor(n, dtype=dtype, seed=4), tensor(m, n, dtype=dtype, seed=5)
    c = config(name)
    for rows, columns, b in ((x_scale, w_scale, None), (x_scale[0, 0], w_scale, bias), (x_scale, w_scale[:1], bias)):
        y = int8_gemm(q, w, rows, columns, b, dtype, config=c)
        same(y, reference.int8_linear(q, rows, w, columns, b, dtype))
    y = reference.int8_linear(q, x_scale, w, w_scale, bias, torch.float32)
    few = ("relu", "gelu") if INTERPRETED and name != "shipped" else ACTIVATIONS
    for activation in few:
        f = ACTIVATIONS[activation]
        got = int8_gemm(q, w, x_scale, w_scale, bias, dtype, activation=activation, residual=residual, config=c)
        expected = (f(y) + residual.float()).to(dtype)
        torch.testing.assert_close(got, expected, rtol=2e-5 if dtype == torch.float32 else 1e-2, atol=1e-3)
    static = torch.tensor(3.0, device=DEVICE)
    n8 = n if "persistent" not in name else 64  # int8 rows of 64 bytes: TMA stores multiples of 16
    got = int8_gemm(q, w[:n8], x_scale, w_scale[:n8], bias[:n8], dtype, activation="relu", out_scale=static, config=c)
    same(got, reference.quantize(y[:, :n8].relu().to(dtype), static))


@kernels
def test_gemm_of_nothing_and_of_views():
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm

    one = torch.ones((), device=DEVICE)
    w = int8(24, 32, seed=1)
    empty = int8_gemm(int8(2, 0, 32), w, torch.ones(2, 0, 1, device=DEVICE), one)
    assert empty.shape == (2, 0, 24) and empty.dtype == torch.bfloat16
    q = int8(4, 5, 40)
    for view in (
        q[..., :32],
        q[:, 1, :32],
        q[0, :, 3:35],
        q.transpose(0, 1)[..., :32],
        q[0, :, :32].t().contiguous().t(),
    ):
        y = int8_gemm(view, w, one, one, dtype=torch.float32)
        same(y, reference.int8_matmul(view.cpu(), w.cpu()).float().to(DEVICE))
    wide = int8(24, 64, seed=1)[:, 16:48]
    same(int8_gemm(q[0, :, :32], wide, one, one), int8_gemm(q[0, :, :32], wide.contiguous(), one, one))
    with pytest.raises(ValueError, match="q has 32 columns and w has 40"):
        int8_gemm(q[0, :, :32], int8(8, 40), one, one)


@kernels
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("n, k", [(48, 64), (33, 37)])
def test_grouped_gemm(tma, n, k):
    from sqcompile.kernels.triton.gemm.grouped import grouped_int8_gemm
    from sqcompile.kernels.triton.gemm.tiles import Config

    if tma and (k % 16 or not (INTERPRETED or torch.cuda.get_device_capability() >= (9, 0))):
        pytest.skip("TMA needs sm_90 and rows of multiples of 16 bytes")
    counts = [0, 5, 1, 0, 40, 17, 0]
    e, t = len(counts), sum(counts)
    q, w = int8(t, k), int8(e, n, k, seed=1)
    x_scale, w_scale, bias = tensor(t, 1, seed=2).abs(), tensor(e, n, seed=3).abs(), tensor(e, n, seed=4)
    ends = torch.tensor(counts).cumsum(0)
    c = Config("tile", 16, 32, 32, ctas=1, tma=tma)
    y = grouped_int8_gemm(q, w, x_scale, w_scale, ends.int().to(DEVICE), bias, torch.float32, config=c)
    for i, end in enumerate(ends.tolist()):
        rows = slice(end - counts[i], end)
        expected = reference.int8_linear(q[rows], x_scale[rows], w[i], w_scale[i], bias[i], torch.float32)
        same(y[rows], expected)
    assert grouped_int8_gemm(q[:0], w, x_scale[:0], w_scale, ends.int().to(DEVICE) * 0).shape == (0, n)


# tables --------------------------------------------------------------------------------------------------------------


def test_tables_and_rules_give_a_configuration_for_every_shape():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.importorskip("triton")
    from sqcompile.kernels.triton.gemm.tiles import Gpu, bucket, tiles

    assert [bucket(m) for m in (1, 2, 3, 16, 17, 5000, 8192, 10**6)] == [1, 2, 4, 16, 32, 8192, 8192, 8192]
    for gpu in (Gpu("NVIDIA H100 80GB HBM3", 90, 132), Gpu("NVIDIA A100-SXM4-80GB", 80, 108), Gpu("?", 86, 84)):
        for n, k in ((4096, 4096), (28672, 4096), (1, 1), (101, 20011), (151936, 896)):
            for m in [2**i for i in range(14)]:
                for aligned in (False, True):
                    c = tiles(gpu, m, n, k, aligned)
                    assert not c.needs_tma or (aligned and gpu.capability >= 90)
                    assert c.kind != "gemv" or m <= 4
    assert tiles(Gpu("NVIDIA H100 80GB HBM3", 90, 132), 4096, 28672, 4096).kind == "persistent"


# GPU only ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["shipped", "tile"])
def test_more_than_2_to_the_31_elements(name):
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm
    from sqcompile.kernels.triton.gemm.tiles import Config
    from sqcompile.kernels.triton.rows.act import act_quantize
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    m, n, k = 140_000, 16_384, 128  # y: 2.29e9 elements, 4.6 GB
    q, w, one = int8(m, k), int8(n, k, seed=1), torch.ones((), device=DEVICE)
    c = None if name == "shipped" else Config("tile", 128, 128, 64, warps=8)
    y = int8_gemm(q, w, one * 0.01, one, dtype=torch.bfloat16, config=c)
    rows = torch.tensor([0, 1, 131_071, 131_072, m - 1], device=DEVICE)
    same(y[rows], reference.int8_linear(q[rows].cpu(), one.cpu() * 0.01, w.cpu(), one.cpu(), None, y.dtype).to(DEVICE))
    if name == "shipped":
        for found, scale in (quantize_rows(y), act_quantize(y, None, "none")):
            same(scale[rows], reference.token_scale(y[rows]))
            same(found[rows], reference.quantize(y[rows], scale[rows]))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("m", [1, 4, 16, 64, 200, 2048])
@pytest.mark.parametrize("n, k", [(6144, 4096), (4096, 14336), (4099, 4097)])
def test_shipped_choices_on_large_shapes_and_in_a_cuda_graph(m, n, k):
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm

    q, w, x_scale, w_scale = int8(m, k), int8(n, k, seed=1), tensor(m, 1).abs(), tensor(n).abs()
    y = int8_gemm(q, w, x_scale, w_scale)
    rows = torch.tensor([0, m // 2, m - 1])
    expected = reference.int8_linear(q[rows].cpu(), x_scale[rows].cpu(), w.cpu(), w_scale.cpu(), None, y.dtype)
    same(y[rows].cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = int8_gemm(q, w, x_scale, w_scale)
    q.copy_(int8(m, k, seed=7))  # a replay with new inputs
    graph.replay()
    same(z, int8_gemm(q, w, x_scale, w_scale))
