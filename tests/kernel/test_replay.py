"""Replayed launches, without a GPU: a driver of our own, whose "kernels" are C functions that run when they are launched."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from sqcompile.kernels.triton import replay
from sqcompile.kernels.triton.launching import launch

DRIVER = r"""
#include <stdint.h>
#include <string.h>
typedef struct { unsigned grid[3], block[3], shared; void* stream; void* attributes; unsigned count; } Config;
static int64_t launches;
int64_t count_launches(void) { return launches; }
int cuLaunchKernelEx(const Config* c, void (*kernel)(void**), void** parameters, void** extra) {
  for (unsigned i = 0; i < c->grid[0]; ++i) kernel(parameters);
  launches += 1;
  return 0;
}
typedef struct { void* address; uint64_t rows, columns, stride; uint32_t box; int type, swizzle; } Map;
int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                           const uint32_t* box, const uint32_t* steps, int a, int swizzle, int b, int fill) {
  const Map m = {address, sizes[1], sizes[0], strides[0], box[0], type, swizzle};
  memcpy(map, &m, sizeof m);
  return rank != 2 || fill != 0;
}
int cuMemsetD8Async(void* address, unsigned char byte, size_t bytes, void* stream) {
  memset(address, byte, bytes);
  return 0;
}
/* y = a x + b, all float32 of n elements */
void scale_add(void** p) {
  const float *x = *(float**)p[0], *b = *(float**)p[1], a = *(float*)p[3];
  float* y = *(float**)p[2];
  for (int64_t i = 0; i < *(int32_t*)p[4]; ++i) y[i] = a * x[i] + (b ? b[i] : 0.0f);
}
/* y[row] = the sum of a row, read through a map */
void sum_rows(void** p) {
  const Map* m = p[0];
  for (uint64_t r = 0; r < m->rows; ++r) {
    float sum = 0;
    for (uint64_t c = 0; c < m->columns; ++c) sum += ((float*)((char*)m->address + r * m->stride))[c];
    (*(float**)p[5])[r] = sum + m->box + m->type + m->swizzle;
  }
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "driver.so", folder / "driver.c"], check=True)
    library: Any = replay._library()
    assert library.sqcompile_replay_driver(bytes(folder / "driver.so"), None) is None
    found = ctypes.CDLL(str(folder / "driver.so"))
    found.count_launches.restype = ctypes.c_int64
    return found


class Kernel:
    """What a compiled kernel of Triton is to `launch`: a signature, and code that runs at once."""

    def __init__(self, driver: Any, name: str, types: dict[str, str], metas: Any = None) -> None:
        import inspect

        self.signature = inspect.Signature(
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in types]
        )
        metadata = SimpleNamespace(
            num_ctas=1, launch_cooperative_grid=False, profile_scratch_size=0, shared=0, num_warps=4, launch_pdl=False,
            global_scratch_size=0, tensordesc_meta=metas,
        )  # fmt: skip
        function = ctypes.cast(getattr(driver, name), ctypes.c_void_p).value
        self.compiled = SimpleNamespace(
            name=name, metadata=metadata, function=function, src=SimpleNamespace(signature=types)
        )
        self.calls = 0

    def run(self, *args: Any) -> None:
        raise NotImplementedError

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            self.run(*args)
            return self.compiled

        return call


class ScaleAdd(Kernel):
    def run(self, *args: Any) -> None:
        x, b, y, a, n = args
        with torch._C._DisableTorchDispatch():
            y.view(-1).copy_(a * x.reshape(-1)[:n] + (0 if b is None else b.reshape(-1)))


class SumRows(Kernel):
    def run(self, *args: Any) -> None:
        d, y = args
        with torch._C._DisableTorchDispatch():
            y.copy_(d.base.sum(1) + d.block_shape[1] + 7 + 3)


def registered(schema: str, function: Any) -> Any:
    """An operator of sqcompile, replayed on the CPU."""
    library = torch.library.Library("sqcompile", "FRAGMENT")
    library.define(schema)
    KEPT.append(library)
    replay.replayed(schema, function, "CPU")
    return getattr(torch.ops.sqcompile, schema.partition("(")[0])


KEPT: list[torch.library.Library] = []


