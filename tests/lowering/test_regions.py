"""Regional compilation: repeated blocks are found by what they do, cut out, and compiled once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ALL_INT8, tiny_lm, token_batches
from families import CAUSAL, causal_lm, roughen, token_ids
from hand_written import Attend
from test_generate import in_float64
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import sqcompile
import sqcompile.compiled.inductor
from sqcompile.backend import smoothquant
from sqcompile.kernels.targets import Target
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.flat import flatten
from sqcompile.passes.ir.graph import value
from sqcompile.passes.lowering.regions import cut, find_repeats
from sqcompile.pytorch.core import enable_python_dispatcher

LAYERS = 6


@pytest.fixture
def compilations(monkeypatch, fresh_dynamo):
    """How often Inductor compiles."""
    calls, real = [], sqcompile.compiled.inductor.inductor

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(sqcompile.compiled.inductor, "inductor", counted)
    return calls


def deep(name):
    kind, config = CAUSAL[name]
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    torch.manual_seed(0)
    return roughen(causal_lm(kind, config | {layers: LAYERS}).eval())


# gemma2's layers take turns between two kinds of attention: a block is two layers
@pytest.mark.parametrize(
    "name, alike",
    [
        ("llama", 5),
        pytest.param("gemma2", 2, marks=pytest.mark.slow),
        *(pytest.param(name, 5, marks=pytest.mark.slow) for name in ("gpt2", "bloom", "qwen3", "mixtral", "gpt_neox")),
    ],
)
def test_blocks_of_families_are_found_and_compute_the_same(name, alike):
    model, ids = deep(name), token_ids()
    compiled = sqcompile.compile(model, [ids], recipe=ALL_INT8, backend="eager", progress=False)
    flat, _ = flatten(compiled.lowered)
    outer, regions = cut(flat, find_repeats(flat))
    keys = [r.key for r in regions.values() if r.key]
    assert len(keys) >= alike and len(set(keys)) == 1
    assert all(len(r.outputs) <= 2 for r in regions.values() if r.key), "cut where few tensors pass"
    for shape in ((2, 11), (1, 5), (3, 1)):
        x = token_ids(shape, seed=3)
        with torch.no_grad():
            assert torch.equal(outer(x)[0], flat(x)[0])


class Blocks(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in widths)
        self.up = nn.ModuleList(nn.Linear(32, w) for w in widths)
        self.down = nn.ModuleList(nn.Linear(w, 32) for w in widths)

    def forward(self, x):
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.relu(up(norm(x))))
        return x


def flat_blocks(widths):
    torch.manual_seed(0)
    x = torch.randn(4, 7, 32)
    compiled = sqcompile.compile(Blocks(widths).eval(), [x], backend="eager", progress=False)
    return flatten(compiled.lowered)[0], x


def test_a_block_that_differs_is_not_taken_for_another():
    flat, x = flat_blocks([48] * 4 + [64] + [48] * 5)
    outer, regions = cut(flat, find_repeats(flat))
    assert len({r.key for r in regions.values() if r.key}) == 1
    with torch.no_grad():
        assert torch.equal(outer(x)[0], flat(x)[0])


class Strided(Blocks):
    """Norm weights are views of every second number: a copy of such a tensor is dense."""

    def __init__(self, widths):
        super().__init__(widths)
        for norm in self.norms:
            norm.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64)[::2])


def test_constants_are_taken_as_they_lie():
    torch.manual_seed(0)
    model, x = Strided([48] * LAYERS).eval(), torch.randn(4, 7, 32)
    recipe = sqcompile.Recipe(smooth=False)  # a folded weight would be another tensor
    want = sqcompile.compile(model, [x], recipe=recipe, backend="eager", progress=False)
    got = sqcompile.compile(model, plan=want.plan, regional=True)
    assert float((got(x) - want(x)).abs().max()) <= 1e-5


class Turned(nn.Module):
    """What goes from block to block is a copy by definition, which Inductor would leave in the layout it came in."""

    def __init__(self):
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(32, 32) for _ in range(LAYERS))

    def forward(self, x):
        for fc in self.fc:
            heads = F.relu(fc(x)).unflatten(-1, (4, 8)).transpose(1, 2)
            x = torch.cat([heads[:, :, :0], heads], 2).transpose(1, 2).flatten(2)
        return x


def test_values_between_blocks_lie_as_they_were_captured():
    torch.manual_seed(0)
    model, x = Turned().eval(), torch.randn(4, 7, 32)
    want = sqcompile.compile(model, [x], backend="eager", progress=False)
    got = sqcompile.compile(model, plan=want.plan, regional=True)
    for y in (x, x[:1, :5]):
        assert float((got(y) - want(y)).abs().max()) <= 1e-5


def test_one_block_is_no_repetition():
    flat, _ = flat_blocks([48])
    assert find_repeats(flat) == []


def test_blocks_are_compiled_once(compilations):
    x = torch.randn(4, 7, 32)
    model = Blocks([48] * LAYERS).eval()
    want = sqcompile.compile(model, [x], backend="eager", progress=False)
    got = sqcompile.compile(model, plan=want.plan, regional=True)
    # Where a norm is one with the linear before it, the first norm and the last linear are no part of a block.
    assert len(compilations) == (3 if Target.of(x.device).fuses else 1)
    for y in (x, x[:1, :5]):
        assert float((got(y) - want(y)).abs().max()) <= 1e-5
    assert got.weight_bytes() == want.weight_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(compilations, cache):
    model = tiny_lm("llama", num_hidden_layers=LAYERS, max_position_embeddings=512)
    plan = sqcompile.calibrate(model, token_batches(), recipe=ALL_INT8, progress=False)
    x = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    want = torch.compile(model, backend=smoothquant, options={"plan": plan, "compiler": "eager"}).generate(x, **options)
    torch._dynamo.reset()
    net = torch.compile(model, backend=smoothquant, options={"plan": plan, "regional": True})
    assert torch.equal(net.generate(x, **options), want)
    assert len(compilations) == 6, "three for prefill, three for decode"


@pytest.mark.slow
def test_layers_compiled_alone_are_compiled_twice(compilations, monkeypatch):
    """The first keeps its weights as constants; when a second comes, what is compiled serves all."""
    import sqcompile.backend.runner as runner

    monkeypatch.setattr(runner, "inductor", sqcompile.compiled.inductor.inductor)
    # in float64: Inductor sums norms in another order, and in float32 a rounding to int8 may fall the other way for it
    model = in_float64(tiny_lm("llama", num_hidden_layers=LAYERS))
    plan = sqcompile.calibrate(model, token_batches(), recipe=ALL_INT8, progress=False)
    reference, x = sqcompile.compile(model, plan=plan, backend="eager"), token_batches()[0]["input_ids"]
    for layer in model.model.layers:
        layer.compile(backend=smoothquant, options={"plan": plan})
    with torch.no_grad():
        got = model(x, use_cache=False).logits
    want = reference(input_ids=x).logits
    assert float((got - want).abs().max()) <= 1e-5
    assert len(compilations) == 2 and counters["stats"]["unique_graphs"] == 1


_ALONE = """
import os, torch, torch._inductor.config, sqcompile
from conftest import ALL_INT8, tiny_lm, token_batches
from sqcompile.backend import smoothquant
torch._dynamo.config.fake_tensor_cache_enabled = True
for layers in (2, 2, 32):   # the first one imports and builds what all need
    torch._dynamo.reset()
    model, x = tiny_lm("llama", num_hidden_layers=layers), token_batches()[0]["input_ids"]
    plan = sqcompile.calibrate(model, token_batches(), recipe=ALL_INT8, progress=False)
    for layer in model.model.layers:
        layer.compile(backend=smoothquant, options={"plan": plan})
    start = sum(os.times()[:4])   # of this process and the compilers it starts: other processes are not in it
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        model(x, use_cache=False)
    print(sum(os.times()[:4]) - start)
