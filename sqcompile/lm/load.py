"""The shipped language model and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def load_tokenizer(folder: Path = DATA) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer (2048 tokens) in ``folder``.

    It puts the BOS token before each text; ``decode(ids, skip_special_tokens=True)`` gives any text back unchanged.

    Raises:
        FileNotFoundError: ``folder`` has no ``tokenizer.json``.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def load_lm(dtype: torch.dtype = torch.float32, folder: Path = DATA) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in ``folder``, on the CPU in eval mode, and the shipped tokenizer, which all the models share.

    The model maps ``input_ids`` (int64, ``[batch, length <= config.max_position_embeddings]``) to ``.logits``
    (``dtype``, ``[batch, length, 2048]``). Each sequence should start with the BOS token, as in training.

    Args:
        dtype: floating-point type of the returned weights; they are stored as float16.
        folder: where ``config.json``, which names the architecture, and ``model.safetensors`` are.

    Raises:
        FileNotFoundError: one of these files is missing.
        RuntimeError: the weights do not fit the configuration.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no model at {folder}: {name} is missing")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)))
    # The output head shares the embedding's tensor, which the file holds once.
    load_model(model, folder / "model.safetensors")
    # The type stubs of transformers hide Module.to's own signature.
    torch.nn.Module.to(model, dtype)
    return model.eval(), load_tokenizer()
