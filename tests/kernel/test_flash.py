"""Our attention kernel for CPUs against float64, by all that it can multiply with, and with masks of every shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from sqcompile.kernels.cpu import flash, x86

NEVER = float("-inf")
pytestmark = pytest.mark.skipif(not flash.available(), reason="needs AVX512 and a compiler")


@given(
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 150), st.integers(1, 600),
    st.sampled_from([32, 64, 96, 128, 256]), st.booleans(), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_flash_is_as_exact_as_pytorchs_own(batch, groups, repeats, queries, keys, d, is_causal, transposed, seed):
    g = torch.Generator().manual_seed(seed)
    heads = groups * repeats

    def tensor(h, s):
        if transposed:
            return torch.randn(batch, s, h, d, generator=g).bfloat16().transpose(1, 2)
        return torch.randn(batch, h, s, d, generator=g).bfloat16()

    q, k, v = 2 * tensor(heads, queries), tensor(groups, keys), tensor(groups, keys)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=is_causal, enable_gqa=True)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    for products in every_product():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash, "products", lambda by=products: by)
            got = flash.flash(q, k, v, None, is_causal, None)
        assert got.shape == want.shape and got.dtype == torch.bfloat16
        assert relative_error(got, want) <= 1.5 * relative_error(torchs, want) + 1e-4, products


def test_flash_with_scores_of_every_size():
    q, k, v = (torch.randn(1, 2, 64, 64).bfloat16() for _ in range(3))
    want = F.scaled_dot_product_attention((400 * q).double(), k.double(), v.double(), scale=1.0)
    assert relative_error(flash.flash(400 * q, k, v, None, False, 1.0), want) < 1e-2  # a softmax of one key
    k[0, 0, 5] = float("nan")
    got = flash.flash(q, k, v, None, True, None)
    assert got[0, 0, 5:].isnan().all() and got[0, 0, :5].isfinite().all() and got[0, 1].isfinite().all()


def every_product():
    """By what the kernel can multiply on this CPU."""
    mine = flash.products()
    return {mine, 0, *([1] if x86.library().sqcompile_has_dots() else [])}


MASK_SHAPES = ["b11k", "b1qk", "1hqk", "qk", "bhqk"]


@given(
    st.integers(1, 3), st.sampled_from([(2, 1), (3, 3), (4, 2)]), st.integers(1, 70), st.integers(1, 600),
    st.sampled_from([32, 64, 128]), st.sampled_from(MASK_SHAPES), st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["never", "lowest", "bias"]), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_flash_with_a_mask_is_as_exact_as_pytorchs_own(batch, heads, queries, keys, d, shape, dtype, kind, seed):
    g = torch.Generator().manual_seed(seed)
    (h, groups), sizes = heads, {"b": batch, "h": heads[0], "q": queries, "k": keys, "1": 1}
    q = 2 * torch.randn(batch, h, queries, d, generator=g).bfloat16()
    k, v = (torch.randn(batch, groups, keys, d, generator=g).bfloat16() for _ in range(2))
    mask = 3 * torch.randn([sizes[c] for c in shape], generator=g).to(dtype)
    if kind != "bias":
        blocked = mask > 1
        blocked[..., 0, :] |= torch.rand((), generator=g) < 0.3  # a query that has no key
        mask.masked_fill_(blocked, NEVER if kind == "never" else torch.finfo(dtype).min)
    assert flash.fits(q, k, v, mask, False, None)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double(), enable_gqa=True)
    half = mask.bfloat16() if kind == "never" else mask.clamp_min(torch.finfo(torch.bfloat16).min).bfloat16()
    torchs = F.scaled_dot_product_attention(q, k, v, half, enable_gqa=True)
    for products in every_product():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash, "products", lambda by=products: by)
            got = flash.flash(q, k, v, mask, False, None)
        assert got.isfinite().all()
        if kind == "never":  # in float64 PyTorch gives NaN to a query without keys, in bfloat16 zeros, as ours does
            assert not got[want.isnan()].any()
            got, torchs = (torch.where(want.isnan(), 0.0, t.double()) for t in (got, torchs))
        want = want.nan_to_num()
        assert (got - want).norm() <= 1.5 * (torchs - want).norm() + 1e-4 * want.norm(), products


def test_flash_leaves_masks_that_it_cannot_read():
    q, k, v = (torch.randn(2, 2, 9, 32).bfloat16() for _ in range(3))
    every = torch.zeros(2, 2, 9, 9)
    for mask in (every.half(), every[0, 0, 0], every[..., :1], every.transpose(2, 3), every.bool(), every[:, :, None]):
        assert not flash.fits(q, k, v, mask, False, None)
    assert not flash.fits(q, k, v, every, True, None)
    assert flash.fits(q, k, v, every[:1, :, ::2].repeat(1, 1, 2, 1)[:, :, :9], False, None)
