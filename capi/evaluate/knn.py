"""Predictions by nearest neighbours."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from capi.evaluate.scores import classes_of


def knn_predict(
    bank: Float[Tensor, "bank dim"],
    bank_labels: Integer[Tensor, "bank"],
    queries: Float[Tensor, "queries dim"],
    n_classes: int,
    *,
    k: int = 10,
    temperature: float = 0.07,
) -> Int[Tensor, "queries"]:
    """argmax_c of the sum of exp(cosine similarity / temperature) over those of the k nearest that are of class c.

    The weighted vote of Wu et al. (arXiv 1805.01978), the usual measure of frozen features.

    Raises:
        ValueError: a label that is no class, no labelled item in the bank, or k below 1.
    """
    labels, labelled = classes_of(bank_labels, n_classes)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not labelled.any():
        raise ValueError(f"the bank must hold at least one labelled item, got none of {len(labels)}")
    bank, labels = F.normalize(bank[labelled], dim=-1), labels[labelled]
    classes = torch.arange(n_classes, device=labels.device)
    predictions = []
    for chunk in F.normalize(queries, dim=-1).split(1024):
        similarities, neighbours = (chunk @ bank.T).topk(min(k, len(bank)), dim=-1)
        weights = ((similarities - 1) / temperature).exp()
        votes = labels[neighbours][..., None] == classes
        predictions.append((weights[..., None] * votes).sum(dim=1).argmax(dim=-1))
    return torch.cat(predictions)
