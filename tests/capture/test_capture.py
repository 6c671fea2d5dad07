"""What models do besides linears: in-place writes, constants, ties, odd signatures. Captured faithfully or refused."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import relative_error, tiny_lm
from test_fold import fold_everything
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile import Recipe


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.register_buffer("steps", torch.arange(16))
        self.register_buffer("memory", torch.randn(16, 16))
        self.body = body

    def forward(self, x, *args, **kwargs):
        return self.body(self, x, *args, **kwargs)


def net(body):
    torch.manual_seed(0)
    return Net(body).eval()


def compiled(model, *batches, **kwargs):
    return sqcompile.compile(model, batches, **{"backend": "eager", "progress": False, **kwargs})


def write(x, value):
    x[..., ::2] = value
    return x


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.b(torch.tanh(m.a(x)).double().type_as(m.a(x))),
        lambda m, x: m.b(F.relu(m.a(x) + m.steps)),
        lambda m, x: (h := torch.tanh(x), y := m.a(h), write(h, 9.0), y + m.b(h))[-1],
        lambda m, x: m.b(write(torch.tanh(x), 9.0)),
        lambda m, x: m.b(F.relu(m.a(x) + write(m.memory[0].clone(), 7.0))),
        lambda m, x: F.linear(x, write(m.b.weight * 1.0, 0.0)),
        lambda m, x: m.b(F.relu(m.a(x), inplace=True)),
        lambda m, x: torch.matmul(m.memory[:, 0], m.b(m.a(x)).transpose(1, 2)),
        lambda m, x: m.b(m.a(x)) @ m.memory[0],
        lambda m, x: m.b(F.relu(torch.add(m.a(x), m.memory[0], alpha=2))),
    ],
)
def test_the_function_is_kept(body):
    model, x = net(body), torch.randn(2, 24, 16)
    with torch.no_grad():
        want = model(x)
    folded, _, _ = fold_everything(model, x)
    assert relative_error(folded(x), want) <= 1e-5
    for recipe in ("default", Recipe(smooth=False)):
        assert relative_error(compiled(model, x, recipe=recipe)(x), want) < 0.03


def test_state_is_refused_and_the_model_is_not_advanced():
    def count(m, x):
        m.steps.add_(1)
        return m.a(x)

    model, x = net(count), torch.randn(2, 3, 16)
    with pytest.raises(sqcompile.CaptureError, match="writes to 'steps'"):
        compiled(model, x)
    assert torch.equal(model.steps, torch.arange(16))


def test_the_model_keeps_nothing_of_a_run_on_fake_tensors():
    def lazy(m, x):
        if not hasattr(m, "cos"):
            m.cos, m.tables[x.shape[-1]] = torch.cos(m.memory), torch.sin(m.memory)
            m.a.register_buffer("sin", torch.sin(m.memory))
        return m.b(m.a(x) * m.cos[0] * m.a.sin[0] + m.tables[16][0])

    model, x = net(lazy), torch.randn(2, 24, 16)
    model.tables = {}
    c = compiled(model, x)
    assert not hasattr(model, "cos") and not model.tables and not hasattr(model.a, "sin")
    assert relative_error(c(x), model(x)) < 0.03


@pytest.mark.parametrize("takes_it", [True, False])
def test_a_cache_asked_for_by_the_configuration_is_turned_off_where_that_can_be_passed(takes_it):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.config = nn.Linear(16, 16), types.SimpleNamespace(use_cache=takes_it)

        def forward(self, x, **kwargs):
            if kwargs and not takes_it:
                raise TypeError(f"no such arguments: {kwargs}")
            y = self.fc(x)
            return (y, y) if kwargs.get("use_cache", self.config.use_cache) else y

    model, x = Wrapper().eval(), torch.randn(2, 6, 16)
    c = compiled(model, x)
    assert relative_error(c(x), model.fc(x)) < 0.03
    if takes_it:  # and where the user says so
        c = compiled(model, {"x": x, "use_cache": False})
        assert relative_error(c(x, use_cache=False), model.fc(x)) < 0.03
        assert len(compiled(model, {"x": x, "use_cache": True})(x, use_cache=True)) == 2


def test_nothing_is_shared_with_the_model():
    model, x = net(lambda m, x: m.a(x) * m.steps + m.memory[0]), torch.randn(2, 3, 16)
    c = compiled(model, x)
    want = c(x)
    model.steps.zero_(), model.memory.zero_()
    assert torch.equal(c(x), want)


def test_constants_and_static_sizes_are_part_of_the_capture():
    x = torch.randn(2, 6, 16)
    c = compiled(net(lambda m, x, t: m.a(x) * t), (x, 2.0))
    assert c(x, 2.0).shape == (2, 6, 16)
    with pytest.raises(sqcompile.CaptureError, match=r"captured as 2\.0, this call has 3\.0"):
        c(x, 3.0)
    c = compiled(net(lambda m, x: m.a(x).reshape(x.shape[0], x.shape[1] * 16)), x, dynamic_shapes=None)
    with pytest.raises(sqcompile.CaptureError, match=r"captured as torch.float32 \[2, 6, 16\]"):
        c(torch.randn(4, 3, 16))
    with pytest.raises(sqcompile.CaptureError, match="float64"):
        c(x.double())


def test_keyword_tensors_tuples_and_dicts():
    x = torch.randn(2, 6, 16)
    model = net(lambda m, x, **kw: m.a(x) + m.b(kw["y"]))
    c = compiled(model, {"x": x, "y": x})
    assert relative_error(c(x, y=2 * x), model(x, y=2 * x)) < 0.03
    model = net(lambda m, x, pair, d: m.a(x) + m.b(pair[0] * pair[1]) + m.b(d["p"] - d["q"]))
    batch = (x, (x, x), {"p": x, "q": 2 * x})
    c = compiled(model, batch)
    again = sqcompile.compile(model, plan=c.plan, backend="eager")
    assert relative_error(again(x, (x, x), {"q": 2 * x, "p": x}), model(*batch)) < 0.03


def test_merged_linears_give_dense_results():
    x = torch.randn(2, 6, 16)
    model = net(lambda m, x: (m.a(x), m.b(x).unsqueeze(0).view(1, 2, -1), m.c(x)))
    out = compiled(model, x, recipe=Recipe(smooth=False))(x)
    assert all(y.is_contiguous() for y in out) and out[0].view(-1).shape == (192,)
    assert all(relative_error(y, w) < 0.03 for y, w in zip(out, model(x), strict=True))


def test_sizes_that_the_model_pins_stay_static():
    model = net(lambda m, x: m.a(x.flatten(1)[:, :16]) + x.flatten(1) @ torch.ones(64, 16))
    x = torch.randn(4, 4, 16)
    assert relative_error(compiled(model, x)(x), model(x)) < 0.03


def test_an_empty_batch_gives_an_empty_result():
    for recipe in ("default", "O2"):
        c = compiled(net(lambda m, x: m.b(F.relu(m.a(x)))), torch.randn(2, 6, 16), recipe=recipe)
        assert c(torch.randn(0, 6, 16)).shape == (0, 6, 16)


def test_a_linear_without_tokens_stays_in_float_and_says_so():
    model = net(lambda m, x: m.a(x) + F.pad(m.b(x[:, 8:]), (0, 0, 8, 0)))
    c = compiled(model, torch.randn(2, 8, 16), dynamic_shapes=None)
    layers = {l.name: l for l in c.report.layers}
    assert layers["a.weight"].quantized and "no calibration token" in layers["b.weight"].reason


def test_a_linear_of_no_channels_stays_as_it_is():
    """Half of one channel, as tensor parallelism may leave it to one of two ranks."""
    model = net(lambda m, x: m.b(F.relu(m.a(x))) + F.linear(x[..., :0], m.a.weight[:16, :0]))
    x = torch.randn(4, 6, 16)
    c = compiled(model, x)
    assert [l.name for l in c.report.layers] == ["a.weight", "b.weight"]
    assert relative_error(c(x), model(x)) < 0.03


def test_skip_knows_tied_weights_by_every_name_and_refuses_unknown_ones():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    model[2].weight = model[0].weight
    for name in ("0", "2"):
        c = compiled(model, torch.randn(4, 8, 16), recipe=Recipe(skip=(name,)))
        assert [l.quantized for l in c.report.layers] == [False, False, True]
    with pytest.raises(sqcompile.RecipeError, match="names no linear"):
        compiled(model, torch.randn(4, 8, 16), recipe=Recipe(skip=("q_proj",)))


@pytest.mark.parametrize(
    ("ids", "head"),
    [
        (lambda m, x: x, True),
        (lambda m, x: x.int().long(), True),
        (lambda m, x: x.clamp(0), True),
        (lambda m, x: x.masked_fill(x == -100, 0), True),
        (lambda m, x: torch.where(x < 0, 0, x), True),
        (lambda m, x: write(x.clone(), 3), True),
        (lambda m, x: torch.cat([m.steps[:1].expand(x.shape[0], 1), x[:, :-1]], 1), True),
        (lambda m, x: m.steps[: x.shape[1]], False),
        (lambda m, x: x.ne(0).cumsum(1), False),
    ],
)
def test_the_head_is_known_by_the_table_of_ids_however_they_are_edited(ids, head):
    model = net(lambda m, x: m.b(torch.tanh(m.a(F.embedding(ids(m, x), m.memory)))))
    c = compiled(model, torch.randint(0, 16, (2, 7)))
    assert [l.quantized for l in c.report.layers] == [True, not head]


def test_a_weight_and_its_transpose_in_one_storage_stay_apart():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.mid, self.dec = (nn.Linear(16, 16, bias=False) for _ in range(3))
            self.dec.weight = nn.Parameter(self.enc.weight.detach().t())

        def forward(self, x):
            return self.dec(torch.tanh(self.mid(self.enc(x))))

    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(4, 8, 16)
    assert relative_error(compiled(model, x, recipe=Recipe(smooth=False, skip=("enc", "dec")))(x), model(x)) < 0.03


def test_a_skipped_reader_of_a_multiplied_input():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lm_head, self.cls = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(16, 4)

        def forward(self, x):
            h = self.norm(x) + x
            return self.lm_head(h), self.cls(h)

    torch.manual_seed(0)
    x = torch.randn(4, 24, 16)
    x[..., 3] *= 50
    model = Heads().eval()
    c = compiled(model, x)
    assert [(l.quantized, l.smoothing) for l in c.report.layers] == [(False, "none"), (True, "multiplied")]
    assert all(relative_error(y, w) < 0.03 for y, w in zip(c(x), model(x), strict=True))


def test_names_of_graph_modules_are_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = nn.Linear(16, 16)

        def forward(self, x):
            return self.graph(x)

    with pytest.raises(sqcompile.CaptureError, match="'graph' clashes"):
        compiled(Named().eval(), torch.randn(2, 16))


def test_a_loader_over_an_iterable_dataset():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([torch.randn(6, 16) for _ in range(4)])

    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    assert sqcompile.compile(net(lambda m, x: m.a(x)), loader, backend="eager").report.layers[0].quantized


def refuses(c, match, *args, **kwargs):
    with pytest.raises(sqcompile.CaptureError, match=match):
        c(*args, **kwargs)


def test_sizes_that_were_equal_in_the_capture_must_be_equal():
    model, x = net(lambda m, x, y: m.a(x + y)), torch.randn(1, 6, 16)
    c = compiled(model, {"x": x, "y": x})
    x, y = torch.randn(4, 9, 16), torch.randn(1, 9, 16)
    remedy = r"which were equal in the capture.* pass equal sizes .*example_inputs="
    names = r"^y\.shape\[0\] is 1 and x\.shape\[0\] is 4, "
    refuses(c, names + remedy, x=x, y=y)
    refuses(c, r"y\.shape\[1\] is 7 and x\.shape\[1\] is 9", x=x, y=x[:, :7])
    assert relative_error(c(x=x, y=x), model(x, y=x)) < 0.03
    c = compiled(model, (x[:2], y))  # a broadcast is part of the capture
    assert relative_error(c(x, y), model(x, y)) < 0.03
    loader = [{"input_ids": torch.ones(2, 6).long(), "attention_mask": torch.ones(2, 6).long()} for _ in range(2)]
    loader[1]["attention_mask"] = torch.ones(2, 5).long()
    with pytest.raises(
        sqcompile.CalibrationError, match=r"batch 1: attention_mask\.shape\[1\] is 5 and input_ids\.shape"
    ):
        sqcompile.calibrate(tiny_lm("llama"), loader, progress=False)


# forward's body, lengths that are served, lengths that are not, the condition
CONDITIONS = {
    "a table of positions": (lambda m, x: m.a(x + m.memory[: x.shape[1]]), (16, 1, 2, 0), (17,), "<= 16"),
    "a branch": (lambda m, x: m.a(x) if x.shape[1] <= 8 else m.b(x), (8, 1), (9, 40), "<= 8"),
    "one length": (lambda m, x: m.a(x) if x.shape[1] == 9 else m.b(x), (8, 1, 10), (9,), "!= 9"),
    "the last few": (lambda m, x: m.a(x[:, -4:]), (4, 9), (3, 1), "<= -4"),
    "a multiple": (lambda m, x: m.a(x) if x.shape[1] % 3 == 0 else m.b(x), (3, 9), (4, 1), r"x\.shape\[1\] % 3\) == 0"),
    "all but the first": (lambda m, x: m.a(x[:, 1:]), (7, 3, 2), (), ""),
    "a check": (lambda m, x: (torch._check(x.shape[1] <= 8), m.a(x))[1], (8, 1), (9,), "<= 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_sizes_for_which_the_model_does_something_else_are_refused(name):
    body, served, refused, condition = CONDITIONS[name]
    model = net(body)
    c = compiled(model, torch.randn(2, 6, 16))
    for length in served:
        x = torch.randn(3, length, 16)
        assert c(x).shape == model(x).shape and (length == 0 or relative_error(c(x), model(x)) < 0.03)
    for length in refused:
        refuses(c, rf"{condition}.* has x\.shape\[1\] = {length}\. .*example_inputs=", torch.randn(3, length, 16))


def test_ranges_of_the_users_own_dims_are_kept():
    dims = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=4, max=32)}}
    c = compiled(net(lambda m, x: m.a(x)), torch.randn(2, 6, 16), dynamic_shapes=dims)
    assert c(torch.randn(1, 32, 16)).shape == (1, 32, 16)
    refuses(c, r"x\.shape\[1\] <= 32", torch.randn(1, 33, 16))
    refuses(c, r"x\.shape\[1\] >= 4", torch.randn(1, 3, 16))


def test_a_tensor_on_another_device_is_refused():
    c = compiled(net(lambda m, x: m.a(x)), torch.randn(2, 6, 16))
    refuses(c, r"argument x was captured as .* on cpu, this call has .* on meta", torch.randn(2, 6, 16, device="meta"))
