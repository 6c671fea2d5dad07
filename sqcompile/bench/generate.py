"""Generation benchmark: ``model.generate`` through backend "smoothquant", beside ``torch.compile`` in bf16. One run.

On a GPU a Llama-3-8B-shaped model with a static cache and CUDA graphs; on a CPU a 1B-shaped one with a static cache.
Weights are random: the tokens are no text, and are not compared; the logits of a prompt are.
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.bench.timing import gpu, machine, sqnr_db

SHAPES = {
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "cpu": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
}
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


def measure(model: Any, cache: StaticCache, batch: int, prompt: int, new: int, rounds: int) -> tuple[float, float]:
    """Decoded tokens a second, all sequences together, and prompt tokens a second, of one ``generate`` call.

    Decode is the difference of generating ``new`` tokens and one, so that prefill counts in neither twice.
    """
    x = torch.randint(3, 32000, (batch, prompt), device=model.device)

    def generate(tokens: int) -> Tensor:
        cache.reset()
        return model.generate(
            x, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
            past_key_values=cache, disable_compile=True,
        )  # fmt: skip

    whole = seconds(lambda: generate(new), model.device.type, rounds)
    first = seconds(lambda: generate(1), model.device.type, rounds)
    return batch * (new - 1) / (whole - first), batch * prompt / first


def contender(name: str, model: LlamaForCausalLM, plan: sqcompile.Plan) -> Any:
    """The model compiled, prefill and decode; on a GPU as CUDA graphs."""
    cuda = model.device.type == "cuda"
    if name == "bf16":
        own = copy.copy(model)
        options: Any = {"mode": "reduce-overhead", "dynamic": False} if cuda else {"dynamic": None}
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
    args = parser.parse_args(argv)
    model = llama(device, args.layers)
    batches = [torch.randint(3, 32000, (2, 256), device=device)]
    recipe = args.recipe or sqcompile.Recipe()  # random weights: any alpha
    plan = sqcompile.calibrate(model, batches, recipe=recipe, progress=False)
    print(f"{gpu() if device == 'cuda' else machine()}, {args.layers} layers, {args.recipe or 'alpha=0.5'}\n")
    print("| | bf16 torch.compile, tokens/s | sqcompile INT8, tokens/s | vs bf16 |\n|---|---|---|---|")
    prompts = PROMPTS[device]
    net = contender("INT8", model, plan)
    caches = {batch: static_cache(model, batch, max(lengths) + args.new) for batch, lengths in prompts.items()}
    cases = [(batch, length) for batch, lengths in prompts.items() for length in lengths]
    ours = [measure(net, caches[case[0]], *case, args.new, args.rounds) for case in cases]
    logits = {"INT8": _logits(net)}
    for (batch, prompt), int8 in zip(cases, ours, strict=True):
        torch.compiler.reset()  # compiled for each case: one code for all sizes may be slower
        del net
        gc.collect()
        net = contender("bf16", model, plan)
        bf16 = measure(net, caches[batch], batch, prompt, args.new, args.rounds)
        for what, a, b in zip(
            (f"decode, batch {batch} after {prompt}", f"prefill, {batch} x {prompt}"), bf16, int8, strict=True
        ):
            print(f"| {what} | {a:.1f} | {b:.1f} | {b / a:.2f}x |", flush=True)
    logits["bf16"] = _logits(net)
    print(f"\nSQNR of the logits beside bf16: {sqnr_db(logits['bf16'], logits['INT8']):.1f} dB")


@torch.no_grad()
def _logits(net: Any) -> Tensor:
    return net(torch.arange(3, 67, device=net.device)[None], use_cache=False).logits.float()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
