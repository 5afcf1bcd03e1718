"""Predictions by the nearest neighbours: exact, some queries and some of the bank at a time, on the bank's device."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from capi.evaluate.scores import classes_of

Distance = Literal["cosine", "L2"]

_QUERIES, _BANK = 1024, 2**18
"""Whose similarities are in memory at a time: 1 GiB."""
_EPS = 1e-12


def nearest(
    bank: Float[Tensor, "bank dim"],
    queries: Float[Tensor, "queries dim"],
    k: int,
    distance: Distance = "cosine",
) -> tuple[Float[Tensor, "queries k"], Int[Tensor, "queries k"]]:
    """Similarity and place of the min(k, bank) nearest of the bank, the nearest first.

    Similar is b.q / (|b| |q|) or, for L2, b.q - |b|^2 / 2, which falls as the distance grows.
    """
    # No copy of the bank, which may fill half of the memory.
    lengths = torch.linalg.vector_norm(bank, dim=-1).clamp_min(_EPS)
    if distance == "cosine":
        queries = F.normalize(queries, dim=-1, eps=_EPS)
    similarities, places = [], []
    for chunk in queries.to(bank.device).split(_QUERIES):
        best: tuple[Tensor, ...] = ()
        for start in range(0, len(bank), _BANK):
            part = bank[start : start + _BANK]
            length = lengths[start : start + _BANK]
            similar = chunk @ part.T
            similar = similar.div_(length) if distance == "cosine" else similar.sub_(length.square() / 2)
            found, place = similar.topk(min(k, len(part)), dim=-1)
            place = place + start
            if best:
                found, place = torch.cat([best[0], found], dim=1), torch.cat([best[1], place], dim=1)
                found, order = found.topk(min(k, found.shape[1]), dim=-1)
                place = place.gather(1, order)
            best = found, place
        similarities.append(best[0])
        places.append(best[1])
    return torch.cat(similarities), torch.cat(places)


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
    labels = labels[labelled]
    similarities, neighbours = nearest(bank[labelled], queries, k)
    # exp of what lies below the nearest one: of a similarity alone it would underflow at low temperatures.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), n_classes)
    for weight, neighbour in zip(weights.T, neighbours.T, strict=True):
        votes[torch.arange(len(votes), device=votes.device), labels[neighbour]] += weight
    return votes.argmax(dim=-1)
