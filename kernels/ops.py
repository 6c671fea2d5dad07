"""The operators of quantized graphs, ``torch.ops.sqcompile.*``. Importing this module registers them.

Each is one node in a graph, so that passes can match it, and each is composite: a compiler that traces through it
sees plain arithmetic and fuses it with what surrounds it (a norm before a quantize, an activation after a linear).
"""

from __future__ import annotations

import torch

from sqcompile.kernels import onednn, reference

_SCHEMAS = {
    "token_scale(Tensor x) -> Tensor": reference.token_scale,
    "tensor_scale(Tensor x) -> Tensor": reference.tensor_scale,
    "quantize(Tensor x, Tensor scale, int zero_point=0) -> Tensor": reference.quantize,
    "dequantize(Tensor q, Tensor scale) -> Tensor": reference.dequantize,
    "int8_linear(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor": (
        reference.int8_linear
    ),
    "int8_linear_packed(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor w_zero, Tensor? bias, ScalarType dtype)"
    " -> Tensor": onednn.linear,
}

_library = torch.library.Library("sqcompile", "DEF")
for _schema, _function in _SCHEMAS.items():
    _library.define(_schema)
    _library.impl(_schema.partition("(")[0], _function, "CompositeImplicitAutograd")

sqcompile_ops = torch.ops.sqcompile
