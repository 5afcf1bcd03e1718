"""Trains CAPI encoders and loads them for their features."""
