"""Names of parameters and buffers: those that the code of torch.fx cannot read are refused in a sentence, others serve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sqcompile
from sqcompile import CaptureError, Recipe

WRONG = (
    'a"b',
    "a\\b",
    "a\nb",
    "a\rb",
    "a\0b",
    "\ud800",
    "class",
    "None",
    "ﬁ",
)  # Python reads the last one as "fi"
RIGHT = ("a'b", "a b", "a-b", "a{b}", "0", "é", "self")
TAKEN = ("_graph", "_code", "_in_spec", "graph", "code", "meta")


class Named(nn.Module):
    """A submodule, a parameter or a buffer with a name."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.name, self.last = kind, name, nn.Linear(8, 8)
        if kind == "submodule":
            self.add_module(name, nn.Linear(8, 8))
        elif kind == "parameter":
            self.register_parameter(name, nn.Parameter(torch.randn(8)))
        else:
            self.register_buffer(name, torch.randn(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = getattr(self, self.name)
        return self.last(found(x).relu() if self.kind == "submodule" else x * found)


def batch() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def compiled(model: nn.Module) -> sqcompile.CompiledModel:
    return sqcompile.compile(model, [batch()], backend="eager", progress=False)


def by_backend(model: nn.Module) -> torch.Tensor:
    torch._dynamo.reset()  # models of one class share what it has compiled, up to a limit
    net = torch.compile(model, backend="smoothquant", options={"compiler": "eager", "calibration_steps": 1})
    with torch.no_grad():
        net(batch())
        return net(batch())


def bisected(model: nn.Module) -> object:
    return sqcompile.debug.bisect(model, batch(), progress=False)


@pytest.mark.parametrize("entry", [compiled, by_backend, bisected])
@pytest.mark.parametrize("name", WRONG)
def test_a_name_that_no_code_reads_is_refused_in_a_sentence(name, entry):
    for kind in ("submodule", "parameter", "buffer"):
        whole = f"{name}.weight" if kind == "submodule" else name
        want = f"the parameter or buffer {whole!r} has a name that the Python code which torch.fx writes of a graph cannot read: rename {name!r}"
        with pytest.raises(CaptureError, match=re.escape(want)) as caught:
            entry(Named(name, kind).eval())
        assert str(caught.value).isprintable()  # a line, whatever the name is


@pytest.mark.parametrize("entry", [compiled, by_backend])
def test_what_the_module_of_a_graph_has_for_itself_is_refused(entry):
    for name in TAKEN:
        for kind in ("submodule", "parameter", "buffer"):
            with pytest.raises(CaptureError, match=f"named '{name}' clashes with torch.fx.GraphModule: rename it"):
                entry(Named(name, kind).eval())
    for kind in ("parameter", "buffer"):
        with pytest.raises(CaptureError, match="the parameter or buffer 'self' has a name"):
            entry(Named("self", kind).eval())


def test_other_names_serve(tmp_path):
    for name in RIGHT:
        model = Named(name, "submodule").eval()
        net = compiled(model)
        want = net(batch())
        assert torch.equal(by_backend(model), want)
        assert all((net.stages[s](batch()) - want).norm() < 0.05 * want.norm() for s in net.stages)
        net.save(tmp_path / "saved")
        assert torch.equal(sqcompile.load(tmp_path / "saved", backend="eager")(batch()), want)
        net.draw(tmp_path / "graph.html")


def test_what_the_graph_does_not_read_may_have_any_name():
    model = Named("fine", "submodule")
    model.add_module('a"b', nn.ReLU())
    model.add_module("graph", nn.Sequential(nn.ReLU()))
    assert torch.equal(compiled(model.eval())(batch()), compiled(Named("fine", "submodule").eval())(batch()))


class Summed(nn.Module):
    """A norm and a linear, and whatever else it is given, added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y + sum(more.values())  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["output", "σ", "x_1", "linear", "args"])
def test_an_argument_of_any_name_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, call = Summed().eval(), {"x": torch.randn(4, 8, 16), name: torch.randn(4, 8, 16)}
    net = sqcompile.compile(model, [call], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    net.save(tmp_path / "net")
    assert torch.equal(sqcompile.load(tmp_path / "net", backend="eager", progress=False)(**call), net(**call))


@pytest.mark.parametrize("name", ["class", "a b", "torch", "getattr", "device", "inf"])
def test_an_argument_that_the_code_of_a_graph_cannot_have_is_refused(name: str) -> None:
    call = {"x": torch.randn(4, 8, 16), name: torch.randn(4, 8, 16)}
    with pytest.raises(CaptureError, match=f"the argument '{name}' has a name that the Python code"):
        sqcompile.compile(Summed().eval(), [call], recipe=Recipe(alpha=0.5), backend="eager", progress=False)


def test_a_sparse_argument_is_refused_in_words() -> None:
    with pytest.raises(CaptureError, match=r"layout torch.sparse_coo: pass it dense"):
        sqcompile.compile(Summed().eval(), [torch.randn(4, 16).to_sparse()], recipe=Recipe(alpha=0.5), progress=False)
