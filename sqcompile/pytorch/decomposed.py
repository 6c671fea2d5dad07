"""decomposed: the operators that PyTorch's own quantizers write. Importing their module registers them.

name                      what for                                                                   tried on
quantized_decomposed      quantize and dequantize per tensor, per channel and per token              2.11, 2.13
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed

quantized_decomposed = torch.ops.quantized_decomposed
