"""Each name of sqcompile.pytorch is there, and does what sqcompile relies on: what to run first on a new version of PyTorch."""

from __future__ import annotations

import importlib
import logging
import re
import subprocess
import sys

import pytest
import torch
from pytorch_cases import Net, exported
from torch import Tensor, fx, nn
from torch.testing._internal.two_tensor import TwoTensor

from sqcompile.pytorch import core, distributed, dynamo, inductor, symbolic

MODULES = {m.__name__.rpartition(".")[2]: m for m in (core, symbolic, distributed, dynamo, inductor)}
aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("module", MODULES)
def test_every_name_is_described(module):
    rows = re.findall(r"^ *(\w[\w, ]*?)  .*\d\.\d+$", MODULES[module].__doc__, re.MULTILINE)
    described = [name for names in rows for name in names.split(", ")]
    assert sorted(described) == sorted(MODULES[module].__all__)


@pytest.mark.parametrize(("module", "name"), [(m, name) for m in MODULES for name in MODULES[m].__all__])
def test_every_name_is_there(module, name):
    assert getattr(MODULES[module], name) is not None


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("core", ["sympy", "triton", "torch._dynamo", "torch._inductor"]),
        ("symbolic", ["triton", "torch._dynamo", "torch._inductor"]),
        ("dynamo", ["torch._inductor.compile_fx"]),
        ("inductor", ["torch._inductor.compile_fx"]),
    ],
)
def test_what_importing_does_not_import(module, unwanted):
    # the file alone: the rest of sqcompile defines operators, for which torch 2.11 imports Dynamo
    path = MODULES[module].__file__
    code = f"import runpy, sys; runpy.run_path({path!r}); print([m for m in {unwanted} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# core


def test_an_operator_that_raises_is_called_again():
    def refuse(x):
        raise RuntimeError("no number")

    def explain(x):
        raise KeyError(f"{len(x)} numbers")

    library = torch.library.Library("sqcompile_test_retry", "DEF")
    library.define("number(Tensor x) -> Tensor")
    library.impl("number", refuse, "CPU")
    library.impl("number", refuse, "Meta")
    packet = torch.ops.sqcompile_test_retry.number
    found = {packet.default: 1, packet: 2}
    core.retry(packet, explain)
    assert found[packet.default] == 1 and found[packet] == 2  # graphs look operators up by their hash
    for op in (packet, packet.default):
        with pytest.raises(KeyError, match="3 numbers"):
            op(torch.zeros(3))
        with pytest.raises(RuntimeError, match="no number"):  # of another device
            op(torch.zeros(3, device="meta"))
    core.withdraw(library)


def test_storage_ids_are_equal_for_views_alone():
    for mode in (torch.no_grad(), core.FakeTensorMode()):
        with mode:
            x, other = torch.zeros(4, 4), torch.zeros(4, 4)
            assert core.storage_id(x) == core.storage_id(x[1:].t()) != core.storage_id(other)


def test_a_schema_names_arguments_and_says_which_are_written():
    form = core.schema(aten.add_.Tensor)
    assert [a.name for a in form.arguments] == ["self", "other", "alpha"] and form.arguments[2].default_value == 1
    assert [bool(a.alias_info and a.alias_info.is_write) for a in form.arguments] == [True, False, False]
    assert form.name == "aten::add_" and len(form.returns) == 1 and core.overload_name(aten.add_.Tensor) == "Tensor"
    targets = (aten.add_.Tensor, aten.add.Tensor, "placeholder", torch.add)
    assert [core.writes_to_arguments(t) for t in targets] == [True, False, False, False]


def test_operators_and_nested_graphs_are_told_apart():
    cond = torch.ops.higher_order.cond
    assert isinstance(aten.add.Tensor, core.OpOverload) and not isinstance(cond, core.OpOverload)
    assert isinstance(cond, core.HigherOrderOperator) and not isinstance(aten.add.Tensor, core.HigherOrderOperator)


def test_an_exported_graph_has_the_pytrees_of_its_call():
    gm = exported(out=lambda y: {"y": y}).module()
    info = core.codegen(gm.graph).pytree_info
    assert info.in_spec == core.pytree.tree_structure((({"tokens": 0},), {}))
    assert info.out_spec == core.pytree.tree_structure({"y": 0})
    graph = fx.Graph()
    graph.set_codegen(core.codegen(gm.graph))
    assert core.codegen(graph) is core.codegen(gm.graph)


