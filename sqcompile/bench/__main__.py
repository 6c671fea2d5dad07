"""``python -m sqcompile.bench cpu``."""

import sys

from sqcompile.bench import cpu

BENCHMARKS = {"cpu": cpu.main}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHMARKS:
        sys.exit(f"usage: python -m sqcompile.bench {{{','.join(BENCHMARKS)}}} [options]")
    BENCHMARKS[name](sys.argv[2:])


if __name__ == "__main__":
    main()
