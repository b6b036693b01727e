"""Grammars: what the output of a constrained request may be."""
