"""The model on the CPU: the Runner of a whole model, and a rank's part of one; on the C++ kernels, else with PyTorch."""
