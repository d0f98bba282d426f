"""CUDA kernels: what needs clusters of thread blocks, which Triton has no words for."""
