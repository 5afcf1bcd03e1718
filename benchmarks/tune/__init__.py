"""Sweeps over configurations of kernels on a GPU: what is worth trying, each checked, then timed."""
