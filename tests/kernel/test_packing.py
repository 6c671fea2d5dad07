"""Weights packed for x86: by oneDNN, by our own code in its layout, and for one product."""

from __future__ import annotations

import ctypes
import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sqcompile.kernels import products, reference
from sqcompile.kernels.cpu import onednn, x86

pytestmark = pytest.mark.skipif(not x86.available() or x86.library() is None, reason="needs AVX512-VNNI and a compiler")


def weight(n: int, k: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def memory(packed: Tensor) -> bytes:
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))


@given(st.integers(1, 200), st.integers(1, 300), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_weight_of_a_shape_is_packed_as_onednn_packs_it(n, k, seed):
    every = [weight(n, k, seed + i) for i in range(3)]
    kept = [x86.pack(w) for w in every]
    for w, (packed, sums) in zip(every, kept, strict=True):
        assert memory(packed) == memory(onednn.prepack(w))
        assert torch.equal(sums, w.sum(1, dtype=torch.int32))
    assert len({torch.ops.mkldnn.data_ptr(packed) for packed, _ in kept}) == 3


def test_only_the_first_of_a_shape_that_is_in_use_is_packed_by_onednn(monkeypatch):
    calls, prepack = [], onednn.prepack
    monkeypatch.setattr(onednn, "prepack", lambda w: calls.append(w.shape) or prepack(w))
    kept = [x86.pack(weight(96, 80, seed)) for seed in range(3)]
    assert calls == [(96, 80)]
    x86.pack(weight(96, 81, 0))
    assert calls == [(96, 80), (96, 81)]
    del kept
    gc.collect()
    x86.pack(weight(96, 80, 4))  # nothing is kept for the sake of later weights
    assert len(calls) == 3


@pytest.mark.parametrize("threads", [16, 64])
@pytest.mark.parametrize(("n", "k"), [(384, 384), (130, 576), (2048, 768)])
def test_a_machine_with_many_threads_packs_what_our_kernels_read(threads, n, k):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        w = weight(n, k, threads)
        packed, sums = x86.pack(w)
        assert torch.get_num_threads() == threads
        elsewhere: list[tuple[Tensor, Tensor]] = []
        thread = threading.Thread(target=lambda: elsewhere.append(x86.pack(w[:, : k - 64])))
        thread.start()
        thread.join()
        torch.set_num_threads(1)
        wanted = onednn.prepack(w)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums, w.sum(1, dtype=torch.int32)) and memory(packed) == memory(wanted)
    assert torch.equal(elsewhere[0][1], w[:, : k - 64].sum(1, dtype=torch.int32))


@pytest.mark.parametrize("where", ["blocks", "beside", "size"])
def test_a_layout_that_is_another_is_left_to_onednn(monkeypatch, where):
    """As a later oneDNN, or another processor, may have one."""
    prepack, seen = onednn.prepack, []

    def other(w: Tensor) -> Tensor:
        packed = prepack(w if where != "size" else torch.cat([w, w]))
        at = torch.ops.mkldnn._nbytes(packed) - 1 if where == "beside" else 17
        raw = (ctypes.c_uint8 * 1).from_address(torch.ops.mkldnn.data_ptr(packed) + at)
        raw[0] ^= 1
        seen.append(packed)
        return packed

    monkeypatch.setattr(onednn, "prepack", other)
    for seed in range(2):
        packed, sums = x86.pack(weight(40, 64, seed))
        assert packed is seen[seed]  # and none that we have filled
        assert len(sums) == (40 if where == "beside" else 0)  # our kernels read the blocks alone


def test_rows_of_a_larger_tensor():
    w = weight(64, 130, 0)[::2, 1:129]
    for _ in range(2):
        packed, sums = x86.pack(w)
        assert memory(packed) == memory(onednn.prepack(w.contiguous())) and sums.tolist() == w.sum(1).tolist()


@given(st.integers(0, 70), st.integers(1, 300), st.integers(0, 140), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_a_product_of_a_weight_that_is_used_once(m, k, n, seed):
    q, w = weight(m, k, seed).clamp(-127, 127), weight(n, k, seed + 1)
    got = products.product(q, w)
    assert got.dtype == torch.float32 and torch.equal(got, (q.double() @ w.double().t()).float())
    assert torch.equal(products.product(q.expand(2, m, k), w), got.expand(2, m, n))


def test_a_weight_that_was_multiplied_last_is_not_packed_again_unless_it_is_another(monkeypatch):
    packs, fill = [], x86._fill
    monkeypatch.setattr(x86, "_fill", lambda *a: packs.append(a[1]) or fill(*a))
    q, w = weight(9, 40, 0).clamp(-127, 127), weight(20, 40, 1)

    def right(w):
        return torch.equal(products.product(q, w), (q.double() @ w.double().t()).float())

    assert all(right(w) for _ in range(3)) and len(packs) == (1 if products.has_products(w.device) else 0)
    w[3] = 5  # in place
    assert right(w) and right(weight(20, 40, 2)) and right(w)
    once = weight(20, 40, 3).clone()
    assert right(once)
    del once
    assert right(weight(20, 40, 4))  # maybe where the other one was
    with torch.inference_mode():
        w = w.clone()
        assert right(w)
        w[3] = 7  # of which nothing tells
        assert right(w)


def test_products_of_experts():
    q, w = weight(50, 70, 0).clamp(-127, 127), weight(4 * 30, 70, 1).view(4, 30, 70)
    offsets = torch.tensor([13, 13, 40, 47], dtype=torch.int32)  # one without rows, and three rows of none
    want = reference.grouped_linear(q.float(), w.float(), offsets)
    assert torch.equal(products.grouped_product(q, w, offsets), want)


def test_sums_beyond_float32_are_rounded_once():
    q, w = torch.full((3, 20001), 127, dtype=torch.int8), torch.full((5, 20001), 127, dtype=torch.int8)
    assert products.product(q, w).unique().tolist() == [float(torch.tensor(127 * 127 * 20001).float())]
