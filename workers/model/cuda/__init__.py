"""The model on a CUDA device: Triton kernels, grouped experts, CUDA graphs."""
