"""Assigns requests to workers and speaks HTTP to clients; knows no Ray."""
