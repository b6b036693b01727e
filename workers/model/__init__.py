"""The ERNIE 4.5 model; beside workers.sampling the only room that knows tensors."""
