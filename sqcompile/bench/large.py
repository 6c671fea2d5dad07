"""Large models: seconds and memory to quantize a random Llama that is read from the disk as it is used.

Where llm-compressor is installed, its recipes (see `other_tools`) are run on the same checkpoint and tokens if they are asked
for by name. Those tools load the model, so that no limit of memory holds for them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sqcompile
from sqcompile.bench.timing import machine
from sqcompile.files.weights import Later, write_weights
from sqcompile.process.memory import bytes_of

RECIPES = ("alpha=0.5", "default")
OTHERS = "llm-compressor"  # what the names of its recipes begin with


def llama_config(hidden: int, layers: int, vocabulary: int) -> Any:
    """A Llama of these sizes, with heads of 128 channels, four of which share their keys and values."""
    from transformers import LlamaConfig

    heads = max(1, hidden // 128)
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2 // 64 * 64, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), num_hidden_layers=layers, vocab_size=vocabulary,
        max_position_embeddings=2048, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def generate(folder: str, config: Any) -> int:
    """Writes a checkpoint of random weights, a file for each layer, and gives its bytes.

    Raises:
        SystemExit: if the disk has not room for it, its INT8 weights and a reserve.
    """
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    if (free := shutil.disk_usage(folder).free) < 2 * size + 2**30:
        sys.exit(
            f"{folder} has {free / 1e9:.1f} GB free, and {(2 * size + 2**30) / 1e9:.1f} GB are needed: pass --temporary"
        )
    groups: dict[str, list[str]] = {}
    for name in shapes:
        found = re.search(r"layers\.(\d+)\.", name)
        groups.setdefault(found[1] if found else "rest", []).append(name)
    index: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for i, names in enumerate(groups.values(), 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        later = {n: Later(torch.bfloat16, shapes[n], partial(_random, shapes[n], generator)) for n in names}
        write_weights(os.path.join(folder, file), later, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as f:
        json.dump({"metadata": {"total_size": size}, "weight_map": index}, f)
    config.save_pretrained(folder)
    return size


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A matrix as initialized, or a norm's scales with every hundredth an outlier."""
    if len(shape) == 1:
        scales = 1 + 0.1 * torch.randn(shape, generator=generator)
        scales[::100] *= 20
        return scales.bfloat16()
    return torch.cat(
        [0.02 * torch.randn(p.shape, generator=generator) for p in torch.empty(shape, device="meta").split(256)]
    ).bfloat16()


def quantize(
    folder: str, recipe: str, most: int, batches: int, tokens: int, device: str | None = None
) -> dict[str, float]:
    """Quantizes the checkpoint in a folder, in this process: seconds from files to files, and the most memory it took.

    ``device``: where the plan is made; None for the CPU.
    """
    warnings.filterwarnings("ignore", message=".*copy construct from a tensor.*")
    from transformers import AutoConfig

    windows = torch.randint(
        0, AutoConfig.from_pretrained(folder).vocab_size, (batches, tokens), generator=torch.Generator().manual_seed(1)
    )
    out, begin = os.path.join(folder, "out"), time.perf_counter()
    if recipe.startswith(OTHERS):
        _by_another(folder, recipe, windows, out)
    else:
        how = sqcompile.Recipe(0.5) if recipe == "alpha=0.5" else recipe
        begun: dict[str, float] = {}
        sqcompile.quantize_checkpoint(
            folder, windows.split(1), out, recipe=how, memory=most, device=device,
            progress=lambda p: begun.setdefault(p.stage.partition(":")[0], time.perf_counter()),
        )  # fmt: skip
        ends = [*begun.values(), time.perf_counter()][1:]
        spans = (f"{stage} {end - start:.1f}" for (stage, start), end in zip(begun.items(), ends, strict=True))
        print(", ".join(spans), file=sys.stderr)
    there = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"seconds": time.perf_counter() - begin, "peak": _peak(), "gpu": there}


def _by_another(folder: str, recipe: str, windows: Tensor, out: str) -> None:
    """The same by another tool, which takes a model that is loaded, and writes "compressed-tensors"."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from sqcompile.bench.other_tools import llm_compressor_recipes

    recipes = llm_compressor_recipes()
    if recipe not in recipes:
        sys.exit(f"no recipe {recipe!r}: choose one of {'; '.join(recipes)}")
    words = Tokenizer(WordLevel({"any": 0}, unk_token="any"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)  # which oneshot asks for, and does not use
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    quantized: Any = recipes[recipe](model, windows)[0]
    quantized.save_pretrained(out, save_compressed=True)


def _peak() -> int:
    """The largest resident size of this process, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench large", description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--max-memory", type=bytes_of, default="6GiB", help="of the process, such as 6GiB")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--recipe",
        action="append",
        help="alpha=0.5, default, O1, O2, O3, or one of llm-compressor; alpha=0.5 and default otherwise",
    )
    parser.add_argument("--temporary", default=tempfile.gettempdir(), help="where the checkpoint is written")
    parser.add_argument(
        "--device", action="append", help="where the plan is made, such as cuda; the CPU without it; repeatable"
    )
    parser.add_argument("--of", help=argparse.SUPPRESS)  # a folder, in the process that is measured
    args = parser.parse_args(argv)
    recipes, args.device = args.recipe or RECIPES, args.device or ["cpu"]
    if args.of:
        print(json.dumps(quantize(args.of, recipes[0], args.max_memory, args.batches, args.tokens, *args.device)))
        return
    with tempfile.TemporaryDirectory(dir=args.temporary) as folder:
        size = generate(folder, llama_config(args.hidden, args.layers, args.vocabulary))
        os.sync()  # what the disk has still to write would slow down what is measured
        print(f"{machine()}, {datetime.date.today()}")
        print(
            f"Llama of {args.hidden} channels, {args.layers} layers, {size / 2e9:.2f} G random weights, {size / 1e9:.1f} GB in bf16;"
        )
        print(f"{args.batches} x {args.tokens} calibration tokens, memory limit {args.max_memory / 1e9:.1f} GB\n")
        print("| recipe | device | s | peak memory GB | of the GPU |\n|---|---|---|---|---|")
        for recipe, device in itertools.product(recipes, args.device):
            given = ["--max-memory", str(args.max_memory), "--batches", str(args.batches), "--tokens", str(args.tokens)]
            command = [sys.executable, "-m", "sqcompile.bench", "large", "--of", folder, "--recipe", recipe, *given]
            command += ["--device", device]
            done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            shutil.rmtree(os.path.join(folder, "out"))
            peaks = f"{done['peak'] / 1e9:.2f} | {done['gpu'] / 1e9:.2f}"
            print(f"| {recipe} | {device} | {done['seconds']:.1f} | {peaks} |", flush=True)
