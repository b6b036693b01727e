"""Measures what a simulation must know of a real worker: its steps, and what router, control plane and KV transfer add."""
