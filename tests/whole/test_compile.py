"""The pipeline end to end: same function, every shape, nothing of the user's touched."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from conftest import ALL_INT8, relative_error, tiny_lm, token_batches, typical_error
from expecttest import assert_expected_inline
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import sqcompile
from sqcompile import PRESETS, Recipe
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.ir.text import show


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x, scale=None):
        y = self.down(F.relu(self.up(self.norm(x))))
        return x + (y if scale is None else y * scale)


def compiled_mlp(batches=None, **kwargs):
    torch.manual_seed(0)
    model = MLP().eval()
    return model, sqcompile.compile(
        model, batches or [torch.randn(2, 8, 64)], **{"backend": "eager", "progress": False, **kwargs}
    )


@pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", [ALL_INT8, "O1", "O2", "O3"], ids=["default", "O1", "O2", "O3"])
def test_stages_agree_on_tiny_lms(family, recipe):
    model = tiny_lm(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = sqcompile.compile(model, token_batches(), recipe=recipe, backend="eager", progress=False)
    x = {"input_ids": torch.randint(3, 96, (3, 40))}
    with torch.no_grad():
        want = model(**x, use_cache=False)
        out = {name: stage(**x).logits for name, stage in compiled.stages.items()}
    assert relative_error(out["folded"], want.logits) <= 1e-5
    # single values at the edge of two INT8 steps may fall to either side; most rows are exact
    assert typical_error(out["lowered"], out["quantized"]) <= 1e-5
    assert relative_error(out["lowered"], out["quantized"]) <= 0.2 * relative_error(out["quantized"], want.logits)
    got = compiled(**x)
    assert type(got) is type(want) and torch.equal(got.logits, out["lowered"])
    assert relative_error(got.logits, want.logits) < 0.15
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    inner = [l for l in compiled.report.layers if "layers" in l.name]
    assert len(inner) == {"llama": 14, "opt": 12}[family] and all(l.quantized for l in inner)
    assert [l.name for l in compiled.report.layers if not l.quantized] == ["lm_head.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = tiny_lm("llama", dtype)
    compiled = sqcompile.compile(model, token_batches(), backend="eager", progress=False)
    x = torch.randint(3, 96, (2, 24))
    with torch.no_grad():
        want = tiny_lm("llama").to(dtype).float()(x, use_cache=False).logits
        half = model(x, use_cache=False).logits
    got = compiled(x).logits
    assert got.dtype == dtype
    error, folded = relative_error(got, want), compiled.stages["folded"](input_ids=x).logits
    assert relative_error(folded, half) < {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert error < 0.08


def test_inductor_serves_every_shape_without_recompiling():
    model = tiny_lm("llama")
    compiled = sqcompile.compile(model, token_batches(), progress=False)
    torch._dynamo.utils.counters.clear()
    for shape in ((2, 17), (1, 1), (1, 9), (5, 1), (3, 33), (64, 2)):
        x = torch.randint(3, 96, shape)
        want = compiled.stages["lowered"](input_ids=x).logits
        # rounding differs between compiled and eager elementwise code, and moves single int8 values by one
        assert relative_error(compiled(input_ids=x).logits, want) < (1e-3 if x.numel() > 30 else 2e-2)
    assert not torch._dynamo.utils.counters["stats"]  # Dynamo never ran, so nothing can be recompiled


def test_inductor_and_positional_calls_and_shapes_for_a_plain_module():
    model, compiled = compiled_mlp(backend="inductor")
    for shape in ((2, 8, 64), (1, 1, 64), (7, 3, 64)):
        x = torch.randn(shape)
        assert relative_error(compiled(x), compiled.stages["quantized"](x)) < 1e-3
        assert torch.equal(compiled(x), compiled(x=x))
        assert relative_error(compiled(x), model(x)) < 0.02


def test_plan_replaces_the_data(tmp_path):
    model = tiny_lm("opt")
    plan = sqcompile.calibrate(model, token_batches(), recipe="O3", progress=False)
    plan.save(tmp_path / "plan.safetensors")
    loaded = sqcompile.Plan.load(tmp_path / "plan.safetensors")
    assert loaded.recipe == PRESETS["O3"] and loaded.layers == plan.layers
    x = torch.randint(3, 96, (2, 12))
    outs = [sqcompile.compile(model, plan=p, backend="eager")(x).logits for p in (plan, loaded)] + [
        sqcompile.compile(model, token_batches(), recipe="O3", backend="eager", progress=False)(x).logits
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_a_plan_fits_the_same_model_with_other_captures():
    model = tiny_lm("opt")
    plan = sqcompile.calibrate(model, token_batches(), progress=False)
    x = torch.randint(3, 96, (2, 12))
    masked = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    compiled = sqcompile.compile(model, plan=plan, example_inputs=masked, backend="eager")
    with torch.no_grad():
        assert relative_error(compiled(**masked).logits, model(**masked).logits) < 0.1


def test_stages_read_as_text():
    _model, compiled = compiled_mlp(recipe=Recipe(alpha=0.5))
    assert_expected_inline(
        show(compiled.stages["folded"]),
        """\
