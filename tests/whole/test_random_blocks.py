"""Random models of whole blocks: each is left as it was, and compiles to what its stages say, or is refused in words."""

from __future__ import annotations

import pytest
import torch
from random_checks import capture, examine, fold_error, loss, wrong

from sqcompile.passes.ir.about import about
from sqcompile.passes.labels import rules as label_rules

aten = torch.ops.aten
PART = 50
MOST = range(1000, 1100)  # more of them: python tests/random_figures.py FIRST LAST


@pytest.fixture(autouse=True, scope="module")
def own_captures():
    """Not those that other files of this process have looked at, maybe with other rules."""
    capture.cache_clear()


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(s, marks=pytest.mark.slow) for s in range(5, 12))])
def test_random_blocks(seed):
    found = examine(seed)
    assert wrong(found) is None and loss(found) is None


@pytest.mark.slow
@pytest.mark.parametrize("first", MOST[::PART])
def test_more_random_blocks(first):
    found = {seed: examine(seed) for seed in range(first, first + PART)}
    assert {seed: why for seed, f in found.items() if (why := wrong(f) or loss(f))} == {}
    refused = {seed: f.refused for seed, f in found.items() if f.refused}
    assert len(refused) <= PART // 10, refused


def _passes(ctx, n, out, flow, operands):
    """The wrong rule: labels pass, whatever the operation does to the values."""
    return next(iter(operands.values())).broadcast_to(out.shape)


@pytest.mark.parametrize(
    ("target", "seed"),
    [
        (aten.add.Tensor, 4),
        (aten.sigmoid.default, 4),
        (aten.scaled_dot_product_attention.default, 8),
        (aten.gelu.default, 951),
    ],
)
def test_an_unsound_rule_is_caught(monkeypatch, target, seed):
    """The random blocks are worth something: with one wrong rule they find a wrong fold."""
    for right in (True, False):
        about(capture(seed).gm).found.clear()  # what was matched by other rules
        assert (fold_error(capture(seed)) <= 1e-5) == right
        monkeypatch.setitem(label_rules.RULES, target, _passes)
