"""Plans with evidence for tests of the page: of a decoder of any size, without a model."""

from __future__ import annotations

import functools

import torch

from sqcompile import Plan, Recipe
from sqcompile.passes.planning import evidence as planning
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.evidence import BINS, LARGEST, Curve, Evidence, InputEvidence, Tried

# of each layer: what absorbs 1/s, and the linears, each (name, N, K)
_SITES = (
    ("input_layernorm", (("self_attn.q_proj", 4096, 4096), ("self_attn.k_proj", 1024, 4096), ("self_attn.v_proj", 1024, 4096))),
    ("self_attn.v_proj", (("self_attn.o_proj", 4096, 4096),)),
    ("post_attention_layernorm", (("mlp.gate_proj", 14336, 4096), ("mlp.up_proj", 14336, 4096))),
    ("mlp.up_proj", (("mlp.down_proj", 4096, 14336),)),
)  # fmt: skip


@functools.cache
def synthetic(layers: int, model: str = "SyntheticForCausalLM") -> Plan:
    """A plan of so many decoder layers and a head in float; every seventh down_proj stays in float."""
    g = torch.Generator().manual_seed(0)
    size = next(s for s in planning._SIZES if 4 * layers * planning._bytes(s) <= planning._BYTES)
    entries, inputs, scales, curves = [], [], {}, {}
    for i in range(layers):
        for producer, linears in _SITES:
            names = [f"model.layers.{i}.{n}.weight" for n, _, _ in linears]
            site = f"model.layers.{i}.{producer}.weight -> {', '.join(names)}"
            quantized = producer != "mlp.up_proj" or i % 7 != 3
            for (_, n, k), name in zip(linears, names, strict=True):
                entries.append(_layer(name, n, k, quantized, i, g))
            if quantized:
                scales[site] = torch.ones(8)
                curves[site] = _curve(g)
            inputs.append(_input(tuple(names), site if quantized else "", linears[0][2], size, quantized, g))
    entries.append(
        LayerPlan(
            "lm_head.weight", "linear", False, "none", "the projection back to the vocabulary", shape=(128256, 4096)
        )
    )
    evidence = Evidence(
        model, "sqcompile 0.1.0, torch 2.13.0", "bfloat16", layers * 400_000_000, True, curves, tuple(inputs)
    )
    call = {"args": [], "kwargs": {"input_ids": {"shape": [2, 512], "dtype": "int64"}}}
    return Plan(Recipe("auto", rotate="auto"), call, scales, tuple(entries), evidence=evidence)


def _layer(name: str, n: int, k: int, quantized: bool, i: int, g: torch.Generator) -> LayerPlan:
    noise = float(torch.rand(1, generator=g))
    if not quantized:
        return LayerPlan(
            name, "linear", False, "none", "left in float: costs 0.4 % of perplexity, and max_degradation=0.5",
            shape=(n, k), loss=0.004,
        )  # fmt: skip
    return LayerPlan(
        name, "linear", True, "folded", "the norm before it absorbs 1/s", 0.5, round(28 + 8 * noise - 0.05 * i, 2), None,
        (n, k), 64 if "down" in name else None, loss=float(f"{2e-5 * (1 + 9 * noise**4):.3e}"),
    )  # fmt: skip


def _curve(g: torch.Generator) -> Curve:
    tried = []
    for block, gain in ((None, 1.0), (16, 0.8), (32, 0.75), (64, 0.7), (128, 0.72)):
        for alpha in (None, 0.2, 0.4, 0.5, 0.6, 0.8):
            cost = (
                1e-4
                * gain
                * (3.0 if alpha is None else 1 + 8 * (alpha - 0.5) ** 2)
                * (1 + 0.05 * float(torch.rand(1, generator=g)))
            )
            tried.append(Tried(alpha, block, False, float(f"{cost:.3e}")))
    return Curve(True, tuple(tried))


def _input(
    names: tuple[str, ...], site: str, k: int, size: tuple[int, int, int], quantized: bool, g: torch.Generator
) -> InputEvidence:
    before = torch.rand(k, generator=g) + 0.5
    outliers = torch.randperm(k, generator=g)[:6]
    before[outliers] *= torch.tensor([40.0, 25.0, 20.0, 14.0, 12.0, 9.0])
    before[torch.randperm(k, generator=g)[:3]] = 0.0
    w = 0.1 * (torch.rand(k, generator=g) + 0.5)
    s = (before.clamp_min(0.1) / w).sqrt() if quantized else torch.ones(k)
    absmax = torch.stack([before, before / s, w, w * s])
    rows = torch.rand(size[1], k, generator=g).pow(2) * before
    width, cells = -(-k // size[0]), -(-k // size[2])
    maps = [planning._buckets(x, cells) for x in (rows, rows / s)]
    heat = torch.stack([(255 + (m / m.max()).log2() * 254 / 12).clamp_min(0).round().to(torch.uint8) for m in maps])
    codes = (5000 * torch.exp(-((torch.arange(BINS) - 25) ** 2) / torch.tensor([[60.0], [90.0]]))).int()
    order = before.argsort(descending=True, stable=True)[:LARGEST]
    return InputEvidence(
        names, site, k, 8192, 2, 3, 0, "12 of 8192 calibration tokens reach 31x the others" if "down" in names[0] else "",
        (round(float(before.max()), 3), 4.5), 0.0 if quantized else None, 0.06 if quantized else None, width,
        planning._buckets(absmax, width).to(torch.bfloat16),
        planning._buckets((before == 0)[None].float(), width, total=True)[0].to(torch.uint8),
        order.int(), absmax[:, order].contiguous(), cells, heat, tuple(round(float(m.max()), 4) for m in maps),
        codes * int(quantized),
    )  # fmt: skip
