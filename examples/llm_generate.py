"""A language model that generates with a KV cache, in INT8, through torch.compile.

    python examples/llm_generate.py
    python examples/llm_generate.py --model path/of/a/causal/model --calib texts.txt --prompt "Once upon"

Without options it is the language model of Python source that sqcompile ships (2.8 M parameters).
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sqcompile
from sqcompile.lm import calibration_texts, load_lm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local directory of a causal language model")
    parser.add_argument("--calib", type=Path, help="a text file, like what the model will read")
    parser.add_argument("--prompt", default="def mean(values):\n")
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        model, tokenizer = load_lm()
    text = args.calib.read_text() if args.calib else "\n".join(calibration_texts())

    # 16 windows of 256 tokens; real text, or the scales are those of something else
    ids = tokenizer(text[:200_000], return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)[:16]
    plan = sqcompile.calibrate(model, windows.split(4))

    prompt = tokenizer(args.prompt, return_tensors="pt")
    how = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    with torch.no_grad():
        floats = model.generate(**prompt, **how)
        # the same rewrites as sqcompile.compile, on the graphs of prefill and decode: one INT8 copy of each weight
        fast = torch.compile(model, backend="smoothquant", options={"plan": plan})
        ints = fast.generate(**prompt, **how)
    print("float:", tokenizer.decode(floats[0], skip_special_tokens=True), sep="\n")
    print("\nINT8:", tokenizer.decode(ints[0], skip_special_tokens=True), sep="\n")
    n = min(floats.shape[1], ints.shape[1])
    new = n - prompt.input_ids.shape[1]
    same = int((floats[0, :n] == ints[0, :n]).long().cumprod(0).sum()) - prompt.input_ids.shape[1]
    print(f"\nthe first {same} of {new} tokens are the same")


if __name__ == "__main__":
    main()
