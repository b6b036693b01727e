"""The ERNIE 4.5 model in PyTorch; the only room that knows tensors."""
