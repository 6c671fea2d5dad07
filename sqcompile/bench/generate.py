"""Generation benchmark: ``model.generate`` and `sqcompile.generate` through backend "smoothquant", beside bf16. One run.

On a GPU a Llama-3-8B-shaped model with a static cache and CUDA graphs; on a CPU a 1B-shaped one with a static cache.
Beside each stands the same call of the model that ``torch.compile`` made in bf16. Weights are random: the tokens are no
text, and are not compared; the logits of a prompt are. On a GPU the time of a token, too, beside that of its kernels.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.bench.timing import gpu, machine, sqnr_db

SHAPES = {
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "cpu": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
}
LOOPS = ("model.generate", "sqcompile.generate")
PROMPTS = {"cuda": {1: (128, 2048), 16: (128,)}, "cpu": {1: (64, 512), 4: (64,)}}  # lengths by batch size


def llama(device: str, layers: int) -> LlamaForCausalLM:
    """Random weights whose residual stream neither grows nor dies, bf16, with outlier channels behind the norms."""
    torch.manual_seed(0)
    config: Any = LlamaConfig  # the stubs know no sizes
    config = config(
        **SHAPES[device], num_hidden_layers=layers, vocab_size=32000, max_position_embeddings=4096, rope_theta=500000.0
    )
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(0, p.shape[1] ** -0.5 * (0.5 if "o_proj" in name or "down_proj" in name else 1.0))
            else:
                p.uniform_(0.5, 1.5)
                p[::97] *= 8
    return model.eval()


def seconds(run: Callable[[], Any], device: str, rounds: int) -> float:
    """Median time of a call, after two that compile and warm up."""
    times = []
    for i in range(rounds + 2):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def static_cache(model: Any, batch: int, length: int) -> StaticCache:
    """A cache whose tensors exist before the first call, as CUDA graphs of torch.compile need it."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    return cache


Write = Callable[[Tensor, int], Tensor]  # prompts int64 [batch, tokens] and so many new tokens


def by_transformers(model: Any, cache: StaticCache) -> Write:
    """``model.generate`` with a cache that stays."""

    def write(x: Tensor, tokens: int) -> Tensor:
        cache.reset()
        return model.generate(
            x, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
            past_key_values=cache, disable_compile=True,
        )  # fmt: skip

    return write


def by_sqcompile(model: Any, length: int) -> Write:
    """`sqcompile.generate` with a cache of this length, at least."""
    plain: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_cache_len": length}
    return lambda x, tokens: sqcompile.generate(model, x, max_new_tokens=tokens, record=x.is_cuda, **plain)


def measure(write: Write, x: Tensor, new: int, rounds: int) -> tuple[float, float]:
    """Decoded tokens a second, all sequences together, and prompt tokens a second.

    Decode is the difference of generating ``new`` tokens and one, so that prefill counts in neither twice.
    """
    whole = seconds(lambda: write(x, new), x.device.type, rounds)
    first = seconds(lambda: write(x, 1), x.device.type, rounds)
    return len(x) * (new - 1) / (whole - first), x.numel() / first


