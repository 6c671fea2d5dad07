"""symbolic: sizes as expressions. Imports sympy, which takes its time, so functions import it where they need it.

name                      what for                                                                   tried on
ShapeEnv                  the sizes of a capture; what its methods remember is forgotten             2.11, 2.13
statically_known_true     whether a condition of sizes holds always, without a guard                 2.11, 2.13
free_unbacked_symbols     sizes that depend on values                                                2.11, 2.13
PythonPrinter             a condition of sizes as Python                                             2.11, 2.13
own_expression            a size as it was before guards made it equal to another                    2.11, 2.13
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols, statically_known_true
from torch.utils._sympy.printers import PythonPrinter

__all__ = ["PythonPrinter", "ShapeEnv", "free_unbacked_symbols", "own_expression", "statically_known_true"]


def own_expression(size: torch.SymInt) -> Any:
    """The sympy expression of a size without what its ShapeEnv has learned, which ``size.node.expr`` has."""
    return size.node._expr
