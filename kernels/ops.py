"""The operators of quantized graphs, ``torch.ops.sqcompile.*``. Importing this module registers them.

Each is one node in a graph, so that passes can match it. All but `matmul_u8s8` are composite: a compiler that traces
through them sees plain arithmetic and fuses it with what surrounds it (a norm before a quantize, an activation after
a linear). `matmul_u8s8` is opaque: it chooses its kernel by the number of rows when it runs, so that one compiled
graph serves prefill and decode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.kernels import onednn, reference, vnni


def matmul_u8s8(q: Tensor, w: Tensor, w_scale: Tensor, w_sum: Tensor, dtype: torch.dtype) -> Tensor:
    """(q - 128) wᵀ · w_scale on an x86 CPU with VNNI.

    Args:
        q: uint8 [..., K], zero point 128.
        w: packed int8 weight (`onednn.pack`).
        w_scale: float32 [N].
        w_sum: int32 [N], the sum of each row of w; empty if the weight's layout is not one `vnni` can read.
        dtype: float32 or bfloat16.
    """
    rows = q.numel() // q.shape[-1]
    if rows == 0:
        return _matmul_u8s8_fake(q, w, w_scale, w_sum, dtype)
    if rows <= vnni.MAX_ROWS and w_sum.numel() and vnni.library() is not None:
        return vnni.matmul(q, w, w_scale, w_sum, dtype)
    return onednn.matmul(q, w, w_scale, dtype)


def _matmul_u8s8_fake(q: Tensor, w: Tensor, w_scale: Tensor, w_sum: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty((*q.shape[:-1], w_scale.shape[0]), dtype=dtype)


def int8_linear_packed(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, w_sum: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.int8_linear` for uint8 q [..., K] and a packed weight (see `matmul_u8s8`)."""
    # Δx is applied after the product, as it may be one per row, and the compiler fuses it with what follows.
    # A bf16 model gets its product in bf16: half the traffic of the largest tensors.
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    y = torch.ops.sqcompile.matmul_u8s8(q, w, w_scale, w_sum, wide)
    return reference.scale_output(y, scale, bias, dtype)


_COMPOSITE = {
    "token_scale(Tensor x) -> Tensor": reference.token_scale,
    "tensor_scale(Tensor x) -> Tensor": reference.tensor_scale,
    "quantize(Tensor x, Tensor scale, int zero_point=0) -> Tensor": reference.quantize,
    "dequantize(Tensor acc, Tensor scale, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor": reference.dequantize,
    "int8_linear(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor": (
        reference.int8_linear
    ),
    "int8_linear_packed(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor w_sum, Tensor? bias, ScalarType dtype)"
    " -> Tensor": int8_linear_packed,
}

_library = torch.library.Library("sqcompile", "DEF")
for _schema, _function in _COMPOSITE.items():
    _library.define(_schema)
    _library.impl(_schema.partition("(")[0], _function, "CompositeImplicitAutograd")

_library.define("matmul_u8s8(Tensor q, Tensor w, Tensor w_scale, Tensor w_sum, ScalarType dtype) -> Tensor")
for _key in ("CPU", "MkldnnCPU"):  # packed weights carry the second key
    _library.impl("matmul_u8s8", matmul_u8s8, _key)
torch.library.register_fake("sqcompile::matmul_u8s8", _matmul_u8s8_fake, lib=_library)

sqcompile_ops = torch.ops.sqcompile
