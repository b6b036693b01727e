"""Bookkeeping of KV cache blocks; integers only, no tensors."""
