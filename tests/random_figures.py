"""Figures of many random modules, of both generators: python tests/random_figures.py FIRST LAST, seeds FIRST to LAST - 1."""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter

import torch
from random_checks import Found, examine, loss, wrong
from random_programs import wrong_fold


def print_figures(found: dict[int, Found], folds: dict[int, float | None]) -> None:
    """Of examined random blocks, and of folds of the first generator's modules, by seed."""
    for seed, f in found.items():
        if why := wrong(f) or loss(f):
            print(f"seed {seed}: {why}")
    compiled = [f for f in found.values() if not f.refused]
    refused = Counter(re.sub(r"\d+", "N", f.refused)[:160] for f in found.values() if f.refused)
    print(f"{len(found)} models of random blocks, {len(compiled)} compiled, {sum(refused.values())} refused")
    for reason, n in refused.most_common():
        print(f"  {n} x {reason}")
    print(f"worst fold {max(f.fold for f in found.values() if f.fold == f.fold):.1e}")
    print(f"worst difference of compiled and quantized {max((f.compiled for f in compiled), default=0.0):.1e}")
    for kind, static in (("dynamic", False), ("static", True)):
        gains = sorted(f.gain for f in compiled if f.static == static)
        if gains:
            below = sum(g < -1.0 for g in gains)
            median = gains[len(gains) // 2]
            print(
                f"{kind} scales: {len(gains)} models, {below} lose more than 1 dB, worst {gains[0]:.2f}, median {median:.2f}"
            )
    errors = [e for e in folds.values() if e is not None]
    print(f"{len(folds)} random programs, {len(errors)} folded, worst {max(errors, default=0.0):.1e}")


def main(first: int, last: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found, folds = {}, {}
    for seed in range(first, last):
        try:
            found[seed], folds[seed] = examine(seed), wrong_fold(seed)
        except Exception:
            print(f"seed {seed}")
            raise
    print_figures(found, folds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
