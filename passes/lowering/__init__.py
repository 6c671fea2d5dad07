"""lower: quantize -> GEMM -> dequantize becomes kernels' operators, fused for GPUs, cut into regions for the compiler."""
