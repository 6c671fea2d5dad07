"""Fit the tokenizer that all the models share: ``python -m sqcompile.lm.tokenizer FILE``.

The shipped one comes from this command, with the library of CPython 3.11.7.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .corpus import read_texts, training_files
from .load import BOS, EOS, PAD

VOCAB = 2048


def train_tokenizer(texts: list[str], path: Path) -> None:
    """Fit a byte-level BPE tokenizer on ``texts`` and write it to ``path``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, BOS, EOS],
        # Without all 256 bytes in the vocabulary, unseen characters would be lost.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.save(str(path))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="tokenizer.json to write")
    train_tokenizer(read_texts(training_files()), parser.parse_args(argv).file)


if __name__ == "__main__":
    main()
