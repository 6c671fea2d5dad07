"""Calibration data as people have it: targets, columns, samples without a batch dim; hooks; arguments beyond the capture."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error
from families import build
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import T5ForConditionalGeneration

import sqcompile
from sqcompile.capture.batches import first_batches
from sqcompile.capture.inputs import Reader, as_call


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, scale=1.0):
        return (x + self.fc2(F.relu(self.fc1(self.norm(x))))) * scale


class Two(Net):
    def forward(self, x, y):
        return super().forward(x) + y


class Tokens(Net):
    """As transformers' models are called."""

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.config = nn.Embedding(40, 16), nn.Linear(16, 40), SimpleNamespace(return_dict=True)

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, keep=0, **kwargs):
        h = self.embed(input_ids) * (1 if attention_mask is None else attention_mask[..., None])
        out = {"logits": self.head(super().forward(h))}
        if labels is not None:
            out["loss"] = F.cross_entropy(out["logits"].flatten(0, 1), labels.flatten())
        if use_cache:
            out["cache"] = h
        return out if kwargs.get("return_dict", True) else tuple(out.values())


def token_batches(n):
    return [{"input_ids": torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(i))} for i in range(n)]


@pytest.mark.parametrize("order", [("label", "x"), ("x", "label"), ("t", "x"), ("x", "t")])
@pytest.mark.parametrize("named", [True, False])
def test_rows_are_counted_whatever_stands_before_them(order, named):
    """512 rows together: 16 batches of 32, and no look at the others."""
    what = {"x": torch.randn(32, 16), "label": torch.zeros(32).long(), "t": torch.zeros(32)}
    batch = {n: what[n] for n in order}
    taken = list(first_batches((batch if named else tuple(batch.values()) for _ in range(99)), None, False))
    assert len(taken) == 16


def net(kind=Net):
    torch.manual_seed(0)
    return kind().eval()


def compiled(model, loader, **kwargs):
    return sqcompile.compile(model, loader, **{"backend": "eager", "progress": False, **kwargs})


def planned(model, loader):
    return sqcompile.calibrate(model, loader, progress=False)


