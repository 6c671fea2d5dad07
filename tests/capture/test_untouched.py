"""The user's model stays as it is: no write is carried out on it, nothing is kept of a run on fake tensors."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile import CaptureError


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.a, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.embed, self.body = nn.Embedding(8, 16, max_norm=0.5), body
        self.register_buffer("steps", torch.zeros(16))
        self.plain, self.listed = torch.zeros(16), [torch.zeros(16)]

    def forward(self, x):
        return self.body(self, x)


def net(body):
    torch.manual_seed(0)
    return Net(body).eval()


def under_no_grad(write):
    def body(m, x):
        with torch.no_grad():
            write(m, x)
        return m.a(x)

    return body


def tensors(m):
    return {
        **dict(m.named_parameters()),
        **dict(m.named_buffers()),
        "plain": m.plain,
        "listed": m.listed[0],
        "held": HELD,
    }


HELD = torch.zeros(16)
STAY = "INT8 weights are made once.*What to try"
PARAMETER = rf"writes to its parameter 'a\.weight' when it runs, at .*test_untouched\.py:\d+.*{STAY}"

# how a parameter is written to, by a name; what the error says where it is not PARAMETER
PARAMETERS = {
    "in place": lambda m, x: m.a.weight.clamp_(-0.1, 0.1),
    "a view": lambda m, x: m.a.weight[0].zero_(),
    "an element": lambda m, x: m.a.weight.__setitem__((0, 0), 1.0),
    "through .data": lambda m, x: m.a.weight.data.mul_(2),
    "a contiguous one is itself": lambda m, x: m.a.weight.detach().contiguous().mul_(2),
    "a cast to its own dtype": lambda m, x: m.a.weight.type_as(x).mul_(2),
    "a view that no schema names": lambda m, x: torch.einsum("ij->ji", m.a.weight).mul_(2),
    "several at once": lambda m, x: torch._foreach_mul_([m.a.weight, m.a.bias], 2.0),
    "out=": lambda m, x: torch.mul(m.a.weight, 2, out=m.a.weight),
    "copied into": lambda m, x: m.a.weight.copy_(m.a.weight * 2),
}


def refuses(match, model, x, entry):
    before = {k: (v.detach().clone(), v.data_ptr()) for k, v in tensors(model).items()}
    with pytest.raises(CaptureError, match=match):
        if entry == "compile":
            sqcompile.compile(model, [x, x], backend="eager", progress=False)
        else:
            options = {"calibration_steps": 1, "compiler": "eager"}
            with torch.no_grad():
                torch.compile(model, backend="smoothquant", options=options)(x)
    for name, t in tensors(model).items():
        assert torch.equal(t, before[name][0]) and t.data_ptr() == before[name][1], name


@pytest.mark.parametrize("entry", ["compile", "backend"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_forward_that_writes_to_a_parameter_is_refused_before_anything_runs(name, entry, fresh_dynamo):
    refuses(PARAMETER, net(under_no_grad(PARAMETERS[name])), torch.randn(2, 3, 16), entry)


def assign(m, x):
    m.a.weight.data = m.a.weight * 2


def replace(m, x):
    m.a.weight = nn.Parameter(m.a.weight * 2)


@pytest.mark.parametrize("entry", ["compile", "backend"])
def test_values_that_are_assigned_and_embeddings_with_a_norm_are_refused(entry, fresh_dynamo):
    x = torch.randn(2, 3, 16)
    refuses(
        rf"assigns to a tensor's \.data when it runs, at .*test_untouched.*{STAY}", net(under_no_grad(assign)), x, entry
    )
    ids = torch.randint(0, 8, (2, 3))
    refuses(rf"its parameter 'embed\.weight' when .*{STAY}", net(lambda m, x: m.a(m.embed(x))), ids, entry)


def test_parameters_are_not_replaced_and_an_ineffective_dropout_is_no_copy():
    x = torch.randn(2, 3, 16)
    refuses(rf"replaces its parameter 'a\.weight'.*{STAY}", net(under_no_grad(replace)), x, "compile")
    dropped = under_no_grad(lambda m, x: F.dropout(m.a.weight, 0.1, False).mul_(2))
    refuses(PARAMETER, net(dropped), x, "compile")


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda m, x: m.steps.add_(1), "writes to 'steps' when it runs, at .*test_untouched.*keeps no state"),
        (
            lambda m, x: m.plain.add_(1),
            r"a tensor of shape \(16,\) that it keeps between calls, at .*test_untouched.*keeps no",
        ),
        (lambda m, x: m.listed[0].add_(x.sum()), "that it keeps between calls"),
        (lambda m, x: HELD.add_(1), "that it keeps between calls"),
        (lambda m, x: x.mul_(2), "writes to 'x' when it runs"),
    ],
)
def test_other_writes_are_refused_and_not_carried_out_by_the_capture(write, match):
    refuses(match, net(under_no_grad(write)), torch.randn(2, 3, 16), "compile")


def test_training_mode_is_named_rather_than_the_statistics_it_writes_to():
    model = net(lambda m, x: m.a(m.norm(x.transpose(1, 2)).transpose(1, 2)))
    refuses(r"training mode .*model\.eval\(\)", model.train(), torch.randn(2, 3, 16), "compile")


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: F.linear(x, m.a.weight.data, m.a.bias.detach()),
        lambda m, x: m.a(x) * torch.tensor(0.0).add_(1),
        lambda m, x: m.a(x) * torch.zeros(16).add_(1),
        lambda m, x: F.linear(x, m.a.weight.clone().mul_(1), m.a.bias),
    ],
)
def test_reading_data_and_writing_to_what_forward_makes_is_served(body):
    model, x = net(body), torch.randn(4, 8, 16)
    c = sqcompile.compile(model, [x], backend="eager", progress=False)
    assert c.report.layers[0].quantized
    with torch.no_grad():
        assert (c(x) - model(x)).norm() < 0.03 * model(x).norm()


def test_no_operator_of_a_graph_writes_to_its_arguments():
    from sqcompile.capture.inputs import as_call
    from sqcompile.capture.trace import trace
    from sqcompile.passes.ir.verify import verify

    model, x = net(lambda m, x: m.a(x)), torch.randn(2, 3, 16)
    gm = trace(model, as_call(model, x))
    output = next(iter(reversed(gm.graph.nodes)))
    with gm.graph.inserting_before(output):
        written = gm.graph.call_function(torch.ops.aten.zero_.default, (gm.graph.find_nodes(op="get_attr")[0],))
    written.meta["val"] = written.args[0].meta["val"]
    with pytest.raises(sqcompile.StageError, match=r"traced: %zero__default is aten\.zero_\.default, which writes"):
        verify(gm, "traced")


class Frozen(collections.OrderedDict):
    """A dict that refuses changes, as diffusers' configurations do."""

    def __setitem__(self, key, value):
        raise TypeError("frozen")

    __delitem__ = pop = update = clear = __setitem__


