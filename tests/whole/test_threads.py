"""Threads: what several do at the same time is what they would do one after the other."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from backend_cases import call, compiled, mlp, outliers, planned, session
from torch import nn

import sqcompile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SHAPES = [(2, 8), (3, 8), (2, 5), (1, 7), (4, 1), (1, 1)]


def inputs():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, 64, generator=generator) for shape in SHAPES]


def together(n, work):
    """What ``work(i)`` gives in n threads that begin at the same time; an error in one of them is raised."""
    barrier, found = threading.Barrier(n), [None] * n

    def run(i):
        barrier.wait()
        try:
            found[i] = work(i)
        except BaseException as e:
            found[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def hammer(net, want, threads, times):
    """Every output of every thread is one of those of its input."""

    def work(i):
        wrong = 0
        for k in range(times):
            j = (i + k) % len(want)
            got = call(net, want[j][0])
            wrong += not any(torch.equal(got, w) for w in want[j][1:])
        return wrong

    assert sum(together(threads, work)) == 0


@pytest.mark.parametrize(("n", "times"), [(3, 20), pytest.param(8, 200, marks=pytest.mark.slow)])
def test_a_compiled_model(n, times):
    _, reference = planned(mlp())
    hammer(reference, [(x, reference(x)) for x in inputs()], n, times)


@pytest.mark.slow
def test_a_model_compiled_by_inductor():
    reference = sqcompile.compile(mlp(), outliers(), progress=False)
    hammer(reference, [(x, reference(x)) for x in inputs()], 8, 200)


@pytest.mark.parametrize(("n", "times"), [(3, 20), pytest.param(8, 200, marks=pytest.mark.slow)])
def test_the_backend_with_a_plan(n, times):
    model = mlp()
    plan, reference = planned(mlp())
    hammer(compiled(model, plan=plan), [(x, reference(x)) for x in inputs()], n, times)  # compiled by the threads


@pytest.mark.parametrize(("n", "times"), [(3, 20), pytest.param(8, 200, marks=pytest.mark.slow)])
def test_the_backend_that_calibrates(n, times):
    """A call runs in float, as the model does, or in INT8, as the plan says that was made of what all threads had."""
    model = mlp()
    net, xs = compiled(model, calibration_steps=6), inputs()
    early: list = []

    def first(i):
        x = xs[i % len(xs)]
        for _ in range(times):
            early.append((x, call(net, x)))

    together(n, first)
    plan = session(model).plan
    assert plan is not None
    reference = sqcompile.compile(mlp(), plan=plan, backend="eager", example_inputs=(xs[0],))
    for x, got in early:
        assert torch.equal(got, reference(x)) or torch.equal(got, call(model, x))
    assert sum(torch.equal(got, call(model, x)) for x, got in early) < 6 + 2 * n
    hammer(net, [(x, reference(x)) for x in xs], n, 5)


def test_calibration_counts_calls_that_have_ended():
    """Calls of other threads that have only begun are none that statistics could be made of."""
    model, entered, go_on = mlp(), threading.Semaphore(0), threading.Event()

    @torch.library.custom_op("sqcompile_tests::wait", mutates_args=())
    def wait(x: torch.Tensor) -> torch.Tensor:
        entered.release()
        go_on.wait()
        return x.clone()

    wait.register_fake(lambda x: torch.empty_like(x))
    model.norm = nn.Sequential(model.norm)
    model.norm.forward = lambda x: wait(model.norm[0](x))
    go_on.set()
    net, x = compiled(model, calibration_steps=2), outliers()[0]
    call(net, x)
    go_on.clear()
    while entered.acquire(blocking=False):
        pass
    threads = [threading.Thread(target=call, args=(net, x)) for _ in range(4)]
    for t in threads:
        t.start()
    for _ in threads:
        assert entered.acquire(timeout=60)  # none waits for another, and all run in float
    assert session(model).plan is None
    go_on.set()
    for t in threads:
        t.join()
    call(net, x)
    assert session(model).plan is not None


def test_models_are_compiled_and_calibrated_in_threads():
    want = [planned(mlp(), [x])[1](x) for x in inputs()[:3]]
    models = [(mlp(), mlp()) for _ in range(6)]  # made here, of one generator of random numbers

    def work(i):
        x, (model, other) = inputs()[i % 3], models[i]
        if i < 3:
            return sqcompile.compile(model, [x], backend="eager", progress=False)(x)
        plan = sqcompile.calibrate(model, lambda net: net(x), progress=False)
        return call(compiled(other, plan=plan), x)

    for i, got in enumerate(together(6, work)):
        assert torch.equal(got, want[i % 3])


def test_one_model_is_calibrated_in_two_threads():
    """Hooks see the calls of both."""
    model = mlp()
    batches = [outliers(2), inputs()[:3]]
    want = [planned(mlp(), b)[0] for b in batches]

    def data(net, i):
        for x in batches[i]:
            net(x)

    plans = together(2, lambda i: sqcompile.calibrate(model, lambda net: data(net, i), progress=False))
    for plan, expected in zip(plans, want, strict=True):
        assert all(torch.equal(plan.scales[k], expected.scales[k]) for k in expected.scales)


def test_calibration_data_may_come_from_threads():
    """No lock is held while the user's own code runs, which may wait for threads that compile."""
    model, x = mlp(), outliers()[0]
    plan, reference = planned(mlp())
    other = compiled(mlp(), plan=plan)

    def data(net):
        assert all(torch.equal(y, reference(x)) for y in together(2, lambda i: (net(x), call(other, x))[1]))

    found = sqcompile.calibrate(model, data, progress=False)
    assert torch.equal(sqcompile.compile(mlp(), plan=found, backend="eager")(x), planned(mlp(), [x, x])[1](x))


