"""torch.compile(backend="smoothquant"): however forward spells its sizes and numbers, and wherever its graph breaks.

The numbers are those of compile(), at the first call and at later ones of other sizes, and Dynamo compiles no more often
than for its own backends.
"""

from __future__ import annotations

import pytest
import torch
from backend_cases import call, session
from conftest import relative_error
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import sqcompile
from sqcompile.backend import smoothquant

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

D = 16


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(D, D)

    def forward(self, x):
        b, t, d = x.shape
        return self.fc(x.view(b * t, d)).view(b, t, d)


class Net(nn.Module):
    """A block and its parts, for a ``body`` to call: ``body(self, x, ...)``."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.norm, self.up, self.down, self.qkv = (
            nn.LayerNorm(D),
            nn.Linear(D, 24),
            nn.Linear(24, D),
            nn.Linear(D, 3 * D),
        )
        self.out, self.lm_head = nn.Linear(D, D), nn.Linear(D, 48, bias=False)
        self.embed, self.patch = nn.Embedding(64, D), nn.Conv2d(3, D, 4, 4)
        self.parts = nn.ModuleList(Part() for _ in range(2))
        self.register_buffer("mask", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))
        angles = torch.outer(torch.arange(64.0), 10000 ** (-torch.arange(2.0) / 2))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.scale = 0.5

    def ffn(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, *args, **kwargs):
        return self.body(self, *args, **kwargs)


def nano_gpt(m, x):
    b, t, c = x.size()
    q, k, v = m.qkv(m.norm(x)).split(c, dim=2)
    q, k, v = (z.view(b, t, 4, c // 4).transpose(1, 2) for z in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
    scores = scores.masked_fill(m.mask[:, :, :t, :t] == 0, float("-inf")).softmax(-1)
    return m.ffn(x + m.out((scores @ v).transpose(1, 2).contiguous().view(b, t, c)))


def rotary(m, x):
    b, t, c = x.shape
    q, k, v = (z.view(b, t, 4, c // 4).transpose(1, 2) for z in m.qkv(m.norm(x)).chunk(3, -1))
    cos, sin = m.cos[:t], m.sin[:t]
    q, k = (torch.cat([z[..., :2] * cos - z[..., 2:] * sin, z[..., :2] * sin + z[..., 2:] * cos], -1) for z in (q, k))
    return m.ffn(x + m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)))


def causal(m, x):
    y, t = m.ffn(x), x.shape[1]
    scores = (y @ y.mT).masked_fill(~torch.tril(torch.ones(t, t, dtype=torch.bool)), float("-inf"))
    return scores.softmax(-1) @ y


def padded(m, x):
    t = x.shape[1]
    y = F.pad(x, (0, 0, 0, (4 - t % 4) % 4))
    b, n, d = y.shape
    return m.ffn(y.view(b, n // 4, 4, d)).reshape(b, n, d)[:, :t]


def image(m, x):
    y = m.patch(x)
    b, c, h, w = y.shape
    return m.ffn(y.view(b, c, h * w).transpose(1, 2)).transpose(1, 2).reshape(b, c, h, w)


def parts(m, x):
    for part in m.parts:
        x = x + part(x)
    return {"x": x, "sizes": (x.shape[0], x.shape[1]), "mean": x.sum(1) / x.shape[1]}


def after_a_print(m, x):
    b, t, d = x.shape
    y = m.ffn(x)
    print(end="")
    return m.out(y.view(b, t, d)).reshape(b * t, d)


def sizes_from_before_a_break(m, x):
    b, t, d = x.shape
    y = m.ffn(x)
    torch._dynamo.graph_break()
    return m.lm_head(y.view(b * t, d)).view(b, t, -1)


def half_before_a_break(m, x):
    half = x.shape[1] // 2
    y = m.ffn(x)
    torch._dynamo.graph_break()
    return m.out(y)[:, :half]


def pinned_after_a_break(m, x):
    t = x.shape[1]
    y = m.ffn(x)
    torch._dynamo.graph_break()
    return m.out(y.reshape(-1, t // 2, 2, D).flatten(1, 2))


def sizes(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(*shape, generator=generator),) for shape in shapes]


ROWS = ((2, 6, D), (2, 9, D), (3, 9, D), (8, 8, D))
EVEN = ((2, 6, D), (2, 8, D), (3, 8, D), (4, 12, D))
ONES = ((1, 6, D), (1, 9, D), (1, 1, D), (2, 1, D), (2, 5, D))

# forward's body, its calls, how many graphs they are
SPELLINGS = {
    "nanoGPT": (nano_gpt, sizes(*ROWS), 1),
    "batches and sequences of one": (nano_gpt, sizes(*ONES), 4),
    "rotary": (rotary, sizes(*ROWS), 1),
    "unpacked": (lambda m, x: (s := x.shape, m.ffn(x).view(s[0], s[1], 4, s[2] // 4).mT.flatten(1))[-1], sizes(*ROWS), 1),
    "size(1)": (lambda m, x: m.ffn(x)[:, : x.size(1) // 2], sizes(*ROWS), 1),
    "view(-1)": (lambda m, x: m.ffn(x.view(-1, x.shape[-1])).view(x.shape[0], -1, D), sizes(*ROWS), 1),
    "a product of sizes": (lambda m, x: m.ffn(x.reshape(x.shape[0] * x.shape[1], D)).reshape(x.shape), sizes(*ROWS), 1),
    "arange": (lambda m, x: m.ffn(x + m.embed(torch.arange(x.shape[1]))), sizes(*ROWS), 1),
    "tril": (causal, sizes(*ROWS), 1),
    "padding": (padded, sizes(*ROWS), 2),  # Dynamo guards whether there is any
    "a size as a float": (lambda m, x: m.ffn(x) * x.shape[1] ** -0.5, sizes(*ROWS), 1),
    "the last token": (lambda m, x: m.ffn(x)[torch.arange(x.shape[0]), -1], sizes(*ROWS), 1),
    "a list of modules, a dict": (parts, sizes(*ROWS), 1),
    "a list of tensors": (lambda m, x: m.ffn(torch.cat(list(x), 1)), [([x, y],) for (x,), (y,) in zip(sizes(*EVEN), sizes(*EVEN), strict=True)], 1),
    "two inputs of one size": (lambda m, x, y: m.ffn(x) + m.out(y).mean(1, keepdim=True), [(x, y) for (x,), (y,) in zip(sizes(*EVEN), sizes(EVEN[0], (2, 5, D), (3, 7, D), EVEN[3]), strict=True)], 1),
    "a print": (after_a_print, sizes(*ROWS), 4),
    "a head behind a break": (sizes_from_before_a_break, sizes(*ROWS), 4),
    "half before a break": (half_before_a_break, sizes(*EVEN), 3),
    "pinned after a break": (pinned_after_a_break, sizes(*EVEN), 3),
}  # fmt: skip


def planned(body, calls, **options):
    """A model without smoothing, which would be folded here and multiplied there; what compile() makes of it."""
    torch.manual_seed(0)
    model, recipe = Net(body).eval(), sqcompile.Recipe(smooth=False)
    return model, sqcompile.compile(model, calls[:1], recipe=recipe, backend="eager", progress=False, **options)


def some(names, *quick):
    """Parameters, all but a few of them slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def compiled(model, plan=None, dynamic=None, **options):
    torch._dynamo.reset()
    counters.clear()
    how = {"calibration_steps": 1} if plan is None else {"plan": plan}
    return torch.compile(model, backend=smoothquant, options={"compiler": "eager", **how, **options}, dynamic=dynamic)


