"""C++ code: built once per machine by the compiler that Inductor uses."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

log = logging.getLogger("sqcompile")


CPU_KERNELS = "sqcompile's CPU kernels do not build here, slower ones of PyTorch take their place"


def built(*names: str, otherwise: str = CPU_KERNELS) -> Any | None:
    """The library of some files beside this one, one after the other; None, with a warning, where they do not build."""
    from sqcompile.pytorch.inductor import CppCodeCache  # here, as it takes its time

    try:
        source = "\n".join((Path(__file__).parent / name).read_text() for name in names)
        start = time.perf_counter()
        library = CppCodeCache.load(source, device_type="cpu")
        log.debug(
            "C++ of %s: built, or found in Inductor's cache, in %.2f s",
            ", ".join(names),
            time.perf_counter() - start,
        )
        return library
    except Exception as e:
        warnings.warn(
            f"{otherwise}. Install a C++ compiler for Inductor, such as g++: {e}",
            stacklevel=2,
        )
        return None
