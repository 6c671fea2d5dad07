"""What is no float module with values of its own is refused in one sentence that says what to pass instead."""

from __future__ import annotations

import collections
import types

import pytest
import torch
from torch import nn

import sqcompile
from sqcompile import CalibrationError, CaptureError, NothingToQuantizeError


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


def compiled(model, *batches):
    return sqcompile.compile(model, batches or [torch.randn(2, 5, 16)], backend="eager", progress=False)


class Int4(nn.Parameter):
    """As quantizing libraries hold weights."""


class Wrapper(torch.Tensor):
    """A tensor subclass around others, as of torchao or DTensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Wrapper(args[0].inner)
        raise NotImplementedError(func)


def with_parameter(parameter):
    model = mlp()
    model[1].weight = parameter
    return model


# what is passed as a model, what the error says
MODELS = {
    "TorchScript": (lambda: torch.jit.script(mlp()), "is TorchScript.*pass the nn.Module it was made from"),
    "traced": (lambda: torch.jit.trace(mlp(), torch.randn(2, 5, 16)), "is TorchScript"),
    "TorchScript inside": (lambda: nn.Sequential(torch.jit.script(mlp())), "its submodule '0' is TorchScript"),
    "a function": (lambda: lambda x: x, r"is a function \(<lambda>\): pass an nn\.Module"),
    "a method": (lambda: mlp().forward, r"is a function \(forward\): pass an nn\.Module"),
    "a name": (lambda: "gpt2", "given by name, 'gpt2': load it.*from_pretrained"),
    "a class": (lambda: nn.Linear, "is the class Linear: pass an instance"),
    "nothing": (lambda: None, "is a NoneType: pass an nn.Module"),
    "a pipeline": (lambda: types.SimpleNamespace(unet=mlp(), steps=3), r"pass one that it holds \(\.unet\)"),
    "an exported program": (lambda: torch.export.export(mlp(), (torch.randn(2, 5, 16),)), r"or its \.module\(\)"),
    "uninitialized": (lambda: nn.Sequential(nn.LazyLinear(16)).eval(), "0.weight is not initialized yet: run the model once"),
    "on meta": (lambda: mlp().to("meta"), "0.weight is on the meta device.*load the model with its weights"),
    "one weight on meta": (lambda: with_parameter(nn.Parameter(torch.empty(32, 16, device="meta"))), "1.weight is on the meta"),
    "compiled": (lambda: compiled(mlp()), "compiled by sqcompile already: pass the float model"),
    "compiled inside": (lambda: nn.Sequential(compiled(mlp())), "its submodule '0' is compiled by sqcompile already"),
    "torch.compile": (lambda: torch.compile(mlp()), "made by torch.compile: pass .* _orig_mod"),
    "data parallel": (lambda: nn.DataParallel(mlp()), "wrapped in DataParallel: pass the model in it, model.module"),
    "integer weights": (
        lambda: with_parameter(Int4(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)),
        r"1\.weight is a Int4 of torch\.uint8, quantized already: load the float model",
    ),
    "a tensor subclass": (lambda: with_parameter(nn.Parameter(Wrapper(torch.randn(32, 16)))), "not a plain tensor.*load the float"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("entry", [sqcompile.compile, sqcompile.calibrate])
def test_what_is_no_float_module_is_refused(name, entry):
    make, match = MODELS[name]
    with pytest.raises(CaptureError, match=match) as info:
        entry(make(), [torch.randn(2, 5, 16)], progress=False)
    assert "\n" not in str(info.value)


def test_a_batch_on_another_device_names_the_remedy():
    with pytest.raises(CaptureError, match="move the batch to the model's device"):
        compiled(mlp(), torch.randn(2, 5, 16, device="meta"))


def test_one_sample_without_a_batch_dim_names_the_remedy():
    with pytest.raises(
        NothingToQuantizeError, match=r"0\.weight is multiplied with one vector.*pass batches.*x\[None\]"
    ):
        compiled(nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(16))


def test_a_mapping_inside_of_a_batch_names_the_remedy():
    with pytest.raises(CalibrationError, match=r"batch 0 \(tuple\) holds a UserDict.*pass dict\(\.\.\.\)"):
        compiled(mlp(), (collections.UserDict(x=torch.randn(2, 5, 16)),))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, xs):
        return [self.fc(x) for x in (xs.values() if isinstance(xs, dict) else xs)]


def test_a_call_with_another_structure_inside_names_the_difference():
    x = torch.randn(2, 5, 16)
    c = compiled(Nested().eval(), {"xs": [x, x]})
    assert len(c([x, x])) == 2
    for xs, match in (
        ([x], r"captured with xs\[0\], xs\[1\], this call has xs\[0\]: "),
        ((x, x), "captured with xs: a list, this call has xs: a tuple: "),
        ({"a": x}, r"this call has xs\['a'\]: "),
        ([], "this call has an empty xs: "),
    ):
        with pytest.raises(
            CaptureError, match=match + "call it with the captured ones, or compile with example_inputs="
        ):
            c(xs)


def test_a_part_that_is_compiled_is_moved_with_the_whole_to_where_it_is():
    whole = nn.Sequential(compiled(mlp()), nn.Linear(16, 16))
    assert whole.to("cpu").to(torch.float32).float()[0] is whole[0]
    with pytest.raises(sqcompile.StageError, match="stays on the device and in the dtype"):
        whole.to(torch.bfloat16)
    with pytest.raises(sqcompile.StageError, match="stays on the device and in the dtype"):
        compiled(mlp()).to("meta")


def test_as_many_classes_as_types_of_tokens_make_no_vocabulary():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.types = nn.Embedding(50, 16), nn.Embedding(2, 16)
            self.body, self.classifier = nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, ids, kinds):
            return self.classifier(torch.tanh(self.body(self.tokens(ids) + self.types(kinds)))[:, 0])

    c = compiled(Classifier().eval(), (torch.randint(0, 50, (4, 7)), torch.randint(0, 2, (4, 7))))
    assert [l.quantized for l in c.report.layers] == [True, True]


def test_a_second_vocabulary_that_is_smaller_is_one():
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.source, self.target = nn.Embedding(50, 16), nn.Embedding(20, 16)
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 20)

        def forward(self, source, target):
            context = self.body(self.source(source)).mean(1, keepdim=True)
            return self.head(torch.tanh(self.target(target)) + context)

    c = compiled(Translator().eval(), (torch.randint(0, 50, (4, 7)), torch.randint(0, 20, (4, 6))))
    assert [l.quantized for l in c.report.layers] == [True, False]
