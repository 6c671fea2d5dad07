"""Operators of x86 CPUs that are called without Python give what they give in Python, bit for bit, for all that they take."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sqcompile.errors import IndexRangeError
from sqcompile.kernels import reference
from sqcompile.kernels.cpu import dispatch, x86
from sqcompile.kernels.ops import ON_X86, on_x86_library, sqcompile_ops

pytestmark = pytest.mark.skipif(not x86.available(), reason="for CPUs with VNNI")
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _installed():
    assert dispatch.install(ON_X86, on_x86_library)


def both(name, *args):
    """The operator, and the one in Python."""
    return (getattr(ops, name).default(*args) for ops in (sqcompile_ops, torch.ops.sqcompile_python))


def steps(x):
    """The strides that tell where elements lie."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1] if x.numel() else []


def equal(name, *args):
    found, want = ((y,) if isinstance(y, Tensor) else y for y in both(name, *args))
    for y, z in zip(found, want, strict=True):
        assert y.dtype == z.dtype and y.shape == z.shape and steps(y) == steps(z)
        assert torch.equal(y.nan_to_num(5e9), z.nan_to_num(5e9))


def drawn(*shape, dtype=FLOAT, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("rows", [(1,), (2, 9), (33,), (5, 20), (0, 4)])
@pytest.mark.parametrize(("n", "k"), [(96, 64), (50, 40)])
def test_products(n, k, rows, dtype):
    """By our kernels, by oneDNN, and of no rows."""
    r = torch.Generator().manual_seed(0)
    w = torch.randint(-127, 128, (n, k), generator=r, dtype=torch.int8)
    packed, sums = x86.pack(w)
    q = torch.randint(1, 256, (*rows, k), generator=r, dtype=torch.uint8)
    equal("matmul_u8s8", q, packed, drawn(n).abs(), sums, dtype)
    equal("matmul_u8s8", q, packed, drawn(n).abs(), sums[:0], dtype)  # of a layout that our kernels do not read
    equal("matmul_u8s8", q, x86.pack_avx2(w)[0], drawn(n).abs(), sums[:0], dtype)
    biases = None, drawn(n, dtype=dtype), drawn(n, dtype=torch.float16), drawn(2 * n)[::2], drawn(1), drawn(*rows, n)
    scales = None, drawn(*rows, 1), torch.tensor(0.3), drawn(1, dtype=HALF), drawn(*rows, 1, dtype=torch.float64)
    scales += (drawn(*rows[:-1], 1, 1),)  # of some rows each
    wide = next(both("matmul_u8s8", q, packed, drawn(n).abs(), sums, FLOAT))
    for factors, bias in itertools.product(scales, biases):
        want = reference.scale_output(wide, torch.ones(()) if factors is None else factors, bias, dtype)
        for sums_of, of in ((sums, packed), (sums[:0], packed), (sums[:0], x86.pack_avx2(w)[0])):
            equal("matmul_u8s8", q, of, drawn(n).abs(), sums_of, dtype, factors, bias)
            found = sqcompile_ops.matmul_u8s8(q, of, drawn(n).abs(), sums_of, dtype, factors, bias)
            assert torch.equal(found, want)
    if rows[0] > 1:
        equal("matmul_u8s8", q.transpose(0, -2).contiguous().transpose(0, -2), packed, drawn(n).abs(), sums, dtype)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, torch.float16])
def test_activations(dtype):
    y = drawn(2, 7, 192, dtype=dtype)
    scales, biases = (None, drawn(2, 7, 1, seed=1).abs(), torch.tensor(0.5)), (None, drawn(192, dtype=dtype, seed=2))
    for scale, bias, static in itertools.product(scales, biases, (None, torch.tensor(0.1))):
        for activation, zero_point in (("silu", 128), ("gelu_tanh", 0)):
            equal(
                "linear_act_quantize", y, scale, bias, 0, 96, 96, activation, drawn(96, seed=3), 32, static, zero_point
            )
    equal("linear_act_quantize", y.transpose(0, 1), None, None, 0, -1, 192, "none", None, 0, None, 128)
    equal("linear_act_quantize", y[..., :40], None, None, 0, -1, 40, "relu", None, 0, None, 128)
    args = (
        y.transpose(1, 2).contiguous().transpose(1, 2),
        drawn(7, 2, 1).abs().transpose(0, 1),
        drawn(384, dtype=dtype)[::2],
    )
    equal("linear_act_quantize", *args, 0, 96, 96, "silu", drawn(192)[::2], 0, None, 128)
    equal("linear_act_quantize", y[:0], None, None, 0, -1, 192, "relu", None, 0, None, 128)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("rms", [False, True])