class State:
    def __init__(self):
        self.calls, self.last = 0, None


@pytest.mark.parametrize("fails", [False, True])
def test_what_forward_keeps_is_taken_back_also_when_it_fails(fails):
    def body(m, x):
        y = m.a(x)
        m.calls, m.made, m.kept["y"], m.state.last = m.calls + 1, y, y, y
        m.state.calls += 1
        m.listed.append(y), m.recent.append(y), m.seen.add(y), m.nested["list"][0].append(y)
        m.counts["x"] += 1
        m.ordered["a"] = m.ordered.pop("a")
        del m.gone
        return y + torch.ones(3) if fails else y

    model, x = net(body), torch.randn(2, 8, 16)
    model.calls, model.state, model.kept, model.gone = 0, State(), {}, "here"
    model.recent, model.seen, model.nested = collections.deque([1, 2], maxlen=2), {"s"}, {"list": [[], ()]}
    model.counts, model.ordered = collections.Counter(x=1), collections.OrderedDict(a=1, b=2)
    model.config = Frozen()
    collections.OrderedDict.__setitem__(model.config, "sizes", [1])
    attributes, config = list(model.__dict__), model.config
    try:
        sqcompile.compile(model, [x], backend="eager", progress=False)
    except CaptureError:
        assert fails
    assert list(model.__dict__) == attributes and model.config is config
    assert (model.calls, model.kept, model.gone, model.state.calls, model.state.last) == (0, {}, "here", 0, None)
    assert len(model.listed) == 1 and list(model.recent) == [1, 2] and model.seen == {"s"}
    assert model.nested == {"list": [[], ()]} and model.counts == {"x": 1} and list(model.ordered) == ["a", "b"]


def test_a_model_takes_new_buffers_after_a_capture_that_failed():
    model = net(lambda m, x: m.a(x) if x.sum() > 0 else x)
    with pytest.raises(CaptureError):
        sqcompile.compile(model, [torch.randn(2, 8, 16)], backend="eager", progress=False)
    model.register_buffer("late", torch.zeros(3))
    assert model.late.shape == (3,)
