"""On a GPU: sqcompile.generate replays one CUDA graph a token, and writes what model.generate writes."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref

import pytest
import torch
from conftest import tiny_lm, token_batches
from torch.profiler import ProfilerActivity, profile

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.errors import GenerationError
from sqcompile.generation import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
generate = functools.partial(sqcompile.generate, record=True)
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def nothing_is_refused():
    """A step that cannot be recorded says so in a warning, and runs: here that is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be recorded as a CUDA graph.*")
        yield


@pytest.fixture
def llama():
    model = tiny_lm("llama", max_position_embeddings=512).cuda()
    batches = [{k: v.cuda() for k, v in b.items()} for b in token_batches()]
    return model, sqcompile.calibrate(model, batches, progress=False)


def compiled(model, plan, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend=smoothquant, options={"plan": plan, **options})


def prompts(*shape, seed=5):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def padded():
    ids = prompts(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def recordings(net):
    return sum(len(replays._recorded) for _, replays in run._kept[net].states.values())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "qwen2"])
def test_a_float_model_writes_what_transformers_writes(family):
    model, (ids, mask) = tiny_lm(family, max_position_embeddings=512).cuda(), padded()
    for x, m in ((ids[2:], None), (ids, mask)):
        settings = {**PLAIN, "max_new_tokens": 40}
        free = model.generate(x, attention_mask=m, **settings)
        assert torch.equal(generate(model, x, m, **settings), free)
        assert torch.equal(generate(model, x, m, **settings), free)
        settings["eos_token_id"] = sorted({int(row[x.shape[1] + 21]) for row in free})
        settings |= {"repetition_penalty": 1.2, "min_new_tokens": 9}
        want = model.generate(x, attention_mask=m, **settings)
        assert torch.equal(generate(model, x, m, **settings), want)
        assert torch.equal(generate(model, x.cpu(), None if m is None else m.cpu(), **settings), want.cpu())
    assert recordings(model) == 4  # with and without an end, for one prompt and three


@pytest.mark.parametrize(
    "options",
    [{"compiler": "eager"}, {}, {"mode": "reduce-overhead"}, {"mode": "reduce-overhead", "regional": True}],
    ids=str,
)
def test_a_compiled_model_writes_what_its_own_generate_writes(llama, options):
    model, plan = llama
    net, (ids, mask) = compiled(model, plan, **options), padded()
    settings = {**PLAIN, "max_new_tokens": 40}
    static = {"cache_implementation": "static", "max_cache_len": 128}
    for x, m in ((ids[2:], None), (ids, mask)):
        got = [generate(net, x, m, **settings) for _ in range(3)]
        want = net.generate(x, attention_mask=m, **settings, **static)
        assert all(torch.equal(one, want) for one in got)
    assert recordings(net) == 2


def test_half_precision_and_compiled_by_inductor():
    model, x = tiny_lm("llama", dtype=torch.bfloat16, max_position_embeddings=512).cuda(), prompts(2, 12)
    settings = {**PLAIN, "max_new_tokens": 24}
    want = generate(model, x, **settings)
    assert torch.equal(generate(model, x, **settings), want)
    net = torch.compile(model)
    got = generate(net, x, **settings)
    assert torch.equal(generate(net, x, **settings), got) and recordings(net) == 1
    with pytest.raises(GenerationError, match="compile it without mode='reduce-overhead'"):
        generate(torch.compile(model, mode="reduce-overhead"), x, **settings)


def test_a_token_is_one_graph(llama):
    model, plan = llama
    net, x = compiled(model, plan), prompts(1, 9)

    def launches(new):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            generate(net, x, **PLAIN, max_new_tokens=new)
            torch.cuda.synchronize()
        calls = {e.key: e.count for e in profiler.key_averages()}
        kernels = sum(calls.get(name, 0) for name in ("cudaLaunchKernel", "cuLaunchKernelEx", "cuLaunchKernel"))
        return calls.get("cudaGraphLaunch", 0), kernels, calls.get("cudaStreamSynchronize", 0)

    generate(net, x, **PLAIN, max_new_tokens=40)
    short, long = launches(20), launches(60)
    assert long[0] - short[0] == 40, "each further token is a graph, and nothing else"
    assert long[1:] == short[1:]


