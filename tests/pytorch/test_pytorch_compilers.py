"""What sqcompile relies on of Dynamo, AOTAutograd, Inductor and symbolic sizes; the names are in test_pytorch_names."""

from __future__ import annotations

import sys
import threading
import types

import pytest
import torch
from pytorch_cases import Net, symbolic_size
from torch import Tensor, fx, nn

from sqcompile.pytorch import core, dynamo, inductor, symbolic

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# symbolic


def test_sizes_as_expressions():
    size = symbolic_size()
    assert symbolic.statically_known_true(size >= 2) and not symbolic.statically_known_true(size >= 3)
    assert symbolic.own_expression(size).is_symbol and size.node.expr == symbolic.own_expression(size)
    assert symbolic.PythonPrinter().doprint(size.node.expr * 2) == f"2*{size}"
    assert symbolic.free_unbacked_symbols(torch.zeros(3)) == set()


def test_an_own_expression_is_the_one_before_what_was_learned():
    class Doubled(nn.Module):
        def forward(self, x, y):
            return x + torch.cat([y, y])

    rows = torch.export.Dim("rows", min=2, max=64)
    arguments = torch.randn(6, 4), torch.randn(3, 4)
    exported = torch.export.export(Doubled(), arguments, dynamic_shapes=({0: 2 * rows}, {0: rows}))
    x, y = (n.meta["val"].shape[0] for n in exported.graph.find_nodes(op="placeholder"))
    assert x.node.expr == 2 * y.node.expr and symbolic.own_expression(x).is_symbol


def test_what_remembers_sizes_can_forget():
    assert [m for m in vars(symbolic.ShapeEnv).values() if hasattr(m, "cache_clear")]
    core.FakeTensorMode.cache_clear()


# dynamo


def test_a_compiled_module_leads_to_its_model_and_backend():
    def backend(gm, inputs, **options):
        return gm.forward

    net, x = Net(), torch.randn(2, 4)
    for compiled in (torch.compile(net, backend=backend), torch.compile(net, backend=backend, options={"a": 1})):
        assert isinstance(compiled, dynamo.OptimizedModule) and dynamo.original(compiled) is net
        assert dynamo.backend_of(compiled) is backend
        compiled(x)
        assert dynamo.backend_of(compiled) is backend
        assert torch.equal(dynamo.compiled_form(compiled, core.call_impl.__get__(net))(x), net(x))


@pytest.mark.parametrize("options", [{}, {"options": {"a": 1}}])
def test_a_module_compiled_in_place_leads_to_its_backend(options):
    def backend(gm, inputs, **options):
        return gm.forward

    net = Net()
    assert dynamo.backend_of_function(core.compiled_call(net)) is None
    net.compile(backend=backend, **options)
    assert dynamo.backend_of_function(core.compiled_call(net)) is backend
    net(torch.randn(2, 4))
    assert dynamo.backend_of_function(core.compiled_call(net)) is backend
    assert dynamo.backend_of_function(lambda: net) is None


def test_what_a_backend_sees():
    found = {}

    def backend(gm, inputs):
        frame = dynamo.frame_being_compiled()
        found["code"], found["locals"] = frame.f_code, set(frame.f_locals)
        found["entries"] = dynamo.cache_entries(frame.f_code)
        for e in found["entries"]:
            found["fits"] = e.guard_manager.check(frame.f_locals)
            assert hasattr(e.guard_manager, "id_matched_objs")
        found["targets"] = {n.target for n in gm.graph.nodes}
        other = threading.Thread(target=lambda: found.update(free=dynamo.compile_lock.acquire(blocking=False)))
        other.start()
        other.join()
        found["frames"] = []
        f = sys._getframe()
        while f is not None:
            found["frames"] += [set(v.f_locals) for v in f.f_locals.values() if isinstance(v, dynamo.InterpreterFrame)]
            f = f.f_back
        return gm.forward

    def function(x):
        with torch.no_grad():
            return x.data * 2

    compiled = torch.compile(function, backend=backend, dynamic=False)
    compiled(torch.ones(3))
    assert found["code"] is function.__code__ and found["locals"] == {"x"} and found["entries"] == []
    assert dynamo.get_data in found["targets"] and dynamo.set_grad_enabled in found["targets"]
    assert found["free"] is False
    assert {"x"} in found["frames"]
    compiled(torch.ones(4))
    assert len(found["entries"]) == 1 and found["fits"] is False


