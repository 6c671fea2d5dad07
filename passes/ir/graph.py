"""The graph language the passes share: linears in every spelling, constants, and how a rewrite adds to a graph.

A constant is a tensor computed from parameters and buffers alone. Folding never writes to a parameter: it wraps it
in arithmetic, so a folded weight is the expression ``to(mul(%w, %s), dtype)``, and a parameter that is tied, shared,
or still the user's own is safe by construction. `evaluate` turns an expression into a tensor when one is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.about import about, copy_about
from sqcompile.passes.ir.record import record, value
from sqcompile.process.interrupts import checkpoint
from sqcompile.pytorch.core import codegen, schema, version, writes_to_arguments

aten = torch.ops.aten

# The spellings of a linear that `canonicalize` leaves: linear(x, w, b), and grouped_linear(x, w, offsets) for experts.
LINEARS = (aten.linear.default, sqcompile_ops.grouped_linear.default)

# Casts that `fold` adds only so that a folded weight keeps the model's dtype. `evaluate` skips them, so that a weight
# is quantized from its float32 product and is not rounded to bf16 on the way.
FOLD_CAST = "sqcompile_fold_cast"


@dataclass(frozen=True)
class Linear:
    """One linear of a graph: ``y = x Wᵀ + b``, in the one spelling that `canonicalize` leaves.

    Routed experts are one linear with a weight [E, N, K]: rows of x are sorted by expert, and each meets its own matrix.

    Attributes:
        name: the weight's qualified name; a weight used more than once gets ``#2``, ``#3`` ... after the first use.
        node: name of the node that computes y.
        x: name of the input node, [..., K].
        weight: name of the weight's node, a constant expression, [N, K] or [E, N, K].
        bias: name of the bias's node, [N], or None.
        out_features: N.
        in_features: K.
        experts: E, or None.
        offsets: name of the node that holds where each expert's rows end, int32 [E], or None.
    """

    name: str
    node: str
    x: str
    weight: str
    bias: str | None
    out_features: int
    in_features: int
    experts: int | None = None
    offsets: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (N, K) or (E, N, K)."""
        sizes = (self.out_features, self.in_features)
        return sizes if self.experts is None else (self.experts, *sizes)


def module_of(name: str) -> str:
    """The module of a linear, by the linear's name or its weight's; of experts, the weight's own name."""
    return name.partition("#")[0].removesuffix(".weight")


