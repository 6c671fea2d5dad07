"""A loaded model is the saved one: the same graph, the same bits, whatever the model, the recipe and the process."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace

import artifact_cases as cases
import pytest
import torch
from artifact_cases import batch, compiled, equal, load, manifest
from conftest import relative_error, tiny_lm
from families import FAMILIES, build, outputs, resized, some_slow
from torch import nn

import sqcompile
from sqcompile import PRESETS, ArtifactError, Recipe, StageError
from sqcompile.artifact.structures import Outputs

RECIPES = {
    **PRESETS,
    "static": Recipe("auto", "per_tensor_static"),
    "static, INT8 attention": Recipe(0.5, "per_tensor_static", attention="qk_pv"),
    "INT8 attention": Recipe(0.5, attention="qk"),
    "one scale": Recipe(0.5, "per_tensor", "per_tensor", rotate=32),
    "unsmoothed": Recipe(smooth=False),
}


@pytest.mark.parametrize("name", some_slow(FAMILIES, ("mixtral", "swin")))
def test_every_family_is_the_same_to_the_bit(name, tmp_path):
    model, call = build(name)
    net = sqcompile.compile(model, [call], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    net.save(tmp_path / "net")
    loaded = load(tmp_path / "net")
    assert loaded.lowered.code == net.lowered.code and loaded.plan == net.plan
    assert str(loaded.report) == str(replace(net.report, seconds={})) and loaded.weight_bytes() == net.weight_bytes()
    for x in (call, resized(call)):
        a, b = net(**x), loaded(**x)
        assert type(a) is type(b) and all(map(torch.equal, outputs(a), outputs(b)))


@pytest.mark.parametrize("name", some_slow(RECIPES, ("O3",)))
def test_every_recipe_is_the_same_to_the_bit(name, tmp_path):
    model, call = build("llama")
    model = model.to(torch.bfloat16)
    net = sqcompile.compile(model, [call], recipe=RECIPES[name], backend="eager", progress=False)
    net.save(tmp_path / "net")
    a, b = net(**call), load(tmp_path / "net")(**call)
    assert all(map(torch.equal, outputs(a), outputs(b)))


def test_inductor_gives_the_same_bits(tmp_path):
    net = sqcompile.compile(cases.model(), [batch()], recipe=Recipe(alpha=0.5), progress=False)
    net.save(tmp_path / "net")
    loaded = sqcompile.load(tmp_path / "net")
    for rows, tokens in ((2, 9), (1, 1), (5, 30)):
        x = batch(7, rows, tokens)
        assert equal(net(x), loaded(ids=x))


def test_what_is_stored_is_int8_once(tmp_path):
    net = compiled()
    net.save(tmp_path / "net")
    index = manifest(tmp_path / "net")["tensors"]
    kept = {name: entry["dtype"] for name, entry in index.items()}
    assert kept["up.weight_int8"] == kept["down.weight_int8"] == "int8" and "up.weight" not in kept
    stored = sum(f.stat().st_size for f in (tmp_path / "net").glob("model-*.safetensors"))
    assert stored < 1.3 * net.weight_bytes() + 4000  # headers, and nothing twice
    assert {p.name for p in (tmp_path / "net").iterdir()} == {
        "sqcompile.json", "plan.safetensors", "model-00001-of-00001.safetensors",
    }  # fmt: skip


def test_shards(tmp_path):
    net = compiled()
    net.save(tmp_path / "net", shard_bytes=3000)
    files = sorted(f.name for f in (tmp_path / "net").glob("model-*"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert equal(load(tmp_path / "net")(batch()), net(batch()))


def test_a_loaded_model_is_saved_again_without_its_float_model(tmp_path):
    net = compiled()
    net.save(tmp_path / "first")
    loaded = load(tmp_path / "first")
    loaded.save(tmp_path / "second")
    loaded.save(tmp_path / "first")  # over what it reads from
    again = load(tmp_path / "second")
    assert equal(again(batch()), net(batch())) and equal(load(tmp_path / "first")(batch()), net(batch()))
    assert manifest(tmp_path / "first") == manifest(tmp_path / "second")
    loaded.save(tmp_path / "third")  # what it reads from is the same model
    x = batch(3)
    assert relative_error(again.stages["quantized"](x)["logits"], net(x)["logits"]) < 1e-4
    assert again.stages["lowered"].code == net.lowered.code
    for stage in ("traced", "folded"):
        with pytest.raises(StageError, match="float weights"):
            again.stages[stage]


@pytest.mark.parametrize("what", ["a native artifact", "a checkpoint"])
def test_another_model_in_the_directory_is_seen(what, tmp_path):
    """A loaded model reads its stages again, and would give those of the other one in silence."""
    if what == "a checkpoint":
        one, other = (tiny_lm("llama", vocab_size=v) for v in (96, 104))
        x = torch.randint(3, 90, (2, 9))
        for model in (one, other):
            plan = sqcompile.calibrate(model, [x], recipe=Recipe(alpha=0.5), progress=False)
            sqcompile.export(model, plan, "compressed-tensors", tmp_path / f"{model.config.vocab_size}")
        os.rename(tmp_path / "96", tmp_path / "net")
        net = load(tmp_path / "net")
        net.stages["quantized"]
        os.rename(tmp_path / "net", tmp_path / "old")
        os.rename(tmp_path / "104", tmp_path / "net")
        call = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    else:
        compiled().save(tmp_path / "net")
        call, net = {"ids": batch()}, load(tmp_path / "net")
        compiled(seed=1).save(tmp_path / "net")
    want = net(**call)
    for stage in ("quantized", "lowered"):
        with pytest.raises(ArtifactError, match="holds another model than the one that was loaded"):
            net.stages[stage]
    for write in (lambda: net.save(tmp_path / "copy"), lambda: net.export("pt2", tmp_path / "copy.pt2")):
        with pytest.raises(ArtifactError, match="holds another model"):
            write()
    assert not (tmp_path / "copy").exists() and not (tmp_path / "copy.pt2").exists() and equal(net(**call), want)


def test_the_float_model_is_needed_to_save(tmp_path):
    torch.manual_seed(0)
    net = sqcompile.compile(cases.Block().eval(), [batch()], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    gc.collect()
    with pytest.raises(StageError, match="keep a reference"):
        net.save(tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_calls_are_bound_and_checked_as_before(tmp_path):
    net = compiled()
    net.save(tmp_path / "net")
    loaded = load(tmp_path / "net")
    for wrong in (batch().float(), batch()[0]):
        with pytest.raises(sqcompile.CaptureError) as a:
            net(wrong)
        with pytest.raises(sqcompile.CaptureError) as b:
            loaded(wrong)
        assert str(a.value) == str(b.value)
    with pytest.raises(sqcompile.IndexRangeError):
        loaded(batch() + 50)


class Limited(nn.Module):
    """Takes up to 12 tokens, and more of them by another way."""

    def __init__(self):
        super().__init__()
        self.fc, self.table = nn.Linear(32, 32), nn.Parameter(torch.randn(12, 32))

    def forward(self, x, scale: float = 1.0, *, flip=False):
        x = x + self.table[: x.shape[1]]
        return self.fc(x.flip(1) if flip else x) * scale


def test_conditions_and_constants_of_the_capture_hold(tmp_path):
    torch.manual_seed(0)
    model = Limited().eval()
    net = sqcompile.compile(model, [torch.randn(2, 8, 32)], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    net.save(tmp_path / "net")
    loaded = load(tmp_path / "net")
    x = torch.randn(3, 12, 32)
    assert torch.equal(loaded(x, flip=False), net(x)) and torch.equal(loaded(x, 1.0), net(x))
    for call in ((torch.randn(3, 13, 32),), (x, 2.0)):
        with pytest.raises(sqcompile.CaptureError):
            loaded(*call)


Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Result:
    y: torch.Tensor
    hidden: torch.Tensor


torch.export.register_dataclass(Result, serialized_type_name="Result")


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.fc, self.make = nn.Linear(32, 32), make

    def forward(self, x):
        h = self.fc(x)
        return self.make(h.relu(), h)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda y, h: [y, (h, {"b": h, "a": y})], None),
        (lambda y, h: OrderedDict(y=y, h=h), None),
        (lambda y, h: (y, None), None),
        (lambda y, h: Pair(y, h), ("first", "second")),
        (lambda y, h: Result(y, h), ("y", "hidden")),
    ],
)
def test_results_keep_their_structure_or_their_names(make, names, tmp_path):
    x = torch.randn(4, 32)
    model = Returns(make).eval()
    net = sqcompile.compile(model, [x], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    net.save(tmp_path / "net")
    a, b = net(x), load(tmp_path / "net")(x)
    if names is None:
        assert equal(a, b)
    else:  # a class of the model's source, which is not imported
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)
        assert type(b).__name__ == "Pair" if isinstance(a, tuple) else type(b) is Outputs and list(b) == list(names)


SAVES = """
import sys, torch, sqcompile
from torch import nn
class Secret(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(32), nn.Linear(32, 64)
    def forward(self, x, add=None):
        return {"y": self.fc(self.norm(x))}
torch.manual_seed(0)
net = sqcompile.compile(Secret().eval(), [torch.randn(4, 32)], progress=False, backend="eager")
"""
LOADS = """
import sys, torch, sqcompile
net = sqcompile.load(sys.argv[1] + "/net", backend="eager")
x, y = torch.load(sys.argv[1] + "/xy")
assert torch.equal(net(x)["y"], y) and torch.equal(net(x=x)["y"], y)
assert "transformers" not in sys.modules
"""


def test_the_class_of_the_model_is_not_needed(tmp_path):
    """Two processes; the class lives in the script that the first one is."""
    save = (
        'keep = Secret().eval()\nnet = sqcompile.compile(keep, [torch.randn(4, 32)], progress=False, backend="eager")\n'
    )
    save += 'net.save(sys.argv[1] + "/net")\nx = torch.randn(7, 32)\ntorch.save((x, net(x)["y"]), sys.argv[1] + "/xy")'
    source = SAVES.replace(SAVES.strip().splitlines()[-1], save)
    for text in (source, LOADS):
        done = subprocess.run([sys.executable, "-c", text, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


def test_devices_and_backends(tmp_path):
    compiled().save(tmp_path / "net")
    assert equal(sqcompile.load(tmp_path / "net", device="cpu", backend="eager")(batch()), compiled()(batch()))
    for device in ("cuda:99", "nonsense", 3.5):
        with pytest.raises(ArtifactError, match="device="):
            sqcompile.load(tmp_path / "net", device=device)
    with pytest.raises(sqcompile.RecipeError, match="backend="):
        sqcompile.load(tmp_path / "net", backend="nonsense")
    with pytest.raises(sqcompile.RecipeError, match="target="):
        sqcompile.load(tmp_path / "net", target="nonsense")
    other = sqcompile.load(tmp_path / "net", backend="eager", target="cuda-sm90")
    assert "int8_gemm" in other.lowered.code


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_model_that_a_cpu_saved_runs_on_a_gpu(backend, tmp_path):
    net = compiled()
    net.save(tmp_path / "net")
    loaded = sqcompile.load(tmp_path / "net", device="cuda", backend=backend)
    x = batch(5, 4, 31)
    assert relative_error(loaded(x.cuda())["logits"].cpu(), net(x)["logits"]) < 1e-3
    model = copy.deepcopy(cases.model()).cuda()
    again = sqcompile.compile(model, plan=net.plan, backend=backend, progress=False)
    assert torch.equal(again(x.cuda())["logits"], loaded(x.cuda())["logits"])


def test_a_loaded_model_has_a_page_that_says_why_there_is_no_graph(tmp_path):
    pytest.importorskip("altair", reason="altair is not installed")
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    compiled().save(tmp_path / "net")
    loaded = load(tmp_path / "net")
    loaded.report.to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert 'id="graph"' not in text and "not drawn: a saved model has no stage" in text
    with pytest.raises(StageError, match="a saved model has no stage 'traced'"):
        loaded.draw(tmp_path / "g.html")
    assert {p.name for p in tmp_path.iterdir()} == {"net", "r.html"}
