"""Attention in Triton: INT8 and half precision, lists of a mask's blocks, splits of long keys."""
