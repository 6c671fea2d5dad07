"""batches: samples as the batches that a model of a directory is calibrated and evaluated on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.checkpoints.float_model import Checkpoint, load_tokenizer
from sqcompile.cli import samples
from sqcompile.cli.terminal import CommandError
from sqcompile.files.regular import said
from sqcompile.windows import check_text, encode_stream

_TOKENS = 4096  # of a batch, where its size is left open
LENGTH = 512  # of a sequence, likewise
_CHOICE = 16  # times the text that is asked for, of which windows are taken at random
_NEW, _BEGIN = 32, 4  # tokens of a decoder; what one begins with: its start, language, task, and no times


@dataclass(frozen=True)
class Asked:
    """What the user asks of the data.

    Attributes:
        path: of the file or directory.
        samples: how many rows at most.
        seq_len: tokens of a row; None for 512, or as many as the model takes.
        seed: takes the samples at random by it; None for the first ones.
        batch_size: rows of a batch; None for about 4,096 tokens.
        tokenizer: the directory that has it; None for the model's.
    """

    path: str
    samples: int
    seq_len: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    tokenizer: str | None = None


def length_of(asked: Asked, longest: int | None, usual: int | None = None) -> int:
    """Tokens of a row, of a model that takes so many, and is used with so many; None where that is not known.

    Raises:
        CommandError: if the model does not take as many.
    """
    if asked.seq_len is None:
        return min(LENGTH, longest or LENGTH, usual or LENGTH)
    if longest is not None and asked.seq_len > longest:
        raise CommandError(f"--seq-len {asked.seq_len}: the model takes {longest} tokens at most")
    return asked.seq_len


def batches(asked: Asked, checkpoint: Checkpoint, model: Callable[[], nn.Module]) -> list[dict[str, Tensor]]:
    """The batches, all of them in memory.

    Args:
        asked: see there.
        checkpoint: of the model.
        model: gives the float model, which writes a decoder's tokens; called where there is a decoder beside an encoder.

    Raises:
        CommandError: for data that the model does not read, or that is too little.
    """
    kind = samples.kind_of(asked.path, checkpoint.reads)
    if kind != checkpoint.reads and not (kind == "ids" and checkpoint.reads == "text"):
        raise CommandError(
            f"{asked.path} is {kind}, and {checkpoint.architecture.__name__} reads {checkpoint.reads}: pass {samples.KINDS}"
        )
    found = [*_inputs(asked, checkpoint, kind)]
    if not found:
        raise CommandError(f"{asked.path} has nothing in it: pass real inputs of the model")
    if checkpoint.encoder_decoder:
        net = model()
        found = [part for batch in found for part in _with_decoder(net, batch)]
    return found


def _inputs(asked: Asked, checkpoint: Checkpoint, kind: str) -> Iterator[dict[str, Tensor]]:
    if kind == "ids":
        rows = id_rows(asked)
        _check_ids(rows, checkpoint, asked.path)
        for part in torch.from_numpy(rows.astype("int64")).split(asked.batch_size or _rows(rows.shape[1])):
            yield {"input_ids": part}
    elif kind == "text":
        tokenizer = load_tokenizer(asked.tokenizer) if asked.tokenizer else checkpoint.tokenizer()
        length = length_of(asked, checkpoint.longest, checkpoint.usual(tokenizer))
        found = samples.texts(asked.path, template_of(tokenizer), not checkpoint.causal, asked.seed)
        size = asked.batch_size or _rows(length)
        if checkpoint.causal:
            for part in windows(found, tokenizer, length, asked).split(size):
                yield {"input_ids": part}
            return
        for texts in _batched(itertools.islice(found, asked.samples), size):
            if len(texts) > 1 and tokenizer.pad_token is None:
                raise CommandError(
                    "the tokenizer has no padding token, and texts differ in length: pass --batch-size 1"
                )
            check_text(texts)
            yield dict(
                tokenizer(texts, padding=len(texts) > 1, truncation=True, max_length=length, return_tensors="pt")
            )
    else:
        processor, size = checkpoint.processor(), asked.batch_size or 8
        if kind == "images":
            for pictures in _batched(itertools.islice(samples.images(asked.path, asked.seed), asked.samples), size):
                yield dict(processor(images=pictures, return_tensors="pt"))
            return
        rate = int(processor.sampling_rate)
        for sounds in _batched(itertools.islice(samples.sounds(asked.path, rate, asked.seed), asked.samples), size):
            yield dict(processor(sounds, sampling_rate=rate, return_tensors="pt", **_padding(processor)))


def _padding(processor: Any) -> dict[str, Any]:
    """Recordings of different lengths are padded to the longest, where the processor has not a length of its own."""
    return {} if getattr(processor, "nb_max_frames", None) else {"padding": True}


def windows(texts: Iterable[str], tokenizer: Any, length: int, asked: Asked) -> Tensor:
    """Windows of the texts, int64 [windows, length]: each the BOS token, if there is one, and text.

    The first ones, and no more of the texts is read than that takes; by a seed any of the first texts that have some times as
    many, which are in an order of that seed.

    Raises:
        CommandError: if they do not fill one window.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    own = length - (bos is not None)
    enough = asked.samples * own * (1 if asked.seed is None else _CHOICE)
    parts, count = list[Tensor](), 0
    for text in texts:
        parts.append(encode_stream([text], tokenizer))
        if not count and bos is not None and parts[0][:1].tolist() == [bos]:  # by a chat's template
            parts[0] = parts[0][1:]
        count += len(parts[-1])
        if count >= enough:
            break
    stream = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    rows = len(stream) // own
    if not rows:
        raise CommandError(
            f"{asked.path} has {len(stream)} tokens, too few for one window of {length}: pass more text, or a smaller "
            "--seq-len"
        )
    found = stream[: rows * own].view(rows, own)
    if asked.seed is not None:
        found = found[torch.randperm(rows, generator=torch.Generator().manual_seed(asked.seed))]
    found = found[: asked.samples]
    return found if bos is None else torch.cat([torch.full((len(found), 1), bos), found], 1)


