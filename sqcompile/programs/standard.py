"""standard: a quantized graph in operators that everybody has, for `torch.export` and ONNX. None of sqcompile's is left.

    %token_scale = sqcompile.token_scale(%x)
    %quantize = sqcompile.quantize(%x, %token_scale)
    %to = to(%quantize, float32)
    %to_1 = to(%w_int8, float32)
    %linear = linear(%to, %to_1)
    %dequantize = sqcompile.dequantize(%linear, %token_scale, %w_scale, %b, float32)
->                                                          # as quantizers of PyTorch write it
    %token_scale = sqcompile.token_scale(%x)                # plain arithmetic when it is traced
    %quantize = quantized_decomposed.quantize_per_token(%x, %token_scale, %zeros_like, -127, 127, int8)
    %dequantize = quantized_decomposed.dequantize_per_token(%quantize, %token_scale, %zeros_like, -127, 127, int8, float32)
    %dequantize_1 = quantized_decomposed.dequantize_per_channel(%w_int8, %w_scale, %zero_point, 0, -127, 127, int8)
    %linear = linear(%dequantize, %dequantize_1, %b)
->                                                          # or, for ONNX, where integers are multiplied
    %token_scale = sqcompile.token_scale(%x)
    %quantize = sqcompile.quantize(%x, %token_scale)
    %int8_linear = sqcompile.int8_linear(%quantize, %token_scale, %w_int8, %w_scale, %b, float32)

A static scale is a number of `quantize_per_tensor`, for ONNX with a product `matmul(%dequantize, %w)` of a weight [K, N]: of
linears, the exporter makes operators that round the bias as well. The factor that makes NaN of a row that is not finite is
left out there: what runs the program has its own way with those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sqcompile.errors import ArtifactError
from sqcompile.kernels.attention_parts import int8_attend_whole
from sqcompile.kernels.ops import COMPOSITE, sqcompile_ops
from sqcompile.kernels.reference import QMAX
from sqcompile.kernels.rotation import rotate
from sqcompile.passes.ir.graph import add_op, add_tensor, aten, clone, finish, get_tensor, value
from sqcompile.passes.ir.record import substitute

_RANGE = (-QMAX, QMAX, torch.int8)

# What the ONNX exporter is told a translation of.
TRANSLATED = (sqcompile_ops.int8_linear.default, sqcompile_ops.tensor_scale.default)


@dataclass(frozen=True)
class _Linear:
    """A linear of a quantized graph: the nodes that it is made of. ``static`` is Δ of its input, None for a dynamic one."""

    node: fx.Node
    x: fx.Node
    q: fx.Node
    scale: fx.Node
    static: float | None
    weight: fx.Node
    weight_scale: fx.Node
    bias: fx.Node | None
    dtype: torch.dtype


def standard(gm: fx.GraphModule, integers: bool) -> fx.GraphModule:
    """The graph in standard operators.

    Args:
        gm: the quantized stage.
        integers: whether linears with dynamic scales stay products of integers, `sqcompile.int8_linear`, which the ONNX
            exporter has a translation for.

    Raises:
        ArtifactError: for what has no standard operator: routed experts, and other formats than INT8.
    """
    gm = clone(gm)
    writer = _Writer(gm, integers)
    for n in gm.graph.find_nodes(op="call_function", target=sqcompile_ops.dequantize.default):
        writer.linear(_linear(gm, n))
    for n in gm.graph.find_nodes(op="call_function", target=sqcompile_ops.rotate.default):
        writer.rotate(n)
    gm = finish(gm)
    for n in gm.graph.nodes:
        if integers and n.target in TRANSLATED:
            continue
        if n.target in _PLAIN:
            n.target = _PLAIN[n.target]  # which tracing makes plain arithmetic of
        elif getattr(n.target, "namespace", None) == "sqcompile":
            raise ArtifactError(_refusal(str(n.target).split(".")[1]))
    gm.recompile()
    return gm


def _refusal(operator: str) -> str:
    if operator in ("grouped_linear", "grouped_dequantize"):
        return "routed experts have no operator in this format: export a model without them, or save the model natively"
    return f"sqcompile.{operator} has no operator in this format: save the model natively, with compiled.save"


def _linear(gm: fx.GraphModule, n: fx.Node) -> _Linear:
    acc: Any
    scale: Any
    weight_scale: Any
    acc, scale, weight_scale, bias, dtype = n.args
    to_x, to_w = acc.args[:2]
    q, weight = to_x.args[0], to_w.args[0]
    x, by = q.args[:2]
    if value(weight).dtype != torch.int8:
        raise ArtifactError(f"weights of {value(weight).dtype} have no operator in this format: take a recipe of INT8")
    static = None
    if by is not scale:
        static = float(get_tensor(gm, str(by.target)))
        weight_scale = weight_scale.args[0]
    return _Linear(n, x, q, scale, static, weight, weight_scale, bias, dtype)  # type: ignore[arg-type]


_PLAIN = {**COMPOSITE, sqcompile_ops.int8_attend.default: int8_attend_whole}


class _Writer:
    def __init__(self, gm: fx.GraphModule, integers: bool) -> None:
        from sqcompile.pytorch.decomposed import quantized_decomposed  # here, as it takes its time

        self.gm, self.integers, self.ops = gm, integers, quantized_decomposed
        self.inputs: dict[fx.Node, fx.Node] = {}  # dequantized, by the quantized one
        self.matrices: dict[int, fx.Node] = {}

    def linear(self, l: _Linear) -> None:
        with self.gm.graph.inserting_before(l.node):
            if self.integers and l.static is None:
                operands = (l.q, l.scale, l.weight, l.weight_scale, l.bias)
                y = add_op(self.gm, sqcompile_ops.int8_linear.default, *operands, l.dtype)
            else:
                bias = l.bias
                if bias is not None and value(bias).dtype != torch.float32:
                    bias = add_op(self.gm, aten.to.dtype, bias, torch.float32)
                if self.integers:
                    y = add_op(self.gm, aten.matmul.default, self._input(l), self._weight(l, transposed=True))
                    y = y if bias is None else add_op(self.gm, aten.add.Tensor, y, bias)
                else:
                    y = add_op(self.gm, aten.linear.default, self._input(l), self._weight(l), bias)
                y = y if l.dtype == torch.float32 else add_op(self.gm, aten.to.dtype, y, l.dtype)
        substitute(self.gm, l.node, y)
        self.gm.graph.erase_node(l.node)

    def _input(self, l: _Linear) -> fx.Node:
        if l.q not in self.inputs:
            with self.gm.graph.inserting_before(l.q):
                self.inputs[l.q] = self._rounded(l)
        return self.inputs[l.q]

    def _rounded(self, l: _Linear) -> fx.Node:
        """x, quantized and dequantized."""
        ops = self.ops
        x = l.x if value(l.x).dtype == torch.float32 else add_op(self.gm, aten.to.dtype, l.x, torch.float32)
        if l.static is not None:
            q = add_op(self.gm, ops.quantize_per_tensor.default, x, l.static, 0, *_RANGE)
            return add_op(self.gm, ops.dequantize_per_tensor.default, q, l.static, 0, *_RANGE)
        zero = add_op(self.gm, aten.zeros_like.default, l.scale)
        if value(l.scale).dim():
            q = add_op(self.gm, ops.quantize_per_token.default, x, l.scale, zero, *_RANGE)
            return add_op(self.gm, ops.dequantize_per_token.default, q, l.scale, zero, *_RANGE, torch.float32)
        q = add_op(self.gm, ops.quantize_per_tensor.tensor, x, l.scale, zero, *_RANGE)
        return add_op(self.gm, ops.dequantize_per_tensor.tensor, q, l.scale, zero, *_RANGE)

    def _weight(self, l: _Linear, transposed: bool = False) -> fx.Node:
        """The weight, dequantized: float32 [N, K], or [K, N]."""
        scale, w = get_tensor(self.gm, str(l.weight_scale.target)), l.weight
        if transposed:
            w = add_tensor(self.gm, f"{w.target}_transposed", get_tensor(self.gm, str(w.target)).t().contiguous())
        if scale.numel() == 1:
            by = float(scale)
            return add_op(self.gm, self.ops.dequantize_per_tensor.default, w, by, 0, *_RANGE)
        zeros = torch.zeros(scale.shape, dtype=torch.int64, device=scale.device)
        zero = add_tensor(self.gm, f"{l.weight.target}_zero_point", zeros)
        operator = self.ops.dequantize_per_channel.default
        return add_op(self.gm, operator, w, l.weight_scale, zero, int(transposed), *_RANGE)

    def rotate(self, n: fx.Node) -> None:
        """x H as a product with a matrix, which is not the kernels' sums to the bit."""
        x, block = n.args
        assert isinstance(x, fx.Node) and isinstance(block, int)
        with self.gm.graph.inserting_before(n):
            dtype, device = value(n).dtype, value(n).device
            if block not in self.matrices:
                with self.gm.graph.inserting_before(next(iter(self.gm.graph.nodes))):
                    h = rotate(torch.eye(block, dtype=dtype, device=device), block)
                    self.matrices[block] = add_tensor(self.gm, f"hadamard_{block}", h)
            y = add_op(self.gm, aten.to.dtype, x, dtype) if value(x).dtype != dtype else x
            y = add_op(self.gm, aten.unflatten.int, y, -1, [-1, block])
            y = add_op(self.gm, aten.matmul.default, y, self.matrices[block])
            y = add_op(self.gm, aten.flatten.using_ints, y, -2, -1)
        substitute(self.gm, n, y)
        self.gm.graph.erase_node(n)