def test_a_second_call_launches_without_python(driver: Any) -> None:
    types = {"x": "*fp32", "b": "*fp32", "y": "*fp32", "a": "fp32", "n": "i32"}
    kernel = ScaleAdd(driver, "scale_add", types)
    unbiased = ScaleAdd(driver, "scale_add", types)

    def function(x: Tensor, b: Tensor | None, a: float, dtype: torch.dtype, word: str) -> Tensor:
        y = torch.empty(x.shape, dtype=dtype)
        launch(unbiased if b is None else kernel, (1,), x, b, y, a, x.numel())
        return y

    op = registered("replay_add(Tensor x, Tensor? b, float a, ScalarType dtype, str word) -> Tensor", function)
    for round_ in range(4):
        x, b = torch.randn(3, 5), torch.randn(3, 5)
        assert torch.equal(op(x, b, 2.0, torch.float32, "w"), 2.0 * x + b)
        assert kernel.calls == 1, "only the first call is Python's"
        assert replay.counts("replay_add") == (1, 0), round_
    # other numbers, layouts and words are calls of their own
    x = torch.randn(3, 5)
    assert torch.equal(op(x, x, 3.0, torch.float32, "w"), 3.0 * x + x)
    assert torch.equal(op(torch.ones(4, 5), torch.ones(4, 5), 2.0, torch.float32, "w"), torch.full((4, 5), 3.0))
    assert kernel.calls == 3
    # one tensor twice is not two tensors
    y = torch.randn(3, 5)
    assert torch.equal(op(y, x, 3.0, torch.float32, "w"), 3.0 * y + x)
    assert kernel.calls == 4
    assert torch.equal(op(y, y, 3.0, torch.float32, "w"), 3.0 * y + y)
    assert kernel.calls == 4
    # an address that no vector load can take is another layout
    odd = torch.randn(16)[1:]
    assert torch.equal(op(odd.view(3, 5), x, 3.0, torch.float32, "w"), 3.0 * odd.view(3, 5) + x)
    assert kernel.calls == 5


def test_descriptors_are_made_for_each_call(driver: Any) -> None:
    meta = {"elem_size": 4, "elem_type": 7, "swizzle": 3, "block_size": [16, 32], "fp4_padded": False}
    kernel = SumRows(driver, "sum_rows", {"d": "tensordesc<fp32[16,32]>", "y": "*fp32"}, [meta])

    def function(x: Tensor) -> Tensor:
        y = torch.empty(x.shape[0])
        launch(kernel, (1,), TensorDescriptor(x, list(x.shape), list(x.stride()), [16, 32]), y)
        return y

    op = registered("replay_sum(Tensor x) -> Tensor", function)
    for _ in range(3):
        wide = torch.randint(-9, 9, (6, 64)).float()
        assert torch.equal(op(wide[:, :8]), wide[:, :8].sum(1) + 32 + 7 + 3)
    assert kernel.calls == 1


@pytest.mark.parametrize(("value", "dtype"), [(0, torch.float32), (-1, torch.int32)])
def test_filled_buffers_are_filled_again(driver: Any, value: int, dtype: torch.dtype) -> None:
    """The kernel writes to the first rows alone."""
    types = {"x": "*fp32", "b": "*fp32", "y": "*fp32", "a": "fp32", "n": "i32"}
    kernel = ScaleAdd(driver, "scale_add", types)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        rest = torch.zeros(x.shape) if value == 0 else torch.full(x.shape, value, dtype=dtype)
        y = torch.empty(x.shape)
        launch(kernel, (1,), x, None, y, 2.0, x.numel())
        return y, rest

    op = registered(f"replay_fill{-value}(Tensor x) -> (Tensor, Tensor)", function)
    for _ in range(3):
        x = torch.randn(200, 7)
        y, rest = op(x)
        assert torch.equal(y, 2 * x) and torch.equal(rest, torch.full(x.shape, value, dtype=dtype))
        rest.fill_(5)  # so that the memory it is given next is not what it should be
    assert kernel.calls == 1


@pytest.mark.parametrize("what", ["copy", "wrong", "inside", "alias"])
def test_what_cannot_be_replayed_stays_in_python(driver: Any, what: str) -> None:
    types = {"x": "*fp32", "b": "*fp32", "y": "*fp32", "a": "fp32", "n": "i32"}
    kernel = ScaleAdd(driver, "scale_add", types)

    def function(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        if what == "copy":  # done by PyTorch, and not by a kernel
            x = x * 1.0
        a = 2.0 if what != "wrong" else torch.rand(()).item()  # what a recording would not know
        if what == "inside":
            launch(kernel, (1,), x[1:], None, y[1:], a, x[1:].numel())
            return y
        launch(kernel, (1,), x, None, y, a, x.numel())
        return y if what != "alias" else x

    op = registered(f"replay_{what}(Tensor x) -> Tensor", function)
    for calls in (1, 2, 3):
        x = torch.randn(4, 4)
        y = op(x)
        assert kernel.calls == calls
        if what == "copy":
            assert torch.equal(y, 2 * x)
    assert replay.counts(f"replay_{what}") == (0, 1)
