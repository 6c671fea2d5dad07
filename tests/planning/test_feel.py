"""Choices by what the outputs feel: gradients, the loss made of them, and what is done without."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches
from torch import Tensor, nn

import sqcompile
from sqcompile import Recipe
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.errors import RecipeError
from sqcompile.kernels.qtypes import INT8
from sqcompile.kernels.reference import quantize, token_scale, weight_scale
from sqcompile.kernels.rotation import rotate
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.labels.match import match
from sqcompile.passes.planning.feel import ROWS, feel
from sqcompile.passes.planning.gradients import gradients
from sqcompile.passes.planning.loss import Transform, of_input, of_weight
from sqcompile.plan.recipe import AUTO
from sqcompile.statistics.observe import calibrate

BY_LOSS = Recipe(alpha="auto")


class Blocks(nn.Module):
    """Residual blocks, each with two linears that read one norm, and a third that reads the residual stream of the first."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(depth))
        self.a, self.b, self.c = (nn.ModuleList(nn.Linear(16, 16) for _ in range(depth)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for norm, a, b, c in zip(self.norms, self.a, self.b, self.c, strict=True):
            h = norm(x)
            x = x + torch.tanh(a(h)) * b(h) + h + 0.1 * c(first)
        return x


def felt_of(model: nn.Module, batches: list[Any], recipe: Recipe = BY_LOSS) -> Any:
    gm = trace(model, as_call(model, batches[0]))
    found = calibrate(gm, model, batches)
    return gm, feel(gm, *match(gm), found, recipe)


@pytest.mark.parametrize("depth", (1, 9))  # of one piece, and of several; all of the c are one group, over all pieces
def test_gradients_are_autograd_s(depth):
    model, x, seed = Blocks(depth).eval(), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    gm = trace(model, as_call(model, (x,)))
    linears = find_linears(gm)
    by_input: dict[str, list[Any]] = {}
    for l in linears:
        by_input.setdefault(l.x, []).append(l)
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def see(group, x, of_x, of_outputs):
        assert not seen.keys() & {l.name for l in group}
        seen.update({l.name: (x, of_x, g) for l, g in zip(group, of_outputs, strict=True)})

    output = next(iter(gm.graph.find_nodes(op="output"))).args[0][0].name
    gradients(gm, (x,), {output: lambda _: seed}, [tuple(g) for g in by_input.values()], see)

    want: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda m, i, y, n=n: (want.__setitem__(f"{n}.weight", (i[0], y)), y.retain_grad())[1])
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    (model(x) * seed).sum().backward()
    for h in hooks:
        h.remove()
    modules = dict(model.named_modules())
    assert seen.keys() == want.keys() and len(seen) == 3 * depth
    for group in by_input.values():
        of_x = sum(want[l.name][1].grad @ modules[l.name.removesuffix(".weight")].weight for l in group)
        for l in group:
            x_seen, of_x_seen, of_output = seen[l.name]
            assert relative_error(x_seen, want[l.name][0].detach()) < 1e-6
            assert relative_error(of_x_seen, of_x.detach()) < 1e-5  # without what x + h or the residual itself give
            assert relative_error(of_output, want[l.name][1].grad) < 1e-5


def test_memory_of_gradients_is_that_of_a_piece():
    """What autograd holds at a time, of 24 blocks and of 3: it would be eight times as much without pieces."""
    peaks = {}
    for depth in (3, 24):
        model, x = Blocks(depth).eval(), torch.randn(4, 32, 16)
        gm = trace(model, as_call(model, (x,)))
        output = next(iter(gm.graph.find_nodes(op="output"))).args[0][0].name
        now = most = 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

        def change(by: int) -> None:
            nonlocal now, most
            now += by
            most = max(most, now)

        def pack(t: Tensor) -> Held:
            held, size = Held(t), t.numel() * t.element_size()
            change(size)
            weakref.finalize(held, change, -size)
            return held

        groups = [(l,) for l in find_linears(gm)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            gradients(gm, (x,), {output: torch.ones_like}, groups, lambda *_: None)
        peaks[depth] = most
    assert peaks[3] > 0 and peaks[24] <= 1.5 * peaks[3]


def test_the_loss_is_the_second_order_of_the_divergence():
    """Of a softmax of one linear, whose second derivative is known: ½ Σ p_n (δ_n - Σ p δ)², by row."""
    torch.manual_seed(0)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.embed(ids)))

    model = Head().eval()
    with torch.no_grad():
        model.head.weight *= 4
    batches = [torch.randint(0, 40, (4, 250)) for _ in range(1)]
    _, felt = felt_of(model, batches, dataclasses.replace(BY_LOSS, skip=("head",)))
    reads, how = felt.reads["inner.weight"], Transform()
    assert len(reads.rows) == ROWS and abs(float(reads.weights.sum()) - 1) < 1e-4  # all 1,000 rows are stood for
    of_x, moments = of_input(reads, how, None, INT8)
    of_w = of_weight(model.inner.weight.detach(), felt.outputs["inner.weight"], moments, how, False, INT8)
    x, w = model.embed(batches[0]).detach().flatten(0, 1), model.inner.weight.detach()
    for got, (x_hat, w_hat) in (
        (of_x, (quantize(x, token_scale(x)).float() * token_scale(x), w)),
        (of_w, (x, quantize(w, weight_scale(w, True)).float() * weight_scale(w, True))),
    ):
        delta = (x_hat @ w_hat.t() - x @ w.t()) @ model.head.weight.detach().t()
        p = model(batches[0]).detach().flatten(0, 1).softmax(-1)
        want = float((p * (delta - (p * delta).sum(-1, keepdim=True)).square()).sum(-1).mean()) / 2
        assert 0.75 * want < got < 1.33 * want  # one target is drawn for each row


