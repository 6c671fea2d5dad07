"""On a GPU: generation through the backend, and decoding as one CUDA graph a step."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_lm, token_batches
from torch.profiler import ProfilerActivity, profile

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.backend.cuda_graphs import NotRecorded, Pool, Recorder
from sqcompile.backend.session import sessions_of
from sqcompile.bench.generate import static_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def llama():
    model = tiny_lm("llama", dtype=torch.bfloat16, max_position_embeddings=512).cuda()
    batches = [{k: v.cuda() for k, v in b.items()} for b in token_batches()]
    return model, sqcompile.calibrate(model, batches, progress=False)


def compiled(model, plan, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend=smoothquant, options={"plan": plan, **options})


def recordings(model):
    """How many CUDA graphs each compiled graph of the model has."""
    runs = [b.run for s in sessions_of(model) for r in s.runners for b in r.bound]
    return sorted(len(run.recordings) for run in runs if isinstance(run, Recorder))


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_cuda_graphs_generate_the_same_tokens(llama, compiler):
    model, plan = llama
    prompts = [torch.randint(3, 96, shape, device="cuda") for shape in ((2, 12), (2, 12), (1, 7), (2, 30))]
    options = {**PLAIN, "max_new_tokens": 20, "cache_implementation": "static"}
    plain = compiled(model, plan, compiler=compiler)
    want = [plain.generate(x, **options) for x in prompts]
    net = compiled(model, plan, compiler=compiler, mode="reduce-overhead")
    got = [net.generate(x, **options) for x in prompts]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert recordings(model)[0] == 0 and recordings(model)[-1] >= 2  # prefill; decode at two batch sizes or more


def test_a_growing_cache_is_not_recorded(llama):
    model, plan = llama
    x = torch.randint(3, 96, (2, 12), device="cuda")
    want = compiled(model, plan, compiler="eager").generate(x, max_new_tokens=12, **PLAIN)
    got = compiled(model, plan, compiler="eager", mode="reduce-overhead").generate(x, max_new_tokens=12, **PLAIN)
    assert torch.equal(got, want) and set(recordings(model)) == {0}


@torch.no_grad()
def test_a_decoded_token_is_one_cuda_graph(llama):
    model, plan = llama
    net = compiled(model, plan, mode="reduce-overhead")
    cache, x = static_cache(model, 1, 64), torch.randint(3, 96, (1, 9), device="cuda")
    net(x, past_key_values=cache)
    token = x[:, :1]
    for _ in range(4):
        first = net(token, past_key_values=cache).logits
    kept = first.clone()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        net(token, past_key_values=cache)
        torch.cuda.synchronize()
    assert torch.equal(first, kept), "the next call overwrites no result"
    calls = {e.key: e.count for e in profiler.key_averages()}
    assert calls["cudaGraphLaunch"] == 1
    assert calls.get("cudaLaunchKernel", 0) + calls.get("cuLaunchKernelEx", 0) + calls.get("cuLaunchKernel", 0) <= 4
    assert recordings(model)[-1] == 1


def test_regional_blocks_are_recorded_as_one_graph(llama):
    model, plan = llama
    x = torch.randint(3, 96, (1, 12), device="cuda")
    options = {**PLAIN, "max_new_tokens": 16, "cache_implementation": "static"}
    want = compiled(model, plan, regional=True).generate(x, **options)
    got = compiled(model, plan, regional=True, mode="reduce-overhead").generate(x, **options)
    assert torch.equal(got, want) and recordings(model)[-1] == 1


def test_graphs_are_recorded_again_after_weights_change(llama):
    model, plan = llama
    x = torch.randint(3, 96, (1, 12), device="cuda")
    options = {**PLAIN, "max_new_tokens": 12, "cache_implementation": "static"}
    net = compiled(model, plan, compiler="eager", mode="reduce-overhead")
    net.generate(x, **options)
    model.load_state_dict({k: v * (0.5 if "down_proj" in k else 1.0) for k, v in model.state_dict().items()})
    got = net.generate(x, **options)
    assert recordings(model)[-1] == 1
    assert torch.equal(got, compiled(model, plan, compiler="eager").generate(x, **options))


def test_what_cannot_be_recorded_leaves_the_device_as_it_was():
    pool = Pool(torch.device("cuda", 0))
    x, stream = torch.ones(3, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(NotRecorded):
        pool.record(lambda: [x * float(x.sum())])
    assert torch.cuda.current_stream() == stream
    results, replay = pool.record(lambda: [x + 1])
    x.fill_(4)
    replay()
    assert results[0].tolist() == [5.0, 5.0, 5.0] and torch.rand(2, device="cuda").shape == (2,)