def test_paths_of_a_pytree():
    path, _ = core.pytree.tree_flatten_with_path(((3,), {"cache": [5]}))[0][1]
    assert isinstance(path[1], core.pytree.MappingKey) and path[1].key == "cache" and path[0].idx == 1
    assert core.pytree.keystr(path[2:]) == "[0]"
    assert dict in core.pytree.SUPPORTED_NODES


def test_modes():
    with core.FakeTensorMode() as mode:
        assert isinstance(torch.zeros(2), core.FakeTensor)
        with core.disable_current_modes():
            assert type(torch.zeros(2)) is Tensor
    assert core.TracingContext.try_get() is None
    with core.tracing(core.TracingContext(mode)):
        assert core.TracingContext.try_get().fake_mode is mode
    seen = []

    class Mode(core.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2) + 1
    assert seen == [aten.ones.default, aten.add.Tensor]


def test_the_python_dispatcher_prefers_what_an_operator_has_in_python():
    library = torch.library.Library("sqcompile_test", "FRAGMENT")
    library.define("where(Tensor x) -> int")
    library.impl("where", lambda x: 1, "CompositeImplicitAutograd")
    where = torch.ops.sqcompile_test.where.default
    where.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(lambda x: 2)
    assert where(torch.zeros(1)) == 1
    with core.enable_python_dispatcher():
        assert where(torch.zeros(1)) == 2


def test_wrapper_subclasses():
    x = torch.zeros(2)
    assert core.is_wrapper_subclass(TwoTensor(x, x)) and not core.is_wrapper_subclass(nn.Parameter(x))


def test_weak_references_to_storages():
    x = torch.zeros(4)
    ref = core.StorageWeakRef(x.untyped_storage())
    assert not core.storage_expired(ref.cdata)
    assert core.storage_of_ref(ref.cdata).data_ptr() == x.data_ptr()
    del x
    assert core.storage_expired(ref.cdata) and core.storage_of_ref(ref.cdata) is None and ref.expired()


def test_tensors_as_keys():
    x, same = torch.zeros(2), torch.zeros(2)
    known = core.WeakIdKeyDictionary()
    known[x] = 1
    assert known[x] == 1 and same not in known
    del x
    assert len(known) == 0


def test_versions_count_writes():
    x = torch.zeros(2)
    before = core.version(x)
    x.add_(1)
    assert core.version(x) > before
    with torch.inference_mode():
        uncounted = torch.zeros(2)
    with pytest.raises(RuntimeError):
        core.version(uncounted)


def test_elements_that_share_memory():
    x = torch.zeros(2, 1)
    assert core.is_same_element_twice(x.expand(2, 3)) and not core.is_same_element_twice(x)


def test_buffer_hooks():
    handle = nn.modules.module.register_module_buffer_registration_hook(lambda module, name, buffer: None)
    assert handle.id in core.buffer_hooks
    handle.remove()
    assert handle.id not in core.buffer_hooks


def test_a_compiled_module_calls_what_it_was_given():
    net, x = Net(), torch.randn(2, 4)
    assert core.compiled_call(net) is None
    core.set_compiled_call(net, lambda x: "compiled")
    assert net(x) == "compiled" and core.compiled_call(net)(x) == "compiled"
    core.set_compiled_call(net, None)
    assert torch.equal(net(x), core.call_impl.__get__(net)(x))


def test_export_keeps_what_export_proxies_empties():
    core.EXPORT_PROXIES.clear()
    exported()
    assert core.EXPORT_PROXIES


def test_loggers_of_captures():
    exported()
    importlib.import_module("torch._export")
    assert all(name in logging.root.manager.loggerDict for name in core.CAPTURE_LOGGERS)


def test_instructions_of_the_cpu():
    assert {
        type(core.has_avx2()),
        type(core.has_bf16()),
        type(core.has_vnni()),
        type(core.has_amx()),
        type(core.init_amx()),
    } == {bool}


def test_products():
    a, b = torch.randint(-128, 128, (32, 16), dtype=torch.int8), torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    assert torch.equal(core.int_mm(a, b), a.int() @ b.int())
    x, w = torch.randn(16, 32).to(torch.float8_e4m3fn), torch.randn(16, 32).to(torch.float8_e4m3fn)
    y = core.scaled_mm(x, w.t(), torch.tensor(2.0), torch.tensor(3.0), out_dtype=torch.float32)
    torch.testing.assert_close(y, 6 * x.float() @ w.float().t(), rtol=1e-5, atol=1e-5)
