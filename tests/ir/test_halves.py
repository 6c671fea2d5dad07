"""Products of 16-bit floats for analyses, in float32: those of PyTorch but for the order of sums, and so are gradients."""

from __future__ import annotations

import pytest
import torch

from sqcompile.kernels import reference
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir import halves

aten = torch.ops.aten


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(halves, "_slow", lambda dtype: dtype != torch.float32)


def close(found, exact):
    """Whether values are float32's sums of ``exact`` float64 ones, rounded once: one unit of the dtype apart at most."""
    assert found.isfinite().all()
    unit = torch.finfo(found.dtype).eps * exact.abs() + 2e-5 * exact.abs().max()
    return bool(((found.double() - exact).abs() <= unit).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "n"), [((2, 100, 48), 40), ((130, 48), 1), ((128, 4096), 1030)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_and_its_gradient(slow, dtype, shape, n, bias):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype).requires_grad_()
    w, b = torch.randn(n, shape[-1], generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
    y = halves.linear(x, w, b if bias else None)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], n)
    assert y.grad_fn is not None and "_Linear" in type(y.grad_fn).__name__  # it is made in float32
    exact = x.detach().double() @ w.double().t() + (b.double() if bias else 0)
    assert close(y.detach(), exact)
    up = torch.randn(y.shape, generator=g).to(dtype)
    (found,) = torch.autograd.grad(y, x, up)
    assert found.dtype == dtype
    assert close(found, up.double() @ w.double())


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_users_default_dtype_changes_nothing(slow, default):
    x, w = torch.randn(130, 48).bfloat16().requires_grad_(), torch.randn(40, 48).bfloat16()
    (want,) = torch.autograd.grad(halves.linear(x, w), x, torch.ones(130, 40).bfloat16())
    torch.set_default_dtype(default)
    try:
        (found,) = torch.autograd.grad(halves.linear(x, w), x, torch.ones(130, 40, dtype=torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, want)


def test_no_channels(slow):
    x, w = torch.randn(130, 0).bfloat16(), torch.randn(40, 0).bfloat16()
    assert torch.equal(halves.linear(x, w), torch.nn.functional.linear(x, w))


def test_few_rows_other_dtypes_and_fast_processors_are_left_to_pytorch(slow, monkeypatch):
    w = torch.randn(8, 16)
    for x in (torch.randn(halves.ROWS - 1, 16).bfloat16(), torch.randn(halves.ROWS, 16)):
        assert torch.equal(halves.linear(x, w.to(x.dtype)), torch.nn.functional.linear(x, w.to(x.dtype)))
        assert halves.linear(x.requires_grad_(), w.to(x.dtype)).grad_fn.name().startswith(("Mm", "T", "Add", "Unsafe"))
    monkeypatch.setattr(halves, "_slow", lambda dtype: False)
    x = torch.randn(halves.ROWS, 16).bfloat16()
    assert torch.equal(halves.linear(x, w.bfloat16()), torch.nn.functional.linear(x, w.bfloat16()))


def test_experts(slow):
    x, w = torch.randn(300, 32).bfloat16(), torch.randn(3, 24, 32).bfloat16()
    offsets = torch.tensor([140, 145, 290], dtype=torch.int32)
    found = halves.in_analyses(sqcompile_ops.grouped_linear.default)(x, w, offsets)
    exact = reference.grouped_linear(x.double(), w.double(), offsets)
    assert close(found, exact)
    assert not found[290:].any()


def test_other_operators_are_themselves():
    assert halves.in_analyses(aten.mul.Tensor) is aten.mul.Tensor


@pytest.mark.parametrize(
    ("vendor", "flags", "slow_ones"),
    [
        ("GenuineIntel", {"avx2"}, {torch.bfloat16, torch.float16}),
        ("GenuineIntel", {"avx512_bf16", "avx512_fp16"}, {torch.bfloat16}),
        ("AuthenticAMD", {"avx512_bf16"}, {torch.float16}),
        ("", set(), set()),  # who knows
    ],
)
def test_which_dtypes_are_slow(monkeypatch, vendor, flags, slow_ones):
    monkeypatch.setattr(halves, "_processor", lambda: (vendor, frozenset(flags)))
    monkeypatch.setattr(halves, "amx", lambda: False)
    monkeypatch.setattr(halves.platform, "machine", lambda: "x86_64")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert {d for d in dtypes if halves._slow.__wrapped__(d)} == slow_ones
    monkeypatch.setattr(halves, "amx", lambda: True)
    assert not halves._slow.__wrapped__(torch.bfloat16)
    monkeypatch.setattr(halves.platform, "machine", lambda: "aarch64")
    assert not any(halves._slow.__wrapped__(d) for d in dtypes)


def test_calibration_of_a_model_in_bfloat16_uses_them(slow, monkeypatch):
    import sqcompile

    made = []
    real = halves._Linear.apply
    monkeypatch.setattr(halves._Linear, "apply", lambda *args: made.append(args[1].shape) or real(*args))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.LayerNorm(64), torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64)
    )
    plan = sqcompile.calibrate(model.bfloat16().eval(), [torch.randn(160, 64).bfloat16()], progress=False)
    assert [l.quantized for l in plan.layers] == [True, True]
    assert made.count((96, 64)) >= 2 and made.count((64, 96)) >= 2  # statistics, and gradients
