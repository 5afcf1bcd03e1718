"""Attention over packed tokens with the rotary embedding of CAPI."""
