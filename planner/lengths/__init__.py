"""Sequences of different lengths in one step: which go to which group of ranks."""