def graphs():
    return counters["stats"]["unique_graphs"]


def same(got, want):
    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-3 if isinstance(w, torch.Tensor) else g == w


def own(args):
    """A copy: Dynamo's marks stay with a tensor."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, args)


@pytest.mark.parametrize("name", some(SPELLINGS, "nanoGPT", "a head behind a break"))
def test_the_same_numbers_at_every_size(name):
    body, calls, expected = SPELLINGS[name]
    model, reference = planned(body, calls)
    net = compiled(model, reference.plan)
    for args in calls:
        same(call(net, *own(args)), reference(*args))
    assert graphs() == expected


@pytest.mark.slow
def test_images_of_every_size():
    shapes = ((2, 3, 16, 16), (2, 3, 24, 16), (3, 3, 32, 32))
    model, reference = planned(image, sizes(*shapes))
    net = compiled(model, reference.plan)
    for args in sizes(*shapes):
        fixed = {"plan": reference.plan, "example_inputs": args, "dynamic_shapes": None, "backend": "eager"}
        same(call(net, *own(args)), sqcompile.compile(model, **fixed)(*args))
    assert graphs() == 1


@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", some(["nanoGPT", "padding", "a head behind a break", "pinned after a break"], "a head behind a break")
)
def test_dynamic_is_as_the_user_says(name, dynamic):
    body, calls, _ = SPELLINGS[name]
    model, reference = planned(body, calls)
    net = compiled(model, reference.plan, dynamic)
    for args in calls:
        same(call(net, *own(args)), reference(*args))
    eager = torch.compile(Net(body).eval(), backend="eager", dynamic=dynamic)
    torch._dynamo.reset()
    mine, counters["stats"]["unique_graphs"] = graphs(), 0
    for args in calls:
        call(eager, *own(args))
    assert mine <= graphs() + (dynamic is True), "but for a size that the model pins"


@pytest.mark.slow
def test_sizes_that_the_user_marks():
    model, reference = planned(nano_gpt, sizes(*ROWS))
    net = compiled(model, reference.plan)
    for (x,) in sizes(*ROWS):
        torch._dynamo.mark_dynamic(x, 1)
        same(call(net, x), reference(x))
    assert graphs() == 1


def test_a_break_at_a_value_calibrates_and_runs():
    def scaled(m, x):
        y = m.ffn(x)
        return m.out(y) * x.abs().max().item()

    torch.manual_seed(0)
    model = Net(scaled).eval()
    net = compiled(model, recipe=sqcompile.Recipe(smooth=False))
    calls = sizes(*ROWS)
    assert relative_error(call(net, *calls[0]), call(model, *calls[0])) < 1e-5
    for args in calls:
        assert 1e-5 < relative_error(call(net, *own(args)), call(model, *args)) < 0.03
    assert len(session(model).plan.layers) == 3 and graphs() <= 4


# what is made of a float, and whether Dynamo compiles again for another value of it
FLOATS = {
    "a factor": (lambda m, x, f: m.ffn(x) * f, False),
    "a quotient": (lambda m, x, f: m.ffn(x / f) + 1.0 / f, False),
    "a mean of two": (lambda m, x, f: f * m.ffn(x) + (1 - f) * x, False),
    "of integers": (lambda m, x, f: m.ffn(x + x.int() * f), True),
    "of one value": (lambda m, x, f: m.ffn(x + m.scale_of * f), True),
    "a bound": (lambda m, x, f: m.ffn(x.clamp(max=f) * f), True),
    "an epsilon": (lambda m, x, f: m.out(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + f)), True),
    "of a size": (lambda m, x, f: m.ffn(x * (f * x.shape[1])), True),
    "a branch": (lambda m, x, f: m.ffn(x) * f if f < 0.9 else m.out(x), False),
    "returned": (lambda m, x, f: (m.ffn(x), 2 * f), True),
}


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", some(FLOATS, "a quotient", "a bound"))
def test_a_float_that_changes(name, dynamic):
    body, again = FLOATS[name]
    torch.manual_seed(0)
    model = Net(body).eval()
    model.register_buffer("scale_of", torch.tensor(0.3))
    (x,), recipe = sizes(ROWS[0])[0], sqcompile.Recipe(smooth=False)
    net = compiled(model, dynamic=dynamic, recipe=recipe)
    reference = torch.compile(Net(body).eval(), backend="eager", dynamic=dynamic)
    reference._orig_mod.register_buffer("scale_of", model.scale_of)
    call(net, x, 0.5)
    for f in (0.5, 0.6, 0.7, 0.8):
        got, want = pytree.tree_leaves(call(net, x.clone(), f)), pytree.tree_leaves(call(model, x, f))
        assert relative_error(got[0], want[0]) < 0.03 and got[0].dtype == want[0].dtype and got[1:] == want[1:]
    assert graphs() == (4 if again else 2 if dynamic is None else 1)


@pytest.mark.parametrize("what", some(["attribute", "int", "bool"], "attribute"))
def test_other_numbers_that_change(what):
    body = {
        "attribute": lambda m, x, f: m.ffn(x) * m.scale,
        "int": lambda m, x, heads: m.ffn(x).view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2).flatten(1),
        "bool": lambda m, x, flag: m.ffn(x) if flag else m.out(x),
    }[what]
    torch.manual_seed(0)
    model = Net(body).eval()
    net = compiled(model, recipe=sqcompile.Recipe(smooth=False))
    (x,) = sizes(ROWS[0])[0]
    values = {"attribute": (0.5, 0.5, 0.6, 0.7), "int": (2, 2, 4, 8), "bool": (True, True, False, False, True)}[what]
    for i, v in enumerate(values):
        model.scale = v
        assert relative_error(call(net, x.clone(), v), call(model, x, v)) < 0.03, i
    assert graphs() == 2


@pytest.mark.slow
def test_floats_through_inductor():
    model, reference = planned(lambda m, x, f: m.ffn(x) * f, [(sizes(ROWS[0])[0][0], 0.5)])
    net = compiled(model, reference.plan, compiler="inductor")
    (x,) = sizes(ROWS[0])[0]
    for f in (0.5, 0.6, 0.7):
        assert relative_error(call(net, x.clone(), f), reference(x, 0.5) / 0.5 * f) < 1e-3
    assert graphs() == 3  # Dynamo fixes each float where Inductor compiles
