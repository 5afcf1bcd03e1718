"""Frozen features put to use: k nearest neighbours, probes, and the scores of what they predict.

`python -m capi.evaluate ENCODER ...` prints the table of held-out scenes of each encoder.
"""

from capi.evaluate.command import main
from capi.evaluate.knn import knn_predict
from capi.evaluate.labelled import open_labelled
from capi.evaluate.protocol import evaluate_labelled
from capi.evaluate.scores import accuracy, mean_iou, patch_labels
from capi.evaluate.synthetic import evaluate_synthetic, extract_features, format_table

__all__ = [
    "accuracy",
    "evaluate_labelled",
    "evaluate_synthetic",
    "extract_features",
    "format_table",
    "knn_predict",
    "main",
    "mean_iou",
    "open_labelled",
    "patch_labels",
]
