"""Calibration: every kind of batch, which tokens count, and the sample that is kept of them."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_lm, token_batches
from families import build
from tqdm import tqdm
from transformers import BatchEncoding

import sqcompile
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.statistics.input_stats import SAMPLE_ROWS, InputStats, _keys, seed_of
from sqcompile.statistics.observe import calibrate


@pytest.mark.parametrize(
    "kind", ["tensors", "tuples", "lists", "dicts", "encodings", "generator", "wrapped", "callable", "callable0"]
)
def test_batches_of_every_kind_give_the_same_plan(kind):
    model = tiny_lm("opt")
    ids = [b["input_ids"] for b in token_batches(2)]

    def run(m):
        for x in ids:
            m(x)

    loader = {
        "tensors": ids, "tuples": [(x,) for x in ids], "lists": [[x] for x in ids], "dicts": [{"input_ids": x} for x in ids],
        "encodings": [BatchEncoding({"input_ids": x}) for x in ids], "generator": (x for x in ids), "wrapped": tqdm((x for x in ids), disable=True), "callable": run,
        "callable0": lambda: run(model),
    }[kind]  # fmt: skip
    plan = sqcompile.calibrate(model, loader, progress=False)
    want = sqcompile.calibrate(model, token_batches(2), progress=False)
    assert plan.layers == want.layers
    assert all(torch.equal(plan.scales[k], s) for k, s in want.scales.items())
    assert not model._forward_pre_hooks


def test_the_attention_mask_keeps_padding_out_of_the_statistics():
    model = tiny_lm("llama")
    ids = torch.randint(3, 95, (2, 10))
    padded, mask = torch.full((2, 16), 95), torch.zeros(2, 16, dtype=torch.long)
    padded[:, 6:], mask[:, 6:] = ids, 1  # left padding, with a real token as the pad
    batch = {"input_ids": padded, "attention_mask": mask}
    gm = trace(model, as_call(model, batch))
    stats = calibrate(gm, model, [batch]).inputs
    unmasked = calibrate(gm, model, [{**batch, "attention_mask": torch.ones_like(mask)}]).inputs
    first = "model.layers.0.self_attn.q_proj.weight"
    plain = trace(model, as_call(model, ids))
    want = calibrate(plain, model, [ids]).inputs[first]
    assert stats[first].count == 20 == want.count and unmasked[first].count == 32
    assert torch.allclose(stats[first].absmax, want.absmax, rtol=1e-5)
    assert not torch.allclose(unmasked[first].absmax, want.absmax, rtol=1e-5)


@pytest.mark.slow
def test_a_decoders_tokens_are_masked_by_its_own_mask():
    model, call = build("t5")
    ids, decoder_ids = call["input_ids"], call["input_ids"].flip(-1)  # of one shape
    mask, decoder_mask = torch.ones_like(ids), torch.ones_like(ids)
    mask[:, 8:], decoder_mask[:, 3:] = 0, 0
    masks = {"attention_mask": mask, "decoder_attention_mask": decoder_mask}
    batch = {"input_ids": ids, "decoder_input_ids": decoder_ids, **masks}
    counts = {}
    for given in (masks, {"attention_mask": mask}):
        call = {k: v for k, v in batch.items() if k in given or k not in masks}
        gm = trace(model, as_call(model, call))
        stats = calibrate(gm, model, [call]).inputs
        for kind in ("encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.q"):
            counts[kind.split(".")[0], len(given)] = stats[f"{kind}.weight"].count
        # the decoder's keys and values of the encoder's tokens
        assert stats["decoder.block.1.layer.1.EncDecAttention.k.weight"].count == int(mask.sum())
        assert stats["decoder.block.1.layer.1.EncDecAttention.q.weight"].count == counts["decoder", len(given)]
    real, every = int(mask.sum()), ids.numel()
    assert counts == {("encoder", 2): real, ("encoder", 1): real, ("decoder", 2): 6, ("decoder", 1): every}


def test_the_sample_is_bounded_and_uniform():
    stats = InputStats.empty(torch.empty(0, 1), experts=2)
    for i in range(100):
        rows = torch.arange(i * 50, (i + 1) * 50)
        stats.update(rows[:, None].float(), (rows >= 3000).long(), 0, i)
    assert stats.tokens.tolist() == [3000, 2000]
    assert torch.equal(stats.experts, (stats.rows.flatten() >= 3000).long())  # rows keep their experts
    assert stats.rows.shape == (SAMPLE_ROWS, 1) and stats.count == 5000 and stats.absmax.item() == 4999
    assert len(stats.rows.unique()) == SAMPLE_ROWS and abs(stats.rows.mean().item() - 2500) < 500


@pytest.mark.parametrize("experts", [None, 3])
def test_statistics_do_not_depend_on_the_order_or_the_parts_they_are_made_in(experts):
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 4, generator=g) for n in (50, 1, 90, 200, 33, 2)]

    def seen(order):
        stats = InputStats.empty(torch.empty(0, 4), experts)
        for i in order:
            dealt = torch.arange(len(batches[i])) * (experts or 0) // len(batches[i])
            assert stats.update(batches[i], dealt, seed_of("linear"), i)
        return stats

    whole, *others = seen(range(6)), seen([5, 2, 0, 4, 1, 3])
    others += [seen([4, 1]).merged(seen([3, 0])).merged(seen([2, 5])), seen([]).merged(seen(range(6)))]
    for stats in others:
        for name, want in vars(whole).items():
            got = getattr(stats, name)
            assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want, name
    assert len(whole.keys) == SAMPLE_ROWS and whole.count == sum(map(len, batches))


def test_every_token_of_an_input_has_a_key_of_its_own():
    cpu = torch.device("cpu")
    keys = torch.cat([_keys(5000, seed_of("a"), batch, cpu) for batch in (0, 1, 2, 700)])
    assert len(keys.unique()) == len(keys)  # no ties that the order would break
    assert not torch.isin(_keys(5000, seed_of("b"), 0, cpu), keys).any()
    bits = torch.stack([(keys >> i) & 1 for i in range(64)]).double().mean(1)
    assert bool(((bits - 0.5).abs() < 0.02).all())  # four standard deviations are 0.014
    assert _keys(2, 1, 3, cpu).tolist() == [mixed(1 + ((3 << 32) + row) * 0x9E3779B97F4A7C15) for row in (0, 1)]


def mixed(z):
    """SplitMix64's last steps in Python's numbers, as int64."""
    z %= 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z