def test_a_backend_can_have_dynamo_trace_again():
    class Again(dynamo.TensorifyScalarRestartAnalysis, dynamo.UnspecializeRestartAnalysis):
        pass

    seen = []

    def backend(gm, inputs):
        fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        seen.extend(f.shape[0] for f in fakes if isinstance(f, Tensor))
        if len(seen) == 1:
            dynamo.maybe_mark_dynamic(x, 0)
            raise Again(restart_reason="test")
        return gm.forward

    x = torch.ones(3)
    assert dynamo.marked_dynamic(x) == set()
    torch.compile(lambda x: x * 2, backend=backend)(x)
    assert dynamo.marked_dynamic(x) == {0}
    assert seen[0] == 3 and [type(s) for s in seen] == [int, torch.SymInt]


def test_static_addresses():
    x = torch.zeros(2)
    assert not dynamo.has_static_address(x) and not dynamo.has_static_address(3)
    dynamo.mark_static_address(x)
    assert dynamo.has_static_address(x)


def test_settings_of_dynamo():
    assert dynamo.config.recompile_limit == 8
    assert dynamo.config.assume_static_by_default and dynamo.config.automatic_dynamic_shapes


def test_transforms_that_were_entered_can_be_left():
    from torch._C._functorch import _vmap_increment_nesting

    before = len(dynamo.functorch_interpreters())
    _vmap_increment_nesting(2, "error")
    assert len(dynamo.functorch_interpreters()) == before + 1
    dynamo.pop_functorch_interpreter()
    assert len(dynamo.functorch_interpreters()) == before


def test_aot_export_module_gives_operators_and_what_is_written():
    class Writes(Net):
        def forward(self, x, cache):
            y = self.fc(x)
            cache.copy_(y)
            return (y * 2,)

    net, mode = Writes(), core.FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(torch.zeros(2, 4)) for _ in range(2)]
    with torch.no_grad(), mode:
        gm, signature = dynamo.aot_export_module(net, fakes, trace_joint=False, pre_dispatch=True, decompositions={})
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    assert aten.linear.default in {n.target for n in gm.graph.nodes}
    assert list(signature.inputs_to_parameters.items()) == list(zip(names, ["fc.weight", "fc.bias"], strict=False))
    assert list(signature.user_inputs_to_mutate.values()) == [names[3]]
    assert not signature.inputs_to_buffers | signature.buffers_to_mutate | signature.parameters_to_mutate


# inductor


def test_inductor_compiles_a_graph_without_dynamo():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.mul.Tensor, (x, 2)),))
    mode = core.FakeTensorMode()
    before = len(inductor.PyCodeCache.modules)
    options = {"freezing": True, "triton.cudagraphs": False, "size_asserts": False, "alignment_asserts": False}
    with torch.no_grad(), inductor.config.patch(options), core.tracing(core.TracingContext(mode)):
        run = inductor.compile_fx(fx.GraphModule(nn.Module(), graph), [mode.from_tensor(torch.zeros(3))])
    (y,) = run(torch.ones(3))
    assert torch.equal(y, torch.full((3,), 2.0))
    assert all(isinstance(m, types.ModuleType) for m in inductor.PyCodeCache.modules[before:])
    assert len(inductor.PyCodeCache.modules) > before


def test_inductor_builds_cpp():
    library = inductor.build('extern "C" int sqcompile_seven() { return 7; }')
    assert library.sqcompile_seven() == 7
