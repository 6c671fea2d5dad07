"""Random models out of whole blocks (norm -> mixer -> residual), each drawn from a grammar of spellings by a seed."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from random_attention import Attention
from random_mixers import Experts, Tokens, Torch
from random_mlps import Mlp
from random_parts import Norm, Piece, Project, scale_vector, vector
from torch import Tensor, nn

VOCABULARY = 40
MEMORY = 5  # tokens of a second input, fewer than the first has in calibration


def mixer(r: random.Random, c: int, shallow: bool = False) -> nn.Module:
    kind = r.choices(("attention", "mlp", "torch", "tokens", "experts", "project"), (4, 5, 0.4, 1.2, 1.2, 0.5))[0]
    if kind == "experts" and shallow:
        kind = "mlp"
    if kind == "project":
        return Project(r, c, c)
    return {"attention": Attention, "mlp": Mlp, "torch": Torch, "tokens": Tokens, "experts": Experts}[kind](r, c)


class Block(Piece):
    """[B, S, C] -> [B, S, C] around one or more mixers."""

    SPELLINGS = """
        pre_norm pre_norm pre_norm post_norm sandwich parallel_shared_norm parallel_two_norms in_place
        layer_scale scalar_scale no_residual shared_norm_twice cast turned part_of_channels double_residual
        norm_in_residual
    """

    def __init__(self, r: random.Random, c: int) -> None:
        super().__init__(r)
        self.norm, self.mix = Norm(r, c), mixer(r, c)
        s = self.spelling
        if s.startswith("parallel") or s in ("shared_norm_twice", "double_residual"):
            self.mix2 = mixer(r, c, shallow=True)
        if s in ("sandwich", "parallel_two_norms", "norm_in_residual"):
            self.norm2 = Norm(r, c)
        if s == "layer_scale":
            self.gamma = scale_vector(r, c)
        if s == "scalar_scale":
            self.gamma = nn.Parameter(torch.tensor(r.choice((0.5, [0.7]))))
        if s == "cast":
            dtype = r.choice((torch.float64, torch.bfloat16, torch.float16))
            self.dtypes = r.choice(((dtype, None), (None, dtype)))
        if s == "part_of_channels":
            self.mix = Mlp(r, c // 2)
            self.norm = Norm(r, c // 2)

    def pre_norm(self, x):
        return x + self.mix(self.norm(x))

    def post_norm(self, x):
        return self.norm(x + self.mix(x))

    def sandwich(self, x):
        return x + self.norm2(self.mix(self.norm(x)))

    def parallel_shared_norm(self, x):
        h = self.norm(x)
        return x + self.mix(h) + self.mix2(h)

    def parallel_two_norms(self, x):
        return x + (self.mix(self.norm(x)) + self.mix2(self.norm2(x)))

    def in_place(self, x):
        x = x.clone()
        x += self.mix(self.norm(x))
        return x.mul_(0.9)

    def layer_scale(self, x):
        return torch.add(x, self.gamma * self.mix(self.norm(x)))

    def scalar_scale(self, x):
        return torch.add(self.mix(self.norm(x)) * self.gamma, x, alpha=0.8)

    def no_residual(self, x):
        return self.mix(self.norm(x))

    def shared_norm_twice(self, x):
        """One norm over two tensors."""
        x = x + self.mix(self.norm(x))
        return x + self.mix2(self.norm(x))

    def cast(self, x):
        before, behind = self.dtypes
        h = self.norm(x)
        h = h if before is None else h.to(before).to(x.dtype)
        y = self.mix(h)
        return x + (y if behind is None else y.to(behind).to(x.dtype))

    def turned(self, x):
        """Channels first in between."""
        return (x.mT + self.mix(self.norm(x)).mT.contiguous()).transpose(1, 2)

    def part_of_channels(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat([b, a + self.mix(self.norm(b))], -1)

    def double_residual(self, x):
        h = x + self.mix(self.norm(x))
        return h + x + self.mix2(self.norm(h))

    def norm_in_residual(self, x):
        h = self.norm(x)
        return h + self.mix(h) + self.norm2(x)


class Cross(nn.Module):
    """Reads another input, with a norm of its own or none."""

    def __init__(self, r: random.Random, c: int) -> None:
        super().__init__()
        self.norm, self.mix = Norm(r, c), Torch(r, c) if r.random() < 0.2 else Attention(r, c, across=True)
        self.memory_norm = Norm(r, c) if r.random() < 0.5 else None

    def forward(self, x, memory, padding):
        memory = memory if self.memory_norm is None else self.memory_norm(memory)
        return x + self.mix(self.norm(x), memory, padding)


class Head(Piece):
    """What a model returns of [B, S, C]: something of as many channels for each token, at least beside the rest."""

    SPELLINGS = """
        hidden hidden linear normed_linear mean_pool last_token first_token max_pool attention_pool pair dictionary one_logit
    """

    def __init__(self, r: random.Random, c: int) -> None:
        super().__init__(r)
        n = 1 if self.spelling == "one_logit" else 5 if "pool" in self.spelling or "token" in self.spelling else 2 * c
        self.norm, self.fc = Norm(r, c), Project(r, c, n, "module", "functional", "matmul", "einsum_fd")
        self.query = vector(c)

    def hidden(self, x):
        return x

    def linear(self, x):
        return self.fc(x)

    def normed_linear(self, x):
        return self.fc(self.norm(x))

    def one_logit(self, x):
        return x, self.fc(self.norm(x))

    def mean_pool(self, x):
        return x, self.fc(self.norm(x).mean(1))

    def last_token(self, x):
        return x, self.fc(self.norm(x)[:, -1])

    def first_token(self, x):
        return x, self.fc(torch.tanh(self.norm(x[:, 0])))

    def max_pool(self, x):
        return x, self.fc(self.norm(x.amax(dim=1)))

    def attention_pool(self, x):
        h = self.norm(x)
        p = torch.softmax(h @ self.query, 1)
        return x, self.fc(torch.einsum("bs,bsc->bc", p, h))

    def pair(self, x):
        h = self.norm(x)
        return h, self.fc(h)

    def dictionary(self, x):
        return {"logits": self.fc(self.norm(x)), "pooled": x.mean(1)}


class RandomModel(nn.Module):
    """A model of 1 to 3 blocks; what it takes is drawn, too: hidden states, token ids, an image, or a memory beside."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        r = random.Random(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._draw(r)
        self.eval()

    def _draw(self, r: random.Random) -> None:
        c = self.c = r.choice((8, 12, 16, 24, 32))
        self.takes = r.choices(("hidden", "ids", "image", "memory"), (6, 2, 1, 2.5))[0]
        if self.takes == "ids":
            self.embed = nn.Embedding(VOCABULARY, c)
            self.positions = r.choice(("none", "learned", "sinus"))
            if self.positions == "learned":
                self.table = nn.Embedding(128, c)
            self.tied = r.random() < 0.5
        if self.takes == "image":
            self.patch = nn.Conv2d(3, c, 2, 2)
            self.token = nn.Parameter(torch.randn(1, 1, c))
        self.blocks = nn.ModuleList(Block(r, c) for _ in range(r.choices((1, 2, 3), (20, 5, 1))[0]))
        if self.takes == "memory":
            self.cross = Cross(r, c)
        if r.random() < 0.15:
            self.blocks.append(self.blocks[0])  # the same weights again
        self.head = Head(r, c)
        if self.takes == "ids" and self.tied:
            self.last = Norm(r, c, outliers=False)  # an outlier would be most of every logit

    def forward(self, x, memory=None, padding=None):
        if self.takes == "ids":
            x = self._embedded(x)
        if self.takes == "image":
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 0 and self.takes == "memory":
                x = self.cross(x, memory, padding)
        if self.takes == "ids" and self.tied:
            return F.linear(self.last(x), self.embed.weight)
        return self.head(x)

    def _embedded(self, ids):
        x = self.embed(ids) * self.c**0.5
        at = torch.arange(ids.shape[1], device=ids.device)
        if self.positions == "learned":
            return x + self.table(at)
        if self.positions == "sinus":
            angles = at[:, None] / 10.0 ** torch.arange(self.c // 2, device=ids.device)
            return x + torch.cat((angles.sin(), angles.cos()), -1)
        return x

    def inputs(self, batch: int, tokens: int, seed: int) -> tuple[Tensor, ...]:
        """Arguments of a call, drawn by a seed of their own."""
        g = torch.Generator().manual_seed(seed)
        if self.takes == "ids":
            return (torch.randint(0, VOCABULARY, (batch, tokens), generator=g),)
        if self.takes == "image":
            return (torch.randn(batch, 3, 6, 8, generator=g),)
        x = torch.randn(batch, tokens, self.c, generator=g)
        if self.takes == "hidden":
            return (x,)
        m = max(1, tokens - MEMORY)
        padding = torch.arange(m) < torch.arange(batch)[:, None] + max(1, m - 3)
        return x, torch.randn(batch, m, self.c, generator=g), padding


def outputs(y: Any) -> list[Tensor]:
    """The floating-point tensors a model returned."""
    leaves = list(y.values()) if isinstance(y, dict) else list(y) if isinstance(y, (tuple, list)) else [y]
    return [t for t in leaves if isinstance(t, Tensor) and t.dtype.is_floating_point]
