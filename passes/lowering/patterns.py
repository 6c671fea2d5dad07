"""patterns: norms, activations and multiplications in their spellings, which `fuse` puts into the kernels beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sqcompile.passes.ir.graph import arguments, aten, is_channel_vector, value

_ACTIVATIONS: dict[Any, str] = {aten.silu.default: "silu", aten.relu.default: "relu", aten.gelu.default: "gelu"}


def multiplied(x: fx.Node, const: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """base and a float32 channel vector, where x = base · vector in float32."""
    if x.target != aten.mul.Tensor or value(x).dtype != torch.float32:
        return None
    for base, vector in _operands(x):
        same = value(base).shape == value(x).shape
        if same and base not in const and _is_vector(vector, x, const) and value(vector).dtype == torch.float32:
            return base, vector
    return None


def activation_of(x: fx.Node) -> str | None:
    name = _ACTIVATIONS.get(x.target)
    if name == "gelu" and arguments(x)["approximate"] == "tanh":
        return "gelu_tanh"
    return name


def act_of(x: fx.Node, const: set[fx.Node]) -> tuple[Any, ...] | None:
    """gate, up or None, and the activation, where x = act(gate) · up or act(gate)."""
    if name := activation_of(x):
        return x.args[0], None, name
    if x.target != aten.mul.Tensor:
        return None
    for a, up in _operands(x):
        if up not in const and (name := activation_of(a)):
            same = value(a).shape == value(up).shape and value(a).dtype == value(up).dtype
            return (a.args[0], up, name) if same else None
    return None


def norm_of(x: fx.Node, const: set[fx.Node]) -> tuple[Any, ...] | None:
    """x, weight, bias, eps, rms, round_first of `norm_quantize`, where a node is a norm in one of its spellings."""
    if x.target in (aten.layer_norm.default, aten.rms_norm.default):
        args = arguments(x)
        h, rms = args["input"], x.target == aten.rms_norm.default
        eps = args["eps"]
        if eps is None:  # that of the accumulator or of the input, by PyTorch's version: the same in float32 alone
            if value(h).dtype != torch.float32:
                return None
            eps = torch.finfo(torch.float32).eps
        vectors = args["weight"], None if rms else args["bias"]
        fits = len(args["normalized_shape"]) == 1 and not (vectors[0] is None and vectors[1] is not None)
        return (h, *vectors, eps, rms, False) if fits else None
    y = _cast_of(x)
    if y.target != aten.mul.Tensor:
        return None
    for weight, inner in _operands(y):
        if _is_vector(weight, y, const):
            return _rms(x, weight, inner)
    return None


def _rms(x: fx.Node, weight: fx.Node, inner: fx.Node) -> tuple[Any, ...] | None:
    """weight · [cast] h · rsqrt(mean(h²) + eps)."""
    product = _cast_of(inner)
    if product.target != aten.mul.Tensor:
        return None
    for h, root in _operands(product):
        eps = _root_mean_square(h, root)
        if eps is None:
            continue
        source = _cast_of(h)
        round_first = inner is not product and value(inner).dtype == value(x).dtype
        exact = value(h).dtype == torch.float32 and value(source).dtype == value(x).dtype
        exact = exact and value(source).shape == value(x).shape  # [..., 1] · weight is no norm of K channels
        exact = exact and (not round_first or value(weight).dtype == value(x).dtype)
        return (source, weight, None, eps, True, round_first) if exact else None
    return None


def _root_mean_square(h: fx.Node, root: Any) -> float | None:
    """eps, where a node is rsqrt(mean(h²) + eps)."""
    if root.target != aten.rsqrt.default or root.args[0].target != aten.add.Tensor or root.args[0].kwargs:
        return None
    mean, eps = root.args[0].args[:2]
    if not isinstance(eps, float) or mean.target != aten.mean.dim:
        return None
    square, over = mean.args[0], arguments(mean)
    whole = over["dim"] is not None and list(over["dim"]) == [-1] and over["keepdim"] and over["dtype"] is None
    return eps if whole and square.target == aten.pow.Tensor_Scalar and square.args == (h, 2) else None


def _operands(x: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The two operands of a multiplication in both orders, where both are tensors."""
    a, b = x.args[:2]
    return [(a, b), (b, a)] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []


def _is_vector(v: fx.Node, like: fx.Node, const: set[fx.Node]) -> bool:
    return v in const and value(v).dim() == 1 and is_channel_vector(v, value(like))


def _cast_of(x: fx.Node) -> fx.Node:
    """What x is cast from, or x itself."""
    cast = (x.target == aten.to.dtype and len(x.args) == 2) or x.target == aten.type_as.default
    return x.args[0] if cast else x  # type: ignore[return-value]
