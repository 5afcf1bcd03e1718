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
from capi_kernels.heads.clustering_head import clustering_head
from capi_kernels.heads.clustering_targets import clustering_targets
from capi_kernels.heads.student_loss import student_loss, student_loss_with_statistics
from capi_kernels.reference import ClusteringHead, Potentials, StudentLoss
from capi_kernels.sinkhorn.operation import assignments_from_potentials, sinkhorn_positionwise, sinkhorn_potentials

__version__ = "0.1.0"

__all__ = [
    "ClusteringHead",
    "Potentials",
    "StudentLoss",
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
    "student_loss_with_statistics",
    "visible_attention",
    "visible_attention_qkvpacked",
]
