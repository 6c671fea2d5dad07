"""Replayed launches on a GPU, beside what Python launches, byte by byte."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    from sqcompile.kernels.ops import LAUNCHING
    from sqcompile.kernels.targets import replay_launches
    from sqcompile.kernels.triton import replay

    ops = torch.ops.sqcompile
    PYTHON = {schema.partition("(")[0]: function for schema, function in LAUNCHING.items()}


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    assert replay_launches(), "it must build wherever Triton does"


def same(name: str, calls: list[tuple[Any, ...]]) -> None:
    """Every call as Python gives it; all but the first of their kind without Python."""
    before = replay.counts(name)
    for args in calls:
        want, got = PYTHON[name](*args), getattr(ops, name)(*args)
        pairs = [(want, got)] if isinstance(want, Tensor) else list(zip(want, got, strict=True))
        for a, b in pairs:
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    after = replay.counts(name)
    assert (after[0] - before[0], after[1] - before[1]) == (1, 0), (before, after)


def gemm_call(m: int, k: int, n: int, dtype: torch.dtype, **more: Any) -> tuple[Any, ...]:
    q, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda") for rows in (m, n))
    scale, w_scale = torch.rand(m, 1, device="cuda"), torch.rand(n, device="cuda")
    bias = torch.randn(n, device="cuda", dtype=dtype) if more.get("bias") else None
    residual = torch.randn(m, n, device="cuda", dtype=dtype) if more.get("residual") else None
    out_scale = torch.tensor([0.5], device="cuda") if more.get("static") else None
    return q, scale, w, w_scale, bias, dtype, more.get("activation", "none"), residual, out_scale


@pytest.mark.parametrize("m", [1, 2, 4, 5, 16, 64, 100, 512, 2048])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (4096, 6144), (512, 1024), (100, 36)])
def test_gemm(m: int, k: int, n: int) -> None:
    same("int8_gemm", [gemm_call(m, k, n, torch.bfloat16) for _ in range(3)])


@pytest.mark.parametrize(
    "more",
    [
        {"bias": True},
        {"residual": True, "activation": "gelu"},
        {"bias": True, "static": True, "activation": "relu"},
    ],
)
@pytest.mark.parametrize("m", [3, 48, 1024])
def test_gemm_with_an_epilogue(m: int, more: dict[str, Any]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        same("int8_gemm", [gemm_call(m, 1024, 2048, dtype, **more) for _ in range(3)])


def test_rows_that_are_strided_and_shifted() -> None:
    def call(shift: int) -> tuple[Any, ...]:
        q, *rest = gemm_call(8, 256, 256, torch.bfloat16)
        wide = torch.zeros(8, 512, dtype=torch.int8, device="cuda")
        wide[:, shift : shift + 256] = q
        return wide[:, shift : shift + 256], *rest

    same("int8_gemm", [call(0), call(16), call(32)])  # of where a row starts, only the low bits are part of a layout
    same("int8_gemm", [call(3), call(19), call(35)])


def test_attention() -> None:
    def call(queries: int, keys: int, causal: bool) -> tuple[Any, ...]:
        q = torch.randn(2, 8, queries, 64, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(2, 2, keys, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return q, k, v, None, None, causal, None

    same("attention", [call(1, 300, False) for _ in range(3)])
    same("attention", [call(128, 128, True) for _ in range(3)])


def test_mask_of_attention() -> None:
    mask = torch.zeros(1, 1, 64, 192, device="cuda", dtype=torch.bool)
    mask[..., :100] = True
    q = torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 4, 192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        args = (q, k, v, mask, None, False, 0.125)
        assert torch.equal(ops.attention(*args), PYTHON["attention"](*args))


def test_rotation() -> None:
    calls = [(torch.randn(6, 256, device="cuda", dtype=torch.bfloat16), 32, None, 0) for _ in range(3)]
    same("rotate_quantize", calls)


def test_experts() -> None:
    """Rows past the last expert are zeros."""
    w = torch.randint(-127, 128, (4, 64, 128), dtype=torch.int8, device="cuda")

    def call() -> tuple[Any, ...]:
        q = torch.randint(-127, 128, (32, 128), dtype=torch.int8, device="cuda")
        offsets = torch.tensor([8, 8, 20, 30], dtype=torch.int32, device="cuda")
        return q, torch.rand(32, 1, device="cuda"), w, torch.rand(4, 64, device="cuda"), offsets, torch.bfloat16

    same("int8_grouped_linear", [call() for _ in range(3)])


def test_in_a_cuda_graph() -> None:
    """A call whose kind was never seen before is captured by Python, one that was by C++."""
    for warm in (False, True):
        args = gemm_call(7, 640, 384 if warm else 448, torch.bfloat16)
        ops.int8_gemm(*gemm_call(7, 640, args[2].shape[0], torch.float16))  # compiles; another kind of call
        PYTHON["int8_gemm"](*args)
        if warm:
            ops.int8_gemm(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.int8_gemm(*args)
        args[0].copy_(torch.randint(-127, 128, args[0].shape, dtype=torch.int8, device="cuda"))
        graph.replay()
        assert torch.equal(y, PYTHON["int8_gemm"](*args))


def test_on_another_stream() -> None:
    args = gemm_call(512, 4096, 4096, torch.bfloat16)
    ops.int8_gemm(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        later = args[0].clone()
        torch.cuda._sleep(20_000_000)  # so that a launch on the wrong stream reads what is not there yet
        later.copy_(-args[0])
        y = ops.int8_gemm(later, *args[1:])
    stream.synchronize()
    assert torch.equal(y, PYTHON["int8_gemm"](-args[0], *args[1:]))


def test_threads() -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        for i in range(30):
            args = gemm_call(1 + (seed + i) % 7, 768, 256, torch.bfloat16)
            if not torch.equal(ops.int8_gemm(*args), PYTHON["int8_gemm"](*args)):
                failures.append(f"{seed}, {i}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device() -> None:
    args = [a.to("cuda:1") if isinstance(a, Tensor) else a for a in gemm_call(16, 512, 512, torch.bfloat16)]
    for _ in range(3):
        assert torch.equal(ops.int8_gemm(*args), PYTHON["int8_gemm"](*args))
    assert torch.cuda.current_device() == 0
