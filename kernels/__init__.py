"""Operators and kernels: schemas in `ops`, the plain-PyTorch integer reference in `reference`, CPUs' in `cpu`, GPUs' in `triton`."""
