"""token_rows: which token of the attention mask each row of a tensor comes from. Analysis only.

    %h = embedding(%w, %ids)                                # ids [B, T]
    %x = transpose(%h, 0, 1)
    %heads = reshape(%h, [%b, %t, 2, 4])
    %q = transpose(%heads, 1, 2)
    %pooled = mean(%h, [1])
->
    rows of %h: (b, t) of mask
    rows of %x: (t, b) of mask
    rows of %q: (b, 2, t) of mask                           # each token's row once for each of two heads
    rows of %pooled: of no single token each

The tokens that a mask [B, T] is for start with the labels b T + t, and the graph's layout is executed on them. What mixes
tokens position by position (attention, a convolution that keeps the length) gives rows of the position they stand at;
where rows belong to no single token (pooling, patches, rows picked by data, another input's rows) there is no label, and
the mask says nothing about them.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.graph import LINEARS, arguments, aten
from sqcompile.passes.ir.operators import HOMOGENEOUS, LAYOUT, LIKE_SECOND, SHAPE_ONLY, Fact, having
from sqcompile.passes.ir.sizes import at_two_sizes
from sqcompile.passes.labels.interpreter import LabelInterpreter, execute, rule_failed
from sqcompile.passes.labels.rules import Refused, executed, uniform

_NONE = -1  # of a row that is no token's
_APART = 2**32  # between the labels of two masks


@dataclass(frozen=True)
class Rows:
    """How a tensor's rows, of all dims but the last, lie over tokens.

    Attributes:
        mask: which mask's tokens they are.
        order: what the rows run over, outermost first: "b", "t", and numbers, the sizes of dims that each repeat their
            token, such as heads; 0 for the one whose size varies.
        around: rows before the first and after the last token of each sequence that are no tokens, as a prompt's are.
    """

    mask: str
    order: tuple[str | int, ...]
    around: tuple[int, int] = (0, 0)

    def real(self, mask: Tensor, count: int) -> Tensor | None:
        """Which of ``count`` rows are real: bool [count], by a mask [B, T]; None if they are not over its tokens."""
        mask = torch.nn.functional.pad(mask, self.around, value=True)
        known = mask.numel() * math.prod(n for n in self.order if isinstance(n, int) and n)
        free = count // known if 0 in self.order and known else 1
        if known * free != count:
            return None
        wide = mask if self.order.index("b") < self.order.index("t") else mask.t()
        lengths = iter(wide.shape)
        sizes = [next(lengths) if isinstance(n, str) else n or free for n in self.order]
        index = tuple(slice(None) if isinstance(n, str) else None for n in self.order)
        return wide[index].expand(sizes).flatten()


def token_rows(
    gm: fx.GraphModule, tokens: Mapping[str, tuple[str, int, int]], nodes: Mapping[str, int]
) -> dict[str, Rows]:
    """How the rows of tensors lie over tokens.

    Args:
        gm: a traced graph.
        tokens: by placeholder that holds tokens: the mask that they have, and which of its dims are batch and sequence.
        nodes: whose rows are asked for, and the dim of their channels, which stands for the last one.

    Returns:
        By node; none for a node whose rows are not one token's each, at every size.
    """
    runs = at_two_sizes(gm, lambda sizes: execute(_TokenLabels(gm, tokens, nodes), sizes).found)
    found = {}
    for node in runs[0].keys() & runs[1].keys():
        first, second = runs[0][node], runs[1][node]
        for rows in first:
            same = [r for r in second if (r.mask, r.around, _shape(r)) == (rows.mask, rows.around, _shape(rows))]
            merged = [m for r in same if (m := _merged(rows, r))]
            if merged:
                found[node] = merged[0]
                break
    return found


def _shape(rows: Rows) -> tuple[str, ...]:
    return tuple(n if isinstance(n, str) else "" for n in rows.order)


def _merged(a: Rows, b: Rows) -> Rows | None:
    """What holds at both sizes: one repeat may vary."""
    order = tuple(m if m == n else 0 for m, n in zip(a.order, b.order, strict=True))
    return Rows(a.mask, order, a.around) if order.count(0) <= 1 else None


class _TokenLabels(LabelInterpreter):
    """Labels b T + t of tokens, -1 elsewhere, under one name; see the module's first lines."""

    def __init__(
        self, gm: fx.GraphModule, tokens: Mapping[str, tuple[str, int, int]], nodes: Mapping[str, int]
    ) -> None:
        super().__init__(gm, [])
        self.tokens, self.nodes = tokens, nodes
        self.masks = list(dict.fromkeys(mask for mask, _, _ in tokens.values()))
        self.sizes: dict[str, tuple[int, int]] = {}
        self.found: dict[str, list[Rows]] = {}

    def _propagate(self, n: fx.Node, out: Any) -> dict[str, Any]:
        operands = {a: self.labels[a]["tokens"] for a in n.all_input_nodes if "tokens" in self.labels.get(a, {})}
        empty = isinstance(out, Tensor) and not out.numel()
        if not operands or empty or n.op == "output" or n.target in SHAPE_ONLY - _ROOM:
            return {}
        if isinstance(out, Tensor) and out.dtype == torch.bool:  # a mask of some kind, whose dims may be of keys
            return {}
        try:
            labels: Any = self._row_rule(n, out, operands)
        except Refused:  # a layout no rule foresees: no one's rows
            labels = None
        except Exception as e:  # calibration goes on without these rows, and counts their padding
            warnings.warn(str(rule_failed(n, e)), stacklevel=2)
            labels = None
        return {} if labels is None else {"tokens": labels}

    def _start(self, n: fx.Node, out: Any, mine: dict[str, Any]) -> None:
        labels: Any
        if n.name in self.tokens and isinstance(out, Tensor):
            mask, b, t = self.tokens[n.name]
            self.sizes[mask] = sizes = out.shape[b], out.shape[t]
            labels = self.masks.index(mask) * _APART + torch.arange(sizes[0] * sizes[1]).reshape(sizes)
            labels = labels if b < t else labels.t()
            shape = [s if d in (b, t) else 1 for d, s in enumerate(out.shape)]
            mine["tokens"] = labels.reshape(shape).expand(out.shape)
        labels = mine.get("tokens")
        if n.name in self.nodes and isinstance(labels, Tensor):
            self.found[n.name] = self._rows(_row(labels.movedim(self.nodes[n.name], -1)))

    def _rows(self, row: Tensor) -> list[Rows]:
        """Every way to say in short what tokens rows int64 [...] are of."""
        flat = row.flatten()
        named = flat[flat >= 0]
        if not len(named):
            return []
        mask = self.masks[int(named[0]) // _APART]
        b, t = self.sizes[mask]
        want = self.masks.index(mask) * _APART + torch.arange(b * t).reshape(b, t)
        for around in _around(row, want):
            padded = torch.nn.functional.pad(want, around, value=_NONE)
            each, rest = divmod(flat.numel(), padded.numel())
            found = [] if rest else [Rows(mask, o, around) for o in _orders(flat, padded, each)]
            if found:
                return found
        return []

    def _row_rule(self, n: fx.Node, out: Any, operands: dict[fx.Node, Any]) -> Any:
        t: Any = n.target
        first: Any = n.args[0] if n.args else None
        if t in LAYOUT:
            if first not in operands or (len(operands) > 1 and t not in LIKE_SECOND):
                return None
            return self._layout(n, first, operands[first], 1)
        if t in _JOINS:
            parts: Any = [operands.get(a, torch.full(self.env[a].shape, _NONE)) for a in first]
            return executed(n, parts, *n.args[1:], **n.kwargs)
        if t == aten.embedding.default:
            ids: Any = n.args[1]
            labels = operands.get(ids)
            return None if labels is None else labels.unsqueeze(-1).expand(out.shape)
        if t == aten.one_hot.default:
            return operands[first].unsqueeze(-1).expand(out.shape)
        if t in LINEARS:
            return _wide(_row(operands[first]), out) if first in operands else None
        if t in _PRODUCTS:
            return _product(n, out, operands)
        if t in _CONVOLUTIONS:
            return _convolution(n, out, operands.get(first))
        if t == aten.view_as_complex.default:
            return operands[first][..., 0]
        if t == aten.view_as_real.default:
            return operands[first].unsqueeze(-1).expand(out.shape)
        if t in (aten.pad.default, aten.constant_pad_nd.default):
            sizes = fx.node.map_arg(arguments(n)["pad"], lambda a: self.env[a])
            return aten.constant_pad_nd.default(operands[first], list(sizes), _NONE)
        if not isinstance(out, Tensor):
            return None
        if t == aten.where.self:
            operands = {a: l for a, l in operands.items() if a is not first}
        if t in HOMOGENEOUS or torch.Tag.pointwise in getattr(t, "tags", ()):
            return _agree([labels.broadcast_to(out.shape) for labels in operands.values()]) if operands else None
        if t in _IN_PLACE_OF and first in operands and out.shape == operands[first].shape:
            return operands[first]
        return None


# y has the shape of its first operand, and each element stands where it stood.
_IN_PLACE_OF = having(Fact.IN_PLACE, Fact.ROOM)
_ROOM, _JOINS = having(Fact.ROOM), having(Fact.JOIN)
_PRODUCTS = having(Fact.PRODUCT) | {aten.scaled_dot_product_attention.default}
_CONVOLUTIONS = {aten.conv1d.default, aten.conv1d.padding}


def _row(labels: Tensor) -> Tensor:
    """The token of each row of labels [..., K]: -1 where its channels are not all one token's."""
    first = labels[..., 0]
    return first.where((labels == labels[..., :1]).all(-1), _NONE)


def _wide(row: Tensor, out: Any) -> Any:
    return row.unsqueeze(-1).expand(out.shape)


def _agree(operands: list[Tensor]) -> Tensor:
    """Labels of what is computed element by element: the token that all operands with one have.

    A sequence that is shifted against itself has some tokens less, and its rows stand where those of the other stand.
    """
    whole = [l for l in operands if bool((l >= 0).all())]
    if whole and len(whole) < len(operands):
        operands = whole
    result = operands[0]
    for other in operands[1:]:
        either = torch.maximum(result, other)
        result = either.where((result == other) | (result < 0) | (other < 0), _NONE)
    return result


def _product(n: fx.Node, out: Tensor, operands: dict[fx.Node, Any]) -> Any:
    """Rows are the left operand's, or of a transposed product the right one's columns, as tokens are not summed over."""
    left: Any
    right: Any
    left, right = n.args[:2]
    if left in operands:
        row = _row(operands[left])
        if bool((row >= 0).any()):
            return row if row.shape == out.shape else _wide(row, out)  # times a vector, a number is left of each row
    attention = n.target == aten.scaled_dot_product_attention.default
    columns = operands.get(right)
    if attention or columns is None or columns.dim() < 2:
        return None
    if out.dim() < columns.dim():  # a vector times its columns
        return columns[..., 0, :] if uniform(columns, -2) else None
    return columns[..., :1, :].expand(out.shape) if uniform(columns, -2) else None


def _convolution(n: fx.Node, out: Tensor, labels: Any) -> Any:
    """[B, C, T] -> [B, N, L] by a window that moves one position at a time: where it stands, as padding shows."""
    args = arguments(n)
    stride = args["stride"]
    if (
        labels is None
        or set(stride if isinstance(stride, (list, tuple)) else [stride]) - {1}
        or not uniform(labels, -2)
    ):
        return None
    row, longer = labels[..., :1, :], out.shape[-1] - labels.shape[-1]
    if longer < 0:  # padded before the convolution: the first token is where its first row stands
        before = int((row < 0).all(0).all(0).int().cumprod(0).sum())
        if not before or before > -longer:
            return None
        return row[..., before : before + out.shape[-1]].expand(out.shape)
    return torch.nn.functional.pad(row, (0, longer), value=_NONE).expand(out.shape)


def _around(row: Tensor, want: Tensor) -> list[tuple[int, int]]:
    """How many rows stand before and after the tokens of a sequence, as far as the first sequence shows."""
    found = [(0, 0)]
    if row.dim() >= 2 and bool((row < 0).any()):
        for dim in range(row.dim()):
            line = row.movedim(dim, -1).reshape(-1, row.shape[dim])[0]
            known = (line >= 0).nonzero().flatten().tolist()
            if len(known) == want.shape[1]:
                found.append((known[0], len(line) - known[-1] - 1))
    return found


def _orders(flat: Tensor, want: Tensor, each: int) -> list[tuple[str | int, ...]]:
    """The orders of b, t and repeats, ``each`` in all, in which the tokens want [B, T] are the rows ``flat``."""
    found: list[tuple[str | int, ...]] = []
    divisors = [d for d in range(1, each + 1) if each % d == 0]
    for outer, middle in itertools.product(divisors, divisors):
        if each % (outer * middle):
            continue
        inner = each // (outer * middle)
        for names, tokens in (("bt", want), ("tb", want.t())):
            a, b = tokens.shape
            wide = tokens[None, :, None, :, None].expand(outer, a, middle, b, inner)
            if torch.equal(wide.flatten(), flat):
                order = (outer, names[0], middle, names[1], inner)
                found.append(tuple(x for x in order if x != 1))
    return found