def test_norms(rms, dtype):
    y, residual = drawn(6, 64, dtype=dtype), drawn(2, 3, 64, dtype=dtype, seed=1)
    weight = drawn(64, seed=2)  # a folded one is float32
    for scale, r, keep in itertools.product(
        (None, drawn(6, 1, seed=3).abs()), (None, residual), ((True, False), (False, True))
    ):
        tail = 1e-5, rms, False, drawn(64, seed=4), 16, None, 128, *keep
        equal("linear_norm_quantize", y, scale, None, r, weight, None, *tail)
        equal(
            "linear_norm_quantize", y, scale, drawn(64, seed=5) if scale is not None else None, r, weight, weight, *tail
        )
    turned = residual.transpose(0, 1).contiguous().transpose(0, 1)
    equal("linear_norm_quantize", y, None, None, turned, None, None, 1e-5, rms, False, None, 0, None, 128, True, True)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, torch.float16, torch.float64])
def test_rotations(dtype):
    for k, block, shape in ((96, 32, (2, 5)), (256, 128, (1,)), (64, 16, ())):
        x = drawn(*shape, k, dtype=dtype)
        for static, zero_point in itertools.product((None, torch.tensor(0.1)), (0, 128)):
            equal("rotate_quantize", x, block, static, zero_point)
    x[..., 3] = float("inf")
    for rows in (x, drawn(64, 7, dtype=dtype).t(), drawn(0, 64, dtype=dtype)):  # steps of their own, and none
        equal("rotate_quantize", rows, 32, None, 128)


NEVER = {dtype: (float("-inf"), torch.finfo(dtype).min) for dtype in (FLOAT, HALF, torch.float16, torch.float64)}


