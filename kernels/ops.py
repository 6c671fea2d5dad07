"""The operators of quantized graphs, ``torch.ops.sqcompile.*``. Importing this module registers them.

Each is one node in a graph, so that passes can match it. Most are composite: a compiler that traces through them sees
plain arithmetic and fuses it with what surrounds it (a norm before a quantize, an activation after a linear).
`matmul_u8s8` is opaque: it chooses its kernel by the number of rows when it runs, so that one compiled graph serves
prefill and decode; so are the operators of attention, those of rows on CPUs (rows.py) and the GEMMs of GPUs (fused.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import IndexRangeError
from sqcompile.kernels import all_reduce, attention, attention_int8, attention_parts, fp8, fused, reference, rotation
from sqcompile.kernels import rows as plain_rows
from sqcompile.kernels.cpu import rows as cpu_rows
from sqcompile.kernels.cpu import x86
from sqcompile.kernels.cpu.dispatch import KEYS


def int8_linear_packed(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, w_sum: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.int8_linear` for uint8 q [..., K] and a packed weight (see `matmul_u8s8`)."""
    # Δx is applied after the product, as it may be one per row: by our kernels at its end, else by the compiler.
    # A bf16 model gets its product in bf16: half the traffic of the largest tensors.
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if x86.takes(w, w_scale, w_sum, bias):
        return torch.ops.sqcompile.matmul_u8s8(q, w, w_scale, w_sum, wide, scale, bias).to(dtype)
    y = torch.ops.sqcompile.matmul_u8s8(q, w, w_scale, w_sum, wide)
    return reference.scale_output(y, scale, bias, dtype)


