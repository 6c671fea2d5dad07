"""replay: operators that launch Triton kernels, without Python from their second call on.

Python takes 50 to 190 us to launch one GEMM: it checks, chooses a tile, makes descriptors, and Triton binds and specializes
thirty arguments. All of that depends on the layout of a call alone. So what the first call of its kind launches is
recorded (`launching.Recorder`), compared with Python's result byte by byte, and launched by C++ from then on
(recording.h, replay.cpp). Where that does not build, or with versions of Triton that nobody tried it with, Python goes on.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from sqcompile.kernels.cpu.build import built
from sqcompile.kernels.triton.launching import Recorder
from sqcompile.pytorch.core import withdraw

log = logging.getLogger("sqcompile")

FILES = ("../triton/recording.h", "../triton/replay.cpp")
TRIED = ("3.6.", "3.9.")  # versions of Triton, whose compiled kernels are read
_kept: list[Any] = []  # compiled kernels whose functions are launched
_slow = torch.library.Library("sqcompile_triton", "DEF")  # the operators in Python, which are recorded


def install(operators: Mapping[str, Callable[..., Any]], registered: torch.library.Library) -> bool:
    """Has CUDA's operators of sqcompile replayed in this process from now on. Builds C++, once per machine, for some seconds.

    Args:
        operators: what they do in Python, by schema.
        registered: the library that they are registered by, which is taken back: none of them may be running.

    Returns:
        whether they are.
    """
    if not triton.__version__.startswith(TRIED):
        log.debug("launches are not replayed: Triton is %s, and %s were tried", triton.__version__, " and ".join(TRIED))
        return False
    library = _library()
    if library is None:
        return False
    missing = library.sqcompile_replay_driver(b"libcuda.so.1", b"libtorch_cuda.so")
    if missing:
        log.debug("launches are not replayed: %s", missing.decode())
        return False
    for schema, function in operators.items():
        _define(schema, function, "CUDA")
    withdraw(registered)
    for schema in operators:
        _replay(schema, "CUDA")
    return True


def replayed(schema: str, function: Callable[..., Any], key: str) -> None:
    """Has ``sqcompile::`` operator replay what ``function`` launches, on "CUDA"; on "CPU" in tests, with their own driver."""
    _define(schema, function, key)
    _replay(schema, key)


def _define(schema: str, function: Callable[..., Any], key: str) -> None:
    _slow.define(schema)
    _slow.impl(schema.partition("(")[0], _recorded(_library(), function), key)


def _replay(schema: str, key: str) -> None:
    name, library = schema.partition("(")[0], _library()
    assert library is not None
    failed = library.sqcompile_replay(name.encode(), key == "CUDA")
    if failed:
        raise RuntimeError(f"{name} cannot be replayed: {failed.decode()}")


@functools.cache
def _library() -> Any | None:
    otherwise = "the code that launches sqcompile's GPU kernels does not build here, and Python launches them, which takes longer"
    library = built(*FILES, otherwise=otherwise)
    if library is not None:
        library.sqcompile_replay_driver.restype = library.sqcompile_replay.restype = ctypes.c_char_p
    return library


def counts(name: str) -> tuple[int, int]:
    """How many kinds of calls of an operator are replayed, and how many were seen not to be."""
    library = _library()
    assert library is not None
    found = (ctypes.c_int64(), ctypes.c_int64())
    library.sqcompile_replay_count(name.encode(), *(ctypes.byref(x) for x in found))
    return found[0].value, found[1].value


def _recorded(library: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator in Python, which leaves what it launched for the C++ that called it."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return function(*args)  # what is recorded is compared, for which a graph's recording cannot wait
        with Recorder(args) as recorder:
            out = function(*args)
        words = recorder.words([out] if isinstance(out, Tensor) else [*out])
        if recorder.why is None:
            _kept.extend(compiled for compiled, *_ in recorder.kernels)
        else:
            log.debug("calls like this one of %s are not replayed: %s", function.__name__, recorder.why)
        library.sqcompile_replay_leave((ctypes.c_int64 * len(words))(*words))
        return out

    return run
