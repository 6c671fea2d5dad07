"""``python -m sqcompile.bench``, followed by the name of one of `BENCHMARKS`."""

import sys

from sqcompile.bench import attention, cpu, cpu_peers, generate, gpu, large, latency, launch, parallel, speedup, tools

BENCHMARKS = {
    "cpu": cpu.main,
    "cpu-peers": cpu_peers.main,
    "compile": latency.main,
    "gpu": gpu.main,
    "attention": attention.main,
    "generate": generate.main,
    "large": large.main,
    "launch": launch.main,
    "parallel": parallel.main,
    "speedup": speedup.main,
    "tools": tools.main,
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in BENCHMARKS:
        sys.exit(f"usage: python -m sqcompile.bench {{{','.join(BENCHMARKS)}}} [options]")
    BENCHMARKS[argv[0]](argv[1:])


if __name__ == "__main__":
    main()
