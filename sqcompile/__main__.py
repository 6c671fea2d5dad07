"""``sqcompile demo``, ``sqcompile show`` and ``sqcompile bench``, also as ``python -m sqcompile``."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line: imports a command only when it is asked for."""
    name, rest = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name == "demo":
        from sqcompile.demo import main as demo

        demo(rest)
    elif name == "show":
        from sqcompile.show.__main__ import main as show

        show(rest)
    elif name == "bench":
        from sqcompile.bench.__main__ import main as bench

        bench(rest)
    else:
        sys.exit("usage: sqcompile {demo,show,bench} [options]")


if __name__ == "__main__":
    main()
