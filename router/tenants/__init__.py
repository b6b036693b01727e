"""Whose request it is, and what its tenant may use: keys, rations, usage."""
