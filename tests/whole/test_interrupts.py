"""Ctrl-C at any moment leaves the model as it was, no hook on it, and PyTorch able to compile the next."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import sqcompile
from sqcompile.process import interrupts

pytestmark = pytest.mark.usefixtures("own_ctrl_c")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.kept = {}

    def forward(self, x):
        self.kept["x"] = x
        return self.down(torch.relu(self.up(self.norm(x))))


def net():
    torch.manual_seed(0)
    return Net().eval()


def compiled(model, loader=None):
    loader = loader or [torch.randn(2, 5, 16) for _ in range(2)]
    return sqcompile.compile(model, loader, backend="eager", progress=False)


def interrupt(*args):
    signal.raise_signal(signal.SIGINT)


def untouched(model):
    assert type(model.up.weight) is nn.Parameter and not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs and "x" not in model.kept
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
    assert torch.is_grad_enabled() and interrupts._current is None


def module(name):
    return importlib.import_module(f"sqcompile.{name}")  # of the package's attributes, some are functions of that name


PLACES = {
    "capture": (module("capture.trace"), "refuse_names"),
    "in the export": (module("capture.untouched")._RealTensors, "__torch_dispatch__"),
    "calibration": (module("statistics.observe").InputStats, "update"),
    "labels": (module("passes.labels.interpreter").LabelInterpreter, "run_node"),
    "plan": (module("passes.planning.choose"), "each_best"),
    "rewriting": (module("passes.ir.graph"), "record"),
    "emit": (module("compiled.emit"), "flatten"),
}


@pytest.mark.slow
@pytest.mark.parametrize("callable_loader", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_in_each_stage(place, callable_loader, monkeypatch):
    model, (owner, name) = net(), PLACES[place]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    times = 0

    def at_the_second(*args, **kwargs):
        nonlocal times
        times += 1
        if times == (2 if place in ("in the export", "labels", "rewriting") else 1):
            interrupt()
        return original(*args, **kwargs)

    def loader(m):
        m(torch.randn(2, 5, 16))
        m.kept.clear()

    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, at_the_second)
    with pytest.raises(KeyboardInterrupt):
        compiled(model, loader if callable_loader else None)
    monkeypatch.undo()
    untouched(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x = torch.randn(3, 4, 16)
    assert torch.allclose(compiled(model)(x), model(x), atol=0.1)


def test_the_users_own_code_is_interrupted_at_once():
    reached = []

    def loader(model):
        model(torch.randn(2, 5, 16))
        model.kept.clear()
        interrupt()
        reached.append("after")

    def batches():
        yield torch.randn(2, 5, 16)
        interrupt()
        reached.append("after")
        yield torch.randn(2, 5, 16)

    for data in (loader, batches()):
        model = net()
        with pytest.raises(KeyboardInterrupt):
            compiled(model, data)
        untouched(model)
    assert reached == []


def test_the_second_is_raised_at_once_and_others_handlers_are_kept():
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        interrupt()
        interrupt()
        pytest.fail("the second one had no effect")
    seen = []
    before = signal.signal(signal.SIGINT, lambda *args: seen.append(args[0]))
    try:
        with interrupts.deferred():
            interrupt()
            assert seen == []
            interrupts.checkpoint()
            assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def _one_call_after(count, work):
    """Runs it with Ctrl-C where Python next looks for signals after so many such places: whether there were so many."""
    left = count

    def look(frame, event, arg):
        nonlocal left
        if event in ("call", "c_return"):  # the places where Python 3.11 and later call a handler
            left -= 1
            if left == 0:
                interrupt()

    before = sys.getprofile()
    try:
        sys.setprofile(look)
        work()
    finally:
        sys.setprofile(before)
    return left <= 0


def test_an_interrupt_at_each_instruction_leaves_no_state():
    """What stands between the pipeline and the user's code, entered and left as a calibration by a callable does it."""

    def work():
        with interrupts.deferred(), torch.no_grad():
            interrupts.checkpoint()
            with interrupts.at_once(), interrupts.deferred():
                interrupts.checkpoint()
            for _ in interrupts.each_at_once([1]):
                interrupts.checkpoint()

    work()
    for count in range(1, 1000):
        reached = False
        try:
            reached = _one_call_after(count, work)
        except KeyboardInterrupt:
            reached = True
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, count
        assert interrupts._current is None and torch.is_grad_enabled(), count
        if not reached:
            break
    assert 50 < count < 999


def test_a_handler_that_the_users_code_sets_is_kept():
    def own(number, frame):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        with interrupts.deferred(), interrupts.at_once():
            signal.signal(signal.SIGINT, own)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_the_users_code_keeps_is_the_one_before():
    """Such as a library that calls the handler that it found, for as long as it lives."""
    with interrupts.deferred(), interrupts.at_once():
        kept = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            kept(signal.SIGINT, None)


def test_other_threads_compile_without_handlers():
    found = []
    thread = threading.Thread(target=lambda: found.append(compiled(net())))
    thread.start()
    thread.join()
    assert isinstance(found[0], sqcompile.CompiledModel)


_AT_RANDOM = """
import random, signal, sys, time
import torch
sys.path[:0] = {tests!r}
from test_interrupts import compiled, net, untouched

signal.signal(signal.SIGINT, signal.default_int_handler)
model, x, random = net(), torch.randn(3, 4, 16), random.Random(0)
data = [torch.randn(2, 5, 16) for _ in range(2)]
def loader(m):
    for batch in data:
        m(batch)
    m.kept.clear()
compiled(model, loader)
start = time.process_time()
want = compiled(model, loader)(x)
took = time.process_time() - start
before = {{k: v.clone() for k, v in model.state_dict().items()}}
signal.signal(signal.SIGVTALRM, lambda *args: signal.raise_signal(signal.SIGINT))
cut = 0
for i in range(20):
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, random.uniform(0.001, took))
        try:
            compiled(model, loader if i % 2 else data)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except KeyboardInterrupt:
        cut += 1
    model.kept.clear()  # what the model kept of a real call that the loader made
    untouched(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(compiled(model, loader)(x), want)
assert cut >= 10, cut
print("interrupted", cut)
"""


@pytest.mark.slow
def test_twenty_interrupts_at_random_moments():
    code = _AT_RANDOM.format(tests=[str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "interrupted" in done.stdout, (done.stderr[-2000:], time.monotonic() - start)
