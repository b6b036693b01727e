"""Policies that pick the workers for a request."""
