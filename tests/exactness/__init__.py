"""Pruning against oracles: the same model run in full, with what was dropped masked out of every layer."""
