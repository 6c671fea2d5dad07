"""In-place operations on tensors of a model's own: captured as operations that write to nothing, with the same result."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqcompile.capture.inputs import Call
from sqcompile.capture.trace import trace
from sqcompile.passes.ir.graph import is_mutable


class Net(nn.Module):
    def __init__(self, body: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.body = nn.Linear(8, 8), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.linear(x).clone())


def zeros_and_a_view(y: Tensor) -> Any:
    z = torch.zeros_like(y)
    z[..., :4] = y[..., 4:]
    row = z[:, 2]
    row += 1
    return z, row


def through_a_transposition(y: Tensor) -> Any:
    t = y.transpose(1, 2)
    t[:, 3].mul_(2)
    y.add_(1)
    return t, y


def read_through_an_old_view(y: Tensor) -> Any:
    first = y[:, 0]
    y.relu_()
    return first + y[:, 1], y


def triangular_solve(y: Tensor) -> Any:
    """The loop of gated delta rules."""
    a = y.unsqueeze(-1) * y.unsqueeze(-2)
    for i in range(1, 8):
        row, above = a[..., i, :i].clone(), a[..., :i, :i].clone()
        a[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    return a


def results_of_writes(y: Tensor) -> Any:
    z = y.add_(1).mul_(2)
    z.div_(3)
    return y, z


def parts_of_a_reshaped_view(y: Tensor) -> Any:
    y.unsqueeze(0)[0, :, 1:3] = 5
    flat = y.flatten(1)
    y.sub_(1)
    flat[:, 2] = 7
    return flat, y


def narrower_arithmetic(y: Tensor) -> Any:
    half = y.half()
    half.add_(y)
    half.masked_fill_(half > 0, 2)
    return half


def picked_rows(y: Tensor) -> Any:
    y[:, torch.tensor([0, 2])] = 1.0
    y[:, 1:2].copy_(y[:, 3:4].expand(-1, 1, -1))
    return y


def a_dropout_in_between(y: Tensor) -> Any:
    F.dropout(y, 0.5, False).add_(1)
    return y


def chunks(y: Tensor) -> Any:
    p, q = y.chunk(2, -1)
    y.mul_(2)
    return p - q


def written_chunks(y: Tensor) -> Any:
    p, _ = y.chunk(2, -1)
    p.mul_(2)
    return y


def a_diagonal(y: Tensor) -> Any:
    y.diagonal(0, 1, 2).add_(1)
    return y


def other_shape(y: Tensor) -> Any:
    z = y[:1].clone()
    z.squeeze_(0)
    z.add_(1)
    return z


OURS = [
    zeros_and_a_view, through_a_transposition, read_through_an_old_view, triangular_solve, results_of_writes,
    parts_of_a_reshaped_view, narrower_arithmetic, picked_rows, a_dropout_in_between, chunks,
]  # fmt: skip


def check(body: Callable[[Tensor], Any]) -> None:
    """The captured graph writes to nothing, and gives at two sizes what the model gives."""
    torch.manual_seed(0)
    model = Net(body).eval()
    gm = trace(model, Call((torch.randn(3, 6, 8),), {}))
    assert not any(is_mutable(n.target) for n in gm.graph.nodes)
    for shape in ((3, 6, 8), (2, 9, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            want, got = (out if isinstance(out, tuple) else (out,) for out in (model(x), gm(x)))
        torch.testing.assert_close(got, want)  # PyTorch's own rewrite spells copies through x + (y - x)


@pytest.mark.parametrize("body", OURS)
def test_writes_become_values_without_running_the_program_again(
    body: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.export.ExportedProgram, "run_decompositions")
    check(body)


@pytest.mark.parametrize("body", [written_chunks, a_diagonal, other_shape])
def test_what_is_not_understood_is_left_to_pytorch(body: Callable[[Tensor], Any]) -> None:
    check(body)


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t[:, 1], lambda t: t[:, :2], lambda t: t[..., 2:], lambda t: t.transpose(0, 1), lambda t: t.unsqueeze(1),
    lambda t: t[..., ::2], lambda t: t.permute(*reversed(range(t.dim()))), lambda t: t.flatten(-2) if t.is_contiguous() else t,
    lambda t: t.expand_as(t), lambda t: t.detach(),
]  # fmt: skip
WRITES: list[Callable[[Tensor, Tensor], Any]] = [
    lambda t, u: t.add_(1), lambda t, u: t.mul_(u) if u.shape == t.shape else t.neg_(), lambda t, u: t.fill_(2),
    lambda t, u: t.copy_(u.clone()) if u.shape == t.shape else t.zero_(), lambda t, u: t.masked_fill_(t > 0.5, -1),
    lambda t, u: t.clamp_(max=1.5), lambda t, u: t.sub_(t[..., :1].clone()),
]  # fmt: skip


def program(seed: int) -> Callable[[Tensor], Any]:
    """Views of views of two tensors, written to and read in any order."""

    def body(y: Tensor) -> Any:
        choose = random.Random(seed)
        tensors = [y, y * 2]
        read = []
        for _ in range(12):
            t = choose.choice(tensors)
            kind = choose.random()
            if kind < 0.45 and t.dim() in (2, 3) and min(t.shape[1:]) > 3:
                tensors.append(choose.choice(VIEWS)(t))
            elif kind < 0.8:
                tensors.append(choose.choice(WRITES)(t, choose.choice(tensors)))
            else:
                read.append(t.sin())
        return (*read, *(t.clone() for t in tensors))

    return body


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(s, marks=pytest.mark.slow) for s in range(12, 120))])
def test_random_programs_of_views_and_writes(seed: int) -> None:
    check(program(seed))
