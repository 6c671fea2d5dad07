"""Models in which PyTorch computes several things as one: vmap, and whole encoder layers."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from torch import nn

import sqcompile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Mapped(nn.Module):
    """torch.vmap, as transformers' scans of Mamba have it."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        h = self.up(self.norm(x))
        return self.down(torch.vmap(lambda a, b: a * b + a)(h, torch.sigmoid(h)))


@pytest.mark.slow
def test_a_model_with_vmap_is_quantized():
    torch.manual_seed(0)
    model = Mapped().eval()
    net = torch.compile(model, backend="smoothquant", options={"recipe": sqcompile.Recipe(0.5), "calibration_steps": 2})
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(4, 6 + seed, 32, generator=torch.Generator().manual_seed(seed))
            y, want = net(x), model(x)
    assert 1e-4 < relative_error(y, want) < 0.03
    assert [l.quantized for l in sqcompile.report_of(net).layers] == [True, True]


def test_encoder_layers_of_one_operator_are_said_to_stay_in_float():
    """PyTorch's fast path; without it they are linears as any."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.Linear(32, 32), nn.TransformerEncoder(layer, 1), nn.Linear(32, 32)).eval()
    x, options = torch.randn(4, 9, 32), {"recipe": sqcompile.Recipe(0.5), "calibration_steps": 1, "compiler": "eager"}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with (
            torch.no_grad(),
            pytest.warns(UserWarning, match=r"stay in FLOAT: call torch\.backends\.mha\.set_fastpath"),
        ):
            net = torch.compile(model, backend="smoothquant", options=options)
            net(x), net(x)
        assert len(sqcompile.report_of(net).layers) == 2
        torch.backends.mha.set_fastpath_enabled(False)
        torch._dynamo.reset()
        net = torch.compile(model, backend="smoothquant", options=options)
        with torch.no_grad():
            net(x)
            assert 1e-4 < relative_error(net(x), model(x)) < 0.03
        assert len(sqcompile.report_of(net).layers) == 2 + 4
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
