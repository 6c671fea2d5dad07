"""Programs that other runtimes run: PyTorch without sqcompile, ONNX Runtime, OpenVINO. All beside the quantized stage."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from artifact_cases import RECIPE, batch, compiled
from checkpoint_cases import planned, quantized_stage
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sqcompile
from sqcompile import PRESETS, Recipe
from sqcompile.lm import calibration_texts, evaluation_texts, load_lm, token_windows

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DYNAMIC, STATIC = Recipe(0.5), Recipe(0.5, activation="per_tensor_static")
PER_TENSOR = Recipe(0.5, "per_tensor", "per_tensor")
ENOUGH = 35.0  # dB

# By family, recipe and the kind of program. A static scale of a few tokens leaves values halfway between two steps.
CASES = [
    (family, recipe, format)
    for family, recipe in [
        ("llama", DYNAMIC),
        ("opt", STATIC),
        ("bert", STATIC),
        ("vit", DYNAMIC),
        ("gpt2", PER_TENSOR),
        ("opt", Recipe(0.5, attention="qk")),
        ("llama", PRESETS["O1"]),
        ("opt", PRESETS["O3"]),
    ]
    for format in ("pt2", "onnx")
]

RUN = """
import sys, torch
import torch.ao.quantization.fx  # which has quantized_decomposed
program = torch.export.load(sys.argv[1]).module()
calls = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save([dict(program(**call)) for call in calls], sys.argv[3])
assert "sqcompile" not in sys.modules
"""


def db(got: Any, want: Any) -> float:
    noise = signal = 0.0
    for y, x in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        y, x = torch.as_tensor(y).double(), x.double()
        assert y.shape == x.shape
        noise, signal = noise + float((y - x).square().sum()), signal + float(x.square().sum())
    return 10 * math.log10(signal / max(noise, 1e-30))


def by_torch(path: Path, calls: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """In a process that has no sqcompile."""
    inputs, outputs = path.with_suffix(".in"), path.with_suffix(".out")
    torch.save(calls, inputs)
    subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(inputs), str(outputs)], check=True, timeout=300, cwd=path.parent
    )
    return torch.load(outputs)


def by_onnx(path: Path, calls: list[dict[str, Tensor]]) -> list[list[numpy.ndarray]]:
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [session.run(None, {k: v.numpy() for k, v in call.items()}) for call in calls]


def by_openvino(path: Path, calls: list[dict[str, Tensor]], kinds: Counter[tuple[str, str]] | None = None) -> list[Any]:
    openvino = pytest.importorskip("openvino")
    model = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    if kinds is not None:
        for operation in model.get_runtime_model().get_ops():
            info = operation.get_rt_info()
            kinds[info["layerType"].astype(str), info["runtimePrecision"].astype(str)] += 1
    return [[*model({k: v.numpy() for k, v in call.items()}).values()] for call in calls]


def calls_of(call: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A call, one of a single row, a shorter one where that may be, and one of more than 128 tokens."""
    one = {k: v[:1] for k, v in call.items()}
    calls = [call, one, {k: v[:, :4] if v.dim() == 2 else v for k, v in call.items()}]
    return [*calls, {"input_ids": call["input_ids"].repeat(1, 13)}] if call.keys() == {"input_ids"} else calls


@pytest.mark.slow
@pytest.mark.parametrize(("family", "recipe", "format"), CASES, ids=lambda x: x if isinstance(x, str) else x.activation)
def test_others_run_it(family, recipe, format, tmp_path):
    model, call, plan = planned(family, recipe)
    path = tmp_path / f"model.{format}"
    done = sqcompile.export(model, plan, format, path)
    assert (done.format, done.path, done.bytes) == (format, str(path), path.stat().st_size)
    stage, calls = quantized_stage(model, plan), calls_of(call)
    with torch.no_grad():
        wanted = [stage(**c) for c in calls]
    runs = [by_torch(path, calls)] if format == "pt2" else [by_onnx(path, calls), by_openvino(path, calls)]
    for found in runs:
        assert all(db(got, want) >= ENOUGH for got, want in zip(found, wanted, strict=True))
    assert f"gives {', '.join(dict(wanted[0]))}" in str(done) and all(f"{name} torch." in str(done) for name in call)


