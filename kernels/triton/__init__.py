"""Triton INT8 kernels for NVIDIA GPUs. Importing this package imports nothing; its modules need `triton`.

    quantize.py   x -> int8, Δ: per token, per tensor, static
    norm.py       (residual +) RMSNorm or LayerNorm -> int8, Δ
    act.py        act(gate) · up -> int8, Δ
    gemm.py       int8 · int8 -> int32 -> Δx Δw, bias, activation, residual -> float or int8
    grouped.py    the same product for the experts of a mixture
    tiles.py      which tile sizes a GEMM of a shape runs with: shipped tables, else a rule; never tuned at run time
    tune.py       makes such a table: ``python -m sqcompile.kernels.triton.tune --out FILE``

Every function here is compared with `sqcompile.kernels.reference`; `dry.py` compiles them without a GPU.
"""
