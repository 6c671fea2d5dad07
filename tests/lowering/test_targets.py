"""Lowering for a machine that is not this one: what the graph becomes there, and that it computes the same."""

import dataclasses

import pytest
import torch
from conftest import relative_error
from torch import nn

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.kernels import fused, targets
from sqcompile.kernels.cpu import arm, x86
from sqcompile.kernels.targets import Target


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def batches():
    torch.manual_seed(1)
    return [torch.randn(4, 9, 32) for _ in range(3)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Mlp().eval()


LINEARS = {
    "x86-amx": "int8_linear_packed", "x86-vnni": "int8_linear_packed", "x86-avx2": "int8_linear_packed", "arm64": "int8_linear_s8",
    "cuda-sm80": "int8_gemm", "cuda-sm89": "int8_gemm", "cuda-sm90": "int8_gemm", "reference": "int8_linear",
}  # fmt: skip


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("recipe", ["default", "O3"])
def test_a_graph_for_each_target_gives_the_numbers_of_the_reference(model, name, recipe):
    if name.startswith("x86") and not Target.named(name).runs():
        pytest.skip("packs weights in the layout of such a CPU")
    reference = sqcompile.compile(model, batches(), recipe=recipe, backend="eager", progress=False, target="reference")
    net = sqcompile.compile(model, plan=reference.plan, backend="eager", target=name)
    used = {
        str(n.target).split(".")[1]
        for n in net.lowered.graph.nodes
        if "linear" in str(n.target) or "gemm" in str(n.target)
    }
    between = {"linear_norm_quantize", "linear_act_quantize"} if name.startswith("x86") else set()
    assert used == {LINEARS[name]} | between
    x = torch.randn(3, 5, 32)
    assert relative_error(net(x), reference(x)) < 1e-5
    assert net(x[:0]).shape == (0, 5, 32)
    stage = net.stages["lowered"]  # rebuilt for the same target
    assert [n.target for n in stage.graph.nodes] == [n.target for n in net.lowered.graph.nodes]


def test_a_target_that_is_unknown_is_refused_before_anything_runs(model):
    with pytest.raises(sqcompile.RecipeError, match=r"target='cuda-sm70': choose one of x86-amx, .*reference"):
        sqcompile.compile(model, iter(()), target="cuda-sm70")


SLOW = r"cuda-sm103 multiplies INT8 several times slower than bfloat16: compile the model with Recipe\(dtype='fp8'\)"


def test_a_gpu_that_is_slow_in_int8_is_given_fp8(model):
    with pytest.raises(sqcompile.RecipeError, match=SLOW):
        sqcompile.compile(model, iter(()), target="cuda-sm103")  # before it asks for data
    plan = sqcompile.calibrate(model, batches(), progress=False)
    with pytest.raises(sqcompile.RecipeError, match=SLOW):
        sqcompile.compile(model, plan=plan, backend="eager", target="cuda-sm103")
    net = sqcompile.compile(model, batches(), recipe="fp8", backend="eager", progress=False, target="cuda-sm103")
    assert "fp8_linear" in net.lowered.code


def test_the_backend_refuses_such_a_gpu_in_its_first_call(model, monkeypatch):
    gpu = Target.named("cuda-sm103")
    monkeypatch.setattr(
        sqcompile.backend, "check_format", lambda dtype, device: targets.check_format(dtype, device, gpu)
    )
    net = torch.compile(model, backend=smoothquant, options={"calibration_steps": 3})
    with torch.no_grad(), pytest.raises(sqcompile.RecipeError, match=SLOW):
        net(batches()[0])


def test_what_is_loaded_is_packed_only_where_it_can_be(model, tmp_path, monkeypatch):
    sqcompile.compile(model, batches(), backend="eager", progress=False).save(tmp_path / "net")
    monkeypatch.setattr(x86, "available", lambda: False)
    with pytest.raises(
        sqcompile.RecipeError, match="target='x86-vnni' packs weights for such a CPU, and this one is none"
    ):
        sqcompile.load(tmp_path / "net", backend="eager", target="x86-vnni")
    with pytest.raises(sqcompile.RecipeError, match=SLOW):
        sqcompile.load(tmp_path / "net", backend="eager", target="cuda-sm103")


@pytest.mark.parametrize(
    ("here", "want"),
    [
        ({"x86", "amx"}, "x86-amx"),
        ({"x86"}, "x86-vnni"),
        ({"avx2"}, "x86-avx2"),
        ({"arm"}, "arm64"),
        (set(), "reference"),
    ],
)
def test_the_target_of_a_cpu(monkeypatch, here, want):
    monkeypatch.setattr(x86, "available", lambda: "x86" in here)
    monkeypatch.setattr(x86, "amx", lambda: "amx" in here)
    monkeypatch.setattr(x86, "has_avx2_kernels", lambda: "avx2" in here)
    monkeypatch.setattr(arm, "available", lambda: "arm" in here)
    assert Target.of(torch.device("cpu")).name == want


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_the_target_of_a_gpu(monkeypatch, capability):
    monkeypatch.setattr(fused, "available", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    target = Target.of(torch.device("cuda", 0))
    assert target.name == f"cuda-sm{capability[0]}{capability[1]}" and target == Target.named(target.name)
    assert target.fuses == target.attention == "triton"
    monkeypatch.setattr(fused, "available", lambda device: False)
    target = Target.of(torch.device("cuda", 0))
    assert (target.name, target.device, target.attention) == ("reference", "cuda", None)


def test_a_target_is_a_value_with_a_name_of_its_own():
    names = [target.name for target in targets._known()]
    assert len(names) == len(set(names)) and all(Target.named(name).name == name for name in names)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Target.named("arm64").name = "x"


def test_the_linear_of_arm_is_exact():
    g = torch.Generator().manual_seed(0)
    q, w = (torch.randint(-127, 128, shape, dtype=torch.int8, generator=g) for shape in ((5, 48), (24, 48)))
    scale = torch.rand(24, generator=g)
    packed, beside = arm.pack(w)
    got = torch.ops.sqcompile.matmul_s8s8(q, packed, scale, torch.float32)
    assert beside is None
    assert torch.allclose(got, (q.double() @ w.double().t() * scale.double()).float(), rtol=1e-6)


@pytest.mark.parametrize("what", [torch.device("cuda"), 90])
def test_what_is_no_target_is_refused_before_anything_runs(model, what):
    with pytest.raises(sqcompile.RecipeError, match="pass the name of a target, one of x86-amx"):
        sqcompile.compile(model, iter(()), target=what)


def test_weights_are_packed_only_where_they_can_be(model, monkeypatch):
    monkeypatch.setattr(x86, "available", lambda: False)
    monkeypatch.setattr(x86, "has_avx2_kernels", lambda: False)
    with pytest.raises(sqcompile.RecipeError, match="target='x86-avx2' packs weights for such a CPU"):
        sqcompile.compile(model, iter(()), target="x86-avx2")
    with pytest.raises(sqcompile.RecipeError, match="packs weights for such a CPU, and this one is none"):
        sqcompile.compile(model, iter(()), target="x86-vnni")
    with pytest.raises(sqcompile.RecipeError, match="the model is on meta: move it to the CPU"):
        Target.named("arm64").check(torch.device("meta"))
    Target.named("cuda-sm90").check(torch.device("cpu"))
