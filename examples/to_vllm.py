"""A checkpoint that vLLM serves: INT8 W8A8 in the format of compressed-tensors.

    python examples/to_vllm.py --out out-w8a8
    python examples/to_vllm.py --model path/of/a/causal/model --calib texts.txt --out out-w8a8
    vllm serve out-w8a8

vLLM need not be installed where the checkpoint is written. transformers reads it, too, but runs it in float.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import sqcompile
from sqcompile.lm import calibration_texts, evaluation_texts, load_lm, token_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local directory of a causal language model")
    parser.add_argument("--calib", type=Path, help="a text file, like what the model will read")
    parser.add_argument("--out", default="out-w8a8", help="the directory to write")
    args = parser.parse_args()
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        model, tokenizer = load_lm()
    texts = [args.calib.read_text()] if args.calib else calibration_texts()
    windows = token_windows(texts, tokenizer, 256, 16)

    # α alone: vLLM has no kernel that rotates, and export says what else of a plan a checkpoint cannot hold
    plan = sqcompile.calibrate(model, windows.split(4), recipe=sqcompile.Recipe(alpha="auto"))
    written = sqcompile.export(model, plan, "compressed-tensors", args.out)
    tokenizer.save_pretrained(args.out)
    print(written)

    # what vLLM will compute, up to its own roundings, is what the plan that export returns gives here
    held_out = windows[-2:] if args.model else token_windows(evaluation_texts(), tokenizer, 256, 8)
    compiled = sqcompile.compile(model, plan=written.plan, backend="eager", progress=False)
    print(sqcompile.evaluate(compiled, held_out, against=model, progress=False))
    print(f"\nserve it: vllm serve {args.out}")


if __name__ == "__main__":
    main()
