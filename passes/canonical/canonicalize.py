"""canonicalize: every linear and every view in one spelling. The later passes know that one alone.

    addmm(%b, %x, %w)                    -> linear(%x, t(%w), %b)
    linear(%x, %w, %one)                 -> add(linear(%x, %w), %one)      # a bias of another shape than [N]; so of addmm
    mm(%x, %w)                           -> linear(%x, t(%w))              # w is a parameter; so of matmul and linear
    einsum(bsd,dhe->bshe, [%x, %w])      -> unflatten(linear(%x, reshape(permute(%w, [1, 2, 0]), [16, 4])), -1, [2, 8])
    _grouped_mm(%x, %w, %offsets)        -> sqcompile.grouped_linear(%x, transpose(%w, -2, -1), %offsets)
    bmm(%x, %w)                          ->
        reshape(sqcompile.grouped_linear(reshape(%x, [-1, 4]), transpose(%w, -2, -1), mul(%experts, 3)), [2, 3, 6])
    bmm(%x, %y)                          -> matmul(%x, %y)                 # both are data
    einsum(bqhd,bkhd->bhqk, [%x, %y])    ->
        matmul(permute(%x, [0, 2, 1, 3]), transpose(permute(%y, [0, 2, 1, 3]), -1, -2))
    baddbmm(%z, %x, %y, beta=2)          -> add(matmul(%x, %y), mul(%z, 2))
    view(%x, [6, 4])                     -> reshape(%x, [6, 4])
    _unsafe_view(clone(%x), [6, 4])      -> reshape(%x, [6, 4])
    neg(dropout(%x, 0.5, False))         -> neg(%x)                        # so of detach, detach_
    _to_copy(%x, dtype=float64)          -> to(%x, float64)
    concat([%x, %x], 1)                  -> cat([%x, %x], 1)               # other names of one operation: `aliases`

x Wᵀ + b is ``linear(x, w, b)`` with w [N, K], or ``grouped_linear(x, w, offsets)`` with w [E, N, K] for experts over rows
sorted by expert: the function stays the same. A weight is a constant expression, so that transposing or reshaping it
costs nothing and writes to no parameter. A view looks at memory, whose layout a rewrite may change; a reshape does not.
"""

from __future__ import annotations

import math
import string
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.canonical.aliases import rename
from sqcompile.passes.ir.graph import add_op, add_tensor, arguments, aten, constants, value
from sqcompile.passes.ir.operators import DROPOUTS
from sqcompile.passes.ir.record import substitute


def drops(dropout: fx.Node) -> bool:
    """Whether one of `operators.DROPOUTS` changes what it is given."""
    args = arguments(dropout)
    return bool(args["train"] and args["p"])


def canonicalize(gm: fx.GraphModule) -> None:
    """Rewrites a traced graph in place; what only looks like a linear is left as it is."""
    const = constants(gm)
    for node in list(gm.graph.nodes):
        rename(node)
        if node.target in (aten.view.default, aten._unsafe_view.default):
            _reshape(gm, node)
            continue
        if node.target == aten._to_copy.default and set(node.kwargs) == {"dtype"}:
            node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.kwargs["dtype"]), {}
            continue
        eval_dropout = node.target in DROPOUTS and not drops(node)
        if eval_dropout or node.target in (aten.detach.default, aten.detach_.default):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            continue
        rewrite = _grouped if _is_grouped(node) else _REWRITES.get(node.target)
        if rewrite is None or node in const:
            continue
        with gm.graph.inserting_before(node):
            new = rewrite(gm, node, const)
        if new is not None:
            substitute(gm, node, new)
            gm.graph.erase_node(node)


def _reshape(gm: fx.GraphModule, node: fx.Node) -> None:
    """A view becomes a reshape; of a copy that only it reads, a reshape of what was copied."""
    source = node.args[0]
    copied = node.target == aten._unsafe_view.default and source.target == aten.clone.default  # type: ignore[union-attr]
    node.target = aten.reshape.default
    if copied and len(source.users) == 1:  # type: ignore[union-attr]
        node.update_arg(0, source.args[0])  # type: ignore[union-attr]
        gm.graph.erase_node(source)  # type: ignore[arg-type]


