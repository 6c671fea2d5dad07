"""The words of the sources: every string in them, with … where a value is put in."""

from __future__ import annotations

import ast
import re
from functools import cache

from pages import ROOT

FOLDERS = ("sqcompile", "passes", "kernels")


@cache
def strings() -> tuple[str, ...]:
    """All strings of the package's sources; those that stand beside each other, or are added up, as one."""
    found: set[str] = set()
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                text = _text(node)
                if text and " " in text:
                    found.add(re.sub(r"\s+", " ", text))
    return tuple(sorted(found))


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(v) or "…" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None and right is None else (left or "…") + (right or "…")
    return None


def said(message: str) -> bool:
    """Whether one string of the sources has the words of a message in their order; … in it stands for anything."""
    parts = [p for p in (part.strip() for part in message.split("…")) if p]
    pattern = re.compile(".*".join(map(re.escape, parts)))
    return any(pattern.search(text) for text in strings())
