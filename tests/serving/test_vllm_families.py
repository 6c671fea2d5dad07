"""vLLM computes what our quantized stage does, for families of models. Long: not part of `make serve-test`.

SQCOMPILE_VLLM_PYTHON=.venv-serve/bin/python .venv/bin/python -m pytest -m serve tests/serving/test_vllm_families.py -s
"""

from __future__ import annotations

import pytest
import torch
from families import causal_lm, roughen
from serving_cases import GATED, RECIPES, SIZES, needs_vllm, of_tokens, run_engine

import sqcompile
from sqcompile.checkpoints.export import export

pytestmark = [pytest.mark.slow, *needs_vllm]

FAMILIES = {
    "llama": ("llama", dict(GATED, num_hidden_layers=32)),
    "mistral": ("mistral", GATED),
    "qwen2": ("qwen2", GATED),
    "qwen3": ("qwen3", dict(GATED, head_dim=64)),
    "phi3": ("phi3", GATED),
    "granite": ("granite", GATED),
    "olmo2": ("olmo2", GATED),
    "gemma2": ("gemma2", dict(GATED, head_dim=64, query_pre_attn_scalar=64, sliding_window=128)),
    "opt": ("opt", dict(SIZES, ffn_dim=512, word_embed_proj_dim=256)),
    "gpt_neox": ("gpt_neox", dict(SIZES, intermediate_size=512, rotary_pct=0.25)),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_computes_our_quantized_stage(family, recipe, tmp_path):
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = causal_lm(kind, config).eval()
    roughen(model, 20.0)
    ids = torch.randint(3, 96, (4, 64), generator=torch.Generator().manual_seed(0))
    plan = sqcompile.calibrate(model, [{"input_ids": ids}], recipe=RECIPES[recipe], progress=False)
    done = export(model, plan, "compressed-tensors", tmp_path / "net")
    net = sqcompile.compile(model, plan=done.plan, backend="eager", progress=False)
    with torch.no_grad():
        ours, exact = (of_tokens(m(input_ids=ids).logits, ids) for m in (net, model))
    found = run_engine(tmp_path / "net", ids[:, :1].tolist(), ids[:, 1:].tolist(), tmp_path)
    theirs = torch.tensor([[p for p, _ in row] for row in found["forced"]])
    apart, lost = (theirs - ours).abs().mean(), (ours - exact).abs().mean()
    print(
        f"{family}, {recipe}: log probabilities of vLLM and ours are {apart:.5f} apart, ours and the float model's {lost:.3f}"
    )
    assert apart <= 0.05 * lost