def _is_weight(n: Any, const: set[fx.Node], dim: int = 2) -> bool:
    return n in const and value(n).dim() == dim and value(n).dtype.is_floating_point


def _is_data(n: Any, const: set[fx.Node]) -> bool:
    return isinstance(n, fx.Node) and n not in const and isinstance(value(n), Tensor) and value(n).dim() >= 2


def _is_bias(b: fx.Node, w: fx.Node) -> bool:
    """Whether b has a number for each output of the weight w [N, K]; else it broadcasts, as one number does."""
    return tuple(value(b).shape) == (value(w).shape[0],)


def _linear(gm: fx.GraphModule, node: fx.Node, const: set[fx.Node]) -> fx.Node | None:
    args = arguments(node)
    x, w, b = args["input"], args["weight"], args["bias"]
    if b is not None and value(w).dim() == 2 and not _is_bias(b, w):
        return add_op(gm, aten.add.Tensor, add_op(gm, aten.linear.default, x, w), b)
    return add_op(gm, aten.linear.default, x, w, b) if node.kwargs else None


def _addmm(gm: fx.GraphModule, node: fx.Node, const: set[fx.Node]) -> fx.Node | None:
    args = arguments(node)
    b, x, w = args["self"], args["mat1"], args["mat2"]
    if not _is_data(x, const) or not _is_weight(w, const) or args["beta"] != 1 or args["alpha"] != 1:
        return None
    w = add_op(gm, aten.t.default, w)
    if b in const and _is_bias(b, w):
        return add_op(gm, aten.linear.default, x, w, b)
    return add_op(gm, aten.add.Tensor, add_op(gm, aten.linear.default, x, w), b)


def _matmul(gm: fx.GraphModule, node: fx.Node, const: set[fx.Node]) -> fx.Node | None:
    x, w = (a for a in node.args[:2] if isinstance(a, fx.Node))
    if _is_data(x, const) and _is_weight(w, const, 3) and value(x).dim() == 3:
        same = value(x).shape[0] == value(w).shape[0]  # else it broadcasts
        return _batched(gm, x, add_op(gm, aten.transpose.int, w, -2, -1)) if same else None
    if _is_data(x, const) and _is_weight(w, const):
        return add_op(gm, aten.linear.default, x, add_op(gm, aten.t.default, w))
    both = node.target == aten.bmm.default and _is_data(x, const) and _is_data(w, const)
    return add_op(gm, aten.matmul.default, x, w) if both else None


def _baddbmm(gm: fx.GraphModule, node: fx.Node, const: set[fx.Node]) -> fx.Node | None:
    """BLOOM's scores: a bias of positions plus a product of queries and keys."""
    args = arguments(node)
    x, y = args["batch1"], args["batch2"]
    if not _is_data(x, const) or not _is_data(y, const):
        return None
    terms = [(add_op(gm, aten.matmul.default, x, y), args["alpha"]), (args["self"], args["beta"])]
    scaled = [t if f == 1 else add_op(gm, aten.mul.Tensor, t, f) for t, f in terms if f != 0 or t is not args["self"]]
    return scaled[0] if len(scaled) == 1 else add_op(gm, aten.add.Tensor, *scaled)


def _is_grouped(node: fx.Node) -> bool:
    """PyTorch's grouped product, or the operator that transformers puts in its place where PyTorch has no kernel."""
    return node.target == aten._grouped_mm.default or str(node.target) == "transformers.grouped_mm_fallback.default"


def _grouped(gm: fx.GraphModule, node: fx.Node, const: set[fx.Node]) -> fx.Node | None:
    """Rows of x [T, K], sorted by expert, times w [E, K, N]: int32 offsets [E] say where each expert's rows end."""
    args = arguments(node)
    x, w = (a for a in node.args[:2] if isinstance(a, fx.Node))
    offsets = args["offs"]
    if not _is_data(x, const) or value(x).dim() != 2 or not _is_weight(w, const, 3) or not isinstance(offsets, fx.Node):
        return None
    if args.get("bias") is not None or value(node).dtype != value(x).dtype:
        return None
    w = add_op(gm, aten.transpose.int, w, -2, -1)
    return add_op(gm, sqcompile_ops.grouped_linear.default, x, w, offsets)


