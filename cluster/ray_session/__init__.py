"""Starts or joins Ray, ends it again, and keeps Baton's differences from Ray's defaults in one place."""
