"""Reads a checkpoint folder: its dimensions and its tensors."""
