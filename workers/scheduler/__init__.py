"""Decides, step by step, which tokens of which sequences run; integers only."""