@pytest.mark.slow
def test_onnx_has_standard_operators_alone(tmp_path):
    for recipe, operator in ((DYNAMIC, "MatMulInteger"), (STATIC, "QuantizeLinear")):
        model, _, plan = planned("opt", recipe)
        sqcompile.export(model, plan, "onnx", tmp_path / "model.onnx")
        found = onnx.load(tmp_path / "model.onnx")
        onnx.checker.check_model(found)
        assert [(o.domain, o.version) for o in found.opset_import] == [("", 21)]
        assert not found.functions and {n.domain for n in found.graph.node} == {""}
        kinds = Counter(n.op_type for n in found.graph.node)
        quantized = [l for l in plan.layers if l.quantized]
        if recipe is DYNAMIC:
            assert kinds[operator] == len(quantized) and "QuantizeLinear" not in kinds
        else:
            inputs = {l.input_scale for l in quantized}
            assert kinds[operator] == len(inputs) and "MatMulInteger" not in kinds
        stored = {i.name: i for i in found.graph.initializer}
        held = Counter(i.data_type for i in stored.values() if len(i.dims) == 2 and math.prod(i.dims) >= 64 * 64)
        assert (
            held[onnx.TensorProto.INT8] == len(quantized) and held[onnx.TensorProto.FLOAT] <= 3
        )  # embeddings and the head


def test_a_program_holds_no_float_weight_of_what_is_quantized(tmp_path):
    model, _, plan = planned("opt", DYNAMIC)
    sqcompile.export(model, plan, "pt2", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    targets = {n.target for n in program.graph.nodes if n.op == "call_function" and hasattr(n.target, "namespace")}
    assert {t.namespace for t in targets} == {"aten", "quantized_decomposed"}
    quantized = [l for l in plan.layers if l.quantized]
    held = list(program.state_dict.values())
    assert sorted(tuple(t.shape) for t in held if t.dtype == torch.int8) == sorted(l.shape for l in quantized)
    shapes = {l.shape for l in quantized} - {l.shape for l in plan.layers if not l.quantized}
    assert not [t for t in held if t.is_floating_point() and tuple(t.shape) in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(activation="per_tensor_static")], ids=["default", "static"])
def test_the_trained_language_model(recipe, tmp_path):
    model, tokenizer = load_lm()
    data = token_windows(calibration_texts(), tokenizer, 128)[:32].split(8)
    net = sqcompile.compile(model, data, recipe=recipe, backend="eager", progress=False)
    calls = [{"input_ids": w} for w in token_windows(evaluation_texts(), tokenizer, 128)[:4].split(2)]
    with torch.no_grad():
        wanted = [net.stages["quantized"](**c) for c in calls]
        floating = [model(**c).logits for c in calls]
    costs = [db(a, b.logits) for a, b in zip(floating, wanted, strict=True)]
    for format in ("pt2", "onnx"):
        net.export(format, tmp_path / f"lm.{format}")
    kinds: Counter[tuple[str, str]] = Counter()
    for found in (
        by_torch(tmp_path / "lm.pt2", calls),
        by_onnx(tmp_path / "lm.onnx", calls),
        by_openvino(tmp_path / "lm.onnx", calls, kinds),
    ):
        # a value at the edge of two steps that falls to the other side costs its token as much as INT8, layer by layer
        assert all(db(got, want) >= min(ENOUGH, cost + 3) for got, want, cost in zip(found, wanted, costs, strict=True))
        # and what falls to either side is as near to the float model
        near = [db(got, want) for got, want in zip(found, floating, strict=True)]
        assert near == pytest.approx(costs, abs=0.5)
    if recipe.activation == "per_tensor_static":  # OpenVINO multiplies integers
        static = sum(l.input_scale is not None for l in net.plan.layers)
        assert kinds["FullyConnected", "i8"] >= static > 0


