"""Models that return a KV cache, or take one; and masks of scores, whose sizes are those of tokens."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from families import build, some_slow, token_ids
from transformers import DynamicCache

import sqcompile
from sqcompile import CaptureError, Recipe


def same_cache(a, b, within=0.0):
    def near(x, y):
        return (x - y).norm() <= within * y.norm()

    assert type(a) is DynamicCache and len(a.layers) == len(b.layers)
    return all(near(x.keys, y.keys) and near(x.values, y.values) for x, y in zip(a.layers, b.layers, strict=True))


@pytest.mark.parametrize("family", some_slow(["llama", "gpt2", "opt"], ("llama",)))
@pytest.mark.parametrize("recipe", ["default", pytest.param("O3", marks=pytest.mark.slow)])
def test_a_cache_is_returned_and_saved(family, recipe, tmp_path):
    model, call = build(family)
    batches = [{"input_ids": token_ids(seed=s), "use_cache": True} for s in range(2)]
    net = sqcompile.compile(model, batches, recipe=recipe, backend="eager", progress=False)
    call = {"input_ids": token_ids((3, 7), seed=9), "use_cache": True}
    with torch.no_grad():
        found, want = net(**call), model(**call)
    assert type(found) is type(want) and same_cache(found.past_key_values, want.past_key_values, 0.1)
    net.save(tmp_path / "net")
    loaded = sqcompile.load(tmp_path / "net", backend="eager")
    again = loaded(**call)
    assert torch.equal(again.logits, found.logits) and same_cache(again.past_key_values, found.past_key_values)
    assert "_value_cache_1" in str(net.export("pt2", tmp_path / "net.pt2"))


@pytest.mark.slow
def test_a_fresh_process_gives_a_cache(tmp_path):
    """One that has not imported transformers."""
    model, _ = build("llama")
    batch = {"input_ids": token_ids(), "use_cache": True}
    net = sqcompile.compile(model, [batch], recipe=Recipe(0.5), backend="eager", progress=False)
    net.save(tmp_path / "net")
    script = (
        "import sys, torch, sqcompile\n"
        f"assert 'transformers' not in sys.modules\nnet = sqcompile.load({str(tmp_path / 'net')!r}, backend='eager')\n"
        "y = net(input_ids=torch.ones(1, 5, dtype=torch.int64), use_cache=True)\n"
        "print(type(y.past_key_values).__name__, y.past_key_values.get_seq_length())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["DynamicCache", "5"], done.stderr[-2000:]


def test_a_saved_cache_of_another_kind_is_refused(tmp_path):
    from sqcompile.artifact.structures import from_json

    name = "transformers.cache_utils.DynamicCache"
    good = {
        "class": name,
        "parts": [{"list": [None]}, {"list": [None]}],
        "names": ["key_cache", "value_cache"],
        "layout": [None],
    }
    assert from_json(good).num_leaves == 2
    for change in ({"layout": ["x"]}, {"names": ["keys", "values"]}, {"layout": [[[None]]]}):
        with pytest.raises(sqcompile.ArtifactError):
            from_json(json.loads(json.dumps(good | change)))


@pytest.mark.parametrize("as_example", [True, False])
def test_a_cache_among_the_inputs_is_refused_in_words(as_example):
    """The model writes to it, and the caller looks at it afterwards."""
    model, _ = build("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=token_ids((2, 9)), past_key_values=cache)
    batch = {"input_ids": token_ids((2, 1)), "past_key_values": cache}
    words = (
        "past_key_values is a DynamicCache, which does more than hold its parts, .*: leave it out, or use torch.compile"
    )
    with pytest.raises(CaptureError, match=words):
        sqcompile.compile(model, [batch], recipe=Recipe(0.5), backend="eager", progress=False)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("kind", ["added", "bool"])
def test_a_mask_of_scores_leaves_the_sequence_open(kind):
    model, _ = build("llama")

    def batch(shape, seed):
        allowed = torch.ones(shape[1], shape[1], dtype=torch.bool).tril()[None, None].expand(shape[0], 1, -1, -1)
        added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return {"input_ids": token_ids(shape, seed=seed), "attention_mask": added if kind == "added" else allowed}

    net = sqcompile.compile(
        model, [batch((2, 11), 0), batch((3, 16), 1)], recipe=Recipe(0.5), backend="eager", progress=False
    )
    for shape in ((1, 5), (4, 23)):
        x = batch(shape, 2)
        with torch.no_grad():
            found, want = net(**x).logits, model(**x).logits
        assert (found - want).norm() <= 0.05 * want.norm()
