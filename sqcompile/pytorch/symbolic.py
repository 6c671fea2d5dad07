"""symbolic: sizes as expressions. Imports sympy, which takes its time, so functions import it where they need it.

name                      what for                                                                   tried on
ShapeEnv                  the sizes of a capture; what its methods remember is forgotten             2.11, 2.13
statically_known_true     whether a condition of sizes holds always, without a guard                 2.11, 2.13
free_unbacked_symbols     sizes that depend on values                                                2.11, 2.13
PythonPrinter             a condition of sizes as Python                                             2.11, 2.13
named_expression          a size over the names of symbols_of                                        2.11, 2.13
own_expression            a size as it was before guards made it equal to another                    2.11, 2.13
symbols_of, new_symbols   the symbols of sizes, to be saved and made again, with the names that they had   2.11, 2.13
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols, statically_known_true
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "PythonPrinter",
    "ShapeEnv",
    "free_unbacked_symbols",
    "named_expression",
    "new_symbols",
    "own_expression",
    "statically_known_true",
    "symbols_of",
]

_NAMES = "_sqcompile_names"


def own_expression(size: torch.SymInt) -> Any:
    """The sympy expression of a size without what its ShapeEnv has learned, which ``size.node.expr`` has."""
    return size.node._expr


def symbols_of(env: ShapeEnv, inputs: Iterable[Any]) -> dict[str, tuple[int, int, int | None]]:
    """By name, the symbols of tensors' sizes: the example that stands for each, its least and its largest value."""
    import sympy

    sizes: list[Any] = [
        s for v in inputs if isinstance(v, torch.Tensor) for s in v.shape if isinstance(s, torch.SymInt)
    ]
    names = _names(env)
    found = {names.get(symbol, str(symbol)): symbol for s in sizes for symbol in s.node.expr.free_symbols}
    hints = getattr(env, "backed_var_to_val", None) or env.var_to_val
    ranges = {name: (symbol, env.var_to_range[symbol]) for name, symbol in sorted(found.items())}
    return {
        name: (
            int(hints[symbol]),
            max(0, int(r.lower)),
            int(r.upper) if isinstance(r.upper, (int, sympy.Integer)) and r.upper < 2**48 else None,
        )
        for name, (symbol, r) in ranges.items()
    }


def named_expression(size: torch.SymInt) -> Any:
    """The sympy expression of a size over the names of `symbols_of`."""
    import sympy

    names = _names(size.node.shape_env)
    expr = size.node.expr
    return expr.xreplace({s: sympy.Symbol(names[s], integer=True) for s in expr.free_symbols if s in names})


def _names(env: ShapeEnv) -> dict[Any, str]:
    """The names that symbols of `new_symbols` had, where calls and conditions have them."""
    return getattr(env, _NAMES, {})


def new_symbols(env: ShapeEnv, known: Mapping[str, tuple[int, int, int | None]]) -> dict[str, Any]:
    """Symbols of a new ShapeEnv by their former names: see `symbols_of`."""
    from torch._dynamo.source import ConstantSource  # here, as Dynamo imports triton

    found: dict[str, Any] = {}
    names: dict[Any, str] = {}
    for name, (example, least, largest) in known.items():
        source = ConstantSource(name)
        symbol = env.create_symbol(example, source, DimDynamic.DYNAMIC, None, do_not_specialize_zero_one=True)
        env.constrain_symbol_range(symbol, least, int_oo if largest is None else largest)
        found[name] = env.create_symintnode(symbol, hint=example, source=source)
        names[symbol] = name
    setattr(env, _NAMES, names)
    return found
