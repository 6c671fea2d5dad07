"""Plans on trial: the quantized stage run node by node, with its products in integers where this machine is faster at them."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches

import sqcompile
from sqcompile import Recipe
from sqcompile.kernels import products
from sqcompile.passes.lowering import integer_products
from sqcompile.passes.rewrite.insert_qdq import quantize_weights
from sqcompile.pipeline import on_trial, rewrite
from sqcompile.statistics.together import run_together

needs_products = pytest.mark.skipif(
    not products.has_products(torch.device("cpu")), reason="needs AVX512-VNNI and a compiler"
)


def outputs(gm, arguments):
    """What a graph gives that is run node by node."""
    [names] = next(iter(gm.graph.find_nodes(op="output"))).args
    found = {}
    run_together(gm, [arguments], lambda _, n, y: found.update({n: y} if n in names else {}))
    return found[names[0]]


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def compiled(request):
    model = tiny_lm(request.param, num_hidden_layers=1)
    found = sqcompile.compile(
        model, token_batches(2), recipe=Recipe(alpha=0.5), target="reference", backend="eager", progress=False
    )
    found.float_model = model
    return found


@needs_products
def test_every_product_is_in_integers_and_gives_the_quantized_stage(compiled):
    traced, plan = compiled.stages["traced"], compiled.plan
    gm = on_trial(traced, plan)
    ours = [n for n in gm.graph.nodes if n.target in (products.product, products.grouped_product)]
    assert len(ours) == sum(l.quantized for l in plan.layers)
    assert {n.target for n in ours} >= (
        {products.grouped_product} if any(l.kind == "experts" for l in plan.layers) else set()
    )
    [ids] = token_batches(1)[0].values()
    want = outputs(quantize_weights(rewrite(traced, plan, "quantized", shown=False, lazy=True)), [ids])
    assert relative_error(outputs(gm, [ids]), want) < 1e-6


def test_where_there_are_no_kernels_the_graph_stays_as_it_is(compiled, monkeypatch):
    monkeypatch.setattr(integer_products, "has_products", lambda device: False)
    gm = on_trial(compiled.stages["traced"], compiled.plan)
    assert not any(n.target in (products.product, products.grouped_product) for n in gm.graph.nodes)


@needs_products
@pytest.mark.parametrize("recipe", ["default", "O3", "fp8"])
def test_the_plan_is_the_same_with_and_without_them(monkeypatch, recipe):
    model, batches = tiny_lm("llama", num_hidden_layers=1), token_batches(2)
    plan = sqcompile.calibrate(model, batches, recipe=recipe, progress=False)
    monkeypatch.setattr(products, "has_products", lambda device: False)
    monkeypatch.setattr(integer_products, "has_products", lambda device: False)
    other = sqcompile.calibrate(model, batches, recipe=recipe, progress=False)
    assert {n: s.tolist() for n, s in plan.scales.items()} == {n: s.tolist() for n, s in other.scales.items()}
    for a, b in zip(plan.layers, other.layers, strict=True):
        assert (a.name, a.quantized, a.smoothing, a.alpha, a.rotation) == (
            b.name, b.quantized, b.smoothing, b.alpha, b.rotation,
        )  # fmt: skip
        assert a.sqnr_db == pytest.approx(b.sqnr_db, abs=1e-3)
