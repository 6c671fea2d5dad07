"""FP8 on a GPU: `torch._scaled_mm` gives the reference's numbers, alone and in a compiled model."""

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches

import sqcompile
from sqcompile import Recipe
from sqcompile.kernels import fp8, reference
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.qtypes import FP8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and not fp8.available(torch.device("cuda", 0)), reason="needs FP8 tensor cores"
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("rows", "k", "n"), [(70, 512, 384), (1, 64, 48), (0, 64, 48), (5, 40, 24), (7, 4096, 256)])
def test_the_linear(rows, k, n, static, bias, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    x, w = (torch.randn(*shape, device="cuda", generator=g) for shape in ((2, rows, k), (n, k)))
    scale = torch.full((2, rows, 1), 0.01, device="cuda") if static else reference.token_scale(x, FP8.q_max)
    w_scale = reference.weight_scale(w, True, FP8.q_max)
    q, qw = reference.quantize(x, scale, dtype=FP8.dtype), reference.quantize(w, w_scale, dtype=FP8.dtype)
    b = torch.randn(n, device="cuda", generator=g).to(dtype) if bias else None
    got = sqcompile_ops.fp8_linear(q, scale, qw, w_scale.flatten(), b, dtype)
    want = reference.fp8_linear(q, scale, qw, w_scale.flatten(), b, torch.float32)
    assert got.dtype == dtype and got.shape == (2, rows, n)
    # sums of tensor cores keep 14 bits or more, fast ones for bfloat16
    assert rows == 0 or relative_error(got, want) < {torch.float32: 5e-4, torch.float16: 7e-4}.get(dtype, 6e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_transposed_input(batch, dtype):
    """As what a convolution gives is handed to a linear."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 48)

        def forward(self, x):
            return self.linear(x.flatten(2).transpose(1, 2))

    model = Net().eval().cuda().to(dtype)
    x = torch.randn(batch, 64, 4, 8, device="cuda", dtype=dtype)
    net = sqcompile.compile(model, [x], recipe=Recipe(dtype="fp8"), backend="eager", progress=False)
    assert relative_error(net(x), model(x)) < 0.06
    assert sqcompile.debug.bisect(model, x, recipe=Recipe(dtype="fp8"), progress=False).right


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_language_model(dtype, backend):
    """A rounding that falls the other way is a step of 1 part in 8, so results differ, by less than FP8 costs."""
    plan = sqcompile.calibrate(tiny_lm("llama").to(dtype), token_batches(), recipe=Recipe(dtype="fp8"), progress=False)
    x = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = tiny_lm("llama").to(dtype)(x).logits
    cpu = sqcompile.compile(tiny_lm("llama").to(dtype), plan=plan, backend="eager")(input_ids=x).logits
    net = sqcompile.compile(tiny_lm("llama").to(dtype).cuda(), plan=plan, backend=backend)
    assert len(net.lowered.graph.find_nodes(op="call_function", target=sqcompile_ops.fp8_linear.default)) == 8
    got = net(input_ids=x.cuda()).logits.cpu()
    assert relative_error(got, want) < 1.2 * relative_error(cpu, want)
    assert relative_error(got, cpu) < relative_error(cpu, want)
    for rows in (1, 7):  # other sizes, by the same graph
        assert net(input_ids=x[:, :rows].cuda()).logits.isfinite().all()
