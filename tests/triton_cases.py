"""How the tests of the Triton kernels run: in Triton's interpreter on the CPU, natively on a GPU.

TRITON_INTERPRET counts when a kernel is decorated, so the interpreter gets a process of its own: without a GPU, each test
file starts itself again with the variable set (`run_in_the_interpreter`), and its other tests are not selected.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sqcompile.kernels import reference

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_kernels: Any = (
    []
    if INTERPRETED
    else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
)


if INTERPRETED:
    # The interpreter truncates float32 to bfloat16; every GPU rounds to the nearest even.
    from triton import language as tl
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return _convert(data, source, target, mode)
        wide = torch.from_numpy(data.copy())
        return wide.to(torch.bfloat16).view(torch.uint16).numpy()

    interpreter._convert_float = _rounding


def long(parameter: Any) -> Any:
    """A parameter of tests that are left to `make slow` in the interpreter."""
    return pytest.param(parameter, marks=pytest.mark.slow)


DTYPES = [long(torch.float16), torch.bfloat16, torch.float32]
PARTS = ["not slow", long("slow")]


def kernels(function: Any) -> Any:
    for mark in needs_kernels:
        function = mark(function)
    return function


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Normal values on the device under test, with a few outlier channels."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    x[..., :: max(1, shape[-1] // 3)] *= 20
    return x.to(dtype).to(DEVICE)


def int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8).to(DEVICE)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def nearly(q: Tensor, s: Tensor, y: Tensor, scale: Tensor, rtol: float | None = None) -> None:
    """Single int8 values differ by one, where a sum in another order moved y by one rounding."""
    rtol = (1e-2 if y.dtype != torch.float32 else 1e-5) if rtol is None else rtol
    torch.testing.assert_close(s, scale, rtol=rtol, atol=0)
    difference = (q.int() - reference.quantize(y, s).int()).abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) < 2e-2


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def run_in_the_interpreter(file: str, part: str) -> None:
    """Runs a file's tests of the kernels, those that are marked slow or the others."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", part, file],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " failed" not in run.stdout
