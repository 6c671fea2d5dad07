"""sqcompile.generate: the greedy tokens of model.generate, in float and compiled; what is compiled and kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import tiny_lm, token_batches
from families import CAUSAL, causal_lm
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.errors import GenerationError
from sqcompile.generation import cache, run
from sqcompile.generation.cache import rounded

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def prompts(*shape, seed=5):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def padded():
    """Three prompts of five, eight and nine tokens."""
    ids = prompts(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def compiled(model, **options):
    plan = sqcompile.calibrate(model, token_batches(), progress=False)
    return torch.compile(model, backend=smoothquant, options={"plan": plan, "compiler": "eager", **options})


FAMILIES = ["llama", "gpt_neox", "opt", "qwen2"]
# the cache that sqcompile.generate makes, so that both run the same compiled graphs
STATIC = {"cache_implementation": "static", "max_cache_len": 128}


def same(model, ids, mask=None, **settings):
    """Both ways of generating give the same tokens, int64 [batch, tokens]; these."""
    settings = {"do_sample": False, "pad_token_id": 0, **settings}
    want = model.generate(ids, attention_mask=mask, **settings)
    got = sqcompile.generate(model, ids, mask, **settings)
    assert got.dtype == torch.int64 and torch.equal(got, want)
    return got


def same_under_all_settings(model, x, mask, **more):
    """Without an end, with one, with several, and with all that changes likelihoods."""
    start, more = x.shape[1], {"max_new_tokens": 20, **more}
    free = same(model, x, mask, eos_token_id=None, **more)
    assert free.shape[1] == start + 20
    ends = sorted({int(row[start + n]) for row, n in zip(free, (7, 4, 11), strict=False)})
    ended = same(model, x, mask, eos_token_id=ends, **more)
    assert ended.shape[1] < free.shape[1]
    assert same(model, x, mask, eos_token_id=int(free[0, start + 7]), **more).shape[1] > start
    same(model, x, mask, eos_token_id=ends, min_new_tokens=9, repetition_penalty=1.3, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_float(family):
    model, (ids, mask) = tiny_lm(family), padded()
    same_under_all_settings(model, ids[2:], None)
    same_under_all_settings(model, ids, mask)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_compiled(family):
    net, (ids, mask) = compiled(tiny_lm(family)), padded()
    for x, m in ((ids[2:], None), (ids, mask)):
        sqcompile.generate(net, x, m, max_new_tokens=20, eos_token_id=None)
    # prompts and a token, of one text and of several; OPT counts positions of unpadded prompts in Python, which makes two more
    assert counters["stats"]["unique_graphs"] == (6 if family == "opt" else 4)
    same_under_all_settings(net, ids[2:], None, **STATIC)
    same_under_all_settings(net, ids, mask, **STATIC)


@pytest.mark.parametrize("family", sorted(set(CAUSAL) - {"bloom", "falcon alibi", "gemma2"}))
def test_heads_of_a_sharded_model_are_seen(family, monkeypatch):
    """One process that holds all of it, for whom the configuration says the same."""
    model = tiny_lm(family)
    want = [layer.keys.shape for layer in cache.static_cache(model, 2, 128).layers]
    monkeypatch.setattr(cache, "is_distributed", lambda p: True)
    assert [layer.keys.shape for layer in cache.static_cache(model, 2, 128).layers] == want
    monkeypatch.setattr(model, "forward", None)
    assert cache.static_cache(model, 3, 128).layers[0].keys.shape[0] == 3, "the model has not run again"


def test_a_sharded_model_that_cannot_run_is_refused(monkeypatch):
    model = tiny_lm("llama")
    monkeypatch.setattr(cache, "is_distributed", lambda p: True)
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    with pytest.raises(GenerationError, match=r"which failed: division by zero: use model\.generate"):
        sqcompile.generate(model, prompts(1, 6), max_new_tokens=2)


def test_texts_that_end_go_on_with_padding():
    model, (ids, mask) = tiny_lm("llama"), padded()
    free = same(model, ids, mask, max_new_tokens=16, eos_token_id=None)
    end = int(free[1, 9 + 2])
    assert end not in free[0, 9:], "the first text goes on"
    got = same(model, ids, mask, max_new_tokens=16, eos_token_id=end, pad_token_id=7)
    assert set(got[1, 9 + 3 :].tolist()) == {7} and got.shape[1] == 25
    # without pad_token_id it is the end; in transformers, too
    assert set(same(model, ids, mask, max_new_tokens=16, eos_token_id=end, pad_token_id=None)[1, 12:].tolist()) == {end}


def test_lengths():
    model, ids = tiny_lm("llama"), prompts(2, 6)
    plain = {"eos_token_id": None}
    assert same(model, ids, max_length=11, **plain).shape[1] == 11
    assert same(model, ids, max_length=9, max_new_tokens=8, **plain).shape[1] == 14
    assert sqcompile.generate(model, ids, **plain).shape[1] == 26  # as transformers does
    assert same(model, ids[:, :1], max_new_tokens=1, **plain).shape[1] == 2
    assert same(tiny_lm("llama", max_position_embeddings=16), ids, **plain).shape[1] == 16
    first = int(same(model, ids[:1], max_new_tokens=1, **plain)[0, -1])
    assert same(model, ids[:1], max_new_tokens=9, eos_token_id=first).shape[1] == 7
    assert same(model, ids[:1], max_new_tokens=9, eos_token_id=first, min_length=10).shape[1] >= 10


def test_settings_of_the_model_and_of_a_config():
    model, ids = tiny_lm("llama"), prompts(1, 6)
    model.generation_config.max_new_tokens = 5
    model.generation_config.eos_token_id = None
    assert same(model, ids).shape[1] == 11
    config = type(model.generation_config)(max_new_tokens=7, do_sample=False)
    assert same(model, ids, generation_config=config).shape[1] == 13
    assert torch.equal(sqcompile.generate(model, ids, None, config), model.generate(ids, generation_config=config))
    assert config.max_new_tokens == 7 and config.eos_token_id is None, "the caller's own stays"


def test_padding_is_found_as_in_transformers():
    model, (ids, mask) = tiny_lm("llama"), padded()
    found = same(model, ids, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(found, sqcompile.generate(model, ids, mask, max_new_tokens=8, eos_token_id=None))
    assert not torch.equal(found, same(model, ids, max_new_tokens=8, eos_token_id=0, pad_token_id=0))


@pytest.mark.slow
def test_other_lengths_compile_nothing():
    model = tiny_lm("llama", max_position_embeddings=2048)
    net = compiled(model)
    settings = {"max_new_tokens": 6, "eos_token_id": None}

    def graphs(batch, tokens):
        x = prompts(batch, tokens)
        got = sqcompile.generate(net, x, **settings)
        assert got.shape == (batch, tokens + 6)
        return counters["stats"]["unique_graphs"]

    assert graphs(2, 9) == 2  # the prompts, a token
    assert [graphs(2, n) for n in (5, 30, 100)] == [2, 2, 2]
    grown = [graphs(2, n) for n in (150, 300, 500, 700)]  # caches of 256, 384, 512 and 768 tokens
    assert grown[0] <= 4 and len(set(grown)) == 1, "compiled twice at most"
    assert len(run._kept[net].states) == 4
    assert graphs(3, 9) == grown[0]
    same(net, *padded(), max_new_tokens=6, eos_token_id=None)


def test_lengths_of_the_cache():
    assert [rounded(n) for n in (1, 128, 129, 1000, 1025, 2048, 2049, 4097)] == [
        128, 128, 256, 1024, 1152, 2048, 2304, 4608,
    ]  # fmt: skip
    assert all(0 <= rounded(n) - n <= max(127, n / 8) for n in range(1, 20000, 7))


def test_what_is_kept_goes_with_the_model_or_when_it_is_told_to():
    model, x = tiny_lm("llama"), prompts(1, 4)
    settings = {"max_new_tokens": 4, "eos_token_id": None}
    want = sqcompile.generate(model, x, **settings)
    [(state, _)] = run._kept[model].states.values()
    keys = state.cache.layers[0].keys
    assert torch.equal(sqcompile.generate(model, x, **settings), want)
    assert run._kept[model].states[1, 128, False][0].cache.layers[0].keys is keys, "the cache is used again"
    refs = weakref.ref(state), weakref.ref(model)
    del state, keys
    sqcompile.free_generation(model)
    gc.collect()
    assert refs[0]() is None and refs[1]() is not None
    assert torch.equal(sqcompile.generate(model, x, **settings), want)
    del model
    gc.collect()
    assert refs[1]() is None


def test_the_cache_follows_the_model():
    model, x = tiny_lm("llama"), prompts(1, 4)
    settings = {"max_new_tokens": 4, "eos_token_id": None}
    same(model, x, **settings)
    same(model.double(), x, **settings)
    assert run._kept[model].states[1, 128, False][0].cache.layers[0].keys.dtype == torch.float64


@pytest.mark.slow
def test_the_model_may_calibrate_itself_and_change():
    model, x = tiny_lm("llama"), prompts(2, 9)
    net = torch.compile(model, backend=smoothquant, options={"compiler": "eager", "calibration_steps": 4})
    settings = {"max_new_tokens": 8, "eos_token_id": None, **STATIC}
    floats = sqcompile.generate(model, x, **settings)
    assert torch.equal(sqcompile.generate(net, x, **{**settings, "max_new_tokens": 4}), floats[:, :-4])
    int8 = same(net, x, **settings)
    assert sqcompile.plan_of(model).layers[0].quantized
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
        model.model.layers[0].mlp.down_proj.weight.mul_(0.3)
    assert not torch.equal(same(net, x, **settings), int8)


@pytest.mark.slow
def test_compiled_in_place_and_in_inference_mode():
    model, x = tiny_lm("llama"), prompts(2, 9)
    settings = {"max_new_tokens": 8, "eos_token_id": None}
    plan = sqcompile.calibrate(model, token_batches(), progress=False)
    floats = sqcompile.generate(model, x, **settings)
    model.compile(backend=smoothquant, options={"plan": plan, "compiler": "eager"})
    with torch.inference_mode():
        got = sqcompile.generate(model, x.clone(), **settings)
    assert not got.is_inference() and counters["stats"]["unique_graphs"] == 2
    same(model, x, **settings)
    model._compiled_call_impl = None
    assert torch.equal(sqcompile.generate(model, x, **settings), floats)


def test_callback_gets_each_token():
    model, (ids, mask) = tiny_lm("llama"), padded()
    tokens = []
    got = sqcompile.generate(model, ids, mask, max_new_tokens=9, eos_token_id=None, callback=tokens.append)
    assert torch.equal(torch.stack(tokens, 1), got[:, 9:])
    with pytest.raises(GenerationError, match=r"a callback .* cannot call it for the same model"):
        sqcompile.generate(model, ids, callback=lambda t: sqcompile.generate(model, ids))
    assert torch.equal(sqcompile.generate(model, ids, mask, max_new_tokens=9, eos_token_id=None), got)


def test_windows_that_see_everything():
    gemma = tiny_lm("gemma2", sliding_window=256)  # every other layer has one, and a mask of its own
    same(gemma, *padded(), max_new_tokens=12, eos_token_id=None)
    model = tiny_lm("mistral", sliding_window=256)
    same(model, *padded(), max_new_tokens=12, eos_token_id=None)
    with pytest.raises(GenerationError, match=r"window of 256 tokens, and the cache is to hold 384"):
        sqcompile.generate(model, prompts(1, 250), max_new_tokens=12)


def test_eager_attention():
    model = causal_lm(*CAUSAL["llama"], attn_implementation="eager").eval()
    same(model, *padded(), max_new_tokens=12, eos_token_id=None)


@pytest.mark.parametrize(("prompt", "new"), [(30, 2), (20, 10)])
def test_more_tokens_than_a_table_of_positions_are_refused_in_words(prompt, new):
    config = GPT2Config(n_positions=24, n_embd=32, n_layer=1, n_head=2, vocab_size=96, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(3, 90, (1, prompt), generator=torch.Generator().manual_seed(0))
    with pytest.raises(GenerationError, match=f"are {prompt + new} tokens, and the model has 24 positions"):
        sqcompile.generate(model, ids, max_new_tokens=new)
    assert sqcompile.generate(model, ids[:, :10], max_new_tokens=4).shape[1] <= 14