def silently(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run()


def same_plan(a, b):
    return a.layers == b.layers and all(torch.equal(a.scales[k], s) for k, s in b.scales.items())


def labelled():
    return [{**b, "labels": b["input_ids"].clone()} for b in token_batches(2)]


@pytest.mark.parametrize("callable_", [False, True])
def test_labels_of_a_data_collator_are_left_out(callable_):
    model = net(Tokens)
    loader = labelled()
    want = compiled(model, token_batches(2))
    c = silently(lambda: compiled(model, (lambda m: [m(**b) for b in loader]) if callable_ else loader))
    assert same_plan(c.plan, want.plan)
    ids = token_batches(1)[0]["input_ids"]
    assert torch.equal(c(ids)["logits"], want(ids)["logits"]) and "loss" not in c(ids)
    with pytest.raises(
        sqcompile.CaptureError, match=r"has \(input_ids, labels\): leave labels out.*backend='smoothquant'"
    ):
        c(ids, labels=ids)


def test_labels_stay_where_the_example_has_them():
    model = net(Tokens)
    loader = labelled()
    c = compiled(model, loader, example_inputs=loader[0])  # whose sizes are equal, which no guard says
    with torch.no_grad():
        assert relative_error(c(**loader[1])["loss"], model(**loader[1])["loss"]) < 0.03


def test_a_decoders_tokens_are_made_of_labels_as_the_model_makes_them():
    base, call = build("t5")
    model = T5ForConditionalGeneration(base.config)
    batch = {
        "input_ids": call["input_ids"],
        "labels": call["decoder_input_ids"].masked_fill(call["decoder_input_ids"] % 5 == 0, -100),
    }
    made = as_call(model, batch).kwargs
    assert made.keys() == {"input_ids", "decoder_input_ids"}
    assert torch.equal(made["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(batch["labels"]))

    class Own(nn.Module):  # the same of its configuration, without a method for it
        config = model.config

        def forward(self, input_ids, decoder_input_ids=None, labels=None):
            raise NotImplementedError

    assert torch.equal(as_call(Own(), batch).kwargs["decoder_input_ids"], made["decoder_input_ids"])


def test_a_target_that_the_forward_requires_stays():
    model, (x, y) = net(Two), torch.randn(2, 2, 3, 16)
    assert as_call(model, [x, y]).kwargs.keys() == {"x", "y"}

    class Required(nn.Module):
        def forward(self, x, labels):
            raise NotImplementedError

    assert as_call(Required(), {"x": x, "labels": y}).kwargs.keys() == {"x", "labels"}


def test_elements_and_columns_that_the_forward_does_not_take_are_left_out_with_one_warning():
    model, x = net(), torch.randn(6, 5, 16)
    want = planned(model, [x[:3], x[3:]])
    loaders = {
        "element 2": DataLoader(TensorDataset(x, torch.ones(6), torch.arange(6)), 3),
        "'idx', 'text'": [{"x": rows, "idx": torch.arange(3), "text": ["a", "b", "c"]} for rows in (x[:3], x[3:])],
    }
    for beyond, loader in loaders.items():
        model.forward = functools.partial(type(model).forward, model)
        with pytest.warns(
            UserWarning, match=rf"{beyond} of each calibration batch is left out: Net.forward\(x, scale\)"
        ) as seen:
            if beyond == "element 2":  # what a second parameter can take is its argument
                loader = [[a, 1.0, c] for a, _, c in loader]
            plan = planned(model, loader)
        assert len(seen) == 1 and same_plan(plan, want)


def test_x_and_y_of_a_loader_for_training():
    model, x = nn.Sequential(*net().children()).eval(), torch.randn(6, 5, 16)
    with pytest.warns(
        UserWarning, match=r"element 1 of each calibration batch is left out: Sequential.forward\(input\)"
    ):
        plan = compiled(model, DataLoader(TensorDataset(x, torch.arange(6)), 3)).plan
    assert same_plan(plan, silently(lambda: compiled(model, [(x[:3],), (x[3:],)])).plan)


def test_columns_that_only_keyword_arguments_could_take_are_ignored_if_nothing_reads_them():
    model, batches = net(Tokens), token_batches(2)
    columns = [{**b, "text": ["a"] * len(b["input_ids"]), "loss_mask": torch.ones(2), "label": 1} for b in batches]
    with pytest.warns(UserWarning, match="'text' of each calibration batch is left out") as seen:
        c = compiled(model, columns)
    assert len(seen) == 1 and same_plan(c.plan, planned(model, batches))
    ids = batches[0]["input_ids"]
    for net_ in (c, compiled(model, None, plan=c.plan)):
        assert net_(ids)["logits"].shape == (2, 7, 40)
        assert torch.equal(net_(ids, loss_mask=torch.ones(5))["logits"], net_(ids)["logits"])


def test_the_captured_arguments_may_lie_in_memory_in_any_order():
    model, x = net(Two), torch.randn(4, 3, 16).transpose(0, 1)
    c = compiled(model, [(x, x)])
    assert c.plan.call["positional"] == ["x", "y"] and relative_error(c(x, x), model(x, x)) < 0.03


def test_samples_without_a_batch_dim_get_one():
    model = net(Tokens)
    ids = token_batches(1)[0]["input_ids"]
    rows = []
    for i, row in enumerate(ids):
        row = row[: 5 + i]
        rows.append({"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row})
    want = [{k: v[None] for k, v in r.items()} for r in rows]
    c = silently(lambda: compiled(model, rows))
    assert same_plan(c.plan, planned(model, want))
    c(ids, attention_mask=torch.ones_like(ids))


def test_rows_of_a_dataset():
    datasets = pytest.importorskip("datasets")
    model, x = net(), torch.randn(4, 5, 16)
    rows = datasets.Dataset.from_dict({"x": x.tolist(), "label": [0] * 4}).with_format("torch")
    assert same_plan(silently(lambda: compiled(model, rows)).plan, planned(model, [r[None] for r in x]))


def test_arguments_that_say_what_is_implied_may_be_said():
    model, ids = net(Tokens), token_batches(1)[0]["input_ids"]
    c = compiled(model, [ids])
    said = c(ids, use_cache=False, return_dict=True, keep=0)
    assert torch.equal(said["logits"], c(ids)["logits"])
    for name, other in (("use_cache", True), ("return_dict", False), ("keep", 1), ("output_attentions", True)):
        with pytest.raises(
            sqcompile.CaptureError, match=rf"leave {name}={other} out.*torch.compile\(model, backend='smooth"
        ):
            c(ids, **{name: other})
    c = compiled(net(), [torch.randn(2, 3, 16)])
    x = torch.randn(4, 5, 16)
    assert torch.equal(c(x, scale=1.0), c(x))


def triple(module, args):
    return (args[0] * 3, *args[1:])


def triple_both(module, args, kwargs):
    return tuple(a * 3 for a in args), {k: v * 3 for k, v in kwargs.items()}


class Called(Net):
    def __call__(self, x):
        return super().__call__(x * 3)


def replaced(model):
    """A forward assigned to the object, as accelerate's hooks do it."""
    old = model.forward
    model.forward = functools.update_wrapper(functools.partial(lambda m, x, scale=1.0: old(x * 3, scale)), old)
    model.forward = functools.update_wrapper(
        functools.partial(lambda m, *a, **k: old(a[0] * 3, *a[1:], **k), model), old
    )


HOOKS = {
    "a pre-hook": lambda m: m.register_forward_pre_hook(triple),
    "a pre-hook with keywords": lambda m: m.register_forward_pre_hook(triple_both, with_kwargs=True),
    "a hook": lambda m: m.register_forward_hook(lambda m, a, out: out * 3),
    "hooks below": lambda m: (m.fc1.register_forward_pre_hook(triple), m.fc2.register_forward_hook(lambda m, a, y: y + 1)),
    "a forward assigned": replaced,
    "a partial forward": lambda m: setattr(m, "forward", functools.partial(m.forward, scale=3.0)),
    "a call of its own": lambda m: setattr(m, "__class__", Called),
    "a hook on all modules": lambda m: nn.modules.module.register_module_forward_pre_hook(
        lambda m, a: triple(m, a) if isinstance(m, Net) else None
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_belong_to_the_model(kind):
    model, x = net(), torch.randn(3, 5, 16)
    plain = model(x)
    handle = HOOKS[kind](model)
    want = model(x)
    try:
        assert relative_error(plain, want) > 0.1
        c = compiled(model, [x])
        assert relative_error(c(x), want) < 0.03
        again = compiled(model, None, plan=c.plan)
        assert torch.equal(again(x), c(x))
        if kind == "a call of its own":
            with pytest.raises(
                sqcompile.CalibrationError, match=r"Called has a __call__ of its own.*pass batches instead"
            ):
                compiled(model, lambda m: m(x))
        elif kind != "a hook on all modules":  # a callable's calls are seen before the model's hooks see them
            assert same_plan(planned(model, lambda m: m(x)), c.plan)
    finally:
        if kind == "a hook on all modules":
            handle.remove()


def test_a_pre_hook_sees_positions_as_the_user_passed_them():
    seen = []
    model, x = net(Two), torch.randn(3, 5, 16)
    model.register_forward_pre_hook(lambda m, a, k: seen.append((len(a), *sorted(k))), with_kwargs=True)
    for batch, want in (((x, x), (2,)), ({"x": x, "y": x}, (0, "x", "y"))):
        compiled(model, [batch])
        assert set(seen) == {want}
        seen.clear()
    assert Reader(model).of_model((x,), {"y": x}).positional == ("x",)
