"""Padding: which rows of a graph's tensors are the tokens of a mask, by the graph's layout and not by sizes."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import sqcompile
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.passes.ir.graph import find_linears, nodes_by_name, value
from sqcompile.passes.labels.token_rows import Rows, token_rows
from sqcompile.statistics.observe import calibrate
from sqcompile.statistics.padding import token_inputs

B, T, D = 3, 5, 8
PAD = 1000.0  # in every channel of what is padding


class Body(nn.Module):
    """Runs a function of the embedded tokens [B, T, D] that ends in ``self.fc``."""

    def __init__(self, body):
        super().__init__()
        self.embed, self.fc, self.q = nn.Embedding(20, D), nn.Linear(D, 4), nn.Linear(D, D)
        self.conv = nn.Conv1d(D, D, 3, padding=2)
        self.body = body
        with torch.no_grad():
            self.embed.weight[0] = PAD

    def forward(self, input_ids, attention_mask=None, x=None):
        return self.body(self, self.embed(input_ids), attention_mask, x)


def batch(b=B, t=T, real=2):
    """Sequence i has real + i tokens, the others are padding of id 0."""
    ids = torch.randint(1, 20, (b, t), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(t) < real + torch.arange(b)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def heads(h):
    return h.unflatten(-1, (2, D // 2)).transpose(1, 2)


def attend(m, h, mask):
    q = heads(m.q(h))
    return F.scaled_dot_product_attention(q, q, heads(h), mask[:, None, None].bool()).transpose(1, 2).flatten(2)


def derived(m, h, mask):
    """Attention by hand, whose mask is made of the tokens."""
    q = heads(m.q(h))
    scores = q @ q.mT + torch.where((h[..., 0] > 100)[:, None, None], -1e9, 0.0)
    return (scores.softmax(-1) @ heads(h)).transpose(1, 2).flatten(2)


def rotary(h):
    angles = torch.polar(torch.ones(h.shape[1], D // 2), torch.arange(h.shape[1])[:, None] * torch.ones(D // 2))
    return torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2))) * angles).flatten(-2)


# what reaches the linear, and how its rows lie over the tokens
LAYOUTS = {
    "as they are": (lambda m, h, mask, x: h, ("b", "t")),
    "time-major": (lambda m, h, mask, x: h.transpose(0, 1), ("t", "b")),
    "flattened": (lambda m, h, mask, x: h.reshape(-1, D), ("b", "t")),
    "flattened, time-major": (lambda m, h, mask, x: h.transpose(0, 1).reshape(-1, D), ("t", "b")),
    "by head": (lambda m, h, mask, x: h.repeat(1, 1, 2).unflatten(-1, (2, D)), ("b", "t", 2)),
    "heads before tokens": (lambda m, h, mask, x: h.repeat(1, 1, 2).unflatten(-1, (2, D)).transpose(1, 2), ("b", 2, "t")),
    "each twice": (lambda m, h, mask, x: h.reshape(-1, D).repeat_interleave(2, 0), ("b", "t", 2)),
    "once for each image": (lambda m, h, mask, x: h[:, None].expand(-1, x.shape[1], -1, -1), ("b", 0, "t")),
    "normalized": (lambda m, h, mask, x: F.layer_norm(h, (D,)) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True)), ("b", "t")),
    "attended": (lambda m, h, mask, x: attend(m, h, mask), ("b", "t")),
    "attended by hand": (lambda m, h, mask, x: derived(m, h, mask), ("b", "t")),
    "rotated": (lambda m, h, mask, x: rotary(h), ("b", "t")),
    "shifted by a token": (lambda m, h, mask, x: h + F.pad(h, (0, 0, 1, -1)), ("b", "t")),
    "after a causal convolution": (lambda m, h, mask, x: m.conv(h.mT)[..., : h.shape[1]].mT, ("b", "t")),
    "with what is pooled": (lambda m, h, mask, x: h * h.mean(1, keepdim=True).sigmoid(), ("b", "t")),
    "filled with images": (lambda m, h, mask, x: torch.where((h[..., :1] > 2), x.mean(1, keepdim=True), h), ("b", "t")),
}  # fmt: skip

NO_TOKENS = {
    "the last token": lambda m, h, mask, x: h[:, -1:],
    "pooled": lambda m, h, mask, x: h.mean(1),
    "every other token": lambda m, h, mask, x: h[:, ::2],
    "pairs of tokens": lambda m, h, mask, x: h[:, :, None] + h[:, None],
    "channels": lambda m, h, mask, x: h.mT @ h,
    "another input": lambda m, h, mask, x: x + 0 * h.mean(),
    "a strided convolution": lambda m, h, mask, x: F.conv1d(h.mT, m.conv.weight, stride=2, padding=1).mT,
    "tokens and images": lambda m, h, mask, x: torch.cat([x, h], 1),
    "the next token": lambda m, h, mask, x: h.roll(-1, 1) + h,
}


def capture(body, call):
    model = Body(lambda m, h, mask, x: m.fc(body(m, h, mask, x))).eval()
    return model, trace(model, as_call(model, call))


def rows_of(gm, call, node):
    inputs = {n.name: value(n) for n in gm.graph.find_nodes(op="placeholder")}
    shapes = {n: tuple(call[n].shape) for n in inputs}
    tokens, unsure = token_inputs(inputs, shapes, "attention_mask")
    assert unsure is None
    return token_rows(gm, tokens, {node: -1}).get(node)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_follow_the_layout(name):
    body, order = LAYOUTS[name]
    call = batch() | {"x": torch.randn(B, T, D)}  # an image with as many patches as there are tokens
    _, gm = capture(body, call)
    fc = next(l for l in find_linears(gm) if l.name == "fc.weight")
    assert rows_of(gm, call, fc.x) == Rows("attention_mask", order)


@pytest.mark.parametrize("name", NO_TOKENS)
def test_rows_that_are_no_single_tokens_are_all_kept(name):
    call = batch() | {"x": torch.randn(B, T, D)}
    model, gm = capture(NO_TOKENS[name], call)
    fc = next(l for l in find_linears(gm) if l.name == "fc.weight")
    assert rows_of(gm, call, fc.x) is None
    count = calibrate(gm, model, [call]).inputs["fc.weight"].count
    inputs = [call[n.name] for n in gm.graph.find_nodes(op="placeholder")]
    gm.graph.output_node().args = (([nodes_by_name(gm)[fc.x]],),)  # what the linear reads
    assert count == fx.Interpreter(gm).run(*inputs, enable_io_processing=False)[0][0][..., 0].numel()


def test_rows_around_the_tokens_are_real():
    call = batch() | {"x": torch.randn(B, T, D)}
    _, gm = capture(lambda m, h, mask, x: F.pad(h, (0, 0, 1, 2)), call)
    fc = next(l for l in find_linears(gm) if l.name == "fc.weight")
    rows = rows_of(gm, call, fc.x)
    assert rows == Rows("attention_mask", ("b", "t"), (1, 2))
    mask = call["attention_mask"].bool()
    assert torch.equal(rows.real(mask, B * (T + 3)).view(B, T + 3), F.pad(mask, (1, 2), value=True))
    assert rows.real(mask, B * T) is None


def test_masks_of_rows():
    mask = torch.rand(2, 3) > 0.5
    assert torch.equal(Rows("m", ("t", "b")).real(mask, 6), mask.t().flatten())
    assert torch.equal(Rows("m", (0, "b", 4, "t")).real(mask, 120), mask[None, :, None].expand(5, 2, 4, 3).flatten())
    assert torch.equal(Rows("m", ("b", "t", 2)).real(mask, 12), mask.flatten().repeat_interleave(2))
    assert Rows("m", ("b", "t")).real(mask, 7) is None and Rows("m", (0, "b", "t")).real(mask, 7) is None


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x, attention_mask):
        return self.fc(x)


class Weighted(Plain):
    def forward(self, x, attention_mask):
        return self.fc(x) * attention_mask.t()[..., None]


STATIC = sqcompile.Recipe(smooth=False, activation="per_tensor_static")


def time_major(t, b):
    mask = torch.ones(b, t, dtype=torch.long)
    mask[0, t // 2 :] = 0
    x = torch.randn(t, b, 16)
    x[t // 2 :, 0] = PAD
    return {"x": x, "attention_mask": mask}


@pytest.mark.parametrize(
    ("kind", "sizes"), [(Plain, (6, 4)), (Weighted, (6, 4)), (Weighted, (4, 4)), (Weighted, (6, 1))]
)
def test_time_major_inputs(kind, sizes):
    plan = sqcompile.calibrate(kind().eval(), [time_major(*sizes)], recipe=STATIC, progress=False)
    assert plan.layers[0].input_scale * 127 < PAD / 10


def test_a_square_batch_that_does_not_show_its_layout_is_refused_if_it_has_padding():
    model, call = Plain().eval(), time_major(4, 4)
    with pytest.raises(
        sqcompile.CalibrationError, match=r"batch 0: attention_mask \[4, 4\] has padding.*x \[4, 4, 16\]"
    ):
        sqcompile.calibrate(model, [call], recipe=STATIC, progress=False)
    plan = sqcompile.calibrate(model, [call | {"attention_mask": torch.ones(4, 4)}], recipe=STATIC, progress=False)
    assert plan.layers[0].input_scale * 127 > PAD / 2  # every row counts


@pytest.mark.parametrize("sizes", [(3, 5), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padding_stays_out_of_every_statistic(sizes, dtype):
    call = batch(*sizes)
    call["attention_mask"] = call["attention_mask"].to(dtype)
    real = int(call["attention_mask"].sum())
    model, gm = capture(lambda m, h, mask, x: attend(m, h, mask).transpose(0, 1), call)
    found = calibrate(gm, model, [call]).inputs
    assert {n: s.count for n, s in found.items()} == {"q.weight": real, "fc.weight": real}
    assert all(float(s.absmax.max()) < PAD / 10 for s in found.values())
    square = call | {"attention_mask": call["attention_mask"][:, None, None].expand(-1, 1, sizes[1], -1)}
    model, gm = capture(lambda m, h, mask, x: h * mask[:, 0, 0, :, None], square)  # a mask of scores is none of tokens
    assert calibrate(gm, model, [square]).inputs["fc.weight"].count == sizes[0] * sizes[1]


def test_an_image_tower_with_as_many_tokens_as_the_text_is_not_masked():
    call = batch(4, 4) | {"x": torch.full((4, 4, D), 3.0)}
    model, gm = capture(lambda m, h, mask, x: torch.cat([h * mask[..., None], m.q(x)], 1), call)
    found = calibrate(gm, model, [call]).inputs
    assert found["q.weight"].count == 16


@pytest.mark.parametrize("time_first", [False, True])
def test_the_backend_follows_the_mask_too(time_first):
    call = batch(4, 4)
    order = (lambda h: h.transpose(0, 1)) if time_first else (lambda h: h)
    model = Body(lambda m, h, mask, x: m.fc(order(h * mask[..., None] + h))).eval()
    torch._dynamo.reset()
    net = torch.compile(
        model, backend="smoothquant", options={"calibration_steps": 1, "compiler": "eager", "recipe": STATIC}
    )
    with torch.no_grad():
        net(**call), net(**call)
        real = call["attention_mask"].bool()
        got, want = (order(f(**call)) for f in (net, model))
        assert float((got - want)[real].norm() / want[real].norm()) < 0.05  # padding in the scale would leave nothing


@pytest.mark.parametrize("how", ["rows times a vector", "a vector times columns", "rows times a row"])
def test_products_with_vectors_keep_the_tokens(how):
    """Attention pooling: a score for each token. Padding stays excluded behind it."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.w = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8))

        def forward(self, x, attention_mask):
            h = self.a(x)
            score = {
                "rows times a vector": lambda: h @ self.w,
                "a vector times columns": lambda: self.w @ h.mT,
                "rows times a row": lambda: h @ h[0, 0],
            }[how]()
            return self.b(h * torch.softmax(score, -1)[..., None])

    torch.manual_seed(0)
    model, mask = Pooled().eval(), torch.ones(2, 6, dtype=torch.long)
    mask[:, 4:] = 0
    x = torch.randn(2, 6, 8)
    spoilt = x.masked_fill(mask[..., None] == 0, 1e4)
    plans = [
        sqcompile.calibrate(
            model, [{"x": v, "attention_mask": mask}], recipe=sqcompile.Recipe(smooth=False), progress=False
        )
        for v in (x, spoilt)
    ]
    first = [next(l.sqnr_db for l in plan.layers if l.name == "a.weight") for plan in plans]
    assert first[0] == pytest.approx(first[1])
