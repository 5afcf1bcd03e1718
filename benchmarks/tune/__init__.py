"""Sweeps over configurations, run by hand on a GPU; what they choose is committed."""
