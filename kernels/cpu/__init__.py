"""INT8 kernels of CPUs: oneDNN's, and our own in C++."""