def kernels(write: Write, x: Tensor, new: int) -> float:
    """Seconds that the kernels of a token take on a GPU, one after the other, the waits between them left out."""

    def spent(tokens: int) -> float:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            write(x, tokens)
            torch.cuda.synchronize()
        return sum(e.self_device_time_total for e in profiler.key_averages()) / 1e6

    return (spent(new) - spent(new // 2)) / (new - new // 2)


def contender(name: str, model: LlamaForCausalLM, plan: sqcompile.Plan, graphs: bool = True) -> Any:
    """The model compiled, prefill and decode; on a GPU as CUDA graphs of its own, if these are wanted."""
    cuda = model.device.type == "cuda"
    if name == "bf16":
        own = copy.copy(model)
        options: Any = {"mode": "reduce-overhead", "dynamic": False} if cuda and graphs else {"dynamic": None}
        own.compile(**options)
        return own
    options = {"plan": plan, "mode": "reduce-overhead" if cuda else "default", "regional": cuda}
    return torch.compile(model, backend=smoothquant, options=options)  # as backend="smoothquant", installed or not


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench generate", description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--layers", type=int, default=8 if device == "cuda" else 2)
    parser.add_argument("--new", type=int, default=129 if device == "cuda" else 17)
    parser.add_argument("--rounds", type=int, default=5 if device == "cuda" else 3)
    parser.add_argument("--recipe", help="default, O1, O2 or O3; alpha=0.5 without rotation otherwise")
    parser.add_argument("--int8-only", action="store_true", help="leave bf16 out, which takes most of the time")
    parser.add_argument("--loops", choices=LOOPS, nargs="+", default=LOOPS)
    args = parser.parse_args(argv)
    model = llama(device, args.layers)
    batches = [torch.randint(3, 32000, (2, 256), device=device)]
    recipe = args.recipe or sqcompile.Recipe()  # random weights: any alpha
    plan = sqcompile.calibrate(model, batches, recipe=recipe, progress=False)
    print(f"{gpu() if device == 'cuda' else machine()}, {args.layers} layers, {args.recipe or 'alpha=0.5'}\n")
    prompts = {
        (batch, length): torch.randint(3, 32000, (batch, length), device=device)
        for batch, lengths in PROMPTS[device].items()
        for length in lengths
    }
    longest = {batch: max(lengths) + args.new for batch, lengths in PROMPTS[device].items()}

    def speeds(name: str) -> tuple[dict[tuple[str, int, int], tuple[float, float]], Tensor]:
        """By loop and prompts, each printed when it is there; and logits of the model."""
        net, found = contender(name, model, plan), dict[tuple[str, int, int], tuple[float, float]]()
        logits = _logits(net)

        def timed(loop: str, batch: int, length: int, write: Write, x: Tensor) -> None:
            found[loop, batch, length] = speed, first = measure(write, x, args.new, args.rounds)
            line = f"{name}, {loop}, batch {batch} after {length}: {speed:.1f} tokens/s, prefill {first:.1f}"
            if loop == LOOPS[1] and device == "cuda":
                token, busy = batch / speed, kernels(write, x, args.new)
                line += f"; a token takes {1e3 * token:.2f} ms, its kernels {1e3 * busy:.2f} ({token / busy:.2f}x)"
            print(line, flush=True)

        if LOOPS[0] in args.loops:
            caches = {batch: static_cache(model, batch, length) for batch, length in longest.items()}
            for (batch, length), x in prompts.items():
                timed(LOOPS[0], batch, length, by_transformers(net, caches[batch]), x)
            del caches
        if name == "bf16" and device == "cuda":  # one recording cannot be part of another
            del net
            torch.compiler.reset()
            net = contender(name, model, plan, graphs=False)
        if LOOPS[1] in args.loops:
            for (batch, length), x in prompts.items():
                timed(LOOPS[1], batch, length, by_sqcompile(net, longest[batch]), x)
            sqcompile.free_generation(net)
        return found, logits

    int8, logits = speeds("INT8")
    bf16: Any = None
    if not args.int8_only:
        gc.collect()
        bf16, floats = speeds("bf16")
    print("\n| | bf16 torch.compile, tokens/s | sqcompile INT8, tokens/s | vs bf16 |\n|---|---|---|---|")
    for (loop, batch, length), ours in int8.items():
        for k, what in enumerate((f"decode, batch {batch} after {length}", f"prefill, {batch} x {length}")):
            theirs = bf16[loop, batch, length][k] if bf16 else None
            other = (f"{theirs:.1f}", f"{ours[k] / theirs:.2f}x") if theirs else ("", "")
            print(f"| {what}, {loop} | {other[0]} | {ours[k]:.1f} | {other[1]} |")
    if bf16:
        print(f"SQNR of the logits beside bf16: {sqnr_db(floats, logits):.1f} dB")


@torch.no_grad()
def _logits(net: Any) -> Tensor:
    return net(torch.arange(3, 67, device=net.device)[None], use_cache=False).logits.float()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