def _einsum(gm: fx.GraphModule, node: fx.Node, const: set[fx.Node]) -> fx.Node | None:
    """A contraction of data with one weight over letters that the result does not have."""
    args = arguments(node)
    operands: Any = args["tensors"]
    if len(operands) != 2:
        return None
    names = _letters(args["equation"], [value(t).dim() for t in operands])
    if names is None:
        return None
    inputs, out = names
    x, w = operands
    if x in const:
        (x, w), inputs = (w, x), inputs[::-1]
    of_x, of_w = inputs
    if _is_data(x, const) and _is_data(w, const):
        return None if _broadcast(x, w, of_x, of_w) else _data_einsum(gm, x, w, of_x, of_w, out)
    if not _is_data(x, const) or not _is_weight(w, const, len(of_w)):
        return None
    if letters := _broadcast(x, w, of_x, of_w):
        sizes = {c: max(a, b) for c, (a, b) in letters.items() if isinstance(a, int) and isinstance(b, int)}
        if len(sizes) < len(letters):
            return None
        x, w = (add_op(gm, aten.expand.default, t, [sizes.get(c, -1) for c in of]) for t, of in ((x, of_x), (w, of_w)))
    batch = [c for c in of_w if c in out and c in of_x]
    if len(batch) == 1 and len(set(of_x)) == len(of_x) and len(set(of_w)) == len(of_w):
        return _batched_einsum(gm, x, w, of_x, of_w, out, batch[0])
    contracted = [c for c in of_w if c not in out]
    kept = [c for c in of_w if c in out]
    rest = [c for c in of_x if c not in contracted]
    if not contracted or not kept or any(c not in of_x for c in contracted) or any(c in of_x for c in kept):
        return None
    if sorted(out) != sorted(rest + kept) or len(set(of_x)) != len(of_x) or len(set(of_w)) != len(of_w):
        return None
    sizes = dict(zip(of_w, (int(s) for s in value(w).shape), strict=True))
    n, k = math.prod(sizes[c] for c in kept), math.prod(sizes[c] for c in contracted)
    w = _permuted(gm, w, of_w, kept + contracted)
    if len(of_w) != 2:
        w = add_op(gm, aten.reshape.default, w, [n, k])
    x = _permuted(gm, x, of_x, rest + contracted)
    if len(contracted) > 1:
        x = add_op(gm, aten.flatten.using_ints, x, len(rest), -1)
    y = add_op(gm, aten.linear.default, x, w)
    if len(kept) > 1:
        y = add_op(gm, aten.unflatten.int, y, -1, [sizes[c] for c in kept])
    return _permuted(gm, y, rest + kept, out)


def _broadcast(x: fx.Node, y: fx.Node, of_x: list[str], of_y: list[str]) -> dict[str, tuple[Any, Any]]:
    """The letters of both operands that have size 1 in one of them alone, with both sizes: only an einsum expands them."""
    sizes_x, sizes_y = (dict(zip(of, value(t).shape, strict=True)) for t, of in ((x, of_x), (y, of_y)))
    both = {c: (sizes_x[c], sizes_y[c]) for c in of_x if c in sizes_y}
    return {c: sizes for c, sizes in both.items() if sum(isinstance(s, int) and s == 1 for s in sizes) == 1}


def _batched_einsum(
    gm: fx.GraphModule, x: fx.Node, w: fx.Node, of_x: list[str], of_w: list[str], out: list[str], batch: str
) -> fx.Node | None:
    """A contraction with a matrix for each index of one letter that both operands and the result have."""
    contracted = [c for c in of_w if c not in out]
    kept = [c for c in of_w if c in out and c != batch]
    rest = [c for c in of_x if c not in contracted and c != batch]
    if not contracted or not kept or not rest or any(c not in of_x for c in contracted):
        return None
    if sorted(out) != sorted([batch, *rest, *kept]):
        return None
    sizes = dict(zip(of_w, (int(s) for s in value(w).shape), strict=True))
    n, k = math.prod(sizes[c] for c in kept), math.prod(sizes[c] for c in contracted)
    w = add_op(gm, aten.reshape.default, _permuted(gm, w, of_w, [batch, *kept, *contracted]), [sizes[batch], n, k])
    x = _permuted(gm, x, of_x, [batch, *rest, *contracted])
    lengths = [_size(gm, x, 1 + i) for i in range(len(rest))]
    y = _batched(gm, add_op(gm, aten.reshape.default, x, [sizes[batch], -1, k]), w)
    y = add_op(gm, aten.reshape.default, y, [sizes[batch], *lengths, *(sizes[c] for c in kept)])
    return _permuted(gm, y, [batch, *rest, *kept], out)


