"""spikes: tokens whose largest value is many times the others': the first of a sequence, separators, and the like.

A static scale that is made for them leaves all other tokens a few steps, and one that is not clips them.
"""

from __future__ import annotations

from sqcompile.statistics.input_stats import PER_OCTAVE, SMALLEST, InputStats

TIMES = 8  # the size of the median token
FEW = 0.05  # of the tokens


def spikes(stats: InputStats) -> str | None:
    """In words, that a few of the calibration tokens are many times as large as the others; None if none is."""
    upto = stats.sizes[1:].cumsum(0)  # without tokens of zeros
    if not int(upto[-1]):
        return None
    median = 1 + int((upto * 2 < upto[-1]).sum())
    first = median + 1 + (TIMES.bit_length() - 1) * PER_OCTAVE  # from here on, tokens are so many times as large
    many = int(stats.sizes[first:].sum())
    if not many or many > FEW * stats.count:
        return None
    most = float(stats.absmax.max()) / 2 ** (SMALLEST + (median + 0.5) / PER_OCTAVE)
    return f"{many} of {stats.count} calibration tokens reach{'es' if many == 1 else ''} {most:.0f}x the others"
