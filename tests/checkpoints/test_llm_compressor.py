"""Checkpoints that llm-compressor writes run on our kernels. `make tools-test`."""

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


WANTED = ["llama-token", "llama-static", "qwen2-token", "qwen2-static"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="SQCOMPILE_TOOLS_PYTHON names no environment with llm-compressor"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with a model and its INT8 checkpoint for each of those wanted, of one process."""
    folder = tmp_path_factory.mktemp("compressed")
    script = Path(__file__).parent / "compress_with_llm_compressor.py"
    command = [str(PYTHON), str(script), str(DATA / "tokenizer.json"), str(folder), *WANTED]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=clean, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", WANTED)
def test_the_numbers_are_those_of_its_weights_and_scales(name, written):
    folder = written / name
    net = sqcompile.load(folder / "net", backend="eager")
    assert [l.quantized for l in net.plan.layers] == [True] * 14 + [False]
    model = AutoModelForCausalLM.from_pretrained(folder / "float").eval()
    found = weights(folder / "net")
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
