"""Questions about symbolic sizes, of PyTorch's symbolic_shapes: which imports sympy, and so is imported when asked."""

from __future__ import annotations

from typing import Any


def statically_known_true(condition: Any) -> bool:
    """Whether a condition of sizes holds for all that are possible; no guard is made."""
    from sqcompile.pytorch import symbolic

    return bool(symbolic.statically_known_true(condition))


def unbacked(value: Any) -> bool:
    """Whether a tensor has sizes that depend on values."""
    from sqcompile.pytorch import symbolic

    return bool(symbolic.free_unbacked_symbols(value))
