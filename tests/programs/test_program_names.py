"""Names of what ONNX models take and give: the model's, each of one value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sqcompile
from sqcompile import Recipe

runtime = pytest.importorskip("onnxruntime")


class Named(nn.Module):
    """A norm and a linear, and a function that makes the result of theirs and of the inputs."""

    def __init__(self, f: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.norm, self.linear, self.f = nn.LayerNorm(16), nn.Linear(16, 16), f

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return self.f(self.linear(self.norm(x)), x, mask)


@pytest.mark.parametrize(
    ("f", "names"),
    [
        (lambda y, x, mask: {"y": y * mask}, ["y"]),
        (lambda y, x, mask: {"out": y - mask, "mask": x, "x": mask}, ["out", "mask_2", "x_2"]),
        (lambda y, x, mask: {"x": y + mask}, ["x_2"]),
        (lambda y, x, mask: {"out": y * mask, "attention_mask": mask}, ["out", "attention_mask"]),
        (lambda y, x, mask: {"a": y, "b": y, "c": x, "d": x, "e": mask}, ["a", "b", "c", "d", "e"]),
    ],
    ids=["own", "swapped", "an input's", "an input itself", "twice"],
)
def test_onnx_takes_and_gives_what_the_model_does(f, names, tmp_path):
    torch.manual_seed(0)
    model, call = Named(f).eval(), {"x": torch.randn(4, 8, 16), "mask": torch.rand(4, 8, 16)}
    net = sqcompile.compile(model, [call], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    done = net.export("onnx", tmp_path / "net.onnx", progress=False)
    assert f"gives {', '.join(names)}" in str(done)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "mask"]
    assert [o.name for o in session.get_outputs()] == names
    found = session.run(None, {k: v.numpy() for k, v in call.items()})
    for got, want in zip(found, net.stages["quantized"](**call).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)
