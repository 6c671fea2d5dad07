"""finite: a NaN or an infinity in a parameter is an error that names it: no scale can be made of such a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from sqcompile.errors import WeightError
from sqcompile.passes.ir.graph import Linear, above, constants, evaluate, get_tensor, leaves, nodes_by_name
from sqcompile.passes.labels.interpreter import producer_kind, vector_operand
from sqcompile.process.interrupts import checkpoint


def check_weights(gm: fx.GraphModule, linears: Sequence[Linear]) -> None:
    """Checks the weights and biases of linears that are to be quantized, and of the norms and scales before them.

    Raises:
        WeightError: naming the parameter.
    """
    nodes = nodes_by_name(gm)
    for l in linears:
        _check(gm, nodes[l.weight], f"the weight of {l.name}")
    check_vectors(gm, linears)


def check_vectors(gm: fx.GraphModule, linears: Sequence[Linear]) -> None:
    """`check_weights` without the weights, which are checked once more where they are quantized."""
    nodes, const = nodes_by_name(gm), constants(gm)
    for l in linears:
        if l.bias is not None:
            _check(gm, nodes[l.bias], f"the bias of {l.name}")
    for node in above(*(nodes[l.x] for l in linears)):
        kind = None if node in const else producer_kind(node, False, const)
        at = vector_operand(node, const) if kind == "scale" else None
        vectors = node.args[2:4] if kind == "norm" else () if at is None else (node.args[at],)
        for v in vectors:
            if isinstance(v, fx.Node) and v in const:
                _check(gm, v, f"what scales {node.name}")


def _check(gm: fx.GraphModule, node: fx.Node, what: str) -> None:
    checkpoint()
    parameters = leaves(node)
    for leaf in parameters:
        check_tensor(get_tensor(gm, str(leaf.target)), str(leaf.target))
    if parameters != [node]:
        check_tensor(evaluate(gm, node), what)


def check_tensor(t: Tensor, name: str) -> None:
    """Raises a WeightError if a tensor that scales are made of is not finite."""
    if not t.dtype.is_floating_point or t.numel() == 0 or t.is_meta:
        return
    if all(bool(v.isfinite()) for v in torch.aminmax(t)):  # a NaN is both
        return
    bad = (~t.isfinite()).nonzero()
    what = "NaN" if bool(t[tuple(bad[0])].isnan()) else "an infinity"
    raise WeightError(
        f"{name} holds {what} at {bad[0].tolist()}, {len(bad)} of its {t.numel()} values are not finite: load the model's "
        "weights anew, or leave what reads it in float with Recipe(skip=...)"
    )
