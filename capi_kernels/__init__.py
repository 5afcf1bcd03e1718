"""The ops of CAPI: position-wise Sinkhorn, both heads' losses, and attention over packed tokens with 2-D rotary."""

from capi_kernels import reference
from capi_kernels.attention import (
    apply_rotary,
    cross_attention_weights,
    masked_cross_attention,
    masked_cross_attention_kvpacked,
    rotary_tables,
    visible_attention,
    visible_attention_qkvpacked,
)
from capi_kernels.clustering import clustering_head, clustering_targets
from capi_kernels.reference import ClusteringHead, Potentials, TargetRows
from capi_kernels.sinkhorn import assignments_from_potentials, sinkhorn_positionwise, sinkhorn_potentials
from capi_kernels.student_loss import student_loss

__version__ = "0.1.0"

__all__ = [
    "ClusteringHead",
    "Potentials",
    "TargetRows",
    "apply_rotary",
    "assignments_from_potentials",
    "clustering_head",
    "clustering_targets",
    "cross_attention_weights",
    "masked_cross_attention",
    "masked_cross_attention_kvpacked",
    "reference",
    "rotary_tables",
    "sinkhorn_positionwise",
    "sinkhorn_potentials",
    "student_loss",
    "visible_attention",
    "visible_attention_qkvpacked",
]
