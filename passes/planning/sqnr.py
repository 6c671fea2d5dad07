"""sqnr: what a quantization error is called. An error that is not finite is never a small one."""

from __future__ import annotations

import math

from sqcompile.errors import CalibrationError


def relative(noise: float, signal: float) -> float:
    """noise / signal: 0 without noise; infinite for noise without signal, and where either is not finite."""
    if noise == 0 and math.isfinite(signal):
        return 0.0
    return noise / signal if signal > 0 and math.isfinite(noise) and math.isfinite(signal) else math.inf


def sqnr_db(error: float, what: str) -> float:
    """The signal to quantization noise ratio of a relative error, in dB; infinite for none.

    Raises:
        CalibrationError: if the error is not finite.
    """
    if not math.isfinite(error):
        raise CalibrationError(
            f"{what} are beyond float32 on the calibration sample, or nothing but rounding: check the data and the model's "
            "weights, or leave it in float with Recipe(skip=...)"
        )
    return -10 * math.log10(error) if error > 0 else math.inf
