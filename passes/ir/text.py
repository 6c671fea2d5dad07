"""A stage as stable text, one line per operation.

    %x: f32[s0, s1, 4] = input
    %n: f32[s0, s1, 4] = aten.layer_norm(%x, [4], %norm.weight)
    %size: size = aten.sym_size(%x, 0)
    return [%n, %size]

A constant stands where it is used, by its qualified name. Symbolic sizes are numbered in order of appearance.
"""

from __future__ import annotations

import difflib
import os
import sys
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.graph import value

_DTYPES = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b1",
}  # fmt: skip


def show(gm: fx.GraphModule) -> str:
    """The graph as text."""
    symbols: dict[str, str] = {}
    lines = []
    for n in gm.graph.nodes:
        if n.op == "placeholder":
            lines.append(f"%{n.name}: {_type(value(n), symbols)} = input")
        elif n.op == "call_function":
            args = [_argument(a) for a in n.args] + [f"{k}={_argument(v)}" for k, v in n.kwargs.items()]
            lines.append(f"%{n.name}: {_type(value(n), symbols)} = {_target(n.target)}({', '.join(args)})")
        elif n.op == "output":
            lines.append(f"return {_argument(n.args[0])}")
    return "\n".join(lines)


def show_stage(gm: fx.GraphModule, stage: str, previous: str | None) -> str:
    """Prints a stage where SQCOMPILE_SHOW is set (a name shows that stage alone), as a difference to the previous."""
    want = os.environ.get("SQCOMPILE_SHOW", "")
    text = show(gm) if want else ""
    if want in ("1", stage):
        print(f"== {stage}: {len(text.splitlines())} lines", file=sys.stderr)
        if previous is None or want == stage:
            print(text, file=sys.stderr)
        else:
            diff = difflib.unified_diff(previous.splitlines(), text.splitlines(), n=0, lineterm="")
            print("\n".join(line for line in diff if not line.startswith(("---", "+++", "@@"))), file=sys.stderr)
    return text


def _target(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return f"{target.namespace}.{packet.__name__}"
    return getattr(target, "__name__", str(target))


def _argument(a: Any) -> str:
    if isinstance(a, fx.Node):
        return f"%{a.target}" if a.op == "get_attr" else f"%{a.name}"
    if isinstance(a, (list, tuple)):
        return "[" + ", ".join(_argument(x) for x in a) + "]"
    if isinstance(a, float):
        return f"{a:.6g}"
    return str(a).removeprefix("torch.")


def _type(v: Any, symbols: dict[str, str]) -> str:
    if isinstance(v, Tensor):
        return f"{_DTYPES.get(v.dtype, str(v.dtype))}[{', '.join(_size(s, symbols) for s in v.shape)}]"
    if isinstance(v, (list, tuple)):
        return "(" + ", ".join(_type(x, symbols) for x in v) + ")"
    return "size" if isinstance(v, (int, torch.SymInt)) else type(v).__name__


def _size(s: Any, symbols: dict[str, str]) -> str:
    """Symbols are numbered in order of appearance, as torch.export numbers them anew each time."""
    if not isinstance(s, torch.SymInt):
        return str(s)
    expr = s.node.expr
    names = {sym: symbols.setdefault(str(sym), f"s{len(symbols)}") for sym in sorted(expr.free_symbols, key=str)}
    return str(expr.xreplace({sym: type(sym)(name, integer=True) for sym, name in names.items()}))