def test_a_transform_leaves_the_product_as_it_is():
    torch.manual_seed(0)
    x, w, g = torch.randn(5, 64), torch.randn(24, 64), torch.randn(5, 64)
    how = Transform(torch.rand(64) + 0.5, 32, torch.rand(24) + 0.5)
    y = how.input(x) @ how.weight(w, slice(None)).t() * how.rows
    assert relative_error(y, x @ w.t()) < 1e-5
    assert relative_error((how.input(x) * how.gradient(g)).sum(-1), (x * g).sum(-1)) < 1e-4
    assert relative_error(how.rotated(x), rotate(x, 32)) < 1e-6


class Idle(nn.Module):
    """Two linears that read one norm with an outlier. What one gives hardly counts, and it does not read the outlier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.felt, self.idle = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.norm.weight[5] *= 100
            self.idle.weight[:, 5] = 0
            self.felt.weight[:, 5] *= 3

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.felt(h) + 1e-3 * self.idle(h)


def test_the_loss_sees_what_the_relative_error_does_not():
    model, batches = Idle().eval(), [(torch.randn(8, 16, 64),) for _ in range(4)]
    x, errors, alphas = torch.randn(16, 16, 64), {}, {}
    for alpha in (AUTO, "auto"):
        plan = sqcompile.calibrate(model, batches, recipe=Recipe(alpha=alpha), progress=False)
        compiled = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
        with torch.no_grad():
            errors[alpha] = relative_error(compiled(x), model(x))
        alphas[alpha] = plan.layers[0].alpha
    assert errors["auto"] < 0.7 * errors[AUTO], (errors, alphas)
    assert alphas["auto"] in (0.2, 0.3, 0.4)


def test_only_who_asks_pays():
    model, batches = tiny_lm("llama"), token_batches()
    for recipe in (Recipe(), Recipe(alpha=(0.3, 0.6)), dataclasses.replace(BY_LOSS, smooth=False)):
        assert felt_of(model, batches, recipe)[1] is None
    felt = felt_of(model, batches)[1]
    assert felt.why is None and "model.layers.0.mlp.down_proj.weight" in felt.reads
    assert not any("lm_head" in name for name in felt.reads)
    for reads in felt.reads.values():
        assert len(reads.rows) == len(reads.gradients) == len(reads.weights) <= ROWS


def test_experts_are_felt():
    felt = felt_of(tiny_lm("mixtral"), token_batches())[1]
    assert felt.why is None and any("experts" in name and bool(g.any()) for name, g in felt.outputs.items())


class NoDerivative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.round(self.fc(x) * 8).int().float())


def test_without_gradients_a_linear_s_own_error_decides_and_the_plan_says_so():
    torch.manual_seed(0)
    model, batches = NoDerivative().eval(), [(torch.randn(4, 8, 32),) for _ in range(2)]
    plan = sqcompile.calibrate(model, batches, recipe=BY_LOSS, progress=False)
    fc, head = plan.layers
    assert "chosen by its own error, as no output depends on fc.weight" in fc.reason
    assert "own error" not in head.reason
    same = sqcompile.calibrate(model, batches, recipe=Recipe(alpha=AUTO), progress=False)
    assert same.layers[0].alpha == fc.alpha and same.layers[0].sqnr_db == fc.sqnr_db


def test_a_backward_that_fails_is_a_reason(monkeypatch):
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("sqcompile.passes.planning.feel.gradients", fails)
    plan = sqcompile.calibrate(Idle().eval(), [(torch.randn(2, 16, 64),)], recipe=BY_LOSS, progress=False)
    assert all("the outputs have no gradients: RuntimeError: out of memory" in l.reason for l in plan.layers)


def test_auto_is_a_recipe_s_and_kept_in_a_plan(tmp_path):
    assert BY_LOSS.alphas == AUTO and BY_LOSS.by_loss
    assert dataclasses.replace(BY_LOSS, activation="per_tensor_static", smooth=False).by_loss  # how Δ is made
    with pytest.raises(RecipeError, match="alpha='best': 'auto', a migration strength"):
        Recipe(alpha="best")
    plan = sqcompile.calibrate(Idle().eval(), [(torch.randn(2, 16, 64),)], recipe=BY_LOSS, progress=False)
    plan.save(tmp_path / "plan")
    assert sqcompile.Plan.load(tmp_path / "plan").recipe == BY_LOSS