def test_samples_are_the_same_for_equal_seeds(llama):
    model, plan = llama
    net, x = compiled(model, plan, compiler="eager"), prompts(3, 9)
    settings = {**PLAIN, "do_sample": True, "max_new_tokens": 40, "temperature": 1.5, "top_p": 0.95}

    def drawn(seed, net=net, **more):
        torch.manual_seed(seed)
        return generate(net, x, **{**settings, **more})

    first = drawn(1)  # of which some steps ran before one was recorded
    assert torch.equal(drawn(1), first) and torch.equal(drawn(1), first), "and all later ones were replayed"
    assert not torch.equal(drawn(2), first)
    own = torch.Generator("cuda").manual_seed(1)
    assert torch.equal(drawn(7, generator=own), first)
    after = own.get_state()
    own.manual_seed(1)
    assert torch.equal(drawn(8, generator=own), first) and torch.equal(own.get_state(), after)
    rows = [row.tolist() for row in first[:, 9:]]
    assert all(len(set(row)) > 10 for row in rows), "a replay draws anew"
    before = recordings(net)
    assert not torch.equal(drawn(1, temperature=0.6), first) and recordings(net) == before
    free = drawn(1, net=model)
    assert torch.equal(drawn(1, net=model), free)


def test_replayed_draws_come_by_their_probabilities():
    """A model that gives the same logits for every text: 40000 draws, nearly all of them replayed."""
    model = tiny_lm("llama").cuda()
    logits = 1.5 * torch.randn(96, generator=torch.Generator().manual_seed(0)).cuda()
    model.lm_head.register_forward_hook(lambda module, args, out: logits.expand(out.shape))
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": None, "max_new_tokens": 80}
    tokens = generate(model, prompts(1, 5).expand(500, -1), **settings)[:, 5:]
    assert recordings(model) == 1
    expected = 40000 * logits.double().softmax(-1)
    counts = torch.bincount(tokens.flatten(), minlength=96).double()
    often = expected >= 5
    chi, freedom = float(((counts - expected) ** 2 / expected)[often].sum()), int(often.sum()) - 1
    assert chi < freedom + 5 * (2 * freedom) ** 0.5


def test_other_weights_are_recorded_again(llama):
    model, plan = llama
    net, x = compiled(model, plan, compiler="eager"), prompts(2, 9)
    settings = {**PLAIN, "max_new_tokens": 30}
    static = {"cache_implementation": "static", "max_cache_len": 128}
    first = generate(net, x, **settings)
    model.load_state_dict({k: v * (0.5 if "down_proj" in k else 1.0) for k, v in model.state_dict().items()})
    changed = generate(net, x, **settings)
    assert not torch.equal(changed, first)
    assert torch.equal(changed, net.generate(x, **settings, **static))
    assert torch.equal(generate(net, x, **settings), changed) and recordings(net) == 1


def test_tokens_come_in_order_and_in_any_stream(llama):
    model, plan = llama
    net, x = compiled(model, plan, compiler="eager"), prompts(2, 9)
    settings = {**PLAIN, "max_new_tokens": 30}
    want, told = generate(net, x, **settings), []
    flipped = generate(net, x.flip(1), **settings)
    for _ in range(2):  # the GPU is behind: the other stream must wait for what the call before has yet to do
        torch.cuda._sleep(200_000_000)
        late, side = generate(net, x, **settings), torch.cuda.Stream()
        with torch.cuda.stream(side):
            other = generate(net, x.flip(1), **settings)
        side.synchronize()
        assert torch.equal(late, want) and torch.equal(other, flipped)
    with torch.cuda.stream(torch.cuda.Stream()):
        got = generate(net, x, callback=told.append, **settings)
        assert torch.equal(got, want)
    assert torch.equal(torch.stack(told, 1), want[:, 9:].cpu())
    with pytest.raises(KeyError):
        generate(net, x, callback=lambda tokens: {}["a fault of the caller"], **settings)
    assert torch.equal(generate(net, x, **settings), want)


def test_nothing_is_left_of_a_model():
    model, x = tiny_lm("llama").cuda(), prompts(2, 9)
    generate(model, x, **PLAIN, max_new_tokens=20)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_cannot_be_recorded_runs_all_the_same():
    model, x = tiny_lm("llama").cuda(), prompts(2, 9)
    settings = {**PLAIN, "max_new_tokens": 20, "do_sample": True}
    torch.manual_seed(0)
    want = generate(model, x, **settings)
    sqcompile.free_generation(model)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + 0 * float(logits.sum().isnan()))
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = generate(model, x, **settings)
    assert torch.equal(got, want)
    assert any("cannot be recorded as a CUDA graph" in str(w.message) for w in said)
    torch.manual_seed(0)
    assert torch.equal(generate(model, x, **settings), want)
    # the device's own random numbers and its memory are as before, and the next model is recorded
    torch.manual_seed(0)
    drawn = torch.rand(4096, device="cuda")
    torch.manual_seed(0)
    assert torch.equal(torch.rand(4096, device="cuda"), drawn) and len(drawn.unique()) > 4000
    torch.cuda.empty_cache()
    net = tiny_lm("llama").cuda()
    torch.manual_seed(0)
    want = generate(net, x, **settings)
    torch.manual_seed(0)
    assert torch.equal(generate(net, x, **settings), want) and recordings(net)
