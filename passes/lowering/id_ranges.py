"""id_ranges: a check of the indices that an input gives, in front of what reads a table with them.

    %y = embedding(%embed.weight, %ids)                             # weight [8, 4]
->
    %checked_ids = sqcompile.checked_ids(%ids, 0, 8, ids indexes embed.weight)
    %y = embedding(%embed.weight, %checked_ids)

PyTorch's own operators raise an IndexError for an index out of range. Compiled code for the CPU ends the process instead,
and a one-hot comes out as zeros. On a GPU both stop at an assertion of the device, so nothing is added there.

An index is checked where it stands, so that one computed from inputs is, too (positions counted from a mask), if it is by
arithmetic and layout. What a model chooses by its activations, such as experts, is in range as it is made.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import add_op, aten, constants, first_leaf, value
from sqcompile.passes.ir.operators import HOMOGENEOUS, LAYOUT, Fact, having

_DYNAMOS = re.compile(r"^[Ll]_(kwargs_)?|_$")  # L_input_ids_
_ARITHMETIC, _POSITIONS, _EMBEDDINGS = having(Fact.IDS) | HOMOGENEOUS, having(Fact.POSITIONS), having(Fact.EMBEDDING)


def check_ids(gm: fx.GraphModule) -> None:
    """Adds the checks, in place."""
    const = constants(gm)
    checked: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(gm.graph.nodes):
        for index, table, dim, low in _reads(node):
            v = value(index)
            if index in const or not isinstance(v, Tensor) or v.device.type != "cpu" or v.dtype == torch.bool:
                continue
            origins = _origins(gm, index)
            if table is not None and not value(table).dim():  # of one value
                continue
            if not origins or (table is not None and table not in const and origins <= {"positions"}):
                continue
            size = dim if table is None else value(table).shape[dim]
            key = index, str(size), low  # a symbolic size has no hash
            if key not in checked:
                with gm.graph.inserting_before(node):
                    end = size if isinstance(size, int) else add_op(gm, aten.sym_size.int, table, dim)
                    first = (-end if isinstance(end, int) else add_op(gm, operator.neg, end)) if low else 0
                    name = first_leaf(table) if table in const else None
                    what = f"{_spelled(index, origins)} indexes {name or _described(node)}"
                    checked[key] = add_op(gm, sqcompile_ops.checked_ids.default, index, first, end, what)
            node.replace_input_with(index, checked[key])


def _reads(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | None, int, bool]]:
    """The indices of a node: each with the table that it reads, the table's dim, and whether it may count from the end.

    Of a one-hot, which reads no table, it is the number of classes in the place of the dim.
    """
    args: Any = node.args
    if node.target in _EMBEDDINGS:
        yield args[1], args[0], 0, False
    elif node.target == aten.one_hot.default and len(args) > 1 and isinstance(args[1], int) and args[1] > 0:
        yield args[0], None, args[1], False
    elif node.target in (aten.index_select.default, aten.gather.default):
        yield args[2], args[0], args[1] % max(1, value(args[0]).dim()), False
    elif node.target == aten.index.Tensor:
        dim = 0
        for index in args[1]:
            if isinstance(index, fx.Node):
                yield index, args[0], dim, True
            masks = isinstance(index, fx.Node) and value(index).dtype == torch.bool
            dim += value(index).dim() if masks else 1  # a mask is of as many dims of the table as it has


def _origins(gm: fx.GraphModule, index: fx.Node) -> set[str]:
    """The inputs that an index is computed from by arithmetic and layout; "positions" are of no input."""
    names = about(gm).names or {}
    todo, seen, found = [index], set[fx.Node](), set[str]()
    while todo:
        n = todo.pop()
        v = value(n)
        if n in seen or not isinstance(v, Tensor) or v.dtype.is_floating_point:
            continue
        seen.add(n)
        if n.op == "placeholder":
            found.add(_DYNAMOS.sub("", names.get(n.name, n.name)))
        elif n.target in _POSITIONS:
            found.add("positions")
        elif n.target in LAYOUT:
            todo += n.all_input_nodes[:1]
        elif n.target in _ARITHMETIC:
            todo += n.all_input_nodes
    return found


def _spelled(index: fx.Node, origins: set[str]) -> str:
    names = " and ".join(sorted(origins))
    return names if index.op == "placeholder" or origins == {"positions"} else f"what is computed from {names}"


def _described(node: fx.Node) -> str:
    return f"{node.target.overloadpacket.__name__} ({node.name})"  # type: ignore[union-attr]