def template_of(tokenizer: Any) -> Callable[[Any], str]:
    """What makes a text of a chat's messages."""
    return lambda messages: tokenizer.apply_chat_template(messages, tokenize=False)


def id_rows(asked: Asked) -> Any:
    """Rows of token ids, integers [rows, tokens], of a .npy file.

    Raises:
        CommandError: if it holds something else, or another length is asked for.
    """
    rows = samples.token_ids(asked.path, asked.seed)[: asked.samples]
    if asked.seq_len is not None and asked.seq_len != rows.shape[1]:
        raise CommandError(
            f"--seq-len {asked.seq_len}: the rows of {asked.path} have {rows.shape[1]} tokens, leave it out"
        )
    return rows


def _check_ids(rows: Any, checkpoint: Checkpoint, path: str) -> None:
    vocabulary, longest = checkpoint.config.get_text_config().vocab_size, checkpoint.longest
    if int(rows.min()) < 0 or int(rows.max()) >= vocabulary:
        raise CommandError(
            f"{path} has the token id {int(rows.max() if rows.min() >= 0 else rows.min())}, and the model has {vocabulary}: "
            "use the model's own tokenizer"
        )
    check_rows(rows, longest, path)


def check_rows(rows: Any, longest: int | None, path: str) -> None:
    """Raises CommandError for rows of more tokens than a model takes; None for one of which that is not known."""
    if longest is not None and rows.shape[1] > longest:
        raise CommandError(f"{path} has rows of {rows.shape[1]} tokens, and the model takes {longest} at most")


def _rows(length: int) -> int:
    return max(1, _TOKENS // length)


def _batched(found: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(found)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


@torch.no_grad()
def _with_decoder(model: Any, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The batch with what the float model itself writes, which its decoder reads in use.

    Rows that end at one place are a batch of their own, as what would fill the others up is no token of theirs. The largest
    comes first.
    """
    here = {name: x.to(model.device) for name, x in batch.items()}
    longest = getattr(model.config, "max_target_positions", None)  # of Whisper's table, with what it begins with
    new = _NEW if longest is None else max(1, min(_NEW, longest - _BEGIN))
    try:
        tokens = model.generate(**here, max_new_tokens=new, do_sample=False).cpu()
    except (IndexError, TypeError, ValueError) as e:
        raise CommandError(
            f"the float model writes nothing on this data, which its decoder is to read ({said(e)})"
        ) from e
    start = model.generation_config.decoder_start_token_id
    if not bool((tokens[:, 0] == start).all()):  # some leave it out
        tokens = torch.cat([torch.full_like(tokens[:, :1], start), tokens], 1)
    ends = model.generation_config.eos_token_id
    ended = torch.isin(tokens[:, 1:], torch.tensor([ends] if isinstance(ends, int) else ends or [], dtype=torch.int64))
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 2, tokens.shape[1])
    parts = []
    for length in sorted(set(lengths.tolist()), key=lambda n: (-int((lengths == n).sum()), n)):
        rows = lengths == length
        parts.append({name: x[rows] for name, x in batch.items()} | {"decoder_input_ids": tokens[rows, :length]})
    return parts
