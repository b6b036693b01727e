"""Tenants of a cluster: their file, their keys in the store, and what routers share of their allowances."""
