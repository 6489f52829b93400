"""Evaluation: benchmarks, the run that asks a model every question, its metrics and its files."""
