"""extras: the packages that plots need, which are installed with ``sqcompile[report]``."""

from __future__ import annotations

import importlib
from typing import Any

from sqcompile.errors import ReportError


def needed(*names: str) -> list[Any]:
    """Modules by name.

    Raises:
        ReportError: if one of them is not installed.
    """
    found = []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except ImportError as e:
            raise ReportError(f"plots need {name}, which is not installed: pip install 'sqcompile[report]'") from e
    return found
