"""Fusing for GPUs, on a CPU: the fused operators' plain versions give what the unfused graph gives, to the bit."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from conftest import ALL_INT8, relative_error, tiny_lm, token_batches
from families import build, token_ids
from hand_written import Attend
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import sqcompile
from sqcompile.compiled import report
from sqcompile.compiled.inductor import inductor
from sqcompile.kernels import speedup
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.about import about
from sqcompile.plan.recipe import resolve_recipe


@pytest.fixture
def lowered_for_gpu():
    """Compiles a model as for a GPU, and without fusing, from one plan."""

    def both(model, batches, recipe=ALL_INT8, **kwargs):
        recipe = dataclasses.replace(resolve_recipe(recipe), rotate="none")  # rotations have tests of their own
        plain = sqcompile.compile(model, batches, recipe=recipe, backend="eager", progress=False, target="reference")
        return sqcompile.compile(model, plan=plain.plan, backend="eager", target="cuda-sm90", **kwargs), plain

    return both


def operators(compiled):
    names = (str(n.target) for n in compiled.lowered.graph.nodes)
    ours = (name.split(".")[1] for name in names if name.startswith("sqcompile."))
    return Counter(name for name in ours if name not in ("attention", "mask_kind", "stored", "checked_ids"))  # of CPUs


def outputs(out):
    return [t for t in pytree.tree_leaves(dict(out)) if isinstance(t, torch.Tensor)]


# family, recipe -> operators of the lowered graph of two layers
FUSED = {
    ("llama", "default"): {"int8_gemm": 8, "norm_quantize": 4, "act_quantize": 2, "quantize_rows": 2},
    # keys and values are quantized by nodes of their own, which the compiler fuses with what makes them
    ("llama", "O2"): {
        "int8_gemm": 8, "quantize_rows": 8, "int8_attention": 2, "quantize": 4, "tensor_scale": 4, "scale_over": 2,
        "aligned_mask": 1, "mask_blocks": 1,
    },
    ("llama", "O3"): {"int8_gemm": 8, "norm_quantize": 4, "act_quantize": 2, "int8_attention": 2, "quantize": 2 + 4,
                      "finite_rows": 2, "finite_heads": 4, "aligned_mask": 1, "mask_blocks": 1},
    # fc1 -> relu -> fc2 never leaves int8
    ("opt", "O3"): {"int8_gemm": 8, "norm_quantize": 4, "int8_attention": 2, "quantize": 2 + 4,
                    "finite_rows": 2, "finite_heads": 4, "aligned_mask": 1, "mask_blocks": 1},
    ("gpt2", "default"): {"int8_gemm": 8, "norm_quantize": 4, "quantize_rows": 4},
    ("t5", "default"): {"int8_gemm": 21, "norm_quantize": 11, "act_quantize": 4, "quantize_rows": 6},
    ("gemma", "default"): {"int8_gemm": 8, "norm_quantize": 4, "act_quantize": 2, "quantize_rows": 2},
    ("phi3", "default"): {"int8_gemm": 8, "norm_quantize": 4, "act_quantize": 2, "quantize_rows": 2},
    ("mixtral", "default"): {
        "int8_gemm": 4, "int8_grouped_linear": 4, "norm_quantize": 2, "act_quantize": 2, "quantize_rows": 4,
    },
    ("bert", "default"): {"int8_gemm": 9, "norm_quantize": 4, "act_quantize": 2, "quantize_rows": 3},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "recipe"),
    [c if c[0] not in ("t5", "mixtral", "phi3") else pytest.param(*c, marks=pytest.mark.slow) for c in FUSED],
    ids=map(" ".join, FUSED),
)
def test_fused_graphs_give_the_unfused_result(lowered_for_gpu, name, recipe):
    model, call = build(name)
    batches = [call, {**call, "input_ids": token_ids(seed=4)}]
    gpu, plain = lowered_for_gpu(model, batches, ALL_INT8 if recipe == "default" else recipe)
    assert operators(gpu) == FUSED[name, recipe]
    x = {**call, "input_ids": token_ids(seed=5)}
    for a, b in zip(outputs(gpu(**x)), outputs(plain(**x)), strict=True):
        assert relative_error(a, b) <= 1e-6


def test_residuals_and_static_chains_are_in_the_gemm(lowered_for_gpu):
    gpu, _ = lowered_for_gpu(tiny_lm("opt"), token_batches(), "O3")
    gemms = gpu.lowered.graph.find_nodes(op="call_function", target=sqcompile_ops.int8_gemm.default)
    kinds = Counter((g.args[6], g.args[7] is not None, g.args[8] is not None) for g in gemms)
    # per layer: qkv; out_proj and fc2 with the residual; fc1 with relu and int8 out
    assert kinds == {("none", False, False): 2, ("none", True, False): 4, ("relu", False, True): 2}


def test_half_precision_differs_by_the_roundings_it_leaves_out(lowered_for_gpu):
    model = tiny_lm("llama", dtype=torch.bfloat16)
    gpu, plain = lowered_for_gpu(model, token_batches())
    ids = token_ids((2, 20), seed=3)
    with torch.no_grad():
        exact = tiny_lm("llama")(input_ids=ids, use_cache=False).logits
    assert relative_error(gpu(input_ids=ids).logits, exact) <= 1.1 * relative_error(plain(input_ids=ids).logits, exact)


@pytest.mark.slow
def test_a_compiler_assumes_no_number_of_blocks_of_a_mask(lowered_for_gpu):
    gpu, _ = lowered_for_gpu(tiny_lm("llama"), token_batches(), sqcompile.Recipe(attention="qk"))
    assert operators(gpu)["mask_blocks"] == 1
    env = about(gpu._run).fake_mode.shape_env
    run = inductor(gpu._run)  # for a GPU it once made loops of 128 iterations over the 300 tokens below
    assert all(r.lower <= 2 and r.upper >= 2**31 - 1 for r in env.var_to_range.values())
    x = token_ids((2, 300), seed=5)
    assert relative_error(run(x)[0], gpu(input_ids=x).logits) <= 1e-5


class TwoAttentions(Attend):
    """They share masks, and their products are not in the order of what they become."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, mask):
        (q, k, v), (p, j, w) = self.heads(x), self.heads(x.flip(1))
        first, second = q @ k.mT, p @ j.mT
        b = torch.softmax(second + mask + self.bias, -1) @ w
        a = torch.softmax(first + mask + self.bias, -1) @ v
        c = torch.softmax(q @ j.mT + self.bias, -1) @ v
        return self.join(a + b + c)


