"""Keeps the bytes of evicted prefix blocks in host memory and on disk."""
