"""Calls with sizes of one or none: served as the model does, or refused in words where the captured graph does something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import relative_error
from families import build
from torch import Tensor, nn

import sqcompile
from sqcompile import CaptureError, CompiledModel, Recipe


class Then(nn.Module):
    """A norm and an MLP, and what a function makes of its result, float [B, T, 16]."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.f = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.down(torch.relu(self.up(self.norm(x)))))


def compiled(f: Callable[[Tensor], Tensor], *sizes: int, **options: Any) -> tuple[nn.Module, CompiledModel]:
    torch.manual_seed(0)
    model, x = Then(f).eval(), torch.randn(*(sizes or (4, 9)), 16)
    how = {"recipe": Recipe(alpha=0.5), "backend": "eager", "progress": False, **options}
    return model, sqcompile.compile(model, [x, x.flip(0)], **how)


@pytest.mark.parametrize(
    ("f", "size", "condition"),
    [
        (lambda y: y * 2 if y.shape[0] == 1 else y, (1, 5), "x.shape[0] > 1"),
        (lambda y: y - 1 if y.shape[1] == 1 else y, (2, 1), "x.shape[1] > 1"),
        (lambda y: y.softmax(1) if y.shape[1] > 1 else y, (2, 1), "x.shape[1] > 1"),
        (lambda y: y * 3 if y.shape[1] < 2 else y, (2, 1), "x.shape[1] > 1"),
        (lambda y: y / y.std(1, keepdim=True) if y.shape[1] > 1 else y, (2, 1), "x.shape[1] > 1"),
        (lambda y: y.mean(1) if y.shape[1] > 0 else y.new_zeros(y.shape[0], 16), (2, 0), "x.shape[1] > 0"),
        (lambda y: y.squeeze(1), (2, 1), "x.shape[1] > 1"),
        (lambda y: y.squeeze((0, 1)), (1, 5), "x.shape[0] > 1"),
        (lambda y: y.squeeze(), (1, 5), "x.shape[0] > 1"),
    ],
    ids=["one row", "one token", "more than one", "fewer than two", "deviation", "none", "squeeze", "squeezes", "all"],
)  # fmt: skip
def test_what_the_model_does_otherwise_is_refused(f, size, condition, tmp_path):
    model, net = compiled(f)
    net.save(tmp_path / "net")
    for served in (net, sqcompile.load(tmp_path / "net", backend="eager", progress=False)):
        for other in ((3, 4), (2, 6)):
            x = torch.randn(*other, 16)
            assert relative_error(served(x), model(x)) < 0.05
        with pytest.raises(CaptureError) as e:
            served(torch.randn(*size, 16))
        assert condition in str(e.value) and f"= {min(size)}" in str(e.value)


