"""Run by the Python of `make compare`'s environment: tiny models, quantized by llm-compressor's oneshot.

    compress_with_llm_compressor.py TOKENIZER FOLDER [MODEL_TYPE-{token,static} ...]

FOLDER/MODEL_TYPE-token/float has a model, .../net what llm-compressor makes of it.
"""

from __future__ import annotations

import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
)  # fmt: skip


def main(tokenizer: str, folder: str, *wanted: str) -> None:
    for name in wanted:
        kind, inputs = name.split("-")
        compress(kind, inputs, tokenizer, f"{folder}/{name}")


def compress(kind: str, inputs: str, tokenizer: str, folder: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).save_pretrained(f"{folder}/float")
    words = PreTrainedTokenizerFast(tokenizer_file=tokenizer, pad_token="<pad>")
    words.save_pretrained(f"{folder}/float")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/float").eval()
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    static = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel"},
        "input_activations": {**eight, "strategy": "tensor", "dynamic": False},
    }
    how = {"scheme": "W8A8", "targets": "Linear"} if inputs == "token" else {"config_groups": {"all": static}}
    rows = [{"input_ids": row} for row in torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))]
    oneshot(
        model=model, recipe=[QuantizationModifier(ignore=["lm_head"], **how)], dataset=DataLoader(rows, batch_size=1),
        num_calibration_samples=len(rows), processor=words,
    )  # fmt: skip
    model.save_pretrained(f"{folder}/net", save_compressed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
