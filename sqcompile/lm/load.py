"""The shipped language model, and how it is fed and scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def load_lm(
    dtype: torch.dtype = torch.float32, folder: Path = DATA
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model in ``folder``, on the CPU in eval mode, and its tokenizer.

    The model maps ``input_ids`` (int64, ``[batch, length <= 1024]``) to ``.logits`` (``dtype``,
    ``[batch, length, 2048]``). Each sequence should start with the BOS token, as in training.

    Args:
        dtype: floating-point type of the returned weights; they are stored as float16.
        folder: where ``config.json``, ``model.safetensors`` and ``tokenizer.json`` are.

    Raises:
        FileNotFoundError: one of these files is missing.
        RuntimeError: the weights do not fit the configuration.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no model at {folder}: {name} is missing")
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(str(folder)))
    weights = load_file(folder / "model.safetensors")
    if "model.embed_tokens.weight" in weights:
        # The output head shares the embedding's tensor, which the file holds once.
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    # The type stubs of transformers hide Module.to's own signature.
    torch.nn.Module.to(model, dtype)
    return model.eval(), load_tokenizer(folder)


def token_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, length: int = 512, limit: int | None = None
) -> torch.Tensor:
    """Cut texts into equal windows, each the BOS token and ``length - 1`` tokens of text.

    The texts are joined with EOS between them and cut without overlap; what is left at the end is dropped.

    Args:
        texts: the texts, in order.
        tokenizer: as :func:`load_lm` gives it.
        length: tokens per window, at least 2.
        limit: at most this many windows, taken evenly over all the texts; all of them if None.

    Returns:
        int64 token ids, ``[windows, length]``.

    Raises:
        ValueError: ``length`` or ``limit`` is too small, or the texts do not fill one window.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, not {length}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    stream = encode_stream(texts, tokenizer)
    count = len(stream) // (length - 1)
    if count == 0:
        raise ValueError(f"the texts have {len(stream)} tokens, too few for one window of {length}")
    body = stream[: count * (length - 1)].view(count, length - 1)
    windows = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), body], dim=1)
    if limit is None or limit >= count:
        return windows
    return windows[torch.arange(limit) * count // limit]


def encode_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts as one int64 stream ``[tokens]``, with the EOS token after each and no BOS token."""
    texts = list(texts)
    if not texts:
        return torch.empty(0, dtype=torch.int64)
    # A tokenizer remembers the padding of an earlier call until it is told otherwise.
    encoded = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)], dtype=torch.int64)


def perplexity(model: Callable[..., Any], windows: torch.Tensor, batch_size: int = 8) -> float:
    """Perplexity of next-token prediction: exp of the cross entropy (nats) averaged over all predicted tokens.

    Args and errors: as `window_losses`.
    """
    return math.exp(float(window_losses(model, windows, batch_size).mean()))


@torch.no_grad()
def window_losses(model: Callable[..., Any], windows: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
    """Cross entropy of next-token prediction in each window, in nats a token: float64 ``[windows]``.

    Every token of a window but the first is predicted from those before it. The cross entropy is computed in float32
    whatever the type of the logits.

    Args:
        model: ``model(input_ids=ids).logits`` gives ``[batch, length, vocab]`` for int64 ``ids`` ``[batch, length]``.
        windows: int64 token ids ``[windows, length]``, on the device that the model expects.
        batch_size: windows per call; the last call may have fewer.

    Raises:
        ValueError: ``windows`` is not a matrix with at least one row and two columns, or ``batch_size`` is under 1.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [at least 1, at least 2], not {list(windows.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    losses = []
    for ids in windows.split(batch_size):
        logits = model(input_ids=ids).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses.append(each.view(len(ids), -1).double().mean(1).cpu())
    return torch.cat(losses)
