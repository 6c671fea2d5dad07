"""Pieces of random blocks that look at one token at a time: activations and MLPs."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from random_parts import Norm, Piece, Project, scale_vector
from torch import nn


class Activation(Piece):
    SPELLINGS = """
        relu relu_in_place squared_relu leaky gelu gelu_tanh silu silu_by_hand quick_gelu tanh relu_by_max
        relu_by_clamp relu_by_where relu6 elu hardswish mish prelu abs square none scaled_relu half_relu
        bfloat16_relu double_silu dropout_relu threshold mul_mask
    """

    def __init__(self, r: random.Random, *spellings: str) -> None:
        super().__init__(r, *spellings)
        if self.spelling == "prelu":
            self.slope = nn.Parameter(torch.tensor([0.2]))

    def relu(self, x):
        return x.relu()

    def relu_in_place(self, x):
        return F.relu_(x * 1.0)

    def squared_relu(self, x):
        return F.relu(x).square()

    def leaky(self, x):
        return F.leaky_relu(x, 0.1)

    def gelu(self, x):
        return F.gelu(x)

    def gelu_tanh(self, x):
        return F.gelu(x, approximate="tanh")

    def silu(self, x):
        return F.silu(x)

    def silu_by_hand(self, x):
        return x * torch.sigmoid(x)

    def quick_gelu(self, x):
        return x * torch.sigmoid(1.702 * x)

    def tanh(self, x):
        return 1.5 * torch.tanh(x)

    def relu_by_max(self, x):
        return torch.maximum(x, torch.zeros_like(x))

    def relu_by_clamp(self, x):
        return x.clamp(min=0)

    def relu_by_where(self, x):
        return torch.where(x > 0, x, 0.0)

    def relu6(self, x):
        return F.relu6(x)

    def elu(self, x):
        return F.elu(x)

    def hardswish(self, x):
        return F.hardswish(x)

    def mish(self, x):
        return F.mish(x)

    def prelu(self, x):
        return F.prelu(x, self.slope)

    def abs(self, x):
        return x.abs()

    def square(self, x):
        return x * x

    def none(self, x):
        return x

    def scaled_relu(self, x):
        return 0.5 * x.mul(2.0).relu_()

    def half_relu(self, x):
        return torch.relu(x.half()).float()

    def bfloat16_relu(self, x):
        return torch.relu(x.bfloat16()).to(x.dtype)

    def double_silu(self, x):
        return F.silu(x.to(torch.float64)).to(x.dtype)

    def dropout_relu(self, x):
        return F.dropout(x.relu(), 0.1, self.training)

    def threshold(self, x):
        return F.threshold(x, 0.0, 0.0)

    def mul_mask(self, x):
        return x * (x > 0)


class Layout(Piece):
    """Moves the channels of [B, S, C] about, and scales or drops some; often it does nothing."""

    SPELLINGS = """
        same same same same same same flip roll picked swapped turned padded zeros_beside negative dropped masked kept
        repeated stacked filled split_and_scaled
    """

    def __init__(self, r: random.Random, c: int) -> None:
        super().__init__(r, *(("same",) if c % 2 else ()))
        self.c = c
        self.register_buffer("order", torch.randperm(c))
        self.register_buffer("keep", torch.rand(c) < 0.8)

    def same(self, x):
        return x

    def flip(self, x):
        return x.flip(-1)

    def roll(self, x):
        return torch.roll(x, shifts=(1, 3), dims=(1, 2))

    def picked(self, x):
        return x[:, :, self.order] if self.c > 8 else x.index_select(-1, self.order)

    def swapped(self, x):
        a, b = x.tensor_split(2, -1)
        return torch.cat((b, a), dim=-1)

    def turned(self, x):
        return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    def padded(self, x):
        return F.pad(x, (2, 0))[..., 1 : self.c + 1]

    def zeros_beside(self, x):
        half = self.c // 2
        return torch.cat([x[..., half:], torch.zeros_like(x[..., half:])], -1)

    def negative(self, x):
        return -x / 2

    def dropped(self, x):
        return x * self.keep

    def masked(self, x):
        return x.masked_fill(~self.keep, 0.0)

    def kept(self, x):
        """Rows before and channels of another."""
        return torch.where(self.keep, x, x.roll(1, 1))

    def repeated(self, x):
        return x[..., : self.c // 2].repeat(1, 1, 2)

    def stacked(self, x):
        return torch.stack(x.chunk(2, -1), -1).reshape(x.shape)

    def filled(self, x):
        y = torch.zeros_like(x)
        y[..., 1:] = x[..., :-1]
        return y

    def split_and_scaled(self, x):
        a, b = x.split([1, self.c - 1], -1)
        return torch.cat([a * 3.0, b.mul(0.5)], -1)


class Mlp(Piece):
    """[B, S, C] -> [B, S, C]; gated in most spellings, gate and up in either order, fused or not."""

    SPELLINGS = """
        plain plain separate separate_up_first chunked chunked_up_first split sliced interleaved unbound glu
        bilinear clamped in_place normed twice wide_and_narrow one_wide scaled_hidden overwritten
        residual_inside stacked
    """

    def __init__(self, r: random.Random, c: int, *projections: str) -> None:
        super().__init__(r)
        s, h = self.spelling, r.choice((c, 2 * c, 24))
        h = 1 if s == "one_wide" else h
        self.act = Activation(r)
        fused = s in (
            "chunked",
            "chunked_up_first",
            "split",
            "sliced",
            "interleaved",
            "unbound",
            "glu",
            "clamped",
            "in_place",
        )
        self.up = Project(r, c, 2 * h if fused else h, *projections)
        if s in ("separate", "separate_up_first", "bilinear", "normed", "stacked", "residual_inside"):
            self.gate = Project(r, c, h, *projections)
        if s == "normed":
            self.norm = Norm(r, h)
        if s in ("wide_and_narrow", "residual_inside"):
            self.mid = Project(r, h, h, *projections)
        if s == "scaled_hidden":
            self.g = scale_vector(r, h)
        self.down = Project(r, 2 * h if s == "stacked" else h, c, *projections)
        self.h, self.layout = h, Layout(r, h)

    def plain(self, x):
        return self.down(self.layout(self.act(self.up(x))))

    def separate(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))

    def separate_up_first(self, x):
        return self.down(self.layout(self.up(x)).mul(self.act(self.gate(x))))

    def chunked(self, x):
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(self.layout(self.act(gate) * up))

    def chunked_up_first(self, x):
        up, gate = torch.chunk(self.up(x), 2, -1)
        return self.down(up * self.act(gate))

    def split(self, x):
        gate, up = torch.split(self.up(x), [self.h, self.h], dim=2)
        return self.down(up * self.act(gate))

    def sliced(self, x):
        y = self.up(x)
        return self.down(y[..., self.h :] * self.act(y[:, :, : self.h]))

    def interleaved(self, x):
        y = self.up(x)
        return self.down(self.act(y[..., ::2]) * y[..., 1::2])

    def unbound(self, x):
        up, gate = self.up(x).unflatten(-1, (2, self.h)).unbind(-2)
        return self.down(up * self.act(gate))

    def glu(self, x):
        return self.down(F.glu(self.up(x), -1))

    def bilinear(self, x):
        return self.down(self.layout(self.gate(x) * self.up(x)))

    def clamped(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.down((up.clamp(-3, 3) + 1) * gate.clamp(max=3.0) * torch.sigmoid(gate))

    def in_place(self, x):
        gate, up = self.up(x).chunk(2, -1)
        y = self.act(gate).clone()
        return self.down(y.mul_(up))

    def normed(self, x):
        return self.down(self.norm(self.act(self.gate(x)) * self.up(x)))

    def twice(self, x):
        """The second projection reads two tensors."""
        y = self.up(x)
        return self.down(y.relu()) - 0.5 * self.down(self.act(y))

    def wide_and_narrow(self, x):
        return self.down(F.relu(self.mid(self.act(self.up(x)))))

    def one_wide(self, x):
        return self.down(self.act(self.up(x)))

    def scaled_hidden(self, x):
        return self.down(self.layout(self.act(self.up(x)) * self.g))

    def overwritten(self, x):
        y = self.up(x).clone()
        y[..., : self.h // 2] = y[..., : self.h // 2].relu()
        y[..., self.h // 2 :] *= 0.5
        return self.down(y)

    def residual_inside(self, x):
        y = self.up(x)
        return self.down(y + self.mid(self.act(self.gate(x))))

    def stacked(self, x):
        return self.down(torch.cat([self.up(x).relu(), self.act(self.gate(x))], -1))
