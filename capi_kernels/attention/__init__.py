"""Attention over packed tokens with the rotary embedding of CAPI: within images, to contexts, and its weights alone."""

from capi_kernels.attention.masked_cross import masked_cross_attention, masked_cross_attention_kvpacked
from capi_kernels.attention.rotary import apply_rotary, rotary_tables
from capi_kernels.attention.visible import visible_attention, visible_attention_qkvpacked
from capi_kernels.attention.weights import cross_attention_weights

__all__ = [
    "apply_rotary",
    "cross_attention_weights",
    "masked_cross_attention",
    "masked_cross_attention_kvpacked",
    "rotary_tables",
    "visible_attention",
    "visible_attention_qkvpacked",
]