def nodes_by_name(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {n.name: n for n in gm.graph.nodes}


def constants(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose value depends on parameters and buffers alone."""
    known: set[fx.Node] = set()
    for n in gm.graph.nodes:
        pure = n.op == "get_attr" or (n.op == "call_function" and n.all_input_nodes and not _stateful(n))
        if pure and all(a in known for a in n.all_input_nodes):
            known.add(n)
    return known


def _stateful(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or is_mutable(node.target)


def is_mutable(target: Any) -> bool:
    """Whether an operator writes to an argument; `detach_`, which takes a constant off autograd's record, does not."""
    return target != aten.detach_.default and writes_to_arguments(target)


def get_tensor(gm: torch.nn.Module, name: str) -> Tensor:
    """The tensor stored under a qualified name."""
    obj: Any = gm
    for part in name.split("."):
        obj = getattr(obj, part)
    return obj


def set_tensor(gm: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Stores a tensor as a buffer under a qualified name, replacing what is there."""
    *path, leaf = name.split(".")
    mod: torch.nn.Module = gm
    for part in path:
        if not isinstance(getattr(mod, part, None), torch.nn.Module):
            mod.add_module(part, torch.nn.Module())
        mod = getattr(mod, part)
    if hasattr(mod, leaf):
        delattr(mod, leaf)
    # Packed oneDNN weights have no storage, so a state_dict could not be saved with them.
    mod.register_buffer(leaf, tensor, persistent=not tensor.is_mkldnn)


def state(tensor: Tensor) -> tuple[int, int]:
    """Version and address of a tensor's values. A tensor made in inference mode has no version."""
    return (0 if tensor.is_inference() else version(tensor)), tensor.data_ptr()


def evaluate(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a constant node, on the device of its parameters; scale arithmetic stays in float32."""

    def run(n: fx.Node) -> Any:  # nothing is kept: an intermediate of a weight is as large as the weight
        if n.op == "get_attr":
            return get_tensor(gm, str(n.target))
        if n.meta.get(FOLD_CAST):
            return run(n.args[0])  # type: ignore[arg-type]
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), run)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    checkpoint()
    with torch.no_grad():
        return run(node)


def effective_weight(gm: fx.GraphModule, linear: Linear, nodes: dict[str, fx.Node]) -> Tensor:
    """The weight a linear multiplies with, as `Linear.shape` in the dtype of its expression (float32 once folded).

    ``nodes`` are the graph's by name: who asks for many weights looks them up once.
    """
    return evaluate(gm, nodes[linear.weight])


def row_parts(w: Tensor, elements: int = 2**21) -> list[slice]:
    """Slices of the rows of w [N, K] with about ``elements`` values each, to bound the memory of float arithmetic.

    On a GPU 16 times as many: each part costs launches, and the processor's caches hold none of it.
    """
    rows = max(1, (16 * elements if w.is_cuda else elements) // w.shape[1])
    return [slice(i, i + rows) for i in range(0, w.shape[0], rows)]


def row_step(w: Tensor, most: int) -> int:
    """Every which row of w [N, K] gives about ``most`` values. It is odd: rows that follow one another belong to heads."""
    return max(1, w.numel() // most) | 1


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph, with the same node names, over the same tensors.

    It has no code yet, as passes change it first: `finish` writes it, or ``recompile``.
    """
    new = fx.GraphModule({}, fx.Graph())
    for n in gm.graph.find_nodes(op="get_attr"):
        set_tensor(new, str(n.target), get_tensor(gm, str(n.target)))
    graph = new.graph
    graph.output(graph.graph_copy(gm.graph, {}))
    old_out = next(iter(reversed(gm.graph.nodes)))
    new_out = next(iter(reversed(graph.nodes)))
    new_out.meta, new_out.name = dict(old_out.meta), old_out.name
    graph.set_codegen(codegen(gm.graph))
    copy_about(gm, new)
    return new


def add_tensor(gm: fx.GraphModule, name: str, tensor: Tensor, device: torch.device | None = None) -> fx.Node:
    """A get_attr node for a new buffer. Call inside ``graph.inserting_before``.

    A tensor on the meta device stands in for one that is not there yet; ``device`` is that one's.
    """
    base, k = name, 1
    while _has(gm, name):
        k += 1
        name = f"{base}_{k}"
    set_tensor(gm, name, tensor)
    node = gm.graph.get_attr(name)
    mode = about(gm).fake_mode
    if tensor.is_meta and device is not None:
        with mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        node.meta["val"] = tensor if tensor.is_mkldnn else mode.from_tensor(tensor, static_shapes=True)
    return node


def _has(gm: torch.nn.Module, name: str) -> bool:
    try:
        get_tensor(gm, name)
    except AttributeError:
        return False
    return True


def add_op(gm: fx.GraphModule, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A call node with its value recorded. Call inside ``graph.inserting_before``."""
    node = gm.graph.call_function(target, args, kwargs)
    record(gm, node)
    return node


def additive(gm: fx.GraphModule, keep: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A bool mask as one that is added, as scaled_dot_product_attention does it: minus infinity where it is False."""
    attend, not_attend = (add_op(gm, aten.scalar_tensor.default, x, dtype=dtype) for x in (0.0, -math.inf))
    return add_op(gm, aten.where.self, keep, attend, not_attend)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator call by the schema's names, defaults filled in."""
    parameters = schema(node.target).arguments
    given = dict(zip((a.name for a in parameters), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in parameters}


def finish(gm: fx.GraphModule) -> fx.GraphModule:
    """Removes what a rewrite left unused, tensors included, and regenerates the code."""
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    used = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
    for name in [n for n, _ in gm.named_buffers(remove_duplicate=False)]:
        if name not in used:
            path, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(path), leaf)
    gm.graph.lint()
    gm.recompile()
    return gm


def find_linears(gm: fx.GraphModule) -> list[Linear]:
    """Every linear with a constant weight of some channels, routed experts among them, in graph order."""
    const = constants(gm)
    uses: dict[str, int] = {}
    found = []
    for n in gm.graph.nodes:
        if n.target not in LINEARS:
            continue
        x, w, bias = linear_operands(n)
        if n in const or x in const or w not in const or not value(w).dtype.is_floating_point or value(x).dim() < 2:
            continue
        if not value(w).numel() or (bias is not None and bias not in const):
            continue
        base = first_leaf(w) or w.name
        uses[base] = uses.get(base, 0) + 1
        name = base if uses[base] == 1 else f"{base}#{uses[base]}"
        *experts, n_out, k = (int(size) for size in value(w).shape)
        routed = (experts[0], n.args[2].name) if experts else (None, None)
        found.append(Linear(name, n.name, x.name, w.name, bias.name if bias else None, n_out, k, *routed))
    return found


def linear_operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Input, weight and bias of one of `LINEARS`; routed experts have no bias."""
    x, w, *rest = node.args
    return x, w, rest[0] if rest and node.target == aten.linear.default else None  # type: ignore[return-value]


def above(*nodes: fx.Node, start: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Nodes and all that they are computed from, but for what ``start``, which is part of it, is computed from."""
    todo, found = list(nodes), set(start)
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo.extend(n.all_input_nodes)
    return found


def leaves(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers of a constant expression."""
    return [n for n in above(node) if n.op == "get_attr"]


def first_leaf(node: fx.Node) -> str | None:
    """The qualified name of the first parameter in a constant expression."""
    while node.op != "get_attr":
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return str(node.target)


def is_channel_vector(node: fx.Node, like: Tensor) -> bool:
    """Whether a constant node broadcasts as one value per channel (last dim) over a tensor shaped as ``like``."""
    v = value(node)
    return (
        isinstance(v, Tensor)
        and v.dim() >= 1
        and math.prod(v.shape[:-1]) == 1
        and v.shape[-1] == like.shape[-1]
        and v.shape[-1] != 1
        and v.dim() <= like.dim()
        and v.dtype.is_floating_point
    )
