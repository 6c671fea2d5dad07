"""Settings of sqcompile.generate: honoured as transformers does, or refused by name; sampling by its probabilities."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import tiny_lm
from transformers import GenerationConfig

import sqcompile
from sqcompile.errors import GenerationError, SQCompileError
from sqcompile.generation.settings import HONOURED, NEUTRAL, WITHOUT_EFFECT, read_settings

OTHER = {  # a value of each field that changes something, for those that have no number or flag to turn
    "early_stopping": True,
    "stop_strings": ["x"],
    "cache_implementation": "quantized",
    "cache_config": {"nbits": 4},
    "bad_words_ids": [[5]],
    "exponential_decay_length_penalty": (3, 1.1),
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "sequence_bias": {(5,): 1.0},
    "watermarking_config": {"bias": 1.0},
    "num_assistant_tokens_schedule": "heuristic",
    "speculation_type": "dflash",
    "compile_config": {"mode": "default"},
    "continuous_batching_config": {"num_blocks": 4},
    "dola_layers": "high",
    "constraints": [object()],
    "force_words_ids": [[5]],
    "use_cache": False,
}
FIELDS = [name for name in vars(GenerationConfig()) if not name.startswith("_")]


@pytest.fixture(scope="module")
def llama():
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(5))


def value_of(name):
    """A value that is no neutral one."""
    neutral = NEUTRAL.get(name, (None,))[0]
    if name in OTHER:
        return OTHER[name]
    return (not neutral) if isinstance(neutral, bool) else 3


@pytest.mark.parametrize("name", [f for f in FIELDS if f not in HONOURED and f not in WITHOUT_EFFECT])
def test_every_other_field_is_refused_by_name(llama, ids, name):
    with pytest.raises(GenerationError, match=rf"\b{name}=") as by_override:
        sqcompile.generate(llama, ids, **{name: value_of(name)})
    assert "\n" not in str(by_override.value) and isinstance(by_override.value, SQCompileError)
    config = GenerationConfig()
    setattr(config, name, value_of(name))
    with pytest.raises(GenerationError, match=rf"\b{name}="):
        sqcompile.generate(llama, ids, generation_config=config)


def test_each_field_is_known_and_its_default_is_taken(llama, ids):
    known = set(HONOURED) | set(NEUTRAL) | set(WITHOUT_EFFECT)
    assert set(HONOURED) | set(NEUTRAL) <= set(FIELDS)
    defaults = GenerationConfig._get_default_generation_params()
    assert {n: v for n, v in defaults.items() if v is not None and n not in known} == {}
    wrong = {n: v for n, v in defaults.items() if v is not None and v not in (HONOURED.get(n, v), *NEUTRAL.get(n, ()))}
    assert wrong == {"max_length": 20} or wrong == {}
    said = {name: values[0] for name, values in NEUTRAL.items()}
    plain = sqcompile.generate(llama, ids, max_new_tokens=4)
    assert torch.equal(sqcompile.generate(llama, ids, max_new_tokens=4, **said), plain)
    assert torch.equal(
        sqcompile.generate(llama, ids, max_new_tokens=4, bos_token_id=5, disable_compile=True, num_beams=None), plain
    )


def test_a_field_of_a_later_transformers_is_refused(llama, ids):
    config = GenerationConfig(max_new_tokens=4)
    config.think_twice = True
    with pytest.raises(GenerationError, match="does not do think_twice=True"):
        sqcompile.generate(llama, ids, generation_config=config)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("logits_processor", [object()], "logits_processor is no setting"),
        ("stopping_criteria", [object()], "stopping_criteria is no setting"),
        ("streamer", object(), "streamer is no setting of sqcompile.generate: pass callback="),
        (
            "assistant_model",
            object(),
            "assistant_model is no setting .*: model.generate of the compiled model takes it",
        ),
        ("prefix_allowed_tokens_fn", print, "prefix_allowed_tokens_fn is no setting"),
        ("past_key_values", object(), "keeps a cache of its own"),
        ("inputs_embeds", object(), "inputs_embeds is no setting"),
        ("max_new_tokns", 3, "max_new_tokns is no setting"),
        ("max_new_tokens", 0, "max_new_tokens=0: pass a whole number of at least 1"),
        ("max_new_tokens", 2.5, "max_new_tokens=2.5: pass a whole number"),
        ("max_length", 6, "the prompts have 6 tokens, and max_length is 6"),
        ("min_new_tokens", -1, "min_new_tokens=-1"),
        ("eos_token_id", "</s>", "eos_token_id='</s>': pass an id of a token, or a list"),
        ("eos_token_id", [2, -1], r"eos_token_id=\[2, -1\]"),
        ("pad_token_id", [1, 2], r"pad_token_id=\[1, 2\]: pass one id"),
        ("pad_token_id", 96, "pad_token_id=96, and the model has ids from 0 to 95"),
        ("do_sample", "yes", "do_sample='yes': pass True or False"),
        ("temperature", 0.0, "temperature=0.0: pass a number above 0"),
        ("top_k", -3, "top_k=-3"),
        ("top_p", 1.5, "top_p=1.5: pass a number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty=0: pass a number above 0"),
        ("max_cache_len", 0, "max_cache_len=0"),
        ("generator", 5, "generator is a torch.Generator, and not int"),
    ],
)
def test_what_cannot_be(llama, ids, name, value, words):
    with pytest.raises(GenerationError, match=words) as error:
        sqcompile.generate(llama, ids, **{"do_sample": name in ("temperature", "top_k", "top_p"), name: value})
    assert "\n" not in str(error.value)


def test_prompts_that_are_none(llama, ids):
    for wrong, words in (
        (ids[0], r"a? ?tensor \[batch, tokens\], and not \[6\]"),
        (ids.float(), "input_ids are token ids"),
        ([[3, 4]], "and not list"),
        (ids[:, :0], r"the prompts \[2, 0\] have no tokens"),
        (ids + 90, r"the token id 1\d\d, and the model has ids from 0 to 95"),
        (-ids, "the token id -"),
    ):
        with pytest.raises(GenerationError, match=words):
            sqcompile.generate(llama, wrong)
    with pytest.raises(GenerationError, match=r"attention_mask is as large as input_ids, \[2, 6\], and not \[2, 5\]"):
        sqcompile.generate(llama, ids, torch.ones(2, 5))
    mask = torch.ones(2, 6)
    mask[0, -1] = 0
    with pytest.raises(GenerationError, match="a prompt ends with padding: pad on the left"):
        sqcompile.generate(llama, ids, mask)


def test_models_that_cannot(ids):
    def refused(model, words):
        with pytest.raises(GenerationError, match=words) as error:
            sqcompile.generate(model, ids)
        assert "\n" not in str(error.value)

    refused(torch.nn.Linear(2, 2), "takes a causal language model of transformers, .* and this is a Linear")
    refused(tiny_lm("bloom"), "BloomForCausalLM takes no attention mask")
    refused(tiny_lm("falcon alibi"), "no cache for attention with ALiBi of FalconForCausalLM")
    refused(tiny_lm("gemma2"), "window of 8 tokens, and the cache is to hold 128")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    refused(tiny_lm("llama", rope_parameters=rope), "rotary embedding of type 'dynamic'")
    with torch.device("meta"):
        refused(tiny_lm("llama"), "parameters are on meta: load it onto one device")


def test_nothing_is_recorded_without_a_gpu(ids):
    with pytest.raises(GenerationError, match="the model is on cpu: leave it out"):
        sqcompile.generate(tiny_lm("llama"), ids, record=True, max_new_tokens=2)


def test_a_model_without_a_cache_is_refused(ids):
    block = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)).eval()
    net = sqcompile.compile(block, [torch.randn(4, 16)] * 2, backend="eager", progress=False)
    with pytest.raises(GenerationError, match=r"has no KV cache.*torch.compile\(model, backend='smoothquant'"):
        sqcompile.generate(net, ids)


def test_settings_of_sampling_without_it_are_named(llama, ids):
    with pytest.warns(UserWarning, match=r"temperature=0.7 has no effect without do_sample=True") as seen:
        sqcompile.generate(llama, ids, max_new_tokens=2, temperature=0.7)
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match=r"temperature=0.0 has no effect"):  # as many spell greedy
        got = sqcompile.generate(llama, ids, max_new_tokens=2, temperature=0.0)
    assert torch.equal(got, sqcompile.generate(llama, ids, max_new_tokens=2))
    own = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)  # as checkpoints have it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_settings(own, None, {"do_sample": False, "max_new_tokens": 2}, 6, None)
    assert not found.kind(6).temperature and not found.kind(6).top_p


def drawn(model, x, seed, **settings):
    return sqcompile.generate(
        model, x, do_sample=True, generator=torch.Generator().manual_seed(seed), eos_token_id=None, **settings
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5, "top_k": 0},
        {"top_k": 5},
        {"top_p": 0.6},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.8},
    ],
    ids=str,
)
def test_sampled_tokens_are_those_of_transformers(llama, ids, settings):
    """On a CPU: the same draws of the same generator."""
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": [9, 17], "repetition_penalty": 1.2, **settings}
    for seed in range(5):
        torch.manual_seed(seed)
        want = llama.generate(ids, do_sample=True, **settings)
        after = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(sqcompile.generate(llama, ids, do_sample=True, **settings), want)
        assert torch.equal(torch.rand(3), after), "the generator is where transformers leaves it"
        torch.manual_seed(99)
        own = torch.Generator().manual_seed(seed)
        assert torch.equal(sqcompile.generate(llama, ids, do_sample=True, generator=own, **settings), want)


def test_equal_seeds_give_equal_tokens(llama, ids):
    first = drawn(llama, ids, 1, max_new_tokens=12)
    assert torch.equal(drawn(llama, ids, 1, max_new_tokens=12), first)
    assert not torch.equal(drawn(llama, ids, 2, max_new_tokens=12), first)


@pytest.mark.parametrize(
    "settings", [{"top_k": 0}, {"temperature": 0.7, "top_k": 8}, {"top_k": 0, "top_p": 0.5}], ids=str
)
def test_tokens_come_by_their_probabilities(llama, ids, settings):
    """The first token of 8000 texts: chi-square beside softmax of the processed logits."""
    with torch.no_grad():
        logits = llama(ids[:1]).logits[0, -1].double() / settings.get("temperature", 1.0)
    order = logits.argsort(descending=True)
    if settings["top_k"]:
        logits[order[settings["top_k"] :]] = -torch.inf
    p = logits.softmax(-1)
    if "top_p" in settings:
        before = p[order].cumsum(0) - p[order]
        p[order[before >= settings["top_p"]]] = 0
        p /= p.sum()
    n = 8000
    tokens = drawn(llama, ids[:1].expand(n, -1), 0, max_new_tokens=1, **settings)[:, -1]
    counts = torch.bincount(tokens, minlength=96).double()
    assert counts[p == 0].sum() == 0
    often = p * n >= 5
    expected, seen = p[often] * n, counts[often]
    freedom = int(often.sum()) - 1
    chi = float(((seen - expected) ** 2 / expected).sum())
    assert freedom >= 3 and chi < freedom + 5 * (2 * freedom) ** 0.5
