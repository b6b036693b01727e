"""The model as C++ kernels, built ahead or compiled at first use; the PyTorch model beside it is their reference and their fallback."""