def test_attentions_that_share_masks_in_any_order(lowered_for_gpu):
    torch.manual_seed(0)
    x, mask = torch.randn(2, 9, 32), torch.randn(9, 9)
    gpu, plain = lowered_for_gpu(TwoAttentions().eval(), [(x, mask)], sqcompile.Recipe(attention="qk"))
    assert operators(gpu)["int8_attention"] == 3 and operators(gpu)["mask_blocks"] == 2
    assert relative_error(gpu(x, mask), plain(x, mask)) <= 1e-6


class Explicit(nn.Module):
    """gelu -> fc2: the scale is multiplied explicitly; a post-norm whose output is a residual, too."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        h = self.norm(x)
        return h + self.fc2(F.gelu(self.fc1(h)))


def test_an_explicit_scale_is_the_kernels_multiplier(lowered_for_gpu):
    torch.manual_seed(0)
    gpu, plain = lowered_for_gpu(Explicit().eval(), [torch.randn(4, 6, 32) for _ in range(3)])
    assert operators(gpu) == {"int8_gemm": 2, "norm_quantize": 1, "act_quantize": 1}
    (norm,) = gpu.lowered.graph.find_nodes(op="call_function", target=sqcompile_ops.norm_quantize.default)
    (act,) = gpu.lowered.graph.find_nodes(op="call_function", target=sqcompile_ops.act_quantize.default)
    assert norm.args[7] is not None and norm.args[8] is True  # a multiplier, and the norm's output kept
    assert act.args[2] == "gelu" and act.args[4] is not None
    x = torch.randn(2, 5, 32)
    assert relative_error(gpu(x), plain(x)) <= 1e-6


class Early(nn.Module):
    """A float linear reads the norm before the quantized ones do, another after them."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.fc1, self.fc2 = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        h = self.norm(x)
        gate = self.first(h).sum(-1, keepdim=True)
        return h + self.fc2(F.gelu(self.fc1(h)) * gate) + self.last(h).mean()


def test_readers_of_a_norm_that_is_quantized_too(lowered_for_gpu):
    torch.manual_seed(0)
    recipe = sqcompile.Recipe(skip=("first", "last"))
    gpu, plain = lowered_for_gpu(Early().eval(), [torch.randn(4, 6, 32) for _ in range(3)], recipe)
    assert operators(gpu)["norm_quantize"] == 1
    x = torch.randn(2, 5, 32)
    assert relative_error(gpu(x), plain(x)) <= 1e-6


class Odd(nn.Module):
    """What only looks like a norm of the input's channels, in a spelling that `fuse` must not take for one."""

    def __init__(self, name, dtype=torch.float32):
        super().__init__()
        self.name, self.w, self.fc = name, nn.Parameter(1 + 0.3 * torch.randn(32)), nn.Linear(32, 32)
        self.norm = nn.RMSNorm(32)
        self.to(dtype)

    def forward(self, x):
        square = x.pow(2)
        if self.name == "eps of the dtype":
            y = self.norm(x)
        elif self.name == "alpha":
            y = self.w * (x * torch.rsqrt(torch.add(square.mean(-1, keepdim=True), 0.5, alpha=4.0)))
        elif self.name == "all dims":
            y = self.w * (x * torch.rsqrt(square.mean(None, keepdim=True) + 1e-2))
        elif self.name == "another dim":
            y = self.w * (x * torch.rsqrt(square.mean(1, keepdim=True) + 1e-2))
        elif self.name == "one channel":
            y = x[..., :1] * self.w
        else:
            y = self.w * F.layer_norm(x[..., :1], (1,))
        return self.fc(y)


