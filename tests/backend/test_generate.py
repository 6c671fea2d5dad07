"""model.generate through the backend: the tokens of the quantized reference, two compilations, every way to generate."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from conftest import tiny_lm, token_batches
from torch import nn
from torch._dynamo.utils import counters
from transformers import pipeline
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.backend.decide import decide
from sqcompile.backend.session import sessions_of
from sqcompile.kernels.cpu import x86

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def llama():
    model = tiny_lm("llama", max_position_embeddings=512)
    reference = sqcompile.compile(model, token_batches(), backend="eager", progress=False)
    return model, reference.plan, reference


def compiled(model, plan, **options):
    return torch.compile(model, backend=smoothquant, options={"plan": plan, "compiler": "eager", **options})


def greedy(reference, ids, new):
    """The quantized model without a cache: argmax of the last token, int64 [batch, tokens + new]."""
    for _ in range(new):
        ids = torch.cat([ids, reference(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def prompts(*shape, seed=5):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_and_two_compilations_for_any_prompt_length(llama, cache):
    model, plan, reference = llama
    net = compiled(model, plan)
    for length in (30, 7, 5):  # the longest first: a static cache that grows is another cache
        x = prompts(2, length)
        got = net.generate(x, max_new_tokens=16, cache_implementation=cache, **PLAIN)
        assert torch.equal(got, greedy(reference, x, 16))
        assert graphs() == 2
    assert model._compiled_call_impl is None and "get_compiled_call" not in model.__dict__


def test_the_quantized_stage_generates_the_same_tokens(llama):
    model, plan, reference = llama
    x = prompts(2, 7)
    got = compiled(model, plan, stage="quantized").generate(x, max_new_tokens=16, **PLAIN)
    assert torch.equal(got, greedy(reference, x, 16)) and graphs() == 2


@pytest.mark.parametrize("how", ["compile in place", pytest.param("forward", marks=pytest.mark.slow)])
def test_other_ways_to_compile(llama, how):
    model, plan, reference = llama
    x, options = prompts(1, 6), {"plan": plan, "compiler": "eager"}
    try:
        if how == "forward":
            model.forward = torch.compile(model.forward, backend=smoothquant, options=options)
        else:
            model.compile(backend=smoothquant, options=options)
        assert torch.equal(model.generate(x, max_new_tokens=9, **PLAIN), greedy(reference, x, 9))
    finally:
        model.__dict__.pop("forward", None)
        model._compiled_call_impl = None
    assert graphs() == 2


@pytest.mark.slow
def test_layers_compiled_alone_share_one_compilation():
    model = tiny_lm("llama", num_hidden_layers=4)
    plan = sqcompile.calibrate(model, token_batches(), progress=False)
    reference, x = sqcompile.compile(model, plan=plan, backend="eager"), prompts(2, 9)
    for layer in model.model.layers:
        layer.compile(backend=smoothquant, options={"plan": plan, "compiler": "eager"})
    with torch.no_grad():
        got = model(x, use_cache=False).logits
    assert float((got - reference(input_ids=x).logits).abs().max()) <= 1e-3
    assert graphs() == 1


def test_left_padding(llama):
    model, plan, reference = llama
    net, x = compiled(model, plan), prompts(1, 6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), x], 1)
    batch = torch.cat([padded, prompts(1, 10)])
    mask = torch.cat([torch.tensor([[0] * 4 + [1] * 6]), torch.ones(1, 10, dtype=torch.int64)])
    got = net.generate(batch, attention_mask=mask, max_new_tokens=10, **PLAIN)
    assert torch.equal(got[0, 4:], greedy(reference, x, 10)[0])
    assert torch.equal(got[1:], greedy(reference, batch[1:], 10))
    assert graphs() == 2


@pytest.mark.slow
def test_sampling_and_beams(llama):
    """Beside the compiled model that generates without a cache: the same draws and beams."""
    model, plan, reference = llama
    net, x = compiled(model, plan), prompts(2, 8)
    for options in ({"do_sample": True, "top_k": 20}, {"do_sample": False, "num_beams": 3}):
        torch.manual_seed(0)
        got = net.generate(x, max_new_tokens=8, **{**PLAIN, **options})
        torch.manual_seed(0)
        want = with_forward(model, reference).generate(x, max_new_tokens=8, use_cache=False, **{**PLAIN, **options})
        assert torch.equal(got, want)


def with_forward(model, reference):
    """The transformers model with another's forward."""
    view = copy.copy(model)

    def forward(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
        return CausalLMOutputWithPast(logits=reference(input_ids=input_ids).logits)

    view.forward = forward
    return view


@pytest.mark.slow
def test_an_assistant_model(llama):
    model, plan, reference = llama
    net, x = compiled(model, plan), prompts(1, 8)
    assistant = tiny_lm("llama", num_hidden_layers=1)
    got = net.generate(x, assistant_model=assistant, max_new_tokens=10, **PLAIN)
    assert torch.equal(got, greedy(reference, x, 10))


def test_the_first_calls_calibrate_while_it_generates(llama):
    model, _, _ = llama
    net = torch.compile(model, backend=smoothquant, options={"compiler": "eager", "calibration_steps": 8})
    x = prompts(2, 9)
    floats = model.generate(x, max_new_tokens=8, **PLAIN)
    assert torch.equal(net.generate(x, max_new_tokens=8, **PLAIN), floats)  # a prefill and seven decoded tokens
    net.generate(x, max_new_tokens=12, **PLAIN)
    session = next(s for s in sessions_of(model) if s.options.calibration_steps == 8 and s.options.plan is None)
    assert session.plan is not None and sum(l.quantized for l in session.plan.layers) == 14
    assert graphs() == 2


@pytest.mark.parametrize("cache", [pytest.param("dynamic", marks=pytest.mark.slow), "static"])
def test_attention_calibrates_while_it_generates(llama, cache):
    """A cache hands every key to each later token: what counts is the keys that a call brings."""
    model, _, _ = llama
    recipe = sqcompile.Recipe(attention="qk", alpha=0.5 if cache == "dynamic" else 0.6)  # a session for each
    net = torch.compile(model, backend=smoothquant, options={"compiler": "eager", "recipe": recipe})
    x = prompts(2, 9)
    seen = []
    with mock.patch("sqcompile.backend.self_calibration.decide", lambda *args: seen.append(args) or decide(*args)):
        net.generate(x, max_new_tokens=12, cache_implementation=cache, **PLAIN)
    [(observers, _, calls)] = seen
    tokens = [s.count for o in observers for s in o.heads.values()]
    assert calls == 8 and sorted(tokens) == [16] * 6 + [18] * 6, "two prompts of nine, then eight tokens each"
    plan = next(s.plan for s in sessions_of(model) if s.options.recipe == recipe)
    assert [a.quantized for a in plan.attention] == ["qk"] * 2 and graphs() == 2


@pytest.mark.slow
def test_text_generation_pipeline(lm):
    model, tokenizer = lm
    plan = sqcompile.calibrate(model, [{"input_ids": torch.randint(3, 2048, (2, 32))}], progress=False)
    net = compiled(model, plan)
    generate = pipeline("text-generation", model=net, tokenizer=tokenizer)
    [out] = generate("def main(", max_new_tokens=8, do_sample=False, use_cache=True)
    assert out["generated_text"].startswith("def main(") and len(out["generated_text"]) > len("def main(")
    assert graphs() == 2


def continued(model, plan, prompts, new, **options):
    """Each prompt and its greedy tokens through one backend."""
    torch._dynamo.reset()
    net = torch.compile(model, backend=smoothquant, options={"plan": plan, **options})
    return [net.generate(x, max_new_tokens=new, use_cache=True, **PLAIN) for x in prompts]


class DoubleNorm(nn.Module):
    """LlamaRMSNorm without its detour through float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class DoubleRotary(nn.Module):
    """LlamaRotaryEmbedding without its detour through float32."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotary.inv_freq.double())

    def forward(self, x, position_ids):
        angles = torch.cat([position_ids[..., None] * self.inv_freq] * 2, -1)
        return angles.cos(), angles.sin()


def in_float64(model):
    """A copy of a Llama that computes all of itself in float64."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            model.set_submodule(name, DoubleNorm(module))
        elif isinstance(module, LlamaRotaryEmbedding):
            model.set_submodule(name, DoubleRotary(module))
    return model.double()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "count"), [(torch.float64, 3), (torch.float32, 6)])
def test_two_hundred_tokens_of_the_shipped_model(lm, lm_windows, dtype, count):
    """Beside the quantized stage, which generates with a cache of its own; token for token in float64.

    In float32, kernels sum norms and attention in different orders: now and then a rounding in a quantization falls the
    other way, and of two tokens that are as good the other is taken. There, tokens may part at such a tie alone.
    """
    model = in_float64(lm[0]) if dtype == torch.float64 else lm[0]
    plan = sqcompile.calibrate(model, [lm_windows[0]], progress=False)
    prompts = [lm_windows[1][i : i + 1, :64] for i in range(1, 1 + count)]
    want = continued(model, plan, prompts, 200, stage="quantized", compiler="eager")
    reference = sqcompile.compile(model, plan=plan, backend="eager").stages["quantized"]

    def same(tokens):
        """How many are the same; where others part, it is at a tie."""
        for a, b in zip(tokens, want, strict=True):
            if dtype == torch.float64 or torch.equal(a, b):
                assert torch.equal(a, b)
            else:
                first = int((a != b)[0].nonzero()[0])
                logits = reference(input_ids=b[:, :first]).logits[0, -1]
                assert float(logits[b[0, first]] - logits[a[0, first]]) < 0.05, "a tie"
        return sum(torch.equal(a, b) for a, b in zip(tokens, want, strict=True))

    # without kernels for x86, more sums of float32 are PyTorch's, and ties come as its code for that CPU has it
    if dtype == torch.float64:
        assert same(continued(model, plan, prompts, 200, compiler="eager")) >= 2 * count / 3 or not x86.available()
    counters.clear()
    assert same(continued(model, plan, prompts, 200)) >= 2 * count / 3 or not x86.available()
    assert graphs() == 2
