"""CPU benchmark: two decoder layers of Llama-3.2-1B shape, random weights, beside torch.compile in bf16 and fp32."""

from __future__ import annotations

import argparse
import datetime
import functools
import warnings
from typing import Any

import torch
from torch import nn

import sqcompile
from sqcompile.bench.timing import interleaved, machine, sqnr_db

SHAPES = ((1, 512), (1, 1), (16, 1))


def llama(layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The decoder of a Llama-3.2-1B-shaped model without its vocabulary projection, random weights."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=layers,
        vocab_size=1024, max_position_embeddings=2048, use_cache=False, dtype=dtype,
    )  # fmt: skip
    return LlamaModel(config).eval().to(dtype)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench cpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="time per shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--recipe", default="default", help="default, O1, O2 or O3")
    parser.add_argument("--target", help='lower for another CPU than this, such as "x86-avx2"')
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the model to quantize")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*copy construct from a tensor.*")

    bf16 = llama()
    fp32 = llama(dtype=torch.float32)
    fp32.load_state_dict(bf16.state_dict())
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 1024, (1, 512), generator=generator) for _ in range(2)]
    given = bf16 if args.dtype == "bfloat16" else fp32
    int8 = sqcompile.compile(given, ids, recipe=args.recipe, target=args.target)
    print(f"{machine()}, {datetime.date.today()}" + (f", lowered for {args.target}" if args.target else ""))
    print("Llama-3.2-1B-shaped decoder, 2 layers, random weights; milliseconds of a forward pass, medians\n")
    print(
        "| batch x tokens | fp32 torch.compile | bf16 torch.compile | sqcompile INT8 | vs bf16 | vs fp32 | SQNR of the output |"
    )
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        x = torch.randint(0, 1024, shape, generator=generator)
        torch.compiler.reset()  # each float contender is compiled for the very shape it is timed at
        rivals: dict[str, Any] = {"fp32": torch.compile(fp32), "bf16": torch.compile(bf16), "int8": int8}
        with torch.no_grad():
            ms = interleaved({name: functools.partial(f, input_ids=x) for name, f in rivals.items()}, args.seconds)
            reference = fp32(input_ids=x).last_hidden_state
            quality = sqnr_db(reference, int8(input_ids=x).last_hidden_state)
        print(
            f"| {shape[0]} x {shape[1]} | {ms['fp32']:.2f} | {ms['bf16']:.2f} | {ms['int8']:.2f} | {ms['bf16'] / ms['int8']:.2f}x "
            f"| {ms['fp32'] / ms['int8']:.2f}x | {quality:.1f} dB |",
            flush=True,
        )