def test_a_batch_that_is_refused_leaves_nothing_behind():
    model = mlp()
    net, x = compiled(model, calibration_steps=2), outliers()[0]
    bad = x.clone()
    bad[0, 0, 0] = torch.nan
    call(net, x)
    with pytest.raises(sqcompile.CalibrationError, match="not finite"):
        call(net, bad)
    call(net, x)
    _, reference = planned(mlp(), [x, x])
    assert torch.equal(call(net, x), reference(x))


def test_a_model_that_dies_in_another_thread():
    """Its graphs are dropped by whoever comes next, as the thread that frees it waits for nobody."""
    from sqcompile.process.lock import compiling

    model = mlp()
    plan, _ = planned(mlp())
    net, x = compiled(model, plan=plan), outliers()[0]
    call(net, x)
    [runner] = session(model).runners
    owned = [model, net]
    del model, net
    with compiling():
        t = threading.Thread(target=owned.clear)
        t.start()
        t.join(timeout=60)
        assert not t.is_alive()
    call(compiled(mlp(), plan=plan), x)
    assert len(runner.bound) <= 1


def test_weights_that_never_stay_are_said_once():
    """Offloaded weights are put into the model before each call and taken out after it."""

    def offloaded(model):
        kept = {n: p.detach().clone() for n, p in model.named_parameters()}

        def put(module, args):
            for name, t in kept.items():
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(t.clone(), requires_grad=False))

        model.register_forward_pre_hook(put)
        return model

    x = outliers()[0]
    net = compiled(offloaded(mlp()), calibration_steps=2)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(12):
            assert torch.equal(call(net, x), call(mlp(), x))
    [said] = [str(w.message) for w in found if "FLOAT" in str(w.message)]
    assert said.startswith("8 calls ran in FLOAT") and "offloading" in said and "calibration_steps=2" in said


def test_weights_that_never_stay_with_a_plan():
    model, x = mlp(), outliers()[0]
    plan, reference = planned(mlp())
    net = compiled(model, plan=plan)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(8):
            for owner, name in ((model.up, "weight"), (model.down, "weight")):
                setattr(owner, name, nn.Parameter(getattr(owner, name).clone(), requires_grad=False))
            assert torch.equal(call(net, x), reference(x))
    said = [str(w.message) for w in found if "quantized anew" in str(w.message)]
    assert len(said) == 1


def test_constants_and_tasks_that_vary_do_not_keep_a_model_in_float():
    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.heads = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x, task: int):
            return self.heads[task](self.body(x))

    torch.manual_seed(0)
    model, x = Tasks().eval(), outliers()[0]
    net = compiled(model, calibration_steps=2)
    in_float = [torch.equal(call(net, x, i % 4), call(model, x, i % 4)) for i in range(16)]
    assert in_float == [True] * 8 + [False] * 8
    plan = session(model).plan
    assert {l.name for l in plan.layers if l.quantized} >= {f"heads.{i}.weight" for i in range(4)}
