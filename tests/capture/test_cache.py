"""The static KV cache in INT8: half the memory, close to the float cache, read as it is by INT8 attention."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches
from families import build
from transformers import StaticCache

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.capture.kv_cache import Int8StaticCache
from sqcompile.errors import RecipeError
from sqcompile.kernels.ops import sqcompile_ops


def decoded(model, ids, past, prompt=6):
    """Logits of ids, the prompt at once and the others one by one."""
    with torch.no_grad():
        parts = [model(input_ids=ids[:, :prompt], past_key_values=past, use_cache=True).logits]
        parts += [
            model(input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True).logits
            for i in range(prompt, ids.shape[1])
        ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_decoding_stays_close_to_the_float_cache(family):
    model = tiny_lm(family)
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    want = decoded(model, ids, StaticCache(model.config, max_cache_len=32))
    past = Int8StaticCache(model.config, max_cache_len=32)
    got = decoded(model, ids, past)
    assert 0 < relative_error(got, want) < 0.02
    past.reset()
    assert torch.equal(decoded(model, ids, past), got)


def test_half_the_memory():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=96
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    past, plain = Int8StaticCache(config, max_cache_len=64), StaticCache(config, max_cache_len=64)
    for cache in (past, plain):
        decoded(model, torch.arange(3, 13)[None], cache)
    bf16 = sum(t.numel() * t.element_size() for layer in plain.layers for t in (layer.keys, layer.values))
    assert past.nbytes() <= 0.52 * bf16  # int8, and four bytes of scale for 128 channels


def test_generate():
    model = tiny_lm("llama")
    ids = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    more = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(ids, past_key_values=Int8StaticCache(model.config, max_cache_len=32), **more)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, 7:-1]
    behind = logits.amax(-1) - logits.gather(-1, tokens[:, 8:, None])[..., 0]
    assert float(behind.max()) < 0.05 * float(logits.std())  # near ties may fall the other way, nothing else


def test_beams_reorder_the_cache():
    model = tiny_lm("llama")
    ids = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 0])
    past = Int8StaticCache(model.config, max_cache_len=32)
    decoded(model, ids[:, :10], past)
    past.reorder_cache(order)
    with torch.no_grad():
        got = model(input_ids=ids[order, 10:11], past_key_values=past, use_cache=True).logits
    want = decoded(model, ids[order, :11], Int8StaticCache(model.config, max_cache_len=32))[:, -1:]
    assert relative_error(got, want) < 1e-5


def test_int8_attention_reads_the_cache_as_it_is(monkeypatch):
    from sqcompile.backend import runner

    graphs = []
    rewrite = runner.rewrite

    def spy(*args, **kwargs):
        graphs.append(rewrite(*args, **kwargs))
        return graphs[-1]

    monkeypatch.setattr(runner, "rewrite", spy)
    model = tiny_lm("llama")
    plan = sqcompile.calibrate(model, token_batches(), recipe=sqcompile.Recipe(attention="qk"), progress=False)
    torch._dynamo.reset()
    net = torch.compile(model, backend=smoothquant, options={"plan": plan, "compiler": "eager"})
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    got = decoded(net, ids, Int8StaticCache(model.config, max_cache_len=32))
    want = decoded(model, ids, StaticCache(model.config, max_cache_len=32))
    assert relative_error(got, want) < 0.05
    attentions = [
        n for gm in graphs
        for n in gm.graph.find_nodes(op="call_function", target=sqcompile_ops.int8_attention.default)
    ]  # fmt: skip
    assert attentions
    for n in attentions:
        key = n.args[2]
        assert key.target != sqcompile_ops.quantize.default, "keys of the cache are quantized again"


def test_sliding_windows_are_refused_in_words():
    model, _ = build("mistral")
    model.config.sliding_window = 8
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    with pytest.raises(RecipeError, match=r"full attention only.*StaticSlidingWindowLayer.*StaticCache"):
        Int8StaticCache(model.config, max_cache_len=32)
