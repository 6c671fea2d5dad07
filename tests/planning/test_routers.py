"""Routers in every spelling: linears whose output chooses what data is used stay in float, and nothing else does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqcompile
from sqcompile import Recipe
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.planning.routers import find_routers

WIDTH, EXPERTS = 32, 4


class Experts(nn.Module):
    """All experts run on all tokens; ``gates`` [B, T, E] weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.head = nn.Linear(WIDTH, 10)

    def gates(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def mix(self, gates: Tensor, h: Tensor) -> Tensor:
        return sum((gates[..., e : e + 1] * f(h) for e, f in enumerate(self.experts)), torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head(x + self.mix(self.gates(self.router(h)), h))


class OneHot(Experts):
    def gates(self, logits):
        weights, index = logits.softmax(-1).topk(2, -1)
        return (F.one_hot(index, EXPERTS) * weights[..., None]).sum(-2)


class Scattered(Experts):
    def gates(self, logits):
        weights, index = logits.topk(2, -1)
        return torch.full_like(logits, float("-inf")).scatter(-1, index, weights).softmax(-1)


class Threshold(Experts):
    def gates(self, logits):
        p = logits.sigmoid()
        return p * (p > 0.5)


class KthValue(Experts):
    def gates(self, logits):
        p = logits.softmax(-1)
        kept = p.masked_fill(p < p.topk(2, -1).values[..., -1:], 0)
        return kept / kept.sum(-1, keepdim=True)


class Sorted(Experts):
    def gates(self, logits):
        rank = logits.argsort(-1, descending=True).argsort(-1)
        return torch.where(rank < 2, logits.softmax(-1), 0.0)


class Largest(Experts):
    def gates(self, logits):
        return (logits == logits.max(-1, keepdim=True).values).float()


class Picked(Experts):
    def mix(self, gates, h):
        stacked = torch.stack([f(h) for f in self.experts], -2)
        index = gates.argmax(-1)[..., None, None].expand(*h.shape[:-1], 1, WIDTH)
        return stacked.gather(-2, index).squeeze(-2)

    def gates(self, logits):
        return logits


class Product(OneHot):
    def mix(self, gates, h):
        return (gates[..., None, :] @ torch.stack([f(h) for f in self.experts], -2)).squeeze(-2)


class WholeRouter(OneHot):
    """A router of two layers, of which the last one decides; with noise of a linear of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.noise = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS)

    def forward(self, x):
        h = self.norm(x)
        logits = self.router(F.gelu(self.first(h))) + F.softplus(self.noise(h))
        return self.head(x + self.mix(self.gates(logits), h))


class Codebook(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.codes = nn.Parameter(torch.randn(24, 16))

    def forward(self, x):
        z = self.encoder(x)
        far = z.pow(2).sum(-1, keepdim=True) - 2 * z @ self.codes.t() + self.codes.pow(2).sum(-1)
        return self.decoder(F.embedding(far.argmin(-1), self.codes))


class TokenChoice(nn.Module):
    """Mixture of depths: a linear chooses the tokens that a block works on."""

    def __init__(self):
        super().__init__()
        self.router, self.up, self.down = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        index = self.router(x).topk(3, 1).indices
        rows = x.gather(1, index.expand(-1, -1, WIDTH))
        return x.scatter_add(1, index.expand(-1, -1, WIDTH), self.down(F.relu(self.up(rows))))


@pytest.mark.parametrize("kind", [OneHot, Scattered, Threshold, KthValue, Sorted, Largest, Picked, Product])
def test_routers_of_experts_by_masks_stay_float(kind):
    assert routers(kind()) == {"router.weight"}


def test_routers_of_other_kinds():
    assert routers(WholeRouter()) == {"router.weight", "noise.weight"}
    assert routers(Codebook()) == {"encoder.weight", "codes"}
    assert routers(TokenChoice(), torch.randn(2, 9, WIDTH)) == {"router.weight"}


class Soft(Experts):
    def gates(self, logits):
        return logits.softmax(-1)


class Hard(Experts):
    def gates(self, logits):
        return F.hardsigmoid(logits) * F.relu(logits)


class Masked(Experts):
    """An activation that is spelled with a mask, before a product with other data."""

    def gates(self, logits):
        return (
            torch.where(logits > 0, logits, 0.1 * logits) + logits * (logits > 0) + logits.sign() * logits.abs().sqrt()
        )


class Labels(Experts):
    """The argmax of logits is an output, and so is the largest logit."""

    def gates(self, logits):
        return logits.softmax(-1)

    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.argmax(-1), logits.max(-1).values


class Stream(Soft):
    """A choice that no linear makes: the hidden state's largest channel."""

    def forward(self, x):
        x = x + self.experts[0](self.norm(x))
        h = self.norm(x)
        mask = (x.norm(dim=-1, keepdim=True) > 5).float()
        return self.head(x + mask * self.mix(self.gates(self.router(h)), h))


@pytest.mark.parametrize("kind", [Soft, Hard, Masked, Labels, Stream])
def test_continuous_gates_activations_and_returned_labels_are_no_routers(kind):
    assert routers(kind()) == set()


def test_a_router_in_float_sends_tokens_where_the_model_does():
    torch.manual_seed(0)
    model = OneHot().eval()
    compiled = sqcompile.compile(model, [torch.randn(4, 16, WIDTH)], backend="eager", progress=False)
    (router,) = [l for l in compiled.report.layers if not l.quantized]
    assert router.name == "router.weight" and "routes tokens to experts" in router.reason
    x = torch.randn(8, 32, WIDTH)
    with torch.no_grad():
        noise = (compiled(x) - model(x)).square().sum(-1) / model(x).square().sum(-1)
    assert noise.max() < 0.01  # no token has other experts


def routers(model: nn.Module, *inputs: Tensor) -> set[str]:
    gm = trace(model.eval(), as_call(model, inputs or (torch.randn(2, 5, WIDTH),)))
    linears = find_linears(gm)
    found = find_routers(gm, linears)
    return {l.name for l in linears if l.node in found}


class SharedExpert(nn.Module):
    """An expert of all tokens behind a gate of one output, as in Qwen2-MoE."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.gate = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + torch.sigmoid(self.gate(h)) * self.down(torch.relu(self.up(h)))


@pytest.mark.parametrize("recipe", ["default", "O3", Recipe(0.5)], ids=str)
def test_a_linear_of_one_output_stays_in_float(recipe):
    torch.manual_seed(0)
    model = SharedExpert().eval()
    compiled = sqcompile.compile(model, [torch.randn(4, 16, WIDTH)], recipe=recipe, backend="eager", progress=False)
    (gate,) = [l for l in compiled.report.layers if not l.quantized]
    assert gate.name == "gate.weight" and gate.reason == "it has one output, which is a dot product and no GEMM"
