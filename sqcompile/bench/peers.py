"""What runs a model on a CPU: PyTorch, sqcompile, OpenVINO, ONNX Runtime and llama.cpp, each as its own documentation has it.

A contender takes a function that makes the model, in a dtype, and calibration batches, int64 [batch, tokens]. It gives a
function from shape (batch, tokens) to what runs token ids of that shape, int64, and gives the hidden states of the model.
A tool is imported when it is asked for; what it refuses, it raises.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sqcompile
from sqcompile.bench.llama_cpp import llama_cpp

Make = Callable[[torch.dtype], nn.Module]
Run = Callable[[Tensor], Tensor]
ForShape = Callable[[tuple[int, int]], Run]
Contender = Callable[[Make, Sequence[Tensor]], ForShape]


class Hidden(nn.Module):
    """A transformers model as token ids [batch, tokens] -> hidden states [batch, tokens, C], for those who export it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids).last_hidden_state
        return hidden


def _torch(dtype: torch.dtype) -> Contender:
    """`torch.compile`, of each shape by itself."""

    def contender(make: Make, calibration: Sequence[Tensor]) -> ForShape:
        model = make(dtype)

        def for_shape(shape: tuple[int, int]) -> Run:
            torch.compiler.reset()
            compiled = torch.compile(model, dynamic=False)
            return lambda ids: compiled(input_ids=ids).last_hidden_state

        return for_shape

    return contender


def _sqcompile(**choices: Any) -> Contender:
    """One compiled model for all shapes."""

    def contender(make: Make, calibration: Sequence[Tensor]) -> ForShape:
        batches = [{"input_ids": ids} for ids in calibration]
        recipe = sqcompile.Recipe(**choices) if choices else "default"
        compiled = sqcompile.compile(make(torch.bfloat16), batches, recipe=recipe, progress=False)
        return lambda shape: lambda ids: compiled(input_ids=ids).last_hidden_state

    return contender


def _openvino(static: bool) -> Contender:
    """NNCF's weights in INT8, whose activations OpenVINO quantizes when it runs; or NNCF's static INT8 with SmoothQuant.

    Models that its converter refuses are read from ONNX, in which each shape is a program of its own.
    """

    def contender(make: Make, calibration: Sequence[Tensor]) -> ForShape:
        import nncf
        import openvino

        def quantized(exported: Any, batches: Sequence[Tensor]) -> Any:
            if not static:
                return nncf.compress_weights(exported)
            dataset = nncf.Dataset([ids.numpy() for ids in batches])
            return nncf.quantize(exported, dataset, model_type=nncf.ModelType.TRANSFORMER)

        def request(program: Any) -> Run:
            settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            made = openvino.Core().compile_model(program, "CPU", settings).create_infer_request()
            return lambda ids: torch.from_numpy(made.infer([ids.numpy()])[0].copy())

        model = Hidden(make(torch.float32))
        try:
            exported = openvino.convert_model(
                model, example_input=calibration[0], input=[("input_ids", [-1, -1], openvino.Type.i64)]
            )
        except Exception:  # of its frontend, which has many

            def by_onnx(shape: tuple[int, int]) -> Run:
                every = torch.cat([ids.flatten() for ids in calibration])
                every = every.repeat(-(-math.prod(shape) // every.numel()))  # one window, at least
                windows = [*every[: every.numel() // math.prod(shape) * math.prod(shape)].view(-1, *shape)]
                with tempfile.TemporaryDirectory() as folder:
                    path = str(Path(folder) / "plain.onnx")
                    _to_onnx(model, windows[0], path, None)
                    return request(quantized(openvino.Core().read_model(path), windows[:64]))

            return by_onnx
        program = quantized(exported, calibration)

        def for_shape(shape: tuple[int, int]) -> Run:
            fixed = program.clone()
            fixed.reshape([*shape])
            return request(fixed)

        return for_shape

    return contender


def _to_onnx(model: nn.Module, ids: Tensor, path: str, sizes: dict[int, Any] | None) -> None:
    shapes = None if sizes is None else {"input_ids": sizes}
    torch.onnx.export(
        model, (ids,), path, dynamo=True, input_names=["input_ids"], dynamic_shapes=shapes, verbose=False
    )  # fmt: skip


def _onnxruntime(make: Make, calibration: Sequence[Tensor]) -> ForShape:
    """ONNX Runtime's `quantize_dynamic`, one scale per output channel of the weights."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = (str(Path(folder) / name) for name in ("plain.onnx", "int8.onnx"))
        sizes = {0: torch.export.Dim("batch", max=4096), 1: torch.export.Dim("tokens", max=4096)}
        _to_onnx(Hidden(make(torch.float32)), calibration[0], plain, sizes)
        quantize_dynamic(plain, quantized, per_channel=True, weight_type=QuantType.QInt8)
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    return lambda shape: lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


BASE = "torch bf16"  # what the others are compared with
CONTENDERS: dict[str, Contender] = {
    BASE: _torch(torch.bfloat16),
    "torch fp32": _torch(torch.float32),
    "sqcompile default": _sqcompile(),
    "sqcompile static": _sqcompile(activation="per_tensor_static", alpha=0.8),
    "OpenVINO dynamic INT8": _openvino(static=False),
    "OpenVINO static INT8": _openvino(static=True),
    "ONNX Runtime dynamic INT8": _onnxruntime,
    "llama.cpp Q8_0": llama_cpp,
}
