"""expressions: sizes and conditions of sizes, which are Python over symbols: "2*s27", "s27 <= 512".

They are evaluated at each call, so one from a file must be nothing but arithmetic.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from sqcompile.capture.captured import NAMESPACE
from sqcompile.errors import ArtifactError

_LONGEST = 2000  # characters
_LARGEST_POWER = 8
_FUNCTIONS = {"min", "max", "abs", "int", "float", "bool", "round"}
_OF_MODULES = {
    "math": {"ceil", "floor", "trunc", "sqrt", "log2", "pow", "inf"},
    "torch": {"sym_float", "sym_int", "sym_max", "sym_min", "sym_ite", "sym_not"},
}
_GRAMMAR = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd, ast.BinOp, ast.Add, ast.Sub, ast.Mult,
    ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.IfExp,
    ast.Load,
)  # fmt: skip


def checked(text: Any, symbols: Mapping[str, Any]) -> str:
    """An expression that is arithmetic of symbols.

    Args:
        text: the expression.
        symbols: by name, those it may have.

    Raises:
        ArtifactError: for anything else.
    """
    try:
        tree = ast.parse(text, mode="eval") if isinstance(text, str) and len(text) <= _LONGEST else None
        good = tree is not None and all(_allowed(n, symbols) for n in _walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        good = False
    if not good:
        raise ArtifactError(f"it has {str(text)[:100]!r} where an expression of sizes should be")
    assert isinstance(text, str)
    return text


def evaluated(text: str, symbols: Mapping[str, Any]) -> Any:
    """The value of an expression that was `checked`, of sizes or symbolic ones."""
    return eval(text, NAMESPACE, dict(symbols))


def _walk(tree: ast.AST) -> list[ast.AST]:
    """All parts, without the function that a call names and the module that an attribute belongs to."""
    found, todo = [], [tree]
    while todo:
        n = todo.pop()
        found.append(n)
        if isinstance(n, ast.Call):
            todo += n.args
        elif not isinstance(n, ast.Attribute):
            todo += ast.iter_child_nodes(n)
    return found


def _allowed(n: ast.AST, symbols: Mapping[str, Any]) -> bool:
    if isinstance(n, ast.Call):
        named = isinstance(n.func, ast.Name) and n.func.id in _FUNCTIONS
        return not n.keywords and (named or (isinstance(n.func, ast.Attribute) and _is_of_a_module(n.func)))
    if isinstance(n, ast.Attribute):
        return _is_of_a_module(n) and n.attr == "inf"
    if isinstance(n, ast.Name):
        return n.id in symbols
    if isinstance(n, ast.Constant):
        return isinstance(n.value, (int, float)) and abs(n.value) < 2**63
    if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Pow):
        power = n.right.value if isinstance(n.right, ast.Constant) else None
        return type(power) is int and 0 <= power <= _LARGEST_POWER
    return isinstance(n, _GRAMMAR)


def _is_of_a_module(n: ast.Attribute) -> bool:
    return isinstance(n.value, ast.Name) and n.attr in _OF_MODULES.get(n.value.id, ())
