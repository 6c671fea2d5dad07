"""Plans that are made elsewhere than where the model is: the same plans, of weights that are copied as they are used."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, build, resized, some_slow, token_ids

import sqcompile
from sqcompile import api
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.errors import CalibrationError, RecipeError
from sqcompile.evaluation.streamed import Streamed
from sqcompile.models import on_device
from sqcompile.passes.ir import pieces
from sqcompile.passes.ir.graph import aten, find_linears, value
from sqcompile.passes.ir.placed import placed
from sqcompile.passes.labels.match import match

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("family", some_slow(FAMILIES, ["opt", "llama", "qwen2_moe", "bert"]))
def test_a_plan_of_copied_weights_is_the_same_to_the_byte(family, monkeypatch):
    model, call = build(family)
    data = [call, resized(call)]
    want = sqcompile.calibrate(model, data, progress=False)
    monkeypatch.setattr(api, "device_for", lambda model, device: torch.device("cpu"))  # as if that were another one
    assert sqcompile.calibrate(model, data, device="cpu", progress=False).encoded() == want.encoded()


def test_a_placed_graph_has_copies_of_its_tensors_and_makes_all_else_there():
    model, call = build("llama")
    with torch.no_grad():
        traced = trace(model, as_call(model, call))
    there = torch.device("meta")
    gm = placed(traced, there)
    for n in gm.graph.nodes:
        if n.op == "get_attr":
            assert value(n).device.type == "cpu"
            (copy,) = n.users
            assert copy.target == aten.to.device
            assert copy.args == (n, there, value(n).dtype)
            assert copy.next in copy.users  # no copy is there before it is read
        elif n.op != "output":
            assert not isinstance(value(n), torch.Tensor) or value(n).device == there, n
            assert n.kwargs.get("device", there) == there
    copies = {user for n in gm.graph.find_nodes(op="get_attr") for user in n.users}
    assert [n.name for n in gm.graph.nodes if n not in copies] == [n.name for n in traced.graph.nodes]
    assert [l.name for l in find_linears(gm)] == [l.name for l in find_linears(traced)]
    assert [s.name for s in match(gm)[0]] == [s.name for s in match(traced)[0]]


def test_a_tensor_that_is_made_of_a_size_is_made_there():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.fc(self.norm(x + torch.ops.aten.full.default([x.shape[0], 16], 1.0)))

    with torch.no_grad():
        traced = trace(Net().eval(), as_call(Net(), torch.randn(5, 16)))
    gm = placed(traced, torch.device("meta"))
    (made,) = (n for n in gm.graph.nodes if n.target == aten.full.default)
    assert made.all_input_nodes  # the size
    assert value(made).device.type == "meta"


def test_what_cannot_be_done_elsewhere_is_refused(monkeypatch):
    model, call = build("opt")
    monkeypatch.setattr(api, "device_for", lambda model, device: torch.device("cpu"))
    recipe = sqcompile.Recipe(max_degradation=1.0)
    with pytest.raises(RecipeError, match="evaluate with device"):
        sqcompile.calibrate(model, [call], recipe=recipe, evaluate=lambda model: 0.0, device="cpu", progress=False)


def test_a_device_without_memory_is_said_in_words():
    words = pytest.raises(CalibrationError, match=r"cuda:0 has too little memory .*--device cpu")
    with words, on_device(torch.device("cuda:0")):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")
    with pytest.raises(torch.OutOfMemoryError), on_device(None):  # where the model itself is
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")


@pytest.mark.parametrize("device", ["meta", "nowhere", "cuda:77"])
def test_a_device_that_cannot_compute_is_refused(device, tmp_path):
    model, call = build("opt")
    with pytest.raises(CalibrationError, match="device="):
        sqcompile.calibrate(model, [call], device=device, progress=False)
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(CalibrationError, match="device="):
        sqcompile.quantize_checkpoint(tmp_path / "float", [call], tmp_path / "out", device=device, progress=False)
    assert os.listdir(tmp_path) == ["float"]


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize(
        ("family", "recipe"),
        [("opt", "default"), ("llama", "O3"), ("qwen2_moe", "default"), ("bert", "O3"), ("whisper", "default")],
    )
    def test_the_plan_is_that_of_a_model_on_the_gpu(self, family, recipe):
        model, call = build(family)
        data = [call, resized(call)]
        plan = sqcompile.calibrate(model, data, recipe=recipe, device="cuda", progress=False)
        assert all(p.device.type == "cpu" for p in model.parameters())
        on_gpu = [{n: x.cuda() for n, x in batch.items()} for batch in data]
        want = sqcompile.calibrate(model.cuda(), on_gpu, recipe=recipe, progress=False)
        assert plan.encoded() == want.encoded()

    def test_a_random_graph_is_run_call_by_call(self):
        class Noisy(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.fc = torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)

            def forward(self, x):
                return self.fc(self.norm(x + 0.01 * torch.randn_like(x)))

        torch.manual_seed(0)
        plan = sqcompile.calibrate(Noisy().eval(), [torch.randn(8, 64)], device="cuda", progress=False)
        assert [l.quantized for l in plan.layers] == [True]

    @pytest.mark.parametrize("most", [None, 0])
    def test_a_checkpoint_is_quantized_there_and_goes_on_with_what_is_finished(self, tmp_path, monkeypatch, most):
        """``most``: bytes at a cut that stay on the GPU; the rest goes through a file and comes back."""
        if most is not None:
            monkeypatch.setattr(pieces, "_most", lambda device: most)
            monkeypatch.setattr(pieces, "_SMALL", 1)
        model, _ = build("llama")
        model.save_pretrained(tmp_path / "float")
        data = [{"input_ids": token_ids((2, 11), seed)} for seed in range(3)]
        want = sqcompile.calibrate(model.cuda(), [{"input_ids": b["input_ids"].cuda()} for b in data], progress=False)
        given = {"device": "cuda", "progress": False}
        sqcompile.quantize_checkpoint(tmp_path / "float", data, tmp_path / "whole", **given)
        assert sqcompile.Plan.load(tmp_path / "whole" / "plan.safetensors").encoded() == want.encoded()

        def cut(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as m, contextlib.suppress(KeyboardInterrupt):
            m.setattr("sqcompile.analysis.choose", cut)  # statistics are finished then
            sqcompile.quantize_checkpoint(tmp_path / "float", data, tmp_path / "out", **given)
        assert (tmp_path / "out.work").is_dir()
        with pytest.raises(sqcompile.ArtifactError, match="device"):
            sqcompile.quantize_checkpoint(tmp_path / "float", data, tmp_path / "out", progress=False)
        sqcompile.quantize_checkpoint(tmp_path / "float", data, tmp_path / "out", **given)
        names = sorted(os.listdir(tmp_path / "whole"))
        assert sorted(os.listdir(tmp_path / "out")) == names
        assert filecmp.cmpfiles(tmp_path / "whole", tmp_path / "out", names, shallow=False)[0] == names

    def test_a_model_is_evaluated_there_piece_by_piece(self, tmp_path):
        model, _ = build("llama")
        model.save_pretrained(tmp_path / "float")
        data = [{"input_ids": token_ids((2, 11), seed)} for seed in range(3)]
        sqcompile.quantize_checkpoint(tmp_path / "float", data, tmp_path / "int8", device="cuda", progress=False)
        found = sqcompile.evaluate(
            Streamed(tmp_path / "int8", "cuda"), data, against=Streamed(tmp_path / "float", "cuda"), progress=False
        )
        int8 = sqcompile.load(tmp_path / "int8", device="cuda", backend="eager", progress=False)
        want = sqcompile.evaluate(int8, data, against=model.cuda(), progress=False)
        assert found.perplexity == pytest.approx(want.perplexity, rel=1e-4)
        assert found.kl == pytest.approx(want.kl, rel=1e-2, abs=1e-6)

    def test_the_gpu_holds_a_part_of_the_weights_at_a_time(self, tmp_path):
        """In a process of its own, whose largest memory is this test's. Rows of inputs, which are kept of all layers, are few."""
        script = """
import json, sys, torch, sqcompile
from sqcompile.bench.large import generate, llama_config
generate(sys.argv[1], config := llama_config(1024, 16, 8000))
size = torch.cuda.max_memory_allocated()
windows = torch.randint(0, 8000, (2, 16), generator=torch.Generator().manual_seed(1)).split(1)
sqcompile.quantize_checkpoint(sys.argv[1], windows, sys.argv[1] + "/out", device="cuda", progress=False)
print(json.dumps({"before": size, "peak": torch.cuda.max_memory_allocated()}))
"""
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        size = sum(f.stat().st_size for f in tmp_path.glob("model-*.safetensors"))
        assert size > 3.5e8
        assert found["before"] == 0
        assert 0 < found["peak"] < size / 2

    def test_no_memory_is_one_sentence(self, tmp_path):
        model, _ = build("llama")
        model.save_pretrained(tmp_path / "float")
        data = [{"input_ids": token_ids((64, 64))}]
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / total)
        try:
            with pytest.raises(CalibrationError, match="memory"):
                sqcompile.quantize_checkpoint(tmp_path / "float", data, tmp_path / "out", device="cuda", progress=False)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert sorted(os.listdir(tmp_path)) in (["float"], ["float", "out.work"])
