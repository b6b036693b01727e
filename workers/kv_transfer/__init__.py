"""Moves KV cache blocks from a prefill worker to a decode worker."""
