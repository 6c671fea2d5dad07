"""Triton INT8 kernels for NVIDIA GPUs. Importing this package imports nothing; its modules need `triton`.

    rows/quantize.py            x -> int8, Δ: per token, per tensor, static
    rows/norm.py                (residual +) RMSNorm or LayerNorm -> int8, Δ
    rows/act.py                 act(gate) · up -> int8, Δ
    gemm/int8_gemm.py           int8 · int8 -> int32 -> Δx Δw, bias, activation, residual -> float or int8
    gemm/grouped.py             the same product for the experts of a mixture
    gemm/tiles.py               which tile sizes a GEMM of a shape runs with: shipped tables, else a rule; never tuned at run time
    gemm/tune.py                makes such a table: ``python -m sqcompile.kernels.triton.gemm.tune --out FILE``
    all_reduce.py               sums of several GPUs, which write to each other's memory
    attention/int8_attention.py attention in INT8 and in half precision

Every function here is compared with `sqcompile.kernels.reference`; `gemm/dry.py` compiles them without a GPU.
"""
