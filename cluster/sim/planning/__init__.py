"""Answers how many workers a load needs, in which layout and split, by simulating it."""
