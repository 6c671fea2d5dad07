"""torch.compile(backend="smoothquant"): methods of every kind that call the model run the compiled code."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from backend_cases import MLP, compiled, outliers, planned

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Speaks(MLP):
    """Calls itself in methods of every kind."""

    def twice(self, x):
        yield self(x)
        return (yield self(x))

    async def later(self, x):
        await asyncio.sleep(0)
        return self(x)

    async def stream(self, x):
        yield self(x)
        await asyncio.sleep(0)
        yield self(x)

    def slowly(self, x, enter, leave):
        enter.set()
        leave.wait(10)
        return self(x)


@pytest.fixture
def speaks():
    torch.manual_seed(0)
    model, x = Speaks().eval(), outliers()[0]
    plan, reference = planned(model)
    net = compiled(model, plan=plan)
    with torch.no_grad():
        assert torch.equal(net(x), reference(x)) and not torch.equal(model(x), reference(x))
        yield model, net, x, reference(x)


def test_generators_and_coroutines_run_compiled(speaks):
    model, net, x, want = speaks
    generator = net.twice(x)
    assert torch.equal(next(generator), want)
    assert not torch.equal(model(x), want), "the model is its own while a generator waits"
    assert torch.equal(generator.send(None), want)
    with pytest.raises(StopIteration) as stop:
        generator.send(3)
    assert stop.value.value == 3

    async def main():
        assert torch.equal(await net.later(x), want)
        assert [torch.equal(y, want) async for y in net.stream(x)] == [True, True]

    asyncio.run(main())
    assert not torch.equal(model(x), want) and model._compiled_call_impl is None


def test_methods_in_two_threads(speaks):
    model, net, x, want = speaks
    results = {}
    enter, leave = ([threading.Event() for _ in range(2)] for _ in range(2))

    def run(i):
        with torch.no_grad():
            results[i] = net.slowly(x, enter[i], leave[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for i, thread in enumerate(threads):
        thread.start()
        enter[i].wait(10)
    for i, thread in enumerate(threads):  # the first to enter leaves first
        leave[i].set()
        thread.join()
    assert torch.equal(results[0], want) and torch.equal(results[1], want)
    assert model._compiled_call_impl is None and not torch.equal(model(x), want)
