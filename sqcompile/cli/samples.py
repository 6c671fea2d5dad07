"""samples: files of text, token ids, pictures or sound, read as far as they are asked for.

texts.txt                     one text; for models that read sentences, one of each line
texts.jsonl, texts.parquet    a "text" of each row, or "messages", which a chat template makes a text of
ids.npy                       token ids, integers [windows, tokens]
folder/                       all pictures, or all .wav files, or all text files in it, by name
"""

from __future__ import annotations

import itertools
import json
import os
import random
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sqcompile.cli.terminal import CommandError
from sqcompile.files.regular import said

TEXTS = (".txt", ".jsonl", ".parquet")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SOUND = ".wav"
KINDS = ".txt, .jsonl, .parquet, .npy, or a directory of pictures or .wav files"


def kind_of(path: str, wanted: str = "text") -> str:
    """What a path holds: "text", "ids", "images" or "audio"; of a directory with several, the one that is ``wanted``.

    Raises:
        CommandError: if it is there not, or holds none of these.
    """
    if not os.path.exists(path):
        raise CommandError(f"there is no {path}: pass {KINDS}")
    endings = {Path(path).suffix.lower()}
    if os.path.isdir(path):
        endings = {p.suffix.lower() for p in Path(path).iterdir()}
    kinds: list[tuple[str, tuple[str, ...]]] = [
        ("text", TEXTS), ("ids", (".npy",)), ("images", IMAGES), ("audio", (SOUND,)),
    ]  # fmt: skip
    for kind, known in sorted(kinds, key=lambda k: k[0] != wanted):
        if endings.intersection(known) and (kind != "ids" or not os.path.isdir(path)):
            return kind
    raise CommandError(f"{path} is none that can be read: pass {KINDS}")


def texts(path: str, template: Callable[[Any], str], by_line: bool, seed: int | None) -> Iterator[str]:
    """The texts of a file or of a directory of files, one after the other.

    Args:
        path: of the file.
        template: makes a text of messages.
        by_line: whether a line of a .txt file is a text, or all of it.
        seed: of the order in which they come; None for their own. All of them are read first then.

    Raises:
        CommandError: for what cannot be read, naming the file and the line.
    """
    found = itertools.chain.from_iterable(_texts(p, template, by_line) for p in _files(path, TEXTS))
    return found if seed is None else iter(_shuffled([*found], seed))


def token_ids(path: str, seed: int | None) -> np.ndarray:
    """The token ids of a .npy file, integers [windows, tokens], mapped into memory unless they are shuffled.

    Raises:
        CommandError: if it holds something else.
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:
        raise CommandError(f"{path} cannot be read ({said(e)}): save an array of token ids with numpy.save") from e
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "iu" or not found.size:
        shape = "x".join(map(str, getattr(found, "shape", ()))) or "no"
        raise CommandError(f"{path} is {shape} {getattr(found, 'dtype', '')}: pass integers [windows, tokens]")
    return found if seed is None else found[_shuffled([*range(len(found))], seed)]


def images(path: str, seed: int | None) -> Iterator[Any]:
    """The pictures of a directory, as PIL has them, in RGB.

    Raises:
        CommandError: for one that cannot be read.
    """
    try:
        from PIL import Image
    except ImportError as e:
        raise CommandError("pictures need pillow: pip install pillow") from e
    for file in _in_order(path, IMAGES, seed):
        try:
            with Image.open(file) as picture:
                yield picture.convert("RGB")
        except Exception as e:
            raise CommandError(f"{file} cannot be read ({said(e)}): remove it, or copy it again") from e


def sounds(path: str, rate: int, seed: int | None) -> Iterator[np.ndarray]:
    """The .wav files of a directory, float32 [samples] in [-1, 1]; of several channels their mean.

    Raises:
        CommandError: for one that cannot be read, or of another rate than the model takes.
    """
    for file in _in_order(path, (SOUND,), seed):
        try:
            with wave.open(file, "rb") as f:
                channels, width, own = f.getnchannels(), f.getsampwidth(), f.getframerate()
                data = f.readframes(f.getnframes())
        except Exception as e:
            raise CommandError(f"{file} cannot be read ({said(e)}): pass .wav files of integers (PCM)") from e
        if own != rate:
            raise CommandError(f"{file} has {own} samples a second, and the model takes {rate}: convert it first")
        if width not in (1, 2, 4):
            raise CommandError(f"{file} has {8 * width} bits a sample: convert it to 16 bits")
        values = np.frombuffer(data, np.dtype({1: "u1", 2: "<i2", 4: "<i4"}[width])).astype(np.float32)
        values -= 128 if width == 1 else 0
        values /= np.float32(2.0 ** (8 * width - 1))
        yield values.reshape(-1, channels).mean(1)


def _texts(path: Path, template: Callable[[Any], str], by_line: bool) -> Iterator[str]:
    if path.suffix.lower() == ".parquet":
        rows: Iterator[tuple[str, Any]] = ((f"row {i} of {path}", row) for i, row in enumerate(_parquet(path)))
    elif path.suffix.lower() == ".jsonl":
        rows = _json_lines(path)
    else:
        for text in _lines(path) if by_line else [_whole(path)]:
            if text.strip():
                yield text.rstrip("\r\n") if by_line else text
        return
    for where, row in rows:
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            if row["text"].strip():
                yield row["text"]
        elif isinstance(row, dict) and row.get("messages") is not None:
            try:
                yield template(row["messages"])
            except Exception as e:
                raise CommandError(
                    f"{where}: its messages make no text ({said(e)}): pass texts, or a tokenizer with a chat template"
                ) from e
        else:
            raise CommandError(f'{where} has no "text" and no "messages": write {{"text": "..."}} on each line')


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for i, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                yield f"line {i} of {path}", json.loads(line)
            except (ValueError, RecursionError) as e:
                raise CommandError(f"line {i} of {path} is no JSON ({said(e)}): mend it, or leave it out") from e


def _parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise CommandError(f"{path} needs pyarrow: pip install pyarrow, or pass .jsonl") from e
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
        for batch in file.iter_batches(64, columns=columns):
            yield from batch.to_pylist()
    except Exception as e:
        raise CommandError(f"{path} cannot be read ({said(e)}): copy it again, or pass .jsonl") from e


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as f:  # with or without a byte order mark
            yield from f
    except (OSError, UnicodeDecodeError) as e:
        raise CommandError(f"{path} cannot be read as UTF-8 ({said(e)}): convert it first") from e


def _whole(path: Path) -> str:
    return "".join(_lines(path))


def _in_order(path: str, endings: tuple[str, ...], seed: int | None) -> list[str]:
    files = [*map(str, _files(path, endings))]
    return files if seed is None else _shuffled(files, seed)


def _files(path: str, endings: tuple[str, ...]) -> list[Path]:
    if not os.path.isdir(path):
        return [Path(path)]
    return sorted(p for p in Path(path).iterdir() if p.suffix.lower() in endings)


def _shuffled(found: list[Any], seed: int) -> list[Any]:
    random.Random(seed).shuffle(found)
    return found
