"""Benchmarks: `python -m pytest benchmarks/ --benchmark-only`."""
