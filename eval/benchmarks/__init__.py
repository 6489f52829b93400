"""Benchmarks: what a sample is, and the folders that hold them; `conf/benchmark/NAME.yaml` names a class of these."""
