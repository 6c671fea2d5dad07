"""How long compiling takes: compile() and the first call, in a process of its own each, and where the seconds went.

Three times, with caches of their own: on a machine that has none, so that C++ is built, too; of a new model, after another one
was compiled there; and again, of the same model in another process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import sqcompile
from sqcompile.bench.cpu import llama
from sqcompile.bench.cpu_peers import minilm
from sqcompile.bench.timing import machine

CASES = {
    "2 layers of Llama-3.2-1B shape": ("llama", 2, False),
    "16 such layers": ("llama", 16, False),
    "16 such layers, `regional`": ("llama", 16, True),
    "all-MiniLM-L6-v2": ("minilm", 6, False),
    "anything": ("small", 1, False),  # to fill the caches with what every model needs
}
STAGES = ("trace", "calibrate", "match", "plan", "fold", "insert_qdq", "lower", "emit")
CACHES = "TORCHINDUCTOR_CACHE_DIR"


def model_of(kind: str, layers: int) -> tuple[nn.Module, int]:
    """A model, and the size of its vocabulary."""
    if kind == "minilm":
        return minilm(torch.float32), 30522
    if kind == "small":
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=layers, vocab_size=96
        )
        return LlamaModel(config).eval().bfloat16(), 96
    return llama(layers), 1024


def measured(case: str) -> dict[str, float]:
    """Seconds of a case in this process: of each stage, and of compile() and the first call together ("all")."""
    kind, layers, regional = CASES[case]
    model, vocabulary = model_of(kind, layers)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, vocabulary, (1, 512), generator=generator) for _ in range(2)]
    start = time.perf_counter()
    compiled = sqcompile.compile(model, ids, regional=regional, progress=False)
    with torch.no_grad():
        compiled(input_ids=ids[0][:, :64])
    return {**compiled.report.seconds, "all": time.perf_counter() - start}


def in_a_process(case: str, caches: str, threads: int) -> dict[str, float]:
    """`measured` in a process of its own, with a directory of caches."""
    command = [sys.executable, "-m", "sqcompile.bench", "compile", "--one", case, "--threads", str(threads)]
    done = subprocess.run(command, env={**os.environ, CACHES: caches}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case} ended with {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(case: str, when: str, seconds: Mapping[str, float]) -> str:
    """A line of the table."""
    return f"| {case} | {when} | {seconds['all']:.1f} | " + " | ".join(f"{seconds[s]:.1f}" for s in STAGES) + " |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench compile", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES][:-1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", choices=[*CASES], help="measures one case in this process, and prints JSON")
    args: Any = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measured(args.one)))
        return
    print(f"{machine()}, {datetime.date.today()}")
    print("Seconds of compile() and the first call, and of compile()'s stages\n")
    print("| model | caches | all | " + " | ".join(STAGES) + " |\n|---|---|---|" + "---|" * len(STAGES), flush=True)
    for case in args.cases:
        with tempfile.TemporaryDirectory() as caches:
            print(row(case, "none", in_a_process(case, caches, args.threads)), flush=True)
        with tempfile.TemporaryDirectory() as caches:
            in_a_process("anything", caches, args.threads)
            for when in ("of another model", "of this model"):
                print(row(case, when, in_a_process(case, caches, args.threads)), flush=True)


if __name__ == "__main__":
    main()