%x: f32[s0, s1, 64] = input
%div_tensor: f32[64] = aten.div(%norm.weight, %smooth_0)
%div_tensor_1: f32[64] = aten.div(%norm.bias, %smooth_0_bias)
%layer_norm: f32[s0, s1, 64] = aten.layer_norm(%x, [64], %div_tensor, %div_tensor_1, 1e-05, False)
%mul_tensor: f32[96, 64] = aten.mul(%up.weight, %smooth_0_columns)
%div_tensor_2: f32[96, 64] = aten.div(%mul_tensor, %smooth_1_rows)
%div_tensor_3: f32[96] = aten.div(%up.bias, %smooth_1_bias)
%linear: f32[s0, s1, 96] = aten.linear(%layer_norm, %div_tensor_2, %div_tensor_3)
%relu: f32[s0, s1, 96] = aten.relu(%linear)
%mul_tensor_1: f32[64, 96] = aten.mul(%down.weight, %smooth_1_columns)
%linear_1: f32[s0, s1, 64] = aten.linear(%relu, %mul_tensor_1, %down.bias)
%add: f32[s0, s1, 64] = aten.add(%x, %linear_1)
return [%add]""",
    )
    targets = [
        str(n.target).split(".")[1] for n in compiled.stages["quantized"].graph.nodes if "sqcompile" in str(n.target)
    ]
    assert targets == ["token_scale", "quantize", "dequantize"] * 2
    assert not find_linears(compiled.stages["lowered"])


def test_one_quantization_for_linears_that_share_an_input():
    compiled = sqcompile.compile(tiny_lm("llama"), token_batches(), recipe=Recipe(), backend="eager", progress=False)
    targets = [str(n.target) for n in compiled.lowered.graph.nodes]
    # per layer: q/k/v, o, gate/up, down; on x86 in one operator with what is before
    assert sum(t.startswith("sqcompile.") and "quantize" in t for t in targets) == 2 * 4
    assert sum("int8_linear" in t or "matmul_u8s8" in t for t in targets) == 2 * 4  # and one GEMM for each


def test_the_float_model_can_be_freed_and_stages_say_so():
    model, compiled = compiled_mlp()
    x = torch.randn(1, 2, 64)
    assert compiled.stages["traced"](x).shape == compiled.stages["folded"](x).shape  # looking keeps nothing either
    want, alive = compiled(x), weakref.ref(model.up.weight)
    values = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    del model
    gc.collect()
    assert alive() is None and all(v.expired() for v in values) and torch.equal(compiled(x), want)
    with pytest.raises(sqcompile.StageError, match="keep a reference"):
        compiled.stages["folded"]


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_attention_that_was_found_keeps_no_weights(family, calibrated):
    """What is remembered of a graph has nodes in it, which hold the graph, and so its tensors."""
    recipe, model = Recipe(attention="qk"), tiny_lm(family)
    data = None if calibrated else token_batches(2)
    plan = sqcompile.calibrate(model, token_batches(2), recipe=recipe, progress=False) if calibrated else None
    recipe = None if calibrated else recipe
    compiled = sqcompile.compile(model, data, plan=plan, recipe=recipe, backend="eager", progress=False)
    values = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    del model
    gc.collect()
    assert compiled.plan.attention and all(v.expired() for v in values)


def test_a_stage_in_hand_outlives_the_model():
    model, compiled = compiled_mlp()
    stage = compiled.stages["quantized"]
    del model
    gc.collect()
    assert compiled.stages["quantized"] is stage


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model, compiled = compiled_mlp()
        x = torch.randn(1, 2, 64)
        want = model(x)
        assert relative_error(compiled.stages["folded"](x), want) < 1e-5
    again = sqcompile.compile(model, plan=compiled.plan, backend="eager")
    assert torch.equal(again(x), compiled(x)) and relative_error(again(x), want) < 0.02


def test_changing_the_model_later_changes_nothing_compiled():
    model, compiled = compiled_mlp()
    x = torch.randn(1, 2, 64)
    want = compiled(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(compiled(x), want)
    with pytest.raises(sqcompile.StageError, match="changed since"):
        compiled.stages["folded"]
    with pytest.raises(sqcompile.StageError, match="compile"):
        compiled.to(torch.bfloat16)
    with pytest.raises(sqcompile.StageError, match="trained"):
        compiled.train()


def test_a_compiled_model_is_not_saved_in_part():
    _model, compiled = compiled_mlp()
    whole = nn.ModuleDict({"net": compiled})
    for save in (
        compiled.state_dict,
        whole.state_dict,
        lambda: copy.deepcopy(compiled),
        lambda: pickle.dumps(compiled),
    ):
        with pytest.raises(sqcompile.StageError, match=r"compiled\.save\(directory\).*sqcompile\.load"):
            save()
    for module, prefix in ((compiled, ""), (whole, "net.")):
        with pytest.raises(sqcompile.StageError, match=r"sqcompile\.load"):
            module.load_state_dict({f"{prefix}lowered.{k}": v for k, v in compiled.lowered.state_dict().items()})


def test_int8_weights_take_a_quarter_of_fp32():
    model, compiled = compiled_mlp()
    kept = sum(p.numel() * 4 for n, p in model.named_parameters() if p.dim() == 1)
    linear = 64 * 96 * 2
    assert compiled.weight_bytes() <= linear + kept + (64 + 96) * 8 + 64


@pytest.mark.slow
def test_memory_of_compile_stays_below_twice_the_models():
    """Measured in a process of its own: the model counts once, everything compile() adds must be less than it.

    Each tensor lies in pages of its own there, so that the peak is that of tensors and not of malloc's free lists.
    """
    code = """
        import gc, resource, torch, sqcompile
        from torch import nn
        from torch.nn import functional as F
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.up, self.down = nn.LayerNorm(1024), nn.Linear(1024, 4096), nn.Linear(4096, 1024)
            def forward(self, x): return x + self.down(F.relu(self.up(self.norm(x))))
        rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        def run(n, dtype):
            model = nn.Sequential(*[Block().to(dtype) for _ in range(n)]).eval()
            before = rss()
            compiled = sqcompile.compile(model, [torch.randn(1, 16, 1024, dtype=dtype)], backend="eager", progress=False)
            return (rss() - before) / sum(p.numel() * p.element_size() for p in model.parameters())
        run(1, torch.{dtype})  # imports and caches, whatever the size
        gc.collect()  # and not the first model, which cycles keep until then
        print(run(8, torch.{dtype}))
    """
    pages = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for dtype in ("float32", "bfloat16"):
        program = textwrap.dedent(code).replace("{dtype}", dtype)
        out = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=pages
        ).stdout
        assert float(out.split()[-1]) < 1.0, (dtype, out)


def test_the_rewritten_graph_is_shown_on_request(capfd, monkeypatch):
    monkeypatch.setenv("SQCOMPILE_SHOW", "1")
    compiled_mlp()
    err = capfd.readouterr().err
    assert [line.split()[1] for line in err.splitlines() if line.startswith("==")] == [
        "traced:", "folded:", "quantized:", "lowered:"
    ]  # fmt: skip
    assert "sqcompile.int8_linear" in err


@pytest.mark.parametrize("view", ["strided", "transposed", "expanded"])
def test_inputs_may_lie_in_any_way(view):
    """Inductor's code takes the strides of the capture for granted: a view must not be read as if it were dense."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 48)).eval()
    whole = torch.randn(4, 20, 32)
    x = {"strided": whole[:, ::3], "transposed": whole.transpose(0, 1), "expanded": whole[:, :1].expand(4, 9, 32)}[view]
    for example in (whole, x):
        compiled = sqcompile.compile(model, [whole], example_inputs=example, progress=False)
        want = compiled.stages["lowered"](x.contiguous())
        assert relative_error(compiled(x), want) < 1e-5
        assert relative_error(compiled(whole), compiled.stages["lowered"](whole)) < 1e-5
