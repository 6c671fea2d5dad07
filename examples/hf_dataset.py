"""Calibrating with a dataset of Hugging Face's `datasets`, or anything that gives rows.

    python examples/hf_dataset.py                     # rows of the standard library's sources
    python examples/hf_dataset.py --model path/of/a/causal/model --data texts.jsonl

With `pip install datasets` the rows are a `datasets.Dataset`. Without it they are a list of dicts, and nothing else
changes: sqcompile reads batches, and does not ask where they come from.
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import sqcompile
from sqcompile.lm import calibration_texts, load_lm


def rows(path: str | None) -> Iterable[dict[str, Any]]:
    """Rows with a "text": a datasets.Dataset where that package is installed."""
    texts = [text[i : i + 1500] for text in calibration_texts() for i in (0, 1500, 3000)]
    try:
        import datasets
    except ImportError:
        print("no package `datasets`: rows are a list of dicts")
        if path is not None:
            import json
            from pathlib import Path

            return [json.loads(line) for line in Path(path).read_text().splitlines()]
        return [{"text": text} for text in texts]
    if path is not None:
        return datasets.load_dataset("json", data_files=path, split="train")
    return datasets.Dataset.from_dict({"text": texts})


def batches(found: Iterable[dict[str, Any]], tokenizer: Any, size: int = 8) -> Iterator[dict[str, Tensor]]:
    """Padded batches: the mask among them keeps padding out of the statistics."""
    texts: list[str] = []
    for row in found:  # rows come one by one, so that a stream is read no further than it is used
        texts.append(row["text"])
        if len(texts) == size:
            yield dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=256))
            texts = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local directory of a causal language model")
    parser.add_argument("--data", help='a file of JSON lines, each with a "text"')
    args = parser.parse_args()
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        model, tokenizer = load_lm()
    # 32 rows, so that the example is quick; without max_batches the first batches with 512 rows together are taken
    plan = sqcompile.calibrate(model, batches(rows(args.data), tokenizer), max_batches=4)
    plan.save("plan.safetensors")
    print(f"plan.safetensors: {sum(layer.quantized for layer in plan.layers)} of {len(plan.layers)} linears in INT8")


if __name__ == "__main__":
    main()
