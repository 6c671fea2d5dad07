"""Kernels that go through rows and quantize them: after a norm, after an activation, and alone."""
