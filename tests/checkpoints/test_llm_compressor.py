"""Checkpoints that llm-compressor writes run on our kernels.

make .venv-tools/ready
SQCOMPILE_TOOLS_PYTHON=.venv-tools/bin/python .venv/bin/python -m pytest tests/checkpoints/test_llm_compressor.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoint_cases import weights
from conftest import relative_error
from torch import nn
from transformers import AutoModelForCausalLM

import sqcompile
from sqcompile.lm.load import DATA

PYTHON = os.environ.get("SQCOMPILE_TOOLS_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="SQCOMPILE_TOOLS_PYTHON names no environment with llm-compressor")
@pytest.mark.parametrize("inputs", ["token", "static"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_numbers_are_those_of_its_weights_and_scales(kind, inputs, tmp_path):
    script = Path(__file__).parent / "compress_with_llm_compressor.py"
    command = [str(PYTHON), str(script), kind, inputs, str(DATA / "tokenizer.json"), str(tmp_path)]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    net = sqcompile.load(tmp_path / "net", backend="eager")
    assert [l.quantized for l in net.plan.layers] == [True] * 14 + [False]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    found = weights(tmp_path / "net")
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            linear.weight.data = found[f"{name}.weight"].float() * found[f"{name}.weight_scale"].float()
            linear.register_forward_pre_hook(_rounded(found.get(f"{name}.input_scale")))
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, reference = (m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (net, model))
    assert relative_error(y, reference) <= 1e-3


def _rounded(step):
    """A hook that rounds a linear's input to its INT8 values: with the file's scale, or one for each token."""

    def hook(module, args):
        x = args[0]
        d = x.abs().amax(-1, keepdim=True) / 127 if step is None else step.float()
        return ((x / d).round().clamp(-127, 127) * d,)

    return hook
