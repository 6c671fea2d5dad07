"""Run by the Python of vLLM's environment: greedy tokens of prompts, and what the engine thinks of given tokens.

    vllm_engine.py DIRECTORY FILE DTYPE

FILE is JSON: {"prompts": [[token, ...], ...], "tokens": [[token, ...], ...]}. One line of JSON is printed:
"tokens", the engine's own greedy ones, and for each of the given ones its log probability and its rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def main(directory: str, file: str, dtype: str) -> None:
    if dtype == "float32":
        import plain_vllm  # its arithmetic is the same on every processor

        plain_vllm.plain_experts()
    elif torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # vLLM 0.32 does not ask for AMX's tiles where its experts or attention are the first to use them
    from vllm import LLM, SamplingParams  # of the environment that runs this

    given = json.loads(Path(file).read_text())
    length = len(given["tokens"][0])
    engine = LLM(directory, skip_tokenizer_init=True, enforce_eager=True, dtype=dtype, max_model_len=256)

    def run(prompts: list[list[int]], **options: int) -> list:
        sampling = SamplingParams(temperature=0, detokenize=False, ignore_eos=True, **options)
        return engine.generate([{"prompt_token_ids": p} for p in prompts], sampling)

    free = run(given["prompts"], max_tokens=length)
    whole = [p + t for p, t in zip(given["prompts"], given["tokens"], strict=True)]
    forced = []
    for prompt, tokens, result in zip(
        given["prompts"], given["tokens"], run(whole, max_tokens=1, prompt_logprobs=1), strict=True
    ):
        at = result.prompt_logprobs[len(prompt) :]
        forced.append([[entry[t].logprob, entry[t].rank] for t, entry in zip(tokens, at, strict=True)])
    print(json.dumps({"tokens": [list(r.outputs[0].token_ids) for r in free], "forced": forced}))


if __name__ == "__main__":
    main(*sys.argv[1:])
