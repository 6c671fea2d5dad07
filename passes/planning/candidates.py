"""candidates: of what may be done with a site, smoothing by every α and rotations of every size, what costs least.

By what the outputs lose, as far as that is known (`feel`, `loss`); else by the error of the site's own linears.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.passes.ir.graph import Linear
from sqcompile.passes.labels.match import Site
from sqcompile.passes.planning.error import Choice, Chooser
from sqcompile.passes.planning.products import column_absmax
from sqcompile.passes.planning.smoothing import smoothing_scale
from sqcompile.passes.planning.spikes import spikes
from sqcompile.process.interrupts import checkpoint

# A site is left unsmoothed only where smoothing makes its error on the sample this much worse. Below that, smoothing is
# kept even without a gain: the sample holds few tokens, and the absmax it is built from saw them all. Static scales are
# tried on tokens that they have not seen (`static_scales`), and take what is best there.
TOLERANCE = 1.1
# A rotation costs additions for every value: it is taken where it makes the error this much smaller, or the loss.
GAIN, GAIN_OF_LOSS = 1.05, 1.2
# A static recipe leaves an input dynamic that spikes where it makes the error so much smaller.
GAIN_OF_DYNAMIC = 4.0


def best(chooser: Chooser, site: Site, floats: dict[str, str]) -> Choice:
    """The smoothing and the rotation with the smallest error. ``floats``: linears that stay in float, by name."""
    balance = [(l, m) for l, m in site.balance if l.name not in floats]
    device = chooser.weight(balance[0][0]).device
    x_absmax = torch.zeros(3, site.channels, dtype=torch.float32, device=device)  # all tokens, either half
    w_absmax = torch.zeros(site.channels, dtype=torch.float32, device=device)
    for l, m in balance:
        index, stats = m.to(device), chooser.calibration.inputs[l.name]
        for largest, absmax in zip(x_absmax, (stats.absmax, *stats.halves), strict=True):
            largest.scatter_reduce_(0, index, absmax, "amax")
        w_absmax.scatter_reduce_(0, index, column_absmax(chooser.weight(l)), "amax")
    linears = [l for l, _ in balance]
    producer = chooser.linears.get(site.producer)
    touched = list(linears)
    absorbed = site.kind == "linear" and chooser.recipe.weight == "per_tensor"
    if absorbed and producer is not None and producer.name not in floats:
        touched.append(producer)  # its rows are divided by s, which one scale for all rows feels
    scales: dict[float | None, Tensor | None] = {None: None}
    for candidate in () if chooser.unsmoothed else chooser.recipe.alphas:
        every = torch.stack([smoothing_scale(x, w_absmax, candidate) for x in x_absmax])
        scales[candidate] = torch.where(site.free.to(device), every, 1.0)
    by_loss = chooser.felt.knows(touched)
    errors = {}
    for block in _blocks(chooser, linears):
        for dynamic in _ways(chooser, linears):
            for alpha, s in scales.items():
                checkpoint()
                choice = Choice(s, alpha, block, dynamic)
                errors[choice] = chooser.tried(site, choice, touched, by_loss) * _handicap(chooser, choice, by_loss)
    return min(errors, key=lambda c: errors[c])


def _blocks(chooser: Chooser, linears: list[Linear]) -> tuple[int | None, ...]:
    """The rotations to try: those of the recipe that the channels of all linears allow, and none where it is open."""
    fit = tuple(b for b in chooser.recipe.blocks if all(l.in_features % b == 0 for l in linears))
    return fit if fit and chooser.recipe.rotate != "auto" else (None, *fit)


def _ways(chooser: Chooser, linears: list[Linear]) -> tuple[bool, ...]:
    """Whether inputs may be dynamic: those of a static recipe that spike may be either."""
    spiky = any(spikes(chooser.calibration.inputs[l.name]) for l in linears)
    return (False, True) if chooser.static and spiky and chooser.recipe.spikes == "dynamic" else (False,)


def _handicap(chooser: Chooser, choice: Choice, by_loss: bool) -> float:
    gain = 1.0 if choice.block is None else GAIN_OF_LOSS if by_loss else GAIN
    gain *= GAIN_OF_DYNAMIC if choice.dynamic else 1.0
    return gain * (1.0 if choice.scales is not None or chooser.static else TOLERANCE)
