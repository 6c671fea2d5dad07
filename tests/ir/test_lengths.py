"""Sizes that are lengths: audio is dynamic in time where the model allows it; sizes that must be equal are tried equal."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from torch import nn

import sqcompile


class Audio(nn.Module):
    """[batch, time] to [batch, frames, 8]."""

    def __init__(self, time=None):
        super().__init__()
        self.time = time
        self.conv, self.norm = nn.Conv1d(1, 16, 40, 20), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        if self.time is not None and x.shape[-1] != self.time:
            raise ValueError("another length")
        return self.down(torch.relu(self.up(self.norm(self.conv(x[:, None]).transpose(1, 2)))))


class Features(nn.Module):
    """[batch, channels, time] to [batch, time, 8]."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(6, 16, 3, padding=1), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).transpose(1, 2))


def compiled(model, *batches, **kwargs):
    torch.manual_seed(0)
    return sqcompile.compile(model.eval(), batches, backend="eager", progress=False, **kwargs)


def test_audio_is_dynamic_in_time():
    torch.manual_seed(0)
    model = Audio()
    c = compiled(model, torch.randn(2, 800), torch.randn(3, 960))
    for shape in ((1, 800), (2, 1999), (4, 40)):
        x = torch.randn(shape)
        assert relative_error(c(x), model(x)) < 0.03
    torch.manual_seed(0)
    model = Features()
    c = compiled(model, torch.randn(2, 6, 25))
    x = torch.randn(1, 6, 70)
    assert relative_error(c(x), model(x)) < 0.03


def test_a_length_that_the_model_pins_names_dynamic_shapes():
    model = Audio(800)
    c = compiled(model, torch.randn(2, 800))
    assert relative_error(c(x := torch.randn(3, 800)), model(x)) < 0.03
    with pytest.raises(
        sqcompile.CaptureError, match=r"\[any, 800\].*example_inputs= like this, or with dynamic_shapes="
    ):
        c(torch.randn(2, 960))


def test_channels_are_no_length():
    c = compiled(nn.Sequential(nn.Linear(16, 8)), torch.randn(4, 16))
    with pytest.raises(sqcompile.CaptureError, match=r"\[any, 16\]"):
        c(torch.randn(4, 17))


class Positions(nn.Module):
    """As many positions as tokens, in an input without a batch."""

    def __init__(self):
        super().__init__()
        self.body, self.where, self.head = nn.Linear(16, 16), nn.Linear(3, 16), nn.Linear(16, 8)

    def forward(self, x, context, of_x, of_context):
        positions = self.where(torch.cat([of_context, of_x]))
        return self.head(torch.tanh(self.body(torch.cat([context, x], 1)) + positions))


@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_that_must_be_equal_are_tried_equal(batch):
    torch.manual_seed(0)
    model = Positions().eval()

    def call(b, n, m):
        return torch.randn(b, n, 16), torch.randn(b, m, 16), torch.randn(n, 3), torch.randn(m, 3)

    c = compiled(model, call(batch, 9, 7))
    for sizes in ((1, 5, 4), (3, 12, 6)):
        x = call(*sizes)
        assert relative_error(c(*x), model(*x)) < 0.03


def test_a_remedy_is_one_that_the_caller_has(fresh_dynamo):
    """``dynamic_shapes`` is an argument of sqcompile's functions, and of nothing that torch.compile takes."""
    from sqcompile.capture.inputs import as_call
    from sqcompile.capture.trace import trace
    from sqcompile.passes.ir.about import about
    from sqcompile.passes.ir.sizes import at_two_sizes

    gm = trace(Features().eval(), as_call(Features(), torch.randn(2, 6, 25)))

    def fails(sizes):
        raise RuntimeError("no such size\nand a page of details")

    with pytest.raises(sqcompile.CaptureError, match=r"sizes: no such size\. To fix them, pass dynamic_shapes=None$"):
        at_two_sizes(gm, fails)
    about(gm).captured = None
    with pytest.raises(sqcompile.CaptureError, match=r"To fix them, pass dynamic=False to torch\.compile$"):
        at_two_sizes(gm, fails)


def test_no_sizes_are_said_to_be_fixed_that_are():
    class Dynamic(nn.Module):
        def forward(self, x):
            raise RuntimeError("dynamic, they say")

    with pytest.raises(sqcompile.CaptureError, match="pass dynamic_shapes=None"):
        compiled(Dynamic(), torch.randn(2, 16))
    with pytest.raises(sqcompile.CaptureError, match="run the model itself on this batch"):
        compiled(Dynamic(), torch.randn(2, 16), dynamic_shapes=None)


class Flex(nn.Module):
    def __init__(self, masked):
        super().__init__()
        self.fc, self.masked = nn.Linear(16, 16), masked

    def forward(self, x):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q = self.fc(x)[:, None]
        n = x.shape[1]
        mask = (
            create_block_mask(lambda b, h, i, j: i >= j, x.shape[0], None, n, n, device="cpu") if self.masked else None
        )
        return flex_attention(q, q, q, block_mask=mask)[:, 0]


@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention_names_another_attention(masked):
    with pytest.raises(sqcompile.CaptureError, match=r'What to try: .*attn_implementation="sdpa"'):
        compiled(Flex(masked), torch.randn(2, 11, 16))


@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention_names_another_attention_to_the_backend(masked, fresh_dynamo):
    options = {"calibration_steps": 1, "compiler": "eager"}
    net = torch.compile(Flex(masked).eval(), backend="smoothquant", options=options)
    with torch.no_grad(), pytest.raises(sqcompile.CaptureError, match=r'What to try: .*attn_implementation="sdpa"'):
        net(torch.randn(2, 11, 16))
