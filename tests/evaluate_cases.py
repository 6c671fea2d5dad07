"""Models whose answers are known, and what `evaluate` should say of them, computed plainly in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqcompile
from sqcompile import Evaluation


class Bigrams(nn.Module):
    """A language model whose logits are a row of a table [V, V]: position and padding make no difference to it."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


class Plain(Bigrams):
    """The same; its output is the tensor, and it takes no mask."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.table[ids]


class Decoder(Bigrams):
    """An encoder-decoder as it is called: logits are of the decoder's tokens."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor | None = None
    ) -> Any:
        return SimpleNamespace(logits=self.table[decoder_input_ids])


class Encoder(nn.Module):
    """Hidden states [B, T, C] and the first token's [B, C], after one linear."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(20, 6, generator=generator))
        self.scale = scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embed[input_ids]
        hidden = torch.cat([hidden[..., :3] * self.scale, hidden[..., 3:]], -1)
        return {"last_hidden_state": hidden, "pooled": hidden[:, 0]}


class Characters:
    """A tokenizer of lower-case letters: ids 3 and up, BOS 1, EOS 2."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options == {"add_special_tokens": False, "padding": False, "truncation": False}
        return {"input_ids": [[3 + ord(c) - ord("a") for c in text] for text in texts]}


def tables(vocabulary: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """A table of logits, and one that differs by about ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    table = 3 * torch.randn(vocabulary, vocabulary, generator=generator)
    return table, table + scale * torch.randn(vocabulary, vocabulary, generator=generator)


def rows(vocabulary: int, lengths: Sequence[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]


def padded(windows: Sequence[Tensor], left: bool = False, value: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [windows, longest] and their mask, int64."""
    longest = max(map(len, windows))
    ids = torch.full((len(windows), longest), value)
    mask = torch.zeros(len(windows), longest, dtype=torch.int64)
    for i, w in enumerate(windows):
        place = slice(longest - len(w), longest) if left else slice(0, len(w))
        ids[i, place], mask[i, place] = w, 1
    return ids, mask


def expected(table: Tensor, reference: Tensor, windows: Sequence[Tensor]) -> dict[str, float]:
    """What `Evaluation` should hold of two `Bigrams`, by definition, in float64."""
    log_p, log_r = table.double().log_softmax(-1), reference.double().log_softmax(-1)
    counts = [len(w) - 1 for w in windows]
    before, after = [w[:-1] for w in windows], [w[1:] for w in windows]
    loss = [-log_p[b, a] for b, a in zip(before, after, strict=True)]
    other = [-log_r[b, a] for b, a in zip(before, after, strict=True)]
    kl = [(log_r.exp() * (log_r - log_p)).sum(-1)[b] for b in before]
    same = [(log_p.argmax(-1) == log_r.argmax(-1))[b].double() for b in before]
    mean, error = ratio(loss, counts)
    float_mean, float_error = ratio(other, counts)
    more, more_error = ratio([x - y for x, y in zip(loss, other, strict=True)], counts)
    return {
        "perplexity": math.exp(mean), "perplexity_error": math.exp(mean) * error,
        "float_perplexity": math.exp(float_mean), "float_perplexity_error": math.exp(float_mean) * float_error,
        "increase": 100 * math.expm1(more), "increase_error": 100 * math.exp(more) * more_error,
        "kl": ratio(kl, counts)[0], "kl_error": ratio(kl, counts)[1],
        "top1": 100 * ratio(same, counts)[0], "top1_error": 100 * ratio(same, counts)[1],
    }  # fmt: skip


def ratio(values: Sequence[Tensor], counts: Sequence[int]) -> tuple[float, float]:
    """Mean over all tokens, and its standard error: sqrt(W / (W - 1) Σ n² (mean of the window - mean)²) / Σ n."""
    mean = float(torch.cat(list(values)).mean())
    spread = sum((n * (float(v.mean()) - mean)) ** 2 for v, n in zip(values, counts, strict=True))
    return mean, math.sqrt(spread * len(counts) / (len(counts) - 1)) / sum(counts)


def evaluate(model: nn.Module, data: Any, **options: Any) -> Evaluation:
    return sqcompile.evaluate(model, data, progress=False, **options)


def agree(found: Evaluation, want: dict[str, float], rel: float = 1e-4) -> None:
    for name, value in want.items():
        # a loss in float32 is off by some 1e-7, and a difference of two, in percent, by some 1e-5
        assert getattr(found, name) == pytest.approx(value, rel=rel, abs=5e-5 if "increase" in name else 1e-9), name
