"""What passes know of a graph's values: recorded once for calls that repeat, executed once for each choice of sizes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import tiny_lm, token_batches
from torch import fx, nn

import sqcompile
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.form import form
from sqcompile.passes.ir.graph import add_op, aten, clone, get_tensor, value
from sqcompile.passes.labels import values
from sqcompile.passes.labels.match import match
from sqcompile.passes.rewrite.weight_store import Shared, held
from sqcompile.pipeline import rewrite


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def traced() -> fx.GraphModule:
    model = Twice().eval()
    return trace(model, as_call(model, torch.randn(3, 5, 8)))


def test_a_call_that_repeats_is_recorded_as_a_tensor_of_its_own() -> None:
    gm = traced()
    first, second = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    with gm.graph.inserting_after(second):
        made = [add_op(gm, aten.exp.default, n) for n in (first, first, second)]
        view, again = (add_op(gm, aten.transpose.int, first, -1, -2) for _ in range(2))
        narrow = add_op(gm, aten.exp.default, view)
    values = [value(n) for n in made]
    assert all(v.shape == value(first).shape and v.stride() == value(first).stride() for v in values)
    assert len({v.untyped_storage()._cdata for v in values}) == 3
    storage = value(first).untyped_storage()._cdata
    assert value(view).untyped_storage()._cdata == value(again).untyped_storage()._cdata == storage
    assert value(narrow).shape == value(view).shape and value(narrow).stride() == value(view).stride()
    assert value(narrow).stride() != value(made[0]).stride()


def test_copies_of_a_graph_share_values_and_none_has_one_twice() -> None:
    """Of a copy's copy, too, whatever the graph between them got before it was copied."""
    gm = traced()

    def more(graph: fx.GraphModule) -> list[torch.Tensor]:
        last = graph.graph.find_nodes(op="call_function", target=aten.linear.default)[-1]
        with graph.graph.inserting_after(last):
            return [value(add_op(graph, aten.exp.default, last)) for _ in range(2)]

    one, other = clone(gm), clone(gm)
    first = more(one)
    assert [id(v) for v in more(other)] == [id(v) for v in first]
    later = more(clone(one))
    assert not {id(v) for v in later} & {id(v) for v in first}
    assert len({v.untyped_storage()._cdata for v in (*first, *later)}) == 4
    assert [id(v) for v in more(one)] == [id(v) for v in later]


def test_sizes_that_depend_on_values_are_each_calls_own() -> None:
    gm = traced()
    first, second = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    with gm.graph.inserting_after(second):
        rows = [value(add_op(gm, aten.nonzero.default, n)).shape[0] for n in (first, second)]
    assert rows[0].node.expr != rows[1].node.expr


def test_all_analyses_of_a_compilation_execute_the_graph_at_two_sizes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = values._Values.run
    monkeypatch.setattr(values._Values, "run", lambda self, *args, **kw: runs.append(1) or run(self, *args, **kw))
    sqcompile.compile(tiny_lm("llama"), token_batches(1), recipe="O3", backend="eager", progress=False)
    assert len(runs) == 2


def test_a_graph_that_changed_is_executed_anew() -> None:
    gm = traced()
    assert [s.kind for s in match(gm)[0]] == ["linear"]
    [relu] = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    kept: dict[Any, Any] = dict(about(gm).values)
    relu.target = aten.exp.default
    assert match(gm)[0] == []
    assert all(about(gm).values[k][1] is not v[1] for k, v in kept.items())


def test_what_is_matched_once_is_kept_until_a_tensor_is_written_to() -> None:
    gm = traced()
    first = match(gm)
    assert match(gm) is first and match(clone(gm)) is not first
    with torch.no_grad():
        get_tensor(gm, "a.weight").mul_(2)
    assert match(gm) is not first


def test_tensors_without_a_version_are_matched_each_time() -> None:
    with torch.inference_mode():
        model = Twice().eval()
    gm = trace(model, as_call(model, torch.randn(3, 5, 8)))
    assert match(gm) is not match(gm)


def test_lowered_graphs_hold_weights_of_their_own() -> None:
    model = tiny_lm("llama")
    plan = sqcompile.calibrate(model, token_batches(1), progress=False)
    gm = trace(model, as_call(model, token_batches(1)[0]))
    lowered = rewrite(gm, plan, "lowered", Shared(id, lambda key: None))
    weights = [weakref.ref(w) for w in held(lowered)]
    assert weights and not held(gm)
    del lowered
    gc.collect()
    assert all(w() is None for w in weights)


def test_a_number_of_another_type_is_another_graph() -> None:
    """1 == 1.0 == True in Python; a tensor plus 1.0 is float where one plus 1 is int."""
    gm = traced()
    [relu] = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    match(gm)
    forms = []
    for number in (1, 1.0, True):
        with gm.graph.inserting_after(relu):
            more = gm.graph.call_function(aten.mul.Tensor, (relu, number))
        forms.append(form(gm))
        gm.graph.erase_node(more)
    assert forms[0] != forms[1] != forms[2] != forms[0]


def test_layers_of_one_template_share_what_their_calls_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose layers are compiled one by one: the graph is executed at two sizes for all of them, not for each."""
    runs = []
    run = values._Values.run
    model = tiny_lm("llama", num_hidden_layers=3)
    plan = sqcompile.calibrate(model, token_batches(1), progress=False)
    monkeypatch.setattr(values._Values, "run", lambda self, *args, **kw: runs.append(1) or run(self, *args, **kw))
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="smoothquant", options={"plan": plan, "compiler": "eager"})
    with torch.no_grad():
        model(token_batches(1)[0]["input_ids"], use_cache=False)
    assert len(runs) == 2
