"""A Llama-3-8B-shaped stack on a GPU, prefill and decode, beside `torch.compile` in bf16 and torchao where installed.

Every contender runs as a CUDA graph; decode is attention over one token. Weights are random; the output of every timed
run is compared with the bf16 model's.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sqcompile
from sqcompile.bench.timing import sqnr_db

PREFILL, DECODE = ((1, 2048), (4, 2048)), ((1, 1), (16, 1), (64, 1))


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder: of its hidden state, its MLP, and its heads, of which ``groups`` are keys' and values'."""

    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int = 128


LLAMA_8B, LLAMA_70B = Shape(4096, 14336, 32, 8), Shape(8192, 28672, 64, 8)
HIDDEN = LLAMA_8B.hidden


class RMSNorm(nn.Module):
    """As transformers writes it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * h.to(x.dtype)


class Layer(nn.Module):
    """One decoder layer: grouped-query attention with rotary embeddings, SwiGLU."""

    def __init__(self, w: Shape) -> None:
        super().__init__()
        self.head = w.head
        self.attention_norm, self.mlp_norm = RMSNorm(w.hidden), RMSNorm(w.hidden)
        linear = lambda k, n: nn.Linear(k, n, bias=False)  # noqa: E731
        self.q, self.k, self.v = (linear(w.hidden, n * w.head) for n in (w.heads, w.groups, w.groups))
        self.o, self.down = linear(w.heads * w.head, w.hidden), linear(w.ffn, w.hidden)
        self.gate, self.up = linear(w.hidden, w.ffn), linear(w.hidden, w.ffn)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.attention_norm(x)
        q, k, v = (f(h).view(b, s, -1, self.head).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(
            _rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o(y.transpose(1, 2).reshape(b, s, -1))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Stack(nn.Module):
    """Decoder layers over hidden states bf16 [batch, tokens, hidden]."""

    def __init__(self, layers: int, widths: Shape = LLAMA_8B) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(widths) for _ in range(layers))
        self.inverse: Tensor
        inverse = 500000.0 ** (-torch.arange(0, widths.head, 2) / widths.head)
        self.register_buffer("inverse", inverse)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * self.inverse
        cos, sin = (f(torch.cat([angle, angle], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def stack(layers: int, widths: Shape = LLAMA_8B) -> Stack:
    """Random weights whose residual stream neither grows nor dies, on the GPU in bf16."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Stack(layers, widths).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(0, p.shape[1] ** -0.5 * (0.5 if ".o." in name or ".down." in name else 1.0))
            else:
                p.uniform_(0.5, 1.5)
                p[::97] *= 8  # outlier channels, which smoothing is for
    return model


def captured(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """A CUDA graph of one call: how to replay it, and how to read its output."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = run(x)
    return graph.replay, lambda: out


def median_us(replay: Callable[[], None], seconds: float = 0.5) -> float:
    """Median microseconds of a replay, by events."""
    times: list[float] = []
    spent = 0.0
    while spent < seconds or len(times) < 10:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
        spent += times[-1] * 1e-6
    return statistics.median(times)


def table(layers: int = 4, seconds: float = 0.5) -> Iterator[str]:
    """Lines of a markdown table."""
    model = stack(layers)
    batches = [torch.randn(2, 256, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    int8 = sqcompile.compile(model, batches, progress=False)
    bf16_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    yield "| batch x tokens | torch.compile bf16, us | sqcompile INT8, us | vs bf16 | SQNR of the output |"
    yield "|---|---|---|---|---|"
    ours: dict[tuple[int, int], float] = {}
    for shape in (*PREFILL, *DECODE):
        x = torch.randn(*shape, HIDDEN, device="cuda", dtype=torch.bfloat16)
        torch.compiler.reset()
        want_replay, want = captured(torch.compile(model, dynamic=False), x)
        got_replay, got = captured(int8, x)
        us = [median_us(f, seconds) for f in (want_replay, got_replay, want_replay, got_replay)]
        bf16, ours[shape] = min(us[0], us[2]), min(us[1], us[3])
        quality = sqnr_db(want(), got())
        yield f"| {shape[0]} x {shape[1]} | {bf16:.0f} | {ours[shape]:.0f} | {bf16 / ours[shape]:.2f}x | {quality:.1f} dB |"
    yield ""
    yield f"{layers} layers; weights {bf16_bytes / 1e6:.0f} MB in bf16, {int8.weight_bytes() / 1e6:.0f} MB compiled: {bf16_bytes / int8.weight_bytes():.2f}x less"
    del model, int8
    if importlib.util.find_spec("torchao") is not None:
        yield from _torchao(layers, ours, seconds)


def _torchao(layers: int, ours: dict[tuple[int, int], float], seconds: float) -> Iterator[str]:
    """Last, as quantize_ changes Inductor's settings for the whole process (coordinate descent tuning, for one)."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = stack(layers)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    yield ""
    yield "| batch x tokens | torchao INT8 + torch.compile, us | sqcompile INT8, us | vs torchao |"
    yield "|---|---|---|---|"
    for shape in reversed(ours):  # the quick ones first
        x = torch.randn(*shape, HIDDEN, device="cuda", dtype=torch.bfloat16)
        torch.compiler.reset()
        try:
            us = median_us(captured(torch.compile(model, dynamic=False), x)[0], seconds)
            theirs = f"{us:.0f} | {ours[shape]:.0f} | {us / ours[shape]:.2f}x"
        except Exception as e:  # it refuses some shapes
            theirs = f"{type(e).__name__} | {ours[shape]:.0f} |"
        yield f"| {shape[0]} x {shape[1]} | {theirs} |"
