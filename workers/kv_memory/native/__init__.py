"""Checksums in C++."""
