"""``sqcompile demo``, ``show``, ``bench`` and ``tune``, also as ``python -m sqcompile``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "demo": "sqcompile.demo",
    "show": "sqcompile.show.__main__",
    "bench": "sqcompile.bench.__main__",
    "tune": "sqcompile.kernels.triton.gemm.tune",
}


def main() -> None:
    """The command line: imports a command only when it is asked for."""
    name, rest = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name not in COMMANDS:
        sys.exit(f"usage: sqcompile {{{','.join(COMMANDS)}}} [options]")
    importlib.import_module(COMMANDS[name]).main(rest)


if __name__ == "__main__":
    main()
