"""Chaos: real worker processes and a real router, with faults at every step of a transfer; tokens must be those of the golden run."""
