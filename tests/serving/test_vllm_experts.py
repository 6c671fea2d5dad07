"""vLLM serves exported experts: one tensor per expert, under the checkpoint's own names. `make serve-test`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import causal_lm, roughen
from serving_cases import GATED, RECIPES, needs_vllm, of_tokens, run_engine

import sqcompile
from sqcompile.checkpoints.export import export

pytestmark = needs_vllm

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": dict(GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(
        GATED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, shared_expert_intermediate_size=256
    ),
}
EXPERTS = "Using CPU Int8 MoE backend"


def _served(family: str, dtype: torch.dtype, folder: Any) -> tuple[Any, Any, torch.Tensor]:
    """A model whose plan is exported to a directory, the plan of the export, and token ids, [4, 64]."""
    torch.manual_seed(0)
    model = causal_lm(family, FAMILIES[family]).eval()
    roughen(model, 20.0)
    model.to(dtype)
    ids = torch.randint(3, 96, (4, 64), generator=torch.Generator().manual_seed(0))
    plan = sqcompile.calibrate(model, [{"input_ids": ids}], recipe=RECIPES["per token"], progress=False)
    return model, export(model, plan, "compressed-tensors", folder).plan, ids


def _logprobs(model: Any, plan: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of each token but the first, by our quantized stage, [4, 63]."""
    net = sqcompile.compile(copy.deepcopy(model), plan=plan, backend="eager", progress=False)
    with torch.no_grad():
        return of_tokens(net(input_ids=ids).logits.float(), ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_reads_our_experts(family, tmp_path):
    model, plan, ids = _served(family, torch.float32, tmp_path / "net")
    ours = _logprobs(model, plan, ids)
    with torch.no_grad():
        lost = (ours - of_tokens(model(input_ids=ids).logits, ids)).abs().mean()
    found = run_engine(tmp_path / "net", ids[:, :1].tolist(), ids[:, 1:].tolist(), tmp_path, says=EXPERTS)
    theirs = torch.tensor([[p for p, _ in row] for row in found["forced"]])
    apart = (theirs - ours).abs().mean()
    print(f"{family}: log probabilities of vLLM and ours are {apart:.5f} apart, ours and the float model's {lost:.4f}")
    assert apart <= 0.05 * lost


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM's INT8 experts on CPUs want AMX")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_runs_our_experts_in_its_own_kernel(family, tmp_path):
    """In bfloat16, whose roundings choose other experts now and then: in our own model as well as in vLLM's."""
    model, plan, ids = _served(family, torch.bfloat16, tmp_path / "net")
    ours, exact = _logprobs(model, plan, ids), _logprobs(model.float(), plan, ids)
    found = run_engine(tmp_path / "net", ids[:, :1].tolist(), ids[:, 1:].tolist(), tmp_path, "bfloat16", says=EXPERTS)
    theirs = torch.tensor([[p for p, _ in row] for row in found["forced"]])
    apart, rounded = (theirs - exact).abs().mean(), (ours - exact).abs().mean()
    print(
        f"{family}: log probabilities of vLLM in bfloat16 are {apart:.4f} from ours in float32, ours in bfloat16 {rounded:.4f}"
    )
    assert apart <= 2 * rounded