def grouped_matmul_u8s8(
    q: Tensor, w: list[Tensor], w_scale: Tensor, w_sum: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """`matmul_u8s8` of each row of q [T, K] with its expert's packed weight; w_scale and w_sum are [E, N]."""
    out = torch.zeros(q.shape[0], w_scale.shape[1], dtype=dtype)
    for e, rows in enumerate(reference.expert_rows(offsets)):
        if rows.stop > rows.start:
            out[rows] = x86.matmul(q[rows], w[e], w_scale[e], w_sum[e], dtype)
    return out


def _grouped_matmul_u8s8_fake(
    q: Tensor, w: list[Tensor], w_scale: Tensor, w_sum: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    return q.new_empty((q.shape[0], w_scale.shape[1]), dtype=dtype)


def int8_grouped_linear_packed(
    q: Tensor, scale: Tensor, w: list[Tensor], w_scale: Tensor, w_sum: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """`reference.int8_grouped_linear` for uint8 q [T, K] and one packed weight per expert."""
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    y = torch.ops.sqcompile.grouped_matmul_u8s8(q, w, w_scale, w_sum, offsets, wide)
    return reference.scale_output(y, scale, None, dtype)


_COMPOSITE = {
    "token_scale(Tensor x, float q_max=127.0) -> Tensor": reference.token_scale,
    "tensor_scale(Tensor x, float q_max=127.0) -> Tensor": reference.tensor_scale,
    "finite_rows(Tensor x) -> Tensor": reference.finite_rows,
    "finite_heads(Tensor x) -> Tensor": reference.finite_heads,
    "quantize(Tensor x, Tensor scale, int zero_point=0, ScalarType dtype=int8) -> Tensor": reference.quantize,
    "dequantize(Tensor acc, Tensor scale, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor": reference.dequantize,
    "dequantize_tokens(Tensor q, Tensor scale, ScalarType dtype) -> Tensor": reference.dequantize_tokens,
    "grouped_dequantize(Tensor acc, Tensor scale, Tensor w_scale, Tensor offsets, ScalarType dtype) -> Tensor": (
        reference.grouped_dequantize
    ),
    "int8_linear(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor": (
        reference.int8_linear
    ),
    "fp8_linear(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor": fp8.fp8_linear,
    "int8_linear_packed(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor w_sum, Tensor? bias, ScalarType dtype)"
    " -> Tensor": int8_linear_packed,
    "int8_grouped_linear_packed(Tensor q, Tensor scale, Tensor[] w, Tensor w_scale, Tensor w_sum, Tensor offsets,"
    " ScalarType dtype) -> Tensor": int8_grouped_linear_packed,
    "scale_over(Tensor x, int[] dims) -> Tensor": attention_parts.scale_over,
    "int8_scores(Tensor q, Tensor q_scale, Tensor k, Tensor k_scale, ScalarType dtype) -> Tensor": (
        attention_parts.int8_scores
    ),
    "mask_scores(Tensor scores, Tensor? mask, SymInt? diagonal) -> Tensor": attention_parts.mask_scores,
    "attention_weights(Tensor scores, ScalarType dtype) -> Tensor": attention_parts.attention_weights,
    "attend(Tensor p, Tensor v) -> Tensor": attention_parts.attend,
}

_library = torch.library.Library("sqcompile", "DEF")
for _schema, _function in _COMPOSITE.items():
    _library.define(_schema)
    _library.impl(_schema.partition("(")[0], _function, "CompositeImplicitAutograd")

# The composite operators, and what they compute.
COMPOSITE: dict[Any, Any] = {
    getattr(torch.ops.sqcompile, schema.partition("(")[0]).default: function for schema, function in _COMPOSITE.items()
}


def stored(x: Tensor) -> Tensor:
    """A copy that a compiler does not fuse away: what reads it does not compute x again."""
    return x.clone()


def checked_ids(ids: Tensor, low: int, end: int, what: str) -> Tensor:
    """A copy of ids, all of which are at least ``low`` and below ``end``.

    Raises:
        IndexRangeError: naming the one that is not.
    """
    if ids.numel():
        smallest, largest = (int(x) for x in ids.aminmax())
        if smallest < low or largest >= end:
            raise IndexRangeError(
                f"{what}, which takes {low} to {end - 1}, and is {smallest if smallest < low else largest} at one place: the "
                "float model refuses it, too. Ids of another tokenizer, labels of -100 and too long texts have such values"
            )
    return ids.clone()


_OPAQUE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "grouped_linear(Tensor x, Tensor w, Tensor offsets) -> Tensor": (
        reference.grouped_linear,
        lambda x, w, offsets: x.new_empty(x.shape[0], w.shape[1]),
    ),
    "grouped_matmul_u8s8(Tensor q, Tensor[] w, Tensor w_scale, Tensor w_sum, Tensor offsets, ScalarType dtype)"
    " -> Tensor": (grouped_matmul_u8s8, _grouped_matmul_u8s8_fake),
    "rotate(Tensor x, int block) -> Tensor": (cpu_rows.rotate, rotation.rotate_fake),
    "all_reduce(Tensor x, str group) -> Tensor": (all_reduce.all_reduce, lambda x, group: x.new_empty(x.shape)),
    "int8_attend(Tensor scores, Tensor v, Tensor v_scale, ScalarType dtype) -> Tensor": (
        attention_parts.int8_attend,
        attention_parts.int8_attend_fake,
    ),
}

_OF_KERNELS = fused.OPAQUE | attention.ATTENTION | attention_int8.ATTENTION  # (plain PyTorch, Triton, fake)
_ROTATE = "rotate_quantize(Tensor x, int block, Tensor? scale, int zero_point) -> (Tensor, Tensor)"
_TRITON = {s: (f, fused.on_cuda(f, kernel)) for s, (f, kernel, _) in _OF_KERNELS.items()}
_TRITON[_ROTATE] = (cpu_rows.rotate_quantize, fused.on_cuda(rotation.rotate_quantize, fused.rotate_quantize_triton))
# The operators of CUDA that launch kernels of Triton, by schema; `triton.replay` withdraws the library for faster ones.
LAUNCHING: dict[str, Callable[..., Any]] = {schema: on_cuda for schema, (_, on_cuda) in _TRITON.items()}
on_cuda_library = torch.library.Library("sqcompile", "IMPL")

_FAKES = {schema: fake for schema, (_, fake) in _OPAQUE.items()} | {s: fake for s, (_, _, fake) in _OF_KERNELS.items()}
_FAKES[_ROTATE] = rotation.rotate_quantize_fake
# Operators that x86 CPUs have in C++, by schema: what they do on a CPU in Python, plain ones for elsewhere, and fake ones.
# `cpu.dispatch` withdraws the library for those in C++.
_X86: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None, Callable[..., Any]]] = {
    "matmul_u8s8(Tensor q, Tensor w, Tensor w_scale, Tensor w_sum, ScalarType dtype, Tensor? scale=None, Tensor? bias=None)"
    " -> Tensor": (
        x86.matmul,
        None,
        x86.matmul_fake,
    ),
    "linear_act_quantize(Tensor y, Tensor? scale, Tensor? bias, int gate, int up, int k, str activation, "
    "Tensor? multiplier, int rotation, Tensor? static, int zero_point) -> (Tensor, Tensor)": (
        cpu_rows.linear_act_quantize,
        plain_rows.linear_act_quantize,
        plain_rows.linear_act_quantize_fake,
    ),
    "linear_norm_quantize(Tensor y, Tensor? scale, Tensor? bias, Tensor? residual, Tensor? weight, Tensor? shift, float eps, "
    "bool rms, bool round_first, Tensor? multiplier, int rotation, Tensor? static, int zero_point, bool keep_sum, "
    "bool keep_norm) -> (Tensor, Tensor, Tensor, Tensor)": (
        cpu_rows.linear_norm_quantize,
        plain_rows.linear_norm_quantize,
        plain_rows.linear_norm_quantize_fake,
    ),
    "mask_kind(Tensor mask) -> Tensor": (
        attention.mask_kind,
        attention.mask_kind,
        lambda mask: mask.new_empty((), dtype=torch.int64),
    ),
    "stored(Tensor x) -> Tensor": (stored, stored, torch.empty_like),
    "checked_ids(Tensor ids, SymInt low, SymInt end, str what) -> Tensor": (
        checked_ids,
        checked_ids,
        lambda ids, low, end, what: torch.empty_like(ids),
    ),
}
ON_X86: dict[str, Callable[..., Any]] = {schema: on_cpu for schema, (on_cpu, _, _) in _X86.items()}
ON_X86 |= {schema: _TRITON[schema][0] for schema in (_ROTATE, *attention.ATTENTION)}
on_x86_library = torch.library.Library("sqcompile", "IMPL")
for _schema, (_on_cpu, _plain, _fake) in _X86.items():
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    for _key in KEYS:
        on_x86_library.impl(_name, _on_cpu, _key)
    if _plain is not None:
        _library.impl(_name, _plain, "CUDA")
    torch.library.register_fake(f"sqcompile::{_name}", _fake, lib=_library)

for _schema, _fake in _FAKES.items():
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    if _schema in _OPAQUE:
        for _key in ("CUDA", *KEYS):
            _library.impl(_name, _OPAQUE[_schema][0], _key)
    else:
        (on_x86_library if _schema in ON_X86 else _library).impl(_name, _TRITON[_schema][0], "CPU")
        on_cuda_library.impl(_name, _TRITON[_schema][1], "CUDA")
    torch.library.register_fake(f"sqcompile::{_name}", _fake, lib=_library)

for _plain, _kernel in fused.VISIBLE:
    _name = f"sqcompile::{_plain.__name__}"
    if torch.version.cuda is not None:
        torch.library.triton_op(_name, fused.on_cuda(_plain, _kernel), mutates_args=())
    else:  # triton_op imports Triton, which takes its time and has nothing to run here
        torch.library.custom_op(_name, _plain, mutates_args=()).register_fake(_plain)

sqcompile_ops = torch.ops.sqcompile