"""


@pytest.mark.slow
def test_thirty_two_layers_compiled_alone_take_about_as_long_as_two():
    """As users compile: in a process of its own, without the tests' checks."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SQCOMPILE_VERIFY": "0"}
    done = subprocess.run([sys.executable, "-c", _ALONE], env=env, check=True, capture_output=True, text=True)
    two, many = map(float, done.stdout.split()[-2:])
    assert many < 2 * two


class Recorded(torch.fx.Interpreter):
    """Runs a graph on fake tensors and compares sizes and strides with those that are recorded."""

    def fetch_attr(self, target):
        tensor = super().fetch_attr(target)
        return tensor if tensor.is_mkldnn else about(self.module).fake_mode.from_tensor(tensor, static_shapes=True)

    def run_node(self, n):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and not result.is_mkldnn:
            number = lambda s: s.node.hint if isinstance(s, torch.SymInt) else s  # noqa: E731
            for got, said in ((result.shape, value(n).shape), (result.stride(), value(n).stride())):
                assert [*map(number, got)] == [*map(number, said)], n.format_node()
        return result


class Copied(Attend):
    """Attention in matmuls, and views of views."""

    def forward(self, x):
        q, k, v = (t[:, :, :, :].detach() for t in self.heads(x))
        return self.join(torch.softmax(q @ k.mT, -1) @ v)


@pytest.mark.parametrize(("name", "gpu"), [("llama", False), ("llama", True), ("opt", True), ("copied", True)])
def test_a_cut_may_fall_anywhere(name, gpu):
    """What passes from one part to the next has the strides that the next one is compiled for."""
    model, batches = (
        (Copied().eval(), [torch.randn(2, 9, 32)]) if name == "copied" else (tiny_lm(name), token_batches())
    )
    target = "cuda-sm90" if gpu else None
    gm = sqcompile.compile(model, batches, recipe="O3", backend="eager", progress=False, target=target).lowered
    with about(gm).fake_mode, enable_python_dispatcher():  # as `record` has it: torch 2.11 needs it for symbolic sizes
        Recorded(gm).run(*[value(n) for n in gm.graph.find_nodes(op="placeholder")])


@pytest.mark.parametrize("tuned", [{}, {"max_autotune": True}, {"benchmark_fusion": True}])
@pytest.mark.parametrize("gpu", [False, True])
def test_on_gpus_nothing_is_decided_by_the_clock_unless_it_is_asked_for(gpu, tuned, monkeypatch):
    from sqcompile.compiled import inductor
    from sqcompile.pytorch import inductor as torch_inductor

    seen = []

    def compile_fx(flat, fakes):
        seen.append(torch_inductor.config.deterministic)
        return flat

    monkeypatch.setattr(torch_inductor, "compile_fx", compile_fx)
    monkeypatch.setattr(inductor, "_on_gpu", lambda flat: gpu)
    net = sqcompile.compile(nn.Linear(16, 16), [torch.randn(2, 16)], backend="eager", progress=False)
    flat, _ = flatten(net.lowered)
    with torch_inductor.config.patch(tuned):
        inductor.inductor(flat)
    assert seen == [gpu and not tuned]
