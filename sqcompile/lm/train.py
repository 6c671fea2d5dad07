"""Train a language model from scratch: ``python -m sqcompile.lm.train --device cuda --compile --out DIR``.

Writes the configuration and the float16 weights to DIR, where ``load_lm(folder=DIR)`` reads them. The shipped weights
come from this command on a GPU, with the library of CPython 3.11.7 and no other option; their held-out perplexity, by
which the options were chosen too, is 10.23. The CPU can run it as well, but needs hours.

``--style`` trains a sibling of another architecture, for tests. All styles share the shipped tokenizer and the split of
the text. A machine without that library takes its tokens from the file that ``--cache`` alone writes elsewhere.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sqcompile.evaluation import evaluate
from sqcompile.windows import encode_stream, token_windows

from .corpus import evaluation_texts, read_texts, training_files
from .load import load_lm, load_tokenizer

LENGTH = 512


@dataclass(frozen=True)
class Style:
    """One of transformers' architectures.

    Attributes:
        model_type: its name in transformers.
        sizes: fields of its configuration beside those that all styles share, for about 2.7 million parameters.
        lr: the default peak learning rate.
    """

    model_type: str
    sizes: dict[str, Any]
    lr: float


STYLES = {
    "llama": Style(
        "llama",
        {"num_hidden_layers": 6, "intermediate_size": 512, "num_key_value_heads": 2, "max_position_embeddings": 1024},
        lr=5e-3,
    ),
    # Its positions are learned, so it has none that no training window reaches.
    "opt": Style(
        "opt",
        {"num_hidden_layers": 5, "ffn_dim": 768, "max_position_embeddings": LENGTH, "dropout": 0.0},
        lr=3e-3,
    ),
    "neox": Style(
        "gpt_neox",
        {
            "num_hidden_layers": 5,
            "intermediate_size": 768,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            "classifier_dropout": 0.0,
        },
        lr=6e-3,
    ),
}


def build_model(style: str) -> PreTrainedModel:
    """A freshly initialised model of one of ``STYLES``, whose special tokens are those of the shipped tokenizer."""
    tokenizer = load_tokenizer()
    config = AutoConfig.for_model(
        STYLES[style].model_type,
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_attention_heads=6,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **STYLES[style].sizes,
    )
    # No style has dropout. Training mode would only have OPT draw its LayerDrop on the host, which splits the graph.
    return AutoModelForCausalLM.from_config(config).eval()


def prepare(cache: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The training stream (int16 ``[tokens]``) and the held-out windows (int64 ``[windows, LENGTH]``).

    With ``cache``, both are kept in that file and read from it the next time, where the library may be another one.
    """
    if cache is not None and cache.is_file():
        kept = load_file(cache)
        return kept["stream"], kept["held_out"]
    tokenizer = load_tokenizer()
    stream = encode_stream(read_texts(training_files()), tokenizer).to(torch.int16)
    held_out = token_windows(evaluation_texts(), tokenizer, LENGTH)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"stream": stream, "held_out": held_out}, cache)
    return stream, held_out


def sample_batch(stream: torch.Tensor, bos: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and targets, int64 ``[batch, LENGTH]`` each; every input row starts with ``bos``."""
    starts = torch.randint(len(stream) - LENGTH, (batch, 1), device=stream.device)
    targets = stream[starts + torch.arange(LENGTH, device=stream.device)].long()
    return F.pad(targets[:, :-1], (1, 0), value=bos), targets


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on the linear layers only: norm gains and embeddings find their own scale.

    The default decay is strong because the corpus is read about 14 times over; longer runs with 0.1 over-fitted it.
    """
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=args.device.startswith("cuda"))


def fit(
    model: PreTrainedModel, stream: torch.Tensor, args: argparse.Namespace, held_out_perplexity: Callable[[], float]
) -> None:
    """Train ``model`` in place on windows of ``stream``, both on ``args.device``."""
    optimizer = make_optimizer(model, args)
    bf16 = args.device.startswith("cuda")
    bos = int(model.config.bos_token_id)

    def loss_of(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    step_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    bar = tqdm(total=None if args.minutes else args.steps, desc="training", unit="step", mininterval=2)
    step, progress, start = 0, 0.0, time.monotonic()
    next_report = 0.1
    while progress < 1.0:
        # Few gradients set the scale early on, and the full rate would follow their noise.
        warm_up = min(1.0, (step + 1) / args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm_up * 0.5 * (1 + math.cos(math.pi * progress))
        loss = step_loss(*sample_batch(stream, bos, args.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0:
            # Compilation is not training time.
            loss.item()
            start = time.monotonic()
        step += 1
        bar.update()
        if step % 20 == 0:
            # Reading the loss waits for the device, so the clock below sees finished steps only.
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if args.minutes:
                progress = (time.monotonic() - start) / (60 * args.minutes)
        if not args.minutes:
            progress = step / args.steps
        if progress >= next_report:
            next_report = progress + 0.1
            bar.write(
                f"{progress:4.0%} step {step} loss {loss.item():.3f} held-out perplexity {held_out_perplexity():.3f}"
            )
    bar.close()


def _perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    return evaluate(model, windows, batch_size=8, progress=False).perplexity or math.nan


def save(model: PreTrainedModel, out: Path) -> None:
    """Write ``config.json`` and the float16 weights; the tied output head is left out."""
    model.config.to_json_file(str(out / "config.json"))
    weights = {name: p.detach().to("cpu", torch.float16).contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="folder to write, made if missing; without it, only --cache is written"
    )
    parser.add_argument("--style", choices=STYLES, default="llama", help="architecture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3500, help="number of steps")
    parser.add_argument("--minutes", type=float, help="train for this time instead of --steps; less repeatable")
    parser.add_argument("--batch", type=int, default=64, help=f"windows of {LENGTH} tokens per step")
    parser.add_argument("--lr", type=float, help="peak learning rate, instead of the style's")
    parser.add_argument("--beta2", type=float, default=0.95, help="AdamW's second-moment decay")
    parser.add_argument("--weight-decay", type=float, default=1.0, help="AdamW's, on linear layers")
    parser.add_argument("--warmup", type=int, default=200, help="steps of rising learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--cache", type=Path, help="file that keeps the token ids between runs")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    args = parser.parse_args(argv)
    if args.out is None and args.cache is None:
        parser.error("nothing to write: pass --out, --cache or both")
    args.lr = STYLES[args.style].lr if args.lr is None else args.lr
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    stream, held_out = prepare(args.cache)
    print(f"{len(stream):,} training tokens, {len(held_out)} held-out windows of {LENGTH}")
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    stream, held_out = stream.to(args.device), held_out.to(args.device)
    model = build_model(args.style).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    fit(model, stream, args, lambda: _perplexity(model, held_out[::8]))
    save(model, args.out)
    saved, _ = load_lm(folder=args.out)
    print(f"held-out perplexity of the saved model: {_perplexity(saved.to(args.device), held_out):.3f}")


if __name__ == "__main__":
    main()
