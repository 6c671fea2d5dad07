"""onnx: a program as an ONNX model of opset 21, by PyTorch's exporter. Linears are the only operators it is told of.

Dynamic scales, a token or a tensor at a time: DynamicQuantizeLinear has uint8 and one scale alone, so it is spelled out.

    Δ = ReduceMax(Abs(x)) / 127;  q = Cast(Clip(Round(x / Δ)), int8);  y = Cast(MatMulInteger(q, w)) · Δw · Δ + b

Static scales: QuantizeLinear and DequantizeLinear around a MatMul, which runtimes make one INT8 kernel of.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sqcompile.errors import ArtifactError, first_line
from sqcompile.files.directory import flush
from sqcompile.files.regular import replace_file
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.reference import ABSMAX_FLOOR, QMAX

OPSET = 21
_MOST_BYTES = 1_900_000_000  # of a file of protobuf, which ends at 2 GB


def onnx_model(program: torch.export.ExportedProgram, outputs: list[str]) -> Any:
    """The ONNX model of a program, an `onnx_ir.Model`.

    Args:
        program: of `program_of`, with linears as `standard` leaves them for ONNX.
        outputs: their names.

    Raises:
        ArtifactError: if onnx and onnxscript are not installed, or an operator has no translation.
    """
    try:
        from onnxscript.optimizer import fold_constants, remove_unused_nodes

        table = _translations()
    except ImportError as e:
        raise ArtifactError(f"ONNX needs {e.name}: pip install 'sqcompile[onnx]'") from e
    try:
        with torch.no_grad(), _quiet():
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                output_names=outputs,
                custom_translation_table=table,
                optimize=False,  # whose rewriting rules, which are for ever, keep the last model
                verbose=False,
            )
            fold_constants(made.model)
            remove_unused_nodes(made.model)
            return made.model
    except Exception as e:
        why: BaseException = e
        while why.__cause__ is not None:  # the exporter's own message is about the exporter
            why = why.__cause__
        raise ArtifactError(
            f"PyTorch's ONNX exporter refuses the quantized graph ({type(why).__name__}: {first_line(why)}): export it as 'pt2'"
        ) from e


def write_onnx(model: Any, path: str, most: int = _MOST_BYTES) -> int:
    """Writes an ONNX model, and gives how many bytes it has.

    A file has 2 GB at most. A larger model has its weights in a second one beside it, ``NAME.<hex>.data``, which is there
    before the first one refers to it; one that an earlier model had is removed.

    Args:
        model: of `onnx_model`.
        path: of the file.
        most: how many bytes of tensors may be in the first file.

    Raises:
        OSError: if it cannot be written; what is there is left as it is.
    """
    import onnx_ir

    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    tensors = (v.const_value for v in model.graph.initializers.values())
    size = sum(t.nbytes for t in tensors if t is not None)
    if size <= most:
        data = onnx_ir.to_proto(model).SerializeToString()
        replace_file(path, data)
        _remove_data(folder, name, None)
        return len(data)
    beside = f"{name}.{secrets.token_hex(8)}.data"
    with tempfile.TemporaryDirectory(prefix=".sqcompile-", suffix=".tmp", dir=folder) as temporary:
        onnx_ir.save(model, os.path.join(temporary, "model"), external_data=beside)
        flush(os.path.join(temporary, beside))
        os.replace(os.path.join(temporary, beside), os.path.join(folder, beside))
        try:
            with open(os.path.join(temporary, "model"), "rb") as f:
                data = f.read()
            replace_file(path, data)
        except BaseException:
            os.unlink(os.path.join(folder, beside))
            raise
    _remove_data(folder, name, beside)
    return len(data) + os.path.getsize(os.path.join(folder, beside))


def _remove_data(folder: str, name: str, kept: str | None) -> None:
    for other in os.listdir(folder):
        if other != kept and re.fullmatch(re.escape(name) + r"\.[0-9a-f]{16}\.data", other):
            os.unlink(os.path.join(folder, other))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself: that torchvision is not installed, say."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    from onnx import TensorProto
    from onnxscript import opset21

    from sqcompile.pytorch.decomposed import quantized_decomposed

    op: Any = opset21

    def int8_linear(q: Any, scale: Any, w: Any, w_scale: Any, bias: Any, dtype: int) -> Any:
        acc = op.MatMulInteger(q, op.Transpose(w, perm=[1, 0]))
        y = op.Mul(op.Mul(op.Cast(acc, to=TensorProto.FLOAT), w_scale), scale)
        if bias is not None:
            y = op.Add(y, op.Cast(bias, to=TensorProto.FLOAT))
        return op.Cast(y, to=dtype)

    def quantize(x: Any, scale: float, zero_point: int, low: int, high: int, dtype: int) -> Any:
        x = op.Max(x, op.Constant(value_float=scale * low))  # the operator itself ends at -128, and at 127
        zero = op.Cast(op.Constant(value_int=zero_point), to=TensorProto.INT8)
        return op.QuantizeLinear(x, op.Constant(value_float=scale), zero)

    def dequantize(
        q: Any, scale: float, zero_point: int, low: int, high: int, dtype: int, out_dtype: Any = None
    ) -> Any:
        return op.DequantizeLinear(q, op.Constant(value_float=scale))

    def dequantize_channels(
        q: Any, scales: Any, zeros: Any, axis: int, low: int, high: int, dtype: int, out_dtype: Any = None
    ) -> Any:
        return op.DequantizeLinear(q, scales, axis=axis)

    def tensor_scale(x: Any, q_max: float = QMAX) -> Any:
        largest = op.Max(op.Cast(op.ReduceMax(op.Abs(x), keepdims=0), to=TensorProto.FLOAT), ABSMAX_FLOOR)
        return op.Mul(largest, op.Constant(value_float=1 / q_max))

    return {
        sqcompile_ops.tensor_scale.default: tensor_scale,
        sqcompile_ops.int8_linear.default: int8_linear,
        quantized_decomposed.quantize_per_tensor.default: quantize,
        quantized_decomposed.dequantize_per_tensor.default: dequantize,
        quantized_decomposed.dequantize_per_channel.default: dequantize_channels,
    }
