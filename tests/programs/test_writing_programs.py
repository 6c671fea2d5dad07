"""Programs are written whole or not at all, and what no standard operator says is refused in words."""

from __future__ import annotations

import functools
import gc
import os
import weakref

import pytest
import torch
from checkpoint_cases import planned, quantized_stage
from expecttest import assert_expected_inline
from golden_cases import ONE_STEP, graph
from golden_cases import planned as plan_for
from torch import nn

import sqcompile
from sqcompile import ArtifactError, Plan, Recipe
from sqcompile.kernels.attention_parts import int8_attend, int8_attend_whole
from sqcompile.passes.ir.graph import get_tensor
from sqcompile.passes.ir.text import show
from sqcompile.passes.rewrite.insert_qdq import insert_qdq
from sqcompile.plan.plan import LayerPlan
from sqcompile.programs import export as programs
from sqcompile.programs import onnx as onnx_programs
from sqcompile.programs.export import check_target
from sqcompile.programs.standard import standard
from sqcompile.programs.traced import program_of

LINEAR = """
    %x: f32[2, 3, 32] = input
    %q = aten.linear(%x, %w, %b)
    return %q
"""
TENSORS = {"w": [6, 32], "b": [6]}


@functools.cache
def tiny() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    return model, sqcompile.calibrate(model, [torch.randn(4, 32)], recipe=Recipe(0.5), progress=False)


def text(integers: bool, layer: LayerPlan | None = None, recipe: Recipe | None = None) -> str:
    gm = graph(LINEAR, TENSORS)
    plan = plan_for(gm) if layer is None else plan_for(gm, layers=(layer,), recipe=recipe)
    return show(standard(insert_qdq(gm, plan), integers))


def test_the_text_of_each_way():
    static = LayerPlan("w", "linear", True, "none", "", input_scale=4 * ONE_STEP)
    how = Recipe(activation="per_tensor_static")
    found = [text(False), text(True), text(False, static, how), text(True, static, how)]
    assert_expected_inline(
        "\n".join(found),
        """\
%x: f32[2, 3, 32] = input
%token_scale_default: f32[2, 3, 1] = token_scale(%x)
%zeros_like_default: f32[2, 3, 1] = aten.zeros_like(%token_scale_default)
%quantize_per_token_default: i8[2, 3, 32] = quantized_decomposed.quantize_per_token(%x, %token_scale_default, %zeros_like_default, -127, 127, int8)
%dequantize_per_token_default: f32[2, 3, 32] = quantized_decomposed.dequantize_per_token(%quantize_per_token_default, %token_scale_default, %zeros_like_default, -127, 127, int8, float32)
%dequantize_per_channel_default: f32[6, 32] = quantized_decomposed.dequantize_per_channel(%w_int8, %w_scale, %w_int8_zero_point, 0, -127, 127, int8)
%linear_default_1: f32[2, 3, 6] = aten.linear(%dequantize_per_token_default, %dequantize_per_channel_default, %b)
return %linear_default_1
%x: f32[2, 3, 32] = input
%token_scale_default: f32[2, 3, 1] = token_scale(%x)
%quantize_default: i8[2, 3, 32] = quantize(%x, %token_scale_default)
%int8_linear_default: f32[2, 3, 6] = sqcompile.int8_linear(%quantize_default, %token_scale_default, %w_int8, %w_scale, %b, float32)
return %int8_linear_default
%x: f32[2, 3, 32] = input
%quantize_per_tensor_default: i8[2, 3, 32] = quantized_decomposed.quantize_per_tensor(%x, 0.0314961, 0, -127, 127, int8)
%dequantize_per_tensor_default: f32[2, 3, 32] = quantized_decomposed.dequantize_per_tensor(%quantize_per_tensor_default, 0.0314961, 0, -127, 127, int8)
%dequantize_per_channel_default: f32[6, 32] = quantized_decomposed.dequantize_per_channel(%w_int8, %w_scale, %w_int8_zero_point, 0, -127, 127, int8)
%linear_default_1: f32[2, 3, 6] = aten.linear(%dequantize_per_tensor_default, %dequantize_per_channel_default, %b)
return %linear_default_1
%x: f32[2, 3, 32] = input
%quantize_per_tensor_default: i8[2, 3, 32] = quantized_decomposed.quantize_per_tensor(%x, 0.0314961, 0, -127, 127, int8)
%dequantize_per_tensor_default: f32[2, 3, 32] = quantized_decomposed.dequantize_per_tensor(%quantize_per_tensor_default, 0.0314961, 0, -127, 127, int8)
%dequantize_per_channel_default: f32[32, 6] = quantized_decomposed.dequantize_per_channel(%w_int8_transposed, %w_scale, %w_int8_zero_point, 1, -127, 127, int8)
%matmul_default: f32[2, 3, 6] = aten.matmul(%dequantize_per_tensor_default, %dequantize_per_channel_default)
%add_tensor: f32[2, 3, 6] = aten.add(%matmul_default, %b)
return %add_tensor""",
    )


