"""Small models every test file uses, and how errors are measured."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from families import CAUSAL, causal_lm, roughen
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from sqcompile import PRESETS, Recipe
from sqcompile.capture.call_spec import to_spec
from sqcompile.capture.inputs import Call, as_call
from sqcompile.capture.trace import trace
from sqcompile.passes.attention.head_sites import match_heads
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.labels.match import input_sites, match
from sqcompile.passes.rewrite.fold import fold
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.plan import Plan

# as many threads as `make test` has cores, over its processes
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
# Inductor's pool of processes costs a fifth of the time of tests that use it
torch._inductor.config.compile_threads = 1
if "PYTEST_XDIST_WORKER" in os.environ:  # the processes that tests start do alike
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
# what is remembered of fake tensors helps where layers repeat; of many small models it costs a fifth of the tests' time
torch._dynamo.config.fake_tensor_cache_enabled = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SQCOMPILE_VERIFY", "1")  # each stage's recorded values are computed again

# When no more tests are begun, in seconds since 1970: for a machine whose speed is not known, and a run that has to end.
UNTIL = int(os.environ.get("SQCOMPILE_TESTS_UNTIL", "0"))

# the default, of which no linear stays in float for accuracy
ALL_INT8 = dataclasses.replace(PRESETS["default"], float_work=0.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of long.txt as slow. The longest tests first: the other process has something to do when they end."""
    lines = (Path(__file__).parent / "long.txt").read_text().splitlines()[1:]
    found = {item.nodeid: item for item in items}
    for name in lines:
        if name in found:
            found[name].add_marker(pytest.mark.slow)
    items.sort(key=lambda item: "interpreter" not in item.name)
    if UNTIL:  # what is left out at the end is something else each time
        first = UNTIL % max(1, len(items))
        items[:] = items[first:] + items[:first]


def pytest_runtest_setup() -> None:
    if UNTIL and time.time() > UNTIL:
        pytest.skip("the time of this run is over")


def pytest_collection_finish() -> None:
    """What the imports made stays: garbage is looked for among what the tests make."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference.double()).norm() / reference.double().norm())


def typical_error(y: Tensor, reference: Tensor) -> float:
    """The median of the rows' relative errors: a router may send single tokens to another expert."""
    return float(((y - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-12)).median())


def tiny_lm(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A tiny causal LM of a transformers family with random weights, norms and outliers."""
    kind, sizes = CAUSAL[family]
    torch.manual_seed(0)
    return roughen(causal_lm(kind, {**sizes, **config}).eval()).to(dtype)


def token_batches(
    n: int = 4, shape: tuple[int, int] = (2, 17), seed: int = 3, vocab: int = 96
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, vocab, shape, generator=generator)} for _ in range(n)]


def sites_of(model: nn.Module, *inputs: Any, **named: Any) -> Any:
    """The traced graph of a call, its sites and its refusals."""
    gm = trace(model, as_call(model, named or inputs))
    return gm, *match(gm)


def fold_everything(model: nn.Module, *inputs: Any, seed: int = 0, **named: Any) -> Any:
    """Folds random scales, far from 1, into every site there is; no calibration is involved."""
    call = as_call(model, named or inputs)
    return fold_sites(trace(model, call), call, seed)


def fold_sites(gm: fx.GraphModule, call: Call, seed: int = 0, into: fx.GraphModule | None = None) -> Any:
    """`fold_everything` of the traced graph of a call; into the same graph in float64 instead, if one is given."""
    sites, refusals = match(gm)
    generator = torch.Generator().manual_seed(seed)
    every = sites + input_sites(refusals, {l.name for l in find_linears(gm)})
    scales = {s.name: torch.where(s.free, torch.exp(torch.randn(s.channels, generator=generator)), 1.0) for s in every}
    layers = tuple(LayerPlan(l.name, "linear", True, "folded", "") for l in find_linears(gm))
    if into is not None:
        scales = {name: s.double() for name, s in scales.items()}
    plan = Plan(Recipe(), to_spec(call), scales, layers)
    return fold(into or gm, every, plan), sites, refusals


def fold_heads(gm: Any, attentions: Any, seed: int = 0) -> Any:
    """Folds random scales, far from 1, into every attention; and the sites and reasons."""
    sites, why = match_heads(gm, attentions)
    generator = torch.Generator().manual_seed(seed)
    heads = {f"{s.name}/scale": torch.exp(torch.randn(s.classes, generator=generator)) for s in sites}
    return fold(gm, [], Plan(Recipe(), None, {}, (), (), heads), sites), sites, why


@pytest.fixture(scope="session")
def lm() -> tuple[nn.Module, Any]:
    """The shipped language model and its tokenizer; tests must not change it."""
    from sqcompile.lm import load_lm

    return load_lm()


@pytest.fixture(scope="session")
def float_lm(lm: tuple[nn.Module, Any]) -> nn.Module:
    """The shipped language model, which computes the logits of a batch once: to evaluate others beside it."""
    from sqcompile.bench.tools import Remembered

    return Remembered(lm[0])


@pytest.fixture(scope="session")
def lm_windows(lm: tuple[nn.Module, Any]) -> tuple[Tensor, Tensor]:
    """Calibration windows and windows of held-out Python source, int64 [16, 512] and [48, 512]."""
    from sqcompile.lm import calibration_texts, evaluation_texts, token_windows

    return (
        token_windows(calibration_texts(), lm[1], 512, 16),
        token_windows(evaluation_texts(), lm[1], 512, 48),
    )


@pytest.fixture
def own_ctrl_c() -> Iterator[None]:
    """Python's own handler: a process that was started in the background ignores Ctrl-C, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before, nothing left behind, and counters that start at 0."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