def _data_einsum(
    gm: fx.GraphModule, x: fx.Node, y: fx.Node, of_x: list[str], of_y: list[str], out: list[str]
) -> fx.Node | None:
    """A contraction of two tensors of data over one letter, such as QKᵀ; the right one is a transposed matrix."""
    batch = [c for c in out if c in of_x and c in of_y]
    rows, columns = ([c for c in letters if c in out and c not in batch] for letters in (of_x, of_y))
    contracted = [c for c in of_x if c not in out]
    if [len(rows), len(columns), len(contracted)] != [1, 1, 1] or sorted(out) != sorted(batch + rows + columns):
        return None
    if sorted(of_x) != sorted(batch + rows + contracted) or sorted(of_y) != sorted(batch + columns + contracted):
        return None
    x = _permuted(gm, x, of_x, batch + rows + contracted)
    if of_y.index(contracted[0]) < of_y.index(columns[0]):  # values: [..., keys, channels]
        y = _permuted(gm, y, of_y, batch + contracted + columns)
    else:
        y = add_op(gm, aten.transpose.int, _permuted(gm, y, of_y, batch + columns + contracted), -1, -2)
    z = add_op(gm, aten.matmul.default, x, y)
    return _permuted(gm, z, batch + rows + columns, out)


def _batched(gm: fx.GraphModule, x: fx.Node, w: fx.Node) -> fx.Node:
    """x [E, T, K] times w [E, N, K]: experts with T rows each."""
    experts, n, k = (int(size) for size in value(w).shape)
    rows = _size(gm, x, 1)
    ends = torch.arange(1, experts + 1, dtype=torch.int32, device=value(x).device)
    offsets = add_op(gm, aten.mul.Tensor, add_tensor(gm, "experts", ends), rows)
    flat = add_op(gm, aten.reshape.default, x, [-1, k])
    y = add_op(gm, sqcompile_ops.grouped_linear.default, flat, w, offsets)
    return add_op(gm, aten.reshape.default, y, [experts, rows, n])


def _size(gm: fx.GraphModule, x: fx.Node, dim: int) -> Any:
    """A size of x: a number, or the node of one that is not known before the model runs."""
    size = value(x).shape[dim]
    return size if isinstance(size, int) else add_op(gm, aten.sym_size.int, x, dim)


def _permuted(gm: fx.GraphModule, x: fx.Node, have: list[str], want: list[str]) -> fx.Node:
    order = [have.index(c) for c in want]
    return x if order == sorted(order) else add_op(gm, aten.permute.default, x, order)


def _letters(equation: str, dims: list[int]) -> tuple[list[list[str]], list[str]] | None:
    """The letters of each operand and of the result, with an ellipsis spelled out; None for an implicit result."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow or len(inputs) != len(dims):
        return None
    free = [c for c in string.ascii_letters if c not in equation]
    extra = [d - len(s.replace("...", "")) for s, d in zip(inputs, dims, strict=True) if "..." in s]
    wide = "".join(free[: max(extra)]) if extra else ""

    def spell(s: str, dim: int) -> list[str]:
        missing = dim - len(s.replace("...", ""))
        return list(s.replace("...", wide[len(wide) - missing :] if missing else ""))

    return [spell(s, d) for s, d in zip(inputs, dims, strict=True)], list(right.replace("...", wide))


_REWRITES: dict[Any, Any] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.matmul.default: _matmul,
    aten.einsum.default: _einsum,
}