@pytest.mark.slow
def test_an_operator_of_one_format_alone_is_refused(tmp_path):
    model, _, plan = planned("mixtral")
    fp8, _, in_fp8 = planned("opt", Recipe(0.5, dtype="fp8"))
    for net, p, match in (
        (model, plan, "routed experts have no operator in this format"),
        (fp8, in_fp8, "weights of torch.float8_e4m3fn have no operator .*: take a recipe of INT8"),
    ):
        for format in programs.PROGRAMS:
            with pytest.raises(ArtifactError, match=match):
                sqcompile.export(net, p, format, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_paths_and_formats(tmp_path):
    model, plan = tiny()
    (tmp_path / "folder").mkdir()
    for path, match in (
        (tmp_path / "none" / "m.pt2", "there is no directory .*/none: make it first"),
        (tmp_path / "folder", "is not a regular file, and none else is replaced: pass another path"),
        (7, "the path is 7: pass a string or a pathlib.Path of a file"),
    ):
        with pytest.raises(ArtifactError, match=match):
            sqcompile.export(model, plan, "pt2", path)
    (tmp_path / "folder" / "model.safetensors").write_text("weights")
    (tmp_path / "folder" / "model.pt2").write_text("an earlier one")
    for wrong in ("model.safetensors", ".."):
        with pytest.raises(ArtifactError, match=r"is read, and would be replaced with .*: write to another path"):
            check_target("pt2", tmp_path / "folder" / wrong, read=[tmp_path / "folder", None])
    for right in ("model.pt2", "other"):
        check_target("pt2", tmp_path / "folder" / right, read=[str(tmp_path / "folder")])
    with pytest.raises(ArtifactError, match="'gguf': choose one of sqcompile, compressed-tensors, smoothed, onnx, pt2"):
        sqcompile.export(model, plan, "gguf", tmp_path / "m")
    with pytest.raises(
        ArtifactError, match="source has the tokenizer of a checkpoint, and 'onnx' has none: leave it out"
    ):
        sqcompile.export(model, plan, "onnx", tmp_path / "m", source=tmp_path)
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("format", programs.PROGRAMS)
def test_a_full_disk_leaves_the_old_file(format, tmp_path, monkeypatch):
    model, plan = tiny()
    path = tmp_path / f"model.{format}"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "save", full)
        patch.setattr(onnx_programs, "replace_file", full)
        with pytest.raises(ArtifactError, match=r"cannot be written to .* on a disk with room"):
            sqcompile.export(model, plan, format, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]
    sqcompile.export(model, plan, format, path)
    assert path.stat().st_size > 1000 and os.listdir(tmp_path) == [path.name]


def test_weights_beside_a_large_onnx_model(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, plan = tiny()
    traced = program_of(standard(quantized_stage(model, plan), integers=True))
    made = onnx_programs.onnx_model(traced.program, list(traced.outputs))
    path = str(tmp_path / "model.onnx")
    for _ in range(2):  # the second takes the place of the first
        size = onnx_programs.write_onnx(made, path, most=1000)
        beside = [n for n in os.listdir(tmp_path) if n != "model.onnx"]
        assert len(beside) == 1 and beside[0].endswith(".data")
        assert size == sum((tmp_path / n).stat().st_size for n in os.listdir(tmp_path))
    feeds = {"input": torch.randn(3, 32).numpy()}
    apart = runtime.InferenceSession(path).run(None, feeds)
    onnx_programs.write_onnx(made, path)
    assert os.listdir(tmp_path) == ["model.onnx"]
    whole = runtime.InferenceSession(path).run(None, feeds)
    assert (apart[0] == whole[0]).all()


def test_without_onnx(tmp_path, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setattr(onnx_programs, "_translations", missing)
    model, plan = tiny()
    with pytest.raises(ArtifactError, match=r"ONNX needs onnxscript: pip install 'sqcompile\[onnx\]'"):
        sqcompile.export(model, plan, "onnx", tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_the_model_is_left_alone(tmp_path):
    model, plan = tiny()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    sqcompile.export(model, plan, "pt2", tmp_path / "m")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and not model.training


@pytest.mark.parametrize("format", programs.PROGRAMS)
def test_nothing_of_an_exported_model_stays(format, tmp_path):
    model, plan = tiny()
    stage = quantized_stage(model, plan)
    kept = weakref.ref(get_tensor(stage, "1.weight_int8"))
    programs.write_program(stage, plan, format, tmp_path / "m")
    del stage
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(("heads", "groups", "keys"), [(4, 2, 5), (4, 4, 128), (2, 1, 300)])
def test_attention_of_all_blocks_at_once(heads, groups, keys):
    generator = torch.Generator().manual_seed(keys)
    scores = torch.randn(2, heads, 3, keys, generator=generator) * 3
    scores[0, 0, 1] = -torch.inf  # a row that sees no key
    scores[..., : keys // 2][1] = -torch.inf
    v = torch.randint(-127, 128, (2, groups, keys, 16), generator=generator, dtype=torch.int8)
    scale = torch.rand(2, groups, 1, 16, generator=generator)
    want = int8_attend(scores, v, scale, torch.float32)
    torch.testing.assert_close(int8_attend_whole(scores, v, scale, torch.float32), want, rtol=1e-5, atol=1e-4)
