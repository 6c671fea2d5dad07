"""On a GPU, which has no INT8 kernels yet: the integer reference runs, says so, and agrees with the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches

import sqcompile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_reference_serves_a_gpu(backend, monkeypatch):
    from sqcompile.passes import lower

    monkeypatch.setattr(lower, "_warned", set())
    batches = token_batches()
    plan = sqcompile.calibrate(tiny_lm("llama"), batches, progress=False)
    cpu = sqcompile.compile(tiny_lm("llama"), plan=plan, backend="eager")
    with pytest.warns(UserWarning, match="no INT8 kernels for cuda"):
        gpu = sqcompile.compile(tiny_lm("llama").cuda(), plan=plan, backend=backend)
    for shape in ((3, 40), (1, 1)):
        x = torch.randint(3, 96, shape)
        assert relative_error(gpu(x.cuda()).logits.cpu(), cpu(x).logits) < 2e-2  # rounding moves single int8 values


def test_calibration_on_a_gpu_gives_the_cpus_plan():
    batches = token_batches()
    cuda = [{k: v.cuda() for k, v in b.items()} for b in batches]
    a = sqcompile.calibrate(tiny_lm("opt"), batches, progress=False)
    b = sqcompile.calibrate(tiny_lm("opt").cuda(), cuda, progress=False)
    assert [l.smoothing for l in a.layers] == [l.smoothing for l in b.layers]
    assert all(relative_error(b.scales[k].cpu(), s) < 1e-3 for k, s in a.scales.items())
