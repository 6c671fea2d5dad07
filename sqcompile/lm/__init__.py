"""A small language model of Python source code, with the text to calibrate and evaluate it: real input, no network."""

from sqcompile.windows import token_windows

from .corpus import CALIBRATION, HELD_OUT, calibration_texts, evaluation_texts, training_files
from .load import load_lm, load_tokenizer

__all__ = [
    "CALIBRATION",
    "HELD_OUT",
    "calibration_texts",
    "evaluation_texts",
    "load_lm",
    "load_tokenizer",
    "token_windows",
    "training_files",
]
