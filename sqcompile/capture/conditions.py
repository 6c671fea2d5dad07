"""conditions: what a capture asked of sizes, and which of that its graph depends on. Imports sympy, which takes its time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import sympy

from sqcompile.passes.ir.explain import is_users
from sqcompile.pytorch.core import pytree
from sqcompile.pytorch.symbolic import PythonPrinter


def printed(condition: sympy.Basic) -> str:
    """A condition as Python."""
    return str(PythonPrinter().doprint(condition))


def decides(guard: Any) -> bool:
    """Whether violating this guard could have produced a different graph.

    PyTorch itself asks whether sizes differ and whether there is more than one of something, for strides and broadcasting,
    which the graph's operators do right for either answer: refusing calls for that would refuse a single token.
    """
    loc, e = guard.sloc.framework_loc, guard.expr
    if is_users(getattr(loc, "filename", "")) or not isinstance(e, sympy.core.relational.Relational):
        return True
    if isinstance(e, sympy.Ne):
        return False
    small, large = (e.lhs, e.rhs) if isinstance(e, (sympy.Lt, sympy.Le)) else (e.rhs, e.lhs)
    unit = large.as_content_primitive()[0]
    at_least = {sympy.StrictLessThan: (0, 1), sympy.StrictGreaterThan: (0, 1), sympy.Le: (1, 2), sympy.Ge: (1, 2)}
    return not (small.is_number and small / unit in at_least.get(type(e), ())) and not _holds_for_many(e)


def _holds_for_many(condition: sympy.Basic) -> bool:
    """Whether a comparison of sizes, of strides say, holds wherever there is more than one of everything."""
    symbols = sorted(condition.free_symbols, key=str)
    if len(symbols) > 4:
        return False
    holds = sympy.lambdify(symbols, condition, modules=[{"Min": min, "Max": max}, "math"])
    try:
        return all(holds(*sizes) for sizes in itertools.product((2, 3, 7, 64, 2**20), repeat=len(symbols)))
    except Exception:  # of functions of sizes that Python has not
        return False


def bounds(env: Any, dims: Any) -> Iterator[sympy.Basic]:
    """Bounds that the user gave a Dim; all others follow from guards, or are export's own: it begins at 2."""
    given = [getattr(dim, side, None) for dim in pytree.tree_leaves(dims) for side in ("min", "max")]
    given_bounds = {bound for bound in given if isinstance(bound, int) and bound > 2}
    for symbol, found in env.var_to_range.items():
        yield from [sympy.Ge(symbol, found.lower)] if found.lower in given_bounds else []
        yield from [sympy.Le(symbol, found.upper)] if found.upper in given_bounds else []