@pytest.mark.parametrize(
    "f",
    [
        lambda y: y,
        lambda y: y[:, -max(1, y.shape[1] // 2) :],
        lambda y: y - y.mean(1, keepdim=True) if y.shape[1] > 1 else y * 0,  # the mean of one is itself
        lambda y: y.unsqueeze(1).squeeze(1),
        lambda y: y.squeeze(0).reshape(-1, 16).sum(0),
        lambda y: y.mean(1).squeeze(0).reshape(y.shape[0], 16),
    ],
    ids=["plain", "half", "the same of one", "a one of its own", "squeezed and summed", "squeezed and back"],
)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_is_the_same_for_one_is_served(f, backend):
    model, net = compiled(f, backend=backend)
    for size in ((1, 5), (2, 1), (1, 1), (3, 7)):
        x = torch.randn(*size, 16)
        want = model(x)
        assert net(x).shape == want.shape and float((net(x) - want).norm()) <= 0.05 * max(float(want.norm()), 1e-6)


def test_an_example_of_one_that_the_graph_does_not_serve_is_refused_at_once():
    """Its graph is captured with two rows, and would be wrong for the very batches that calibrated it."""
    with pytest.raises(CaptureError, match=r"x.shape\[0\] > 1.*dynamic_shapes=None"):
        compiled(lambda y: y * 2 if y.shape[0] == 1 else y, 1, 9)
    model, net = compiled(lambda y: y * 2 if y.shape[0] == 1 else y, 1, 9, dynamic_shapes=None)
    x = torch.randn(1, 9, 16)
    assert relative_error(net(x), model(x)) < 0.05


def test_a_plan_that_is_compiled_again_knows_it():
    model, net = compiled(lambda y: y * 2 if y.shape[0] == 1 else y)
    again = sqcompile.compile(model, plan=net.plan, backend="eager", progress=False)
    with pytest.raises(CaptureError, match=r"x.shape\[0\] > 1"):
        again(torch.randn(1, 5, 16))


def test_a_plan_of_another_call_is_compiled_for_the_one_that_is_given():
    model, net = compiled(lambda y: y * 2 if y.shape[0] == 1 else y)
    x = torch.randn(3, 2, 16)
    again = sqcompile.compile(model, plan=net.plan, example_inputs={"x": x}, backend="eager", progress=False)
    assert relative_error(again(x=x), model(x)) < 0.05
    with pytest.raises(CaptureError, match=r"x.shape\[0\] > 1"):
        again(x=x[:1])


def test_one_row_of_one_token_alone():
    model, net = compiled(lambda y: y * 2 if y.shape[0] * y.shape[1] == 1 else y)
    for size in ((1, 5), (5, 1)):
        x = torch.randn(*size, 16)
        assert relative_error(net(x), model(x)) < 0.05
    with pytest.raises(CaptureError, match=r"x.shape\[0\] \+ x.shape\[1\] > 2"):
        net(torch.randn(1, 1, 16))


def test_a_mask_of_infinities_hides_nothing():
    def masked(y):
        return torch.cat([y * 2 if y.shape[0] == 1 else y, torch.full_like(y, -torch.inf)])

    with pytest.raises(CaptureError, match=r"x.shape\[0\] > 1"):
        compiled(masked)[1](torch.randn(1, 5, 16))


class Streams(nn.Module):
    """Adds what it keeps, which it changes when one token comes; and a table of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.table = nn.LayerNorm(16), nn.Linear(16, 16), nn.Embedding(1, 16)
        self.register_buffer("state", torch.zeros(16))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        if x.shape[1] == 1:
            self.state.add_(1)
        return self.linear(self.norm(x + self.table(kind))) + self.state


def test_a_state_that_one_token_changes_is_seen_and_left_alone():
    model, call = Streams().eval(), {"x": torch.randn(4, 9, 16), "kind": torch.zeros(4, 9, dtype=torch.int64)}
    seed = torch.random.get_rng_state()
    net = sqcompile.compile(model, [call], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    assert torch.equal(torch.random.get_rng_state(), seed) and not model.state.any()
    with pytest.raises(CaptureError, match=r"x.shape\[1\] > 1"):
        net(call["x"][:, :1], call["kind"][:, :1])
    assert (
        relative_error(net(**{k: v[:1] for k, v in call.items()}), model(**{k: v[:1] for k, v in call.items()})) < 0.05
    )


class Two(nn.Module):
    """Two inputs as long as each other by chance, of which the length of one decides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y = self.linear(self.norm(a)).sum(1) + b.sum(1)
        return y * 2 if b.shape[1] == 1 else y


def test_sizes_that_are_equal_by_chance_are_told_apart():
    model, call = Two().eval(), {"a": torch.randn(4, 9, 16), "b": torch.randn(4, 9, 16)}
    net = sqcompile.compile(model, [call], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    one = {"a": call["a"][:, :1], "b": call["b"][:, :3]}
    assert relative_error(net(**one), model(**one)) < 0.05
    with pytest.raises(CaptureError, match=r"b.shape\[1\] > 1"):
        net(a=call["a"], b=call["b"][:, :1])


def test_models_that_draw_are_not_compared():
    """Two runs of them differ, which says nothing of sizes."""
    _, net = compiled(lambda y: y + torch.rand_like(y))
    assert net(torch.randn(1, 1, 16)).shape == (1, 1, 16)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_one_row_and_one_token_of_a_family(family):
    model, call = build(family)
    net = sqcompile.compile(model, [call], recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    for rows, tokens in ((1, 9), (2, 1), (1, 1)):
        small = {k: v[:rows, :tokens] for k, v in call.items()}
        with torch.no_grad():
            want = model(**small)[0]
        assert relative_error(net(**small)[0], want) < 0.1
