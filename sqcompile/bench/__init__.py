"""Benchmarks: ``python -m sqcompile.bench cpu``. Medians of interleaved runs; ratios within one run."""
