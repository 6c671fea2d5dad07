"""Where a loaded checkpoint goes: into an artifact, and to a GPU, with its weights as they are in the files."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from checkpoint_cases import PLAIN, STATIC, exported, masked, planned, with_layers
from conftest import relative_error

import sqcompile
from sqcompile.artifact.fill import lowered_graph
from sqcompile.artifact.moved import moved
from sqcompile.checkpoints.export import export
from sqcompile.checkpoints.read_model import read_model
from sqcompile.compiled.emit import emit
from sqcompile.passes.ir.about import about

DYNAMIC = {"activation": "per_token", "input_scale": None}
TENSOR = {"weight": "per_tensor"}


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (PLAIN, {}),
        (STATIC, {}),
        (STATIC, {"o_proj": DYNAMIC}),
        (dataclasses.replace(STATIC, overrides={"*.up_proj.weight": TENSOR}), {"o_proj": DYNAMIC, "up_proj": TENSOR}),
        (dataclasses.replace(PLAIN, weight="per_tensor"), {}),
    ],
    ids=["token", "static", "two activations", "two weights", "tensor"],
)
def test_a_loaded_checkpoint_is_saved_as_an_artifact(recipe, changes, tmp_path):
    model, call, plan = planned("llama", dataclasses.replace(recipe, overrides={}))
    done = export(model, with_layers(plan, recipe, **changes), "compressed-tensors", tmp_path / "out")
    loaded = sqcompile.load(tmp_path / "out", backend="eager")
    wanted = {l.name: l for l in done.plan.layers}
    for l in loaded.plan.layers:
        mine, theirs = (
            (x.activation or p.recipe.activation) for x, p in ((l, loaded.plan), (wanted[l.name], done.plan))
        )
        assert mine == theirs or not l.quantized
    loaded.save(tmp_path / "saved")
    again = sqcompile.load(tmp_path / "saved", backend="eager")
    assert torch.equal(again(**masked(call)).logits, loaded(**masked(call)).logits)
    assert again.plan == loaded.plan


@pytest.mark.parametrize("family", ["llama", "opt", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_graph_is_moved_with_its_weights_as_they_are_in_the_files(family, tmp_path):
    exported(family, "compressed-tensors", tmp_path / "out", STATIC if family == "opt" else PLAIN)
    read = read_model(str(tmp_path / "out"))
    here = moved(read.graph, torch.device("cpu"))  # as it goes to a GPU
    assert [n.name for n in here.graph.nodes] == [n.name for n in read.graph.graph.nodes]
    lazy, wanted = about(here).lazy, about(read.graph).lazy
    assert lazy.keys() == wanted.keys() and lazy
    for name, weight in lazy.items():
        assert all(torch.equal(a, b) for a, b in zip(weight.make(), wanted[name].make(), strict=True))
    call = masked(planned(family)[1])
    loaded = sqcompile.load(tmp_path / "out", backend="eager")
    again = emit(lowered_graph(here, None), read.call, read.plan, loaded.stages, "eager", False)
    assert torch.equal(again(**call).logits, loaded(**call).logits)


def test_a_device_without_values_is_refused(tmp_path):
    exported("llama", "compressed-tensors", tmp_path / "out")
    with pytest.raises(sqcompile.ArtifactError, match=r"out cannot be loaded for meta: .* the meta device"):
        sqcompile.load(tmp_path / "out", device="meta")
    with pytest.raises(sqcompile.ArtifactError, match="is none of this machine"):
        sqcompile.load(tmp_path / "out", device="cuda:99")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2_moe"])
def test_a_checkpoint_is_loaded_on_a_gpu(family, backend, tmp_path):
    exported(family, "compressed-tensors", tmp_path / "out", STATIC if family == "opt" else PLAIN)
    call = masked(planned(family)[1])
    cpu = sqcompile.load(tmp_path / "out", backend="eager")
    loaded = sqcompile.load(tmp_path / "out", device="cuda", backend=backend)
    there = {name: t.cuda() for name, t in call.items()}
    logits = loaded(**there).logits
    assert logits.is_cuda
    assert relative_error(logits.cpu(), cpu(**call).logits) < 2e-2  # rounding moves single int8 values
    assert "int8_gemm" in loaded.lowered.code
    assert all(t.is_cuda for t in loaded.lowered.state_dict().values())
    for name, net in (("from cpu", cpu), ("from cuda", loaded)):
        net.save(tmp_path / name)
        again = sqcompile.load(tmp_path / name, device="cuda", backend=backend)
        assert torch.equal(again(**there).logits, logits)
