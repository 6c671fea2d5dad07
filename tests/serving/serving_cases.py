"""What tests of serving share: whether there is a vLLM, and how it is run. Its environment is `make .venv-serve/ready`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sqcompile import Recipe

PYTHON = os.environ.get("SQCOMPILE_VLLM_PYTHON")
KERNEL = "CPUInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8"
RECIPES = {"per token": Recipe(0.5), "static": Recipe(0.5, activation="per_tensor_static")}
# vLLM's attention wants heads of 32 channels and more, its experts multiples of 32 channels.
SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GATED = dict(SIZES, intermediate_size=512, num_key_value_heads=2)
needs_vllm = [
    pytest.mark.serve,
    pytest.mark.skipif(PYTHON is None, reason="SQCOMPILE_VLLM_PYTHON names no environment with vLLM: make serve-test"),
    pytest.mark.skipif(
        not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
        reason="vLLM's INT8 kernel wants a CPU with AVX512",
    ),
]


def environment() -> dict[str, str]:
    """Of vLLM's processes."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    return clean | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run_engine(
    directory: Path,
    prompts: list[list[int]],
    tokens: list[list[int]],
    folder: Path,
    dtype: str = "float32",
    says: str = KERNEL,
) -> dict[str, Any]:
    """What `vllm_engine.py` prints, in a process of its own: vLLM keeps what it took until the process ends.

    ``says`` is what stands in vLLM's log.
    """
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts, "tokens": tokens}))
    script = Path(__file__).parent / "vllm_engine.py"
    command = [str(PYTHON), str(script), str(directory), str(folder / "prompts.json"), dtype]
    done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stderr + done.stdout
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"tokens"')))


def of_tokens(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log probability of each token but the first, [batch, length - 1]."""
    return torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
