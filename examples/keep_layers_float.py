"""Three ways to keep linears in float: by name, by what they cost, and with other fields of the recipe.

python examples/keep_layers_float.py
python examples/keep_layers_float.py --model path/of/a/causal/model --calib texts.txt --skip "*.down_proj"
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import sqcompile
from sqcompile.lm import calibration_texts, load_lm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local directory of a causal language model")
    parser.add_argument("--calib", type=Path, help="a text file, like what the model will read")
    parser.add_argument("--skip", default="*.down_proj", help="a name, a part of one, or a shell pattern")
    parser.add_argument("--limit", type=float, default=0.05, help="percent of perplexity that may be lost")
    args = parser.parse_args()
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        model, tokenizer = load_lm()
    text = args.calib.read_text() if args.calib else "\n".join(calibration_texts())
    ids = tokenizer(text[:100_000], return_tensors="pt").input_ids[0]
    batches = ids[: len(ids) // 256 * 256].view(-1, 256)[:8].split(4)

    # one α and no rotation, so that the example is quick; "default" chooses both for each site
    recipes = {
        "everything": sqcompile.Recipe(alpha=0.5),
        f"skip={args.skip!r}": sqcompile.Recipe(alpha=0.5, skip=(args.skip,)),
        f"max_degradation={args.limit}": sqcompile.Recipe(alpha=0.5, max_degradation=args.limit),
        "overrides": sqcompile.Recipe(alpha=0.5, overrides={args.skip: {"alpha": 0.8, "rotate": 32}}),
    }
    for name, recipe in recipes.items():
        plan = sqcompile.calibrate(model, batches, recipe=recipe, progress=False)
        left = [layer for layer in plan.layers if not layer.quantized]
        print(f"{name}: {len(plan.layers) - len(left)} of {len(plan.layers)} linears in INT8")
        for layer in left[:3]:
            print(f"  {layer.name}: {layer.reason}")
        if len(left) > 3:
            print(f"  and {len(left) - 3} more")


if __name__ == "__main__":
    main()
