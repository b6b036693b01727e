"""Assembles routers and workers into a cluster with Ray; owns the CLI."""