@pytest.mark.parametrize("recipe", ["default", "O3"])
@pytest.mark.parametrize(
    "name", ["eps of the dtype", "alpha", "all dims", "another dim", "one channel", "a norm of one"]
)
def test_what_only_looks_like_a_norm(lowered_for_gpu, name, recipe):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name == "eps of the dtype" else torch.float32
    batches = [0.05 * torch.randn(3, 7, 32, dtype=dtype) for _ in range(3)]
    if (name, recipe) == ("a norm of one", "O3"):  # of which nothing but zeros comes
        with pytest.raises(sqcompile.NothingToQuantizeError, match="its input was zero in all 63 calibration tokens"):
            lowered_for_gpu(Odd(name, dtype).eval(), batches, recipe)
        return
    gpu, plain = lowered_for_gpu(Odd(name, dtype).eval(), batches, recipe)
    x = 0.05 * torch.randn(2, 5, 32, dtype=dtype)
    assert relative_error(gpu(x), plain(x)) <= (1e-2 if dtype == torch.bfloat16 else 1e-6)

    class Shapes(torch.fx.Interpreter):
        def run_node(self, n):
            out = super().run_node(n)
            if isinstance(out, torch.Tensor) and n.op == "call_function":
                known = n.meta["val"]
                assert out.dtype == known.dtype and out.shape[-1] == known.shape[-1], n
            return out

    with torch.no_grad():
        Shapes(gpu.lowered).run(x, enable_io_processing=False)


TABLE = {(1, 64, 64): 1.5, (2048, 64, 64): 0.8, (1, 224, 64): 2.0, (2048, 224, 64): 1.6}


@pytest.fixture
def measured(monkeypatch):
    """A table of speeds for the CPU that stands for a GPU here."""
    monkeypatch.setattr(speedup, "expected", lambda device, rows, n, k, of: speedup.nearest(TABLE, rows, n, k))
    monkeypatch.setattr(report, "expected", speedup.expected)


def test_the_report_says_which_gemms_run_in_int8_and_their_gain(lowered_for_gpu, measured):
    gpu, _ = lowered_for_gpu(tiny_lm("llama"), token_batches())
    lines = str(gpu.report).splitlines()
    at = lines.index("INT8 GEMMs, expected speed against float32:")
    assert lines[at + 1 : at + 5] == [
        "  2 x 64 -> 128: 2.00x with 1 row, 1.60x with 2048 rows",  # q, k and v, nearest to 224
        "  2 x 64 -> 64: 1.50x with 1 row, 0.80x with 2048 rows",
        "  2 x 64 -> 224: 2.00x with 1 row, 1.60x with 2048 rows",
        "  2 x 112 -> 64: 1.50x with 1 row, 0.80x with 2048 rows",
    ]


def test_min_speedup_keeps_slow_shapes_in_float(measured):
    plan = sqcompile.calibrate(
        tiny_lm("llama"), token_batches(), recipe=sqcompile.Recipe(min_speedup=1.0), progress=False
    )
    quantized = {l.name.split(".")[-2] for l in plan.layers if l.quantized}
    assert quantized == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    reasons = {l.reason for l in plan.layers if "o_proj" in l.name}
    assert reasons == {"INT8 is expected to be 0.80x of float32 with 2048 rows, less than 1.0x"}


def test_a_shape_far_from_every_measured_one_is_not_judged():
    assert speedup.nearest(TABLE, 1, 64, 64) == 1.5 and speedup.nearest(TABLE, 2, 100, 64) == 1.5
    assert speedup.nearest(TABLE, 1, 1024, 64) is None and speedup.nearest(TABLE, 16, 64, 64) is None
    assert speedup.expected(torch.device("meta"), 1, 4096, 4096) is None


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
ONES, STATIC = torch.ones(16), torch.tensor(0.05)
Q, S = torch.randint(-127, 128, (6, 16), dtype=torch.int8), torch.rand(6, 1)
W, WS = torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.rand(8)
CALLS = {
    "quantize per token": ("quantize_rows", (X, "token", None)),
    "quantize per tensor": ("quantize_rows", (X, "tensor", ONES)),
    "rms norm": ("norm_quantize", (X, ONES, None, 1e-5, True, True, None, None, False)),
    "layer norm, static": ("norm_quantize", (X, ONES, ONES, 1e-5, False, False, STATIC, ONES, True)),
    "gate": ("act_quantize", (X, X, "silu", None, None)),
    "relu, static": ("act_quantize", (X, None, "relu", STATIC, ONES)),
    "gemm": ("int8_gemm", (Q, S, W, WS, None, torch.bfloat16, "gelu", torch.ones(6, 8, dtype=torch.bfloat16), None)),
    "gemm to int8": ("int8_gemm", (Q, S, W, WS, torch.ones(8), torch.float32, "relu", None, STATIC)),
    "grouped": (
        "int8_grouped_linear",
        (Q, S, W.view(2, 4, 16), WS.view(2, 4), torch.tensor([2, 6], dtype=torch.int32), torch.float32),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_pass_opcheck(name):
    op, args = CALLS[name]
    torch.library.opcheck(getattr(sqcompile_ops, op).default, args)
