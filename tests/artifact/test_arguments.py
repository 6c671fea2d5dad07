"""What the operators of a saved graph are called with."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import sqcompile
from sqcompile import ArtifactError
from sqcompile.artifact.arguments import from_json, to_json


def test_complex_numbers_are_arguments(tmp_path):
    for x in (0.6 - 0.8j, complex(float("inf"), 0.0)):
        assert from_json(json.loads(json.dumps(to_json([x]))), {}, torch.device) == [x]
    for bad in ([1.0], [1.0, "1"], [1.0, {"dtype": "float32"}], [None, 1.0], [True, 1.0], {"re": 1.0}):
        with pytest.raises(ArtifactError, match="argument"):
            from_json({"complex": bad}, {}, torch.device)

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            return torch.view_as_real(torch.view_as_complex(self.fc(x).unflatten(-1, (-1, 2))) * (0.6 + 0.8j)).flatten(
                -2
            )

    model, x = Turned().eval(), torch.randn(2, 5, 16)
    net = sqcompile.compile(model, [x], backend="eager", progress=False)
    net.save(tmp_path / "saved", progress=False)
    y = sqcompile.load(tmp_path / "saved", backend="eager")(x)
    assert torch.equal(y, net(x)) and float((y - model(x)).norm() / y.norm()) < 0.02


def test_a_constant_of_the_models_code_is_saved(tmp_path):
    """torch.export records that it is taken off autograd's record, by a call that nobody reads."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            h = self.up(x)
            return self.down(torch.where(h > 0, h, torch.tensor(-1.0, dtype=x.dtype)))

    model, x = Masked().eval(), torch.randn(2, 5, 16)
    net = sqcompile.compile(model, [x], backend="eager", progress=False)
    assert not any("detach" in str(n.target) for n in net.stages["traced"].graph.nodes)
    net.save(tmp_path / "saved", progress=False)
    assert torch.equal(sqcompile.load(tmp_path / "saved", backend="eager")(x), net(x))
