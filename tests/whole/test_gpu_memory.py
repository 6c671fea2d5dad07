"""A GPU without memory: in the middle of compile() or of a recording, it is an error, and the model is as it was."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch import nn

import sqcompile
from sqcompile.backend.cuda_graphs import Pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MB = 2**20
WIDTH = 4096  # each weight, 16 MiB in INT8, has pages of its own: none fits into what another one's left


def net():
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))]
    return nn.Sequential(*layers).to("cuda", torch.bfloat16).eval()


def batches():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(4, 16, WIDTH, generator=g).to("cuda", torch.bfloat16) for _ in range(3)]


@contextlib.contextmanager
def room(nbytes):
    """No more memory than there is in use, and some bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("given", ["data", "plan"])
def test_compiling_without_memory_leaves_the_model_as_it_was(given):
    model, data = net(), batches()
    plan = sqcompile.calibrate(model, data, progress=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    want = sqcompile.compile(model, plan=plan, backend="eager", progress=False)(data[0])
    args = (data,) if given == "data" else ()
    more = {} if given == "data" else {"plan": plan}
    failed = 0
    for some in (0, 24 * MB, 56 * MB, 90 * MB):
        held = torch.cuda.memory_allocated()
        try:
            with room(some):
                sqcompile.compile(model, *args, backend="eager", progress=False, **more)
        except (torch.OutOfMemoryError, sqcompile.SQCompileError) as e:
            assert "out of memory" in str(e), e
            failed += 1
            del e
        gc.collect()
        assert torch.cuda.memory_allocated() <= held
    assert failed
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    again = sqcompile.compile(model, *args, backend="eager", progress=False, **more)
    assert torch.equal(again(data[0]), want)


@pytest.mark.parametrize("some", [0, 100 * MB])  # none for the random numbers that a recording may draw; some
def test_recording_without_memory_leaves_the_device_as_it_was(some):
    pool, stream = Pool(torch.device("cuda", 0)), torch.cuda.current_stream()

    def run():
        return [
            torch.ones(30 * MB, dtype=torch.uint8, device="cuda"),
            torch.ones(300 * MB, dtype=torch.uint8, device="cuda"),
        ]

    with room(some), pytest.raises(torch.OutOfMemoryError):
        pool.record(run)
    assert torch.cuda.current_stream() == stream and torch.rand(4, device="cuda").isfinite().all()
    results, replay = pool.record(run)
    results[1].zero_()
    replay()
    assert all(int(x.min()) == 1 for x in results)
