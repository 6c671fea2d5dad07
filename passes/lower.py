"""lower: dequantize -> linear -> cast becomes one INT8 linear. Reads only the graph.

    %y = to(linear(dequantize(%q, %s), dequantize(%w_int8, %w_scale), %b), dtype)
->
    %y = sqcompile.int8_linear(%q, %s, %w_int8, %w_scale, %b, dtype)                          # any device
    %y = sqcompile.int8_linear_packed(%q_u8, %s, %w_packed, %w_scale, %w_sum, %b, dtype)       # x86 with VNNI
"""

from __future__ import annotations

import warnings

import torch
from torch import fx

from sqcompile.kernels import onednn, vnni
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.reference import UINT8_ZERO_POINT
from sqcompile.passes.graph import add_op, add_tensor, aten, clone, constants, evaluate, finish, get_tensor, value

_warned: set[str] = set()


def lower(gm: fx.GraphModule) -> fx.GraphModule:
    """Lowers every quantized linear, and computes what depends on parameters alone.

    On a device without INT8 kernels of its own, the integer reference runs, with a warning once per device type.
    Weights are packed one at a time and the plain int8 copy is dropped, so no two copies of the model exist.
    """
    gm = clone(gm)
    for node in list(gm.graph.nodes):
        if node.target == aten.linear.default and all(_is_dequantize(a) for a in node.args[:2]):
            _lower_linear(gm, node)
    _materialize(gm)
    return finish(gm)


def _is_dequantize(a: object) -> bool:
    return isinstance(a, fx.Node) and a.target == sqcompile_ops.dequantize.default


def _lower_linear(gm: fx.GraphModule, node: fx.Node) -> None:
    x, w, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    (q, scale), (w_int8, w_scale) = x.args, w.args
    assert isinstance(q, fx.Node) and isinstance(w_int8, fx.Node) and isinstance(w_scale, fx.Node)
    out, dtype = node, torch.float32
    if len(node.users) == 1 and (user := next(iter(node.users))).target == aten.to.dtype and len(user.args) == 2:
        out, dtype = user, user.args[1]  # type: ignore[assignment]
    n = value(w_int8).shape[0]
    per_column = get_tensor(gm, str(w_scale.target)).flatten().expand(n).contiguous()
    name = str(w_int8.target).removesuffix("_int8")
    device = value(w_int8).device
    with gm.graph.inserting_before(out):
        columns = add_tensor(gm, f"{name}_columns", per_column)
        if device.type == "cpu" and onednn.available():
            q_u8 = _as_uint8(gm, q)
            plain = get_tensor(gm, str(w_int8.target))
            packed = onednn.pack(plain)
            readable = vnni.readable(packed, plain)
            row_sum = plain.sum(dim=1, dtype=torch.int32) if readable else torch.empty(0, dtype=torch.int32)
            w_node, sum_node = add_tensor(gm, f"{name}_packed", packed), add_tensor(gm, f"{name}_sum", row_sum)
            args = (q_u8, scale, w_node, columns, sum_node, bias, dtype)
            new = gm.graph.call_function(sqcompile_ops.int8_linear_packed.default, args)
        else:
            _warn_reference(device)
            new = gm.graph.call_function(sqcompile_ops.int8_linear.default, (q, scale, w_int8, columns, bias, dtype))
        new.meta["val"] = value(out)
    out.replace_all_uses_with(new)
    gm.graph.erase_node(out)
    if out is not node:
        gm.graph.erase_node(node)
    if not w.users and new.target == sqcompile_ops.int8_linear_packed.default:
        gm.graph.erase_node(w)
        path, _, leaf = str(w_int8.target).rpartition(".")
        gm.graph.erase_node(w_int8)
        delattr(gm.get_submodule(path), leaf)


def _as_uint8(gm: fx.GraphModule, q: fx.Node) -> fx.Node:
    """The uint8 twin of a quantize node, made once."""
    x, scale = q.args
    for user in x.users:  # type: ignore[union-attr]
        if user.target == sqcompile_ops.quantize.default and user.args == (x, scale, UINT8_ZERO_POINT):
            return user
    with gm.graph.inserting_before(q):
        return add_op(gm, sqcompile_ops.quantize.default, x, scale, UINT8_ZERO_POINT)


def _warn_reference(device: torch.device) -> None:
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(
            f"sqcompile has no INT8 kernels for {device.type}"
            + (" without AVX512-VNNI" if device.type == "cpu" else "")
            + ": the compiled model runs the plain-PyTorch integer reference, correct but slow",
            stacklevel=2,
        )


def _materialize(gm: fx.GraphModule) -> None:
    """Constant expressions that data meets (a norm's weight / s) become tensors."""
    const = constants(gm)
    for node in [n for n in gm.graph.nodes if n in const and n.op == "call_function"]:
        if any(u not in const for u in node.users):
            tensor = evaluate(gm, node)
            if isinstance(tensor, torch.Tensor):
                with gm.graph.inserting_before(node):
                    new = add_tensor(gm, f"constant_{node.name}", tensor.to(value(node).dtype))
                node.replace_all_uses_with(new)
                gm.graph.erase_node(node)
