"""Compiling the kernels for a GPU that is not there: the launch functions run, on CPU tensors, and nothing is launched.

The compiled code is the one a launch with such arguments would use (same specialization, same key in Triton's cache on
disk), so tests can look at its PTX, and the tuner can fill the cache from many processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from sqcompile.kernels.triton.gemm import tiles
from sqcompile.kernels.triton.gemm.tiles import Gpu


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"dry {self.target.arch}"  # the key of Triton's cache in memory: apart from any real device

    def get_current_stream(self, device: object) -> int:
        return 0


@contextlib.contextmanager
def dry(capability: int, sms: int = 132, name: str = "dry") -> Iterator[list[Any]]:
    """Within it, launches with CPU tensors compile for ``sm_<capability>`` and append the compiled kernel to the list.

    A compiled kernel has ``asm["ptx"]``, ``asm["cubin"]`` and ``metadata`` (name, shared bytes, warps). Results of the
    launch functions are uninitialized memory.
    """
    compiled: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    with (
        mock.patch.object(driver, "_active", _Driver(GPUTarget("cuda", capability, 32))),
        mock.patch.object(triton.JITFunction, "run", compile_only),
        mock.patch.object(tiles, "CPU_STANDS_FOR", Gpu(name, capability, sms)),
    ):
        yield compiled