@given(st.data(), st.sampled_from([*NEVER]), st.integers(0, 9), st.integers(0, 9), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_masks(data, dtype, queries, keys, batch):
    blocked = data.draw(st.sampled_from([*NEVER[dtype], -0.0, 1.0, float("inf"), float("nan")]))
    mask = torch.full((batch, 1, queries, keys), blocked, dtype=dtype).triu_(data.draw(st.integers(0, 2)))
    if mask.numel() and data.draw(st.booleans()):
        mask.view(-1)[data.draw(st.integers(0, mask.numel() - 1))] = data.draw(
            st.sampled_from([0.0, *NEVER[dtype], 5.0])
        )
    equal("mask_kind", mask)
    equal("mask_kind", mask.transpose(-1, -2))
    equal("mask_kind", mask.expand(2, batch, 3, queries, keys))
    equal("mask_kind", mask.flatten())
    equal("mask_kind", torch.full((), blocked, dtype=dtype))


@given(st.data(), st.sampled_from([torch.int64, torch.int32, torch.uint8]), st.integers(0, 3), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_ids(data, dtype, batch, tokens):
    ids = torch.randint(0, 100, (batch, tokens), dtype=dtype)
    for x in (ids, ids.t(), ids[:, ::2], ids[..., None].expand(-1, -1, 4)):
        equal("checked_ids", x, 0, 100, "ids")
        equal("stored", x)
    if ids.numel() and dtype != torch.uint8:
        ids.view(-1)[data.draw(st.integers(0, ids.numel() - 1))] = bad = data.draw(st.sampled_from([-101, 100]))
        for x, ops in itertools.product((ids, ids.t()), (sqcompile_ops, torch.ops.sqcompile_python)):
            with pytest.raises(
                IndexRangeError, match=f"^ids, which takes -100 to 99, and is {bad} at one place: the float"
            ):
                ops.checked_ids(x, -100, 100, "ids")


def heads(batch, count, tokens, d, dtype, seed, layout):
    """[batch, count, tokens, d]: dense; as a linear gives it; as a part of what one gives; or with channels apart."""
    wide = {"dense": 1, "linear": 1, "part": 3, "apart": 2}[layout]
    if layout == "dense":
        return drawn(batch, count, tokens, d, dtype=dtype, seed=seed)
    x = drawn(batch, tokens, wide * count * d, dtype=dtype, seed=seed)
    x = x[..., ::2] if layout == "apart" else x[..., : count * d]
    return x.unflatten(-1, (count, d)).transpose(1, 2)


@given(
    st.sampled_from([FLOAT, HALF]), st.integers(0, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 1, 2, 7, 8, 16, 40]), st.integers(0, 5), st.sampled_from([16, 32, 64]),
    st.sampled_from(["none", "full", "causal", "padding", "per head", "queries"]), st.booleans(),
    st.sampled_from([None, 0.3, -0.5]), st.sampled_from(["dense", "linear", "part", "apart"]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_attentions(dtype, batch, groups, repeats, queries, more, d, kind, causal, scale, layout):
    keys = queries + more
    q = heads(batch, groups * repeats, queries, d, dtype, 0, layout)
    k, v = (heads(batch, groups, keys, d, dtype, seed, layout) for seed in (1, 2))
    mask = {
        "none": None,
        "full": torch.zeros(1, 1, queries, keys, dtype=dtype),
        "causal": torch.full((queries, keys), float("-inf"), dtype=dtype).triu_(1),
        "padding": drawn(batch, 1, 1, keys, dtype=dtype, seed=3),
        "per head": drawn(1, groups * repeats, queries, keys, dtype=dtype, seed=3),
        "queries": drawn(queries, keys, dtype=dtype, seed=3),
    }[kind]
    causal = causal and mask is None  # as scaled_dot_product_attention takes them
    about = None if mask is None else sqcompile_ops.mask_kind(mask)
    equal("attention", q, k, v, mask, about, causal, scale)
    if mask is not None:
        equal("attention", q, k, v, mask, None, causal, scale)


def test_attentions_that_are_none():
    """The message is that of the operator in Python, which is PyTorch's."""
    q, k = drawn(2, 4, 16, 32), drawn(2, 4, 16, 32)
    wrong = [
        (q, k[..., :16], k, None, None, False, None),
        (q, k, k, drawn(3, 3), None, False, None),
        (q[0], k[0], k[0], None, None, False, None),
        (q.to(HALF), k, k, None, None, False, None),
    ]
    for args in wrong:
        with pytest.raises(Exception) as want:
            torch.ops.sqcompile_python.attention(*args)
        with pytest.raises(want.type) as found:
            sqcompile_ops.attention(*args)
        assert str(found.value) == str(want.value)


def test_what_is_compiled():
    """Inductor calls them, with sizes that vary, and the error of an index is ours."""

    def run(ids, mask, q):
        kind = sqcompile_ops.mask_kind.default(sqcompile_ops.stored.default(mask * 2))
        y = sqcompile_ops.attention.default(q, q, q, mask * 2, kind, False, None)
        rows = sqcompile_ops.rotate_quantize.default(y.transpose(1, 2).flatten(2), 32, None, 128)
        return sqcompile_ops.checked_ids.default(ids + 1, 0, 20, "ids"), kind, *rows

    compiled = torch.compile(run, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (9, 17):
            mask = torch.full((tokens, tokens), float("-inf"), dtype=HALF).triu_(1)
            args = torch.arange(tokens), mask, drawn(2, 3, tokens, 32, dtype=HALF)
            for y, z in zip(compiled(*args), run(*args), strict=True):
                assert torch.equal(y, z)
        with pytest.raises(IndexRangeError, match=r"^ids, which takes 0 to 19, and is 20 at one place"):
            compiled(torch.arange(20), mask, args[2])


def test_an_activation_that_there_is_not():
    with pytest.raises((RuntimeError, ValueError), match="there is no activation tanhshrink"):
        sqcompile_ops.linear_act_quantize(drawn(2, 32), None, None, 0, -1, 32, "tanhshrink", None, 0, None, 128)


@pytest.mark.parametrize("columns", [(-16, -1), (0, 32), (16, -1)])
def test_columns_behind_the_end(columns):
    for ops in (sqcompile_ops, torch.ops.sqcompile_python):
        with pytest.raises((RuntimeError, ValueError), match="to 32 more"):
            ops.linear_act_quantize(drawn(2, 32), None, None, *columns, 32, "relu", None, 0, None, 128)


@pytest.mark.parametrize(("k", "block"), [(32, 8), (256, 256), (80, 64)])
def test_blocks_that_there_are_not(k, block):
    for ops in (sqcompile_ops, torch.ops.sqcompile_python):
        with pytest.raises((RuntimeError, ValueError), match=f"rotated by {block}"):
            ops.linear_act_quantize(drawn(2, k), None, None, 0, -1, k, "relu", None, block, None, 128)
        with pytest.raises((RuntimeError, ValueError), match=f"rotated by {block}"):
            ops.linear_norm_quantize(
                drawn(2, k), None, None, None, None, None, 1e-5, True, True, None, block, None, 128, False, True
            )
    with pytest.raises((RuntimeError, ValueError), match=f"rotated by {block}"):
        sqcompile_ops.rotate_quantize(drawn(2, k), block, None, 128)


WITHOUT = """
import torch
from types import SimpleNamespace
from sqcompile.errors import IndexRangeError
from sqcompile.kernels import attention, rotation
from sqcompile.kernels.cpu import dispatch
from sqcompile.kernels.ops import ON_X86, on_x86_library, sqcompile_ops

dispatch.library = lambda: {library}
assert not dispatch.install(ON_X86, on_x86_library)
q, mask = torch.randn(1, 2, 9, 32), torch.full((9, 9), float("-inf")).triu(1)
kind = sqcompile_ops.mask_kind(sqcompile_ops.stored(mask))
assert kind == attention.CAUSAL
assert torch.equal(sqcompile_ops.attention(q, q, q, mask, kind, False, None), attention.attention(q, q, q, mask, kind, False, None))
assert torch.equal(sqcompile_ops.rotate_quantize(q, 32, None, 0)[0], rotation.rotate_quantize(q, 32, None, 0)[0])
assert sqcompile_ops.linear_act_quantize(q, None, None, 0, -1, 32, "relu", None, 0, None, 128)[0].dtype == torch.uint8
try:
    sqcompile_ops.checked_ids(torch.arange(3), 0, 2, "ids")
except IndexRangeError:
    print("as before")
"""


@pytest.mark.parametrize("library", ["None", 'SimpleNamespace(sqcompile_dispatch=lambda *given: b"no")'])
def test_without_the_code_they_stay_in_python(library):
    """Where it does not build, and where PyTorch does not take it."""
    run = subprocess.run([sys.executable, "-c", WITHOUT.format(library=library)], capture_output=True, text=True)
    assert run.stdout == "as before\n", run.stderr