@pytest.mark.parametrize("recipe", [RECIPE, STATIC], ids=lambda r: r.activation)
def test_a_loaded_model_is_exported_without_float_weights(recipe, tmp_path):
    compiled(recipe).save(tmp_path / "saved")
    loaded = sqcompile.load(tmp_path / "saved", backend="eager")
    for format in ("pt2", "onnx"):
        loaded.export(format, tmp_path / f"model.{format}")
    want = compiled(recipe)(batch())
    logits, last = want["logits"], want["last"][0]
    call = {"ids": batch()}
    found = by_torch(tmp_path / "model.pt2", [call])[0]
    assert list(found) == ["logits", "last_0", "last_1"]
    for got in (
        [*found.values()],
        by_onnx(tmp_path / "model.onnx", [call])[0],
        by_openvino(tmp_path / "model.onnx", [call])[0],
    ):
        assert db(got[:2], [logits, last]) >= ENOUGH and int(got[2]) == batch().shape[1]


class Limited(nn.Module):
    """Takes a pair of tensors, another path for long ones, and gives a nested result."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, pair, scale=2.0):
        x, y = pair
        y = y * scale if x.shape[1] <= 40 else y
        return {"a": [self.down(torch.relu(self.up(self.norm(x)))) + y], "b": x.shape[0]}


def test_names_constants_and_what_the_capture_took_for_granted(tmp_path):
    torch.manual_seed(0)
    model = Limited().eval()
    pair = [torch.randn(1, 20, 32), torch.randn(1, 20, 32)]
    net = sqcompile.compile(model, [{"pair": pair}], recipe=DYNAMIC, backend="eager", progress=False)
    done = net.export("pt2", tmp_path / "model.pt2")
    assert "takes pair_0 torch.float32 [any, any, 32] on cpu, pair_1 torch" in str(done) and "gives a_0" in str(done)
    asked = net.export("onnx", tmp_path / "model.onnx").notes[-1]
    assert asked == "not asked at run time, as ONNX asks nothing of sizes: pair[0].shape[1] <= 40"
    program = torch.export.load(tmp_path / "model.pt2").module()
    for rows, tokens in ((1, 20), (3, 40), (2, 1)):
        x, y = torch.randn(2, rows, tokens, 32)
        assert db(program(pair_0=x, pair_1=y)["a_0"], net(pair=[x, y])["a"][0]) >= ENOUGH
    with pytest.raises(Exception, match=r"40"):
        program(pair_0=torch.randn(1, 41, 32), pair_1=torch.randn(1, 41, 32))


@pytest.mark.parametrize("attention", ["none", "qk_pv"])
def test_sizes_that_agree_take_any_value(attention, tmp_path):
    """The batch of two inputs is one size from the start, not two that turn out to be equal: then 1 would be refused."""
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True).eval()
    calls = [(torch.randn(2, 7, 32), torch.randn(2, 5, 32))]
    net = sqcompile.compile(model, calls, recipe=Recipe(0.5, attention=attention), backend="eager", progress=False)
    net.export("pt2", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (1, 2, 3):
        x, y = torch.randn(rows, 3, 32), torch.randn(rows, 9, 32)
        assert db(program(src=x, tgt=y)["output"], net(x, y)) >= ENOUGH
    with pytest.raises(Exception, match=r"shape\[0\]|size\(\)\[0\]"):
        program(src=torch.randn(2, 3, 32), tgt=torch.randn(3, 9, 32))


def test_bfloat16(tmp_path):
    torch.manual_seed(0)
    model = Limited().eval().bfloat16()
    pair = list(torch.randn(2, 2, 20, 32).bfloat16())
    net = sqcompile.compile(model, [{"pair": pair}], recipe=Recipe(0.5, rotate=32), backend="eager", progress=False)
    net.export("pt2", tmp_path / "model.pt2")
    found = by_torch(tmp_path / "model.pt2", [{"pair_0": pair[0], "pair_1": pair[1]}])[0]["a_0"]
    assert found.dtype == torch.bfloat16 and db(found, net(pair=pair)["a"][0]) >= ENOUGH
