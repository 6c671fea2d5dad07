"""dispatch: CPU operators of sqcompile that PyTorch calls without Python (dispatch*.cpp).

An operator in Python takes the host 15 to 25 us in a loop, and up to 100 between products that fill the caches: more than its
kernel at a few rows. Where the C++ does not build, Python goes on; where what a user passed is wrong, Python says so.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sqcompile.kernels.cpu import flash, rows, x86
from sqcompile.kernels.cpu.build import built
from sqcompile.pytorch.core import retry, withdraw

log = logging.getLogger("sqcompile")

FILES = ("pool.h", "dispatch.h", "dispatch_rows.cpp", "dispatch_attention.cpp", "dispatch.cpp")
_installing = threading.Lock()
_python = torch.library.Library("sqcompile_python", "DEF")  # what the C++ passes on
_again = torch.library.Library("sqcompile", "IMPL")
KEYS = ("CPU", "MkldnnCPU")  # packed weights carry the second one
_NEVER = -1
_USERS = ("checked_ids", "mask_kind", "attention")  # what a user passes reaches these as it is


def install(operators: Mapping[str, Callable[..., Any]], registered: torch.library.Library) -> bool:
    """Has x86's operators called without Python in this process from now on, once. Builds C++, once per machine.

    Args:
        operators: what they do in Python, by schema.
        registered: the library that they are registered by, which is taken back: none of them may be running.

    Returns:
        whether they are.
    """
    with _installing:
        return _installed(tuple(operators.items()), registered)


@functools.cache
def _installed(operators: tuple[tuple[str, Callable[..., Any]], ...], registered: torch.library.Library) -> bool:
    calls, row_kernels, gemms = library(), rows.library(), x86.library()
    if calls is None or row_kernels is None or gemms is None:
        return False
    for schema, function in operators:
        _python.define(schema)
        for key in KEYS:
            _python.impl(schema.partition("(")[0], function, key)
    kinds = ("vnni", "amx", "flash", "avx2")
    functions = (row_kernels.sqcompile_rows, *(getattr(gemms, f"sqcompile_{kind}") for kind in kinds))
    addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in functions]
    limits = (
        x86.AMX_ROWS if x86.amx() else _NEVER,
        flash.least_queries() if flash.available() else _NEVER,
        flash.products(),
    )
    withdraw(registered)
    wrong = calls.sqcompile_dispatch(
        (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_int64 * len(limits))(*limits)
    )
    if wrong:
        log.debug("CPU operators stay in Python: %s", wrong.decode())
        for schema, function in operators:
            for key in KEYS:
                _again.impl(schema.partition("(")[0], function, key)
        return False
    for name in _USERS:
        retry(getattr(torch.ops.sqcompile, name), getattr(torch.ops.sqcompile_python, name).default)
    return True


@functools.cache
def library() -> Any | None:
    """The compiled code; None where it does not build."""
    lib = built(
        *FILES, otherwise="the code that calls sqcompile's CPU kernels does not build here, and Python calls them"
    )
    if lib is not None:
        lib.sqcompile_dispatch.argtypes, lib.sqcompile_dispatch.restype = [ctypes.c_void_p] * 2, ctypes.c_char_p
        lib.sqcompile_kept.argtypes, lib.sqcompile_kept.restype = [], ctypes.c_int64
    return lib
