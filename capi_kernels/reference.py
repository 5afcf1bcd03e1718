"""The ops as mathematics: differentiable, in any floating type, mutating nothing.

These are the definitions. Every implementation in this package is tested against them in float64.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from capi_kernels._process_groups import resolve_group

SHIFT = 50.0  # The official code scales its exponentials by exp(50): it weighs them against eps.


class Potentials(NamedTuple):
    """The factors of Sinkhorn assignments: exp((logits - column_max) / temperature) * column * row."""

    column_max: Float[Tensor, "*slices prototypes"]
    column: Float[Tensor, "*slices prototypes"]
    row: Float[Tensor, "*slices images"]


class ClusteringHead(NamedTuple):
    """What the clustering head returns: its loss, and the Sinkhorn potentials that its targets are made of."""

    loss: Float[Tensor, ""]
    potentials: Potentials


class StudentLoss(NamedTuple):
    """The student's loss, and of its targets the mean entropy in nats and each one's most likely prototype."""

    loss: Float[Tensor, ""]
    target_entropy: Float[Tensor, ""]
    most_likely: Int[Tensor, " predicted"]


def _reduced(x: Tensor, op: ReduceOp.RedOpType, process_group: ProcessGroup | None) -> Tensor:
    if process_group is None:
        return x
    x = x.clone()
    all_reduce(x, op, process_group)
    return x


def sinkhorn_positionwise(
    logits: Float[Tensor, "*slices images prototypes"],
    n_iterations: int = 3,
    eps: float = 1e-8,
    *,
    temperature: float = 1.0,
    process_group: ProcessGroup | Literal["world"] | None = "world",
) -> Float[Tensor, "*slices images prototypes"]:
    """M = exp(logits / temperature - max + 50); then M <- M / (column sums + eps), M <- M / (row sums + eps), in turn.

    Gradients are those of one process: reductions over a group pass none.
    """
    process_group = resolve_group(process_group)
    scaled = logits / temperature
    column_max = _reduced(scaled.amax(-2, keepdim=True), ReduceOp.MAX, process_group)
    shift = 0.0 if logits.dtype == torch.float16 else SHIFT
    M = torch.exp(scaled - column_max + shift)
    for _ in range(n_iterations):
        M = M / (_reduced(M.sum(-2, keepdim=True), ReduceOp.SUM, process_group) + eps)
        M = M / (M.sum(-1, keepdim=True) + eps)
    return M


def sinkhorn_potentials(
    logits: Float[Tensor, "*slices images prototypes"],
    n_iterations: int = 3,
    eps: float = 1e-8,
    *,
    temperature: float = 1.0,
    process_group: ProcessGroup | Literal["world"] | None = "world",
) -> Potentials:
    """The potentials of `sinkhorn_positionwise`: c <- c / (c S + eps) with S = sum_i a_i E_ik, a <- a / (a R + eps)."""
    process_group = resolve_group(process_group)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column_max = _reduced(logits.amax(-2), ReduceOp.MAX, process_group)
    E = torch.exp((logits - column_max.unsqueeze(-2)) / temperature)
    column = torch.full_like(column_max, SHIFT).exp()
    row = torch.ones_like(E[..., 0])
    for _ in range(n_iterations):
        S = _reduced(torch.einsum("...ik,...i->...k", E, row), ReduceOp.SUM, process_group)
        column = column / (column * S + eps)
        R = torch.einsum("...ik,...k->...i", E, column)
        row = row / (row * R + eps)
    return Potentials(column_max, column, row)


def assignments_from_potentials(
    logits: Float[Tensor, "*slices images prototypes"] | Float[Tensor, "selected prototypes"],
    potentials: Potentials,
    rows: Int[Tensor, " selected"] | None = None,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*rows prototypes"]:
    """exp((logits - column_max) / temperature) * column * row of all rows, or of image * positions + position each.

    Logits [selected, prototypes] are those of the chosen rows themselves.
    """
    column_max, column, row = potentials
    column_max, column, row = column_max.unsqueeze(-2), column.unsqueeze(-2), row.unsqueeze(-1)
    if rows is not None:
        image, position = rows // len(row), rows % len(row)
        column_max, column, row = column_max[position, 0], column[position, 0], row[position, image]
        logits = logits[position, image] if logits.ndim == 3 else logits
    return (torch.exp((logits.to(column.dtype) - column_max) / temperature) * column * row).to(logits.dtype)


def _clustering_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    features = F.normalize(features.detach(), dim=-1, eps=1e-7)
    logits = F.linear(features, weight.to(features.dtype), None if bias is None else bias.to(features.dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def clustering_head(
    features: Float[Tensor, "positions images dim"],
    weight: Float[Tensor, "prototypes dim"],
    bias: Float[Tensor, " prototypes"] | None,
    *,
    target_temperature: float = 0.06,
    prediction_temperature: float = 0.12,
    n_iterations: int = 3,
    eps: float = 1e-8,
    positionwise: bool = True,
    position_chunk: int | None = None,
    n_scored: int | None = None,
    process_group: ProcessGroup | Literal["world"] | None = "world",
) -> ClusteringHead:
    """Cross-entropy between a linear layer's logits on L2-normalised features and their own Sinkhorn assignment.

    Of the first `n_scored` images; the others are balanced with them.
    """
    logits = _clustering_logits(features, weight, bias)
    slices = logits.detach() if positionwise else logits.detach().flatten(0, 1)
    options = {"temperature": target_temperature, "process_group": process_group}
    potentials = sinkhorn_potentials(slices, n_iterations, eps, **options)
    targets = sinkhorn_positionwise(slices, n_iterations, eps, **options).view_as(logits)
    losses = -(targets * F.log_softmax(logits / prediction_temperature, dim=-1)).sum(-1)
    loss = losses[:, :n_scored].mean()
    if not positionwise:  # Every position has the columns of all.
        column_max, column = (x.expand(len(logits), -1) for x in potentials[:2])
        potentials = Potentials(column_max, column, potentials.row.view(logits.shape[:2]))
    return ClusteringHead(loss, potentials)


def clustering_targets(
    features: Float[Tensor, "selected dim"],
    weight: Float[Tensor, "prototypes dim"],
    bias: Float[Tensor, " prototypes"] | None,
    potentials: Potentials,
    rows: Int[Tensor, " selected"],
    *,
    target_temperature: float = 0.06,
) -> Float[Tensor, "selected prototypes"]:
    """What `clustering_head` balanced of the rows image * positions + position, made of their features alone."""
    logits = _clustering_logits(features, weight, bias)
    return assignments_from_potentials(logits, potentials, rows, temperature=target_temperature).detach()


def student_loss(
    logits: Float[Tensor, "predicted prototypes"],
    targets: Float[Tensor, "predicted prototypes"],
    temperature: float = 0.12,
) -> Float[Tensor, ""]:
    """Mean over predictions of -sum_k target_k log softmax(logits / temperature)_k."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits, targets = logits.to(wide), targets.to(wide)
    return -(targets.detach() * F.log_softmax(logits / temperature, dim=-1)).sum(-1).mean()


def student_loss_with_statistics(
    logits: Float[Tensor, "predicted prototypes"],
    targets: Float[Tensor, "predicted prototypes"],
    temperature: float = 0.12,
) -> StudentLoss:
    """The loss, mean over predictions of -sum_k target_k log target_k, and argmax_k target_k."""
    loss = student_loss(logits, targets, temperature)
    targets = targets.detach().to(loss.dtype)
    return StudentLoss(loss, -torch.xlogy(targets, targets).sum(-1).mean(), targets.argmax(-1))


def rotary_tables(
    coords: Float[Tensor, "tokens 2"], freqs: Float[Tensor, "2 head_dim"]
) -> tuple[Float[Tensor, "tokens head_dim"], Float[Tensor, "tokens head_dim"]]:
    """cos and sin of coords @ freqs, formed in at least float32 whatever autocast says."""
    dtype = torch.promote_types(coords.dtype, torch.float32)
    row, column = coords.to(dtype).unsqueeze(-1).unbind(-2)
    angle = row * freqs[0].to(dtype) + column * freqs[1].to(dtype)
    return angle.cos(), angle.sin()


def apply_rotary(
    x: Float[Tensor, "tokens heads head_dim"],
    cos: Float[Tensor, "tokens head_dim"],
    sin: Float[Tensor, "tokens head_dim"],
) -> Float[Tensor, "tokens heads head_dim"]:
    """x * cos + rotate_half(x) * sin with rotate_half(x) = (-x2, x1) on the halves of a head."""
    x1, x2 = x.chunk(2, dim=-1)
    rotated = x * cos.unsqueeze(1) + torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(1)
    return rotated.to(x.dtype)


def _padded(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> tuple[Tensor, Tensor]:
    """[groups, max_seqlen]: the token in each place (`tokens` where there is none), and whether there is one."""
    place = cu_seqlens[:-1, None].long() + torch.arange(max_seqlen, device=cu_seqlens.device)
    mask = place < cu_seqlens[1:, None]
    return place.where(mask, tokens), mask


def _attention_weights(
    q: Float[Tensor, "queries heads head_dim"],
    k: Float[Tensor, "context heads head_dim"],
    q_cos: Float[Tensor, "queries head_dim"] | None,
    q_sin: Float[Tensor, "queries head_dim"] | None,
    k_cos: Float[Tensor, "context head_dim"] | None,
    k_sin: Float[Tensor, "context head_dim"] | None,
    cu_seqlens_q: Int[Tensor, " groups_plus_1"],
    cu_seqlens_k: Int[Tensor, " contexts_plus_1"],
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    kv_index: Int[Tensor, " groups"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "groups heads max_seqlen_q max_seqlen_k"]:
    """`cross_attention_weights` in float32 or wider."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q_cos is not None:
        q = apply_rotary(q, q_cos, q_sin)
    if k_cos is not None:
        k = apply_rotary(k, k_cos, k_sin)
    place_q, mask_q = _padded(cu_seqlens_q, max_seqlen_q, q.shape[0])
    place_k, mask_k = _padded(cu_seqlens_k, max_seqlen_k, k.shape[0])
    if kv_index is not None:
        place_k, mask_k = place_k[kv_index], mask_k[kv_index]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = (F.pad(x.to(wide), (0, 0, 0, 0, 0, 1)) for x in (q, k))  # a last token of zeros, for padding
    scores = torch.einsum("gqhd,gkhd->ghqk", q[place_q], k[place_k]) * scale
    # A finite score for padding: -inf would give NaN in a group without keys.
    weights = scores.masked_fill(~mask_k[:, None, None, :], torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~(mask_q[:, None, :, None] & mask_k[:, None, None, :]), 0)


def cross_attention_weights(
    q: Float[Tensor, "queries heads head_dim"],
    k: Float[Tensor, "context heads head_dim"],
    q_cos: Float[Tensor, "queries head_dim"] | None,
    q_sin: Float[Tensor, "queries head_dim"] | None,
    k_cos: Float[Tensor, "context head_dim"] | None,
    k_sin: Float[Tensor, "context head_dim"] | None,
    cu_seqlens_q: Int[Tensor, " groups_plus_1"],
    cu_seqlens_k: Int[Tensor, " contexts_plus_1"],
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    kv_index: Int[Tensor, " groups"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "groups heads max_seqlen_q max_seqlen_k"]:
    """P_ij = softmax_j(rope(q_i) . rope(k_j) scale) over the tokens j of the context that i's group reads, padded.

    rope gives what `apply_rotary` does, in the type of the tokens; scores and softmax are in float32 or wider.
    """
    tables, cu_seqlens = (q_cos, q_sin, k_cos, k_sin), (cu_seqlens_q, cu_seqlens_k)
    weights = _attention_weights(q, k, *tables, *cu_seqlens, max_seqlen_q, max_seqlen_k, kv_index=kv_index, scale=scale)
    return weights.to(q.dtype)


def masked_cross_attention(
    q: Float[Tensor, "queries heads head_dim"],
    k: Float[Tensor, "context heads head_dim"],
    v: Float[Tensor, "context heads head_dim"],
    q_cos: Float[Tensor, "queries head_dim"] | None,
    q_sin: Float[Tensor, "queries head_dim"] | None,
    k_cos: Float[Tensor, "context head_dim"] | None,
    k_sin: Float[Tensor, "context head_dim"] | None,
    cu_seqlens_q: Int[Tensor, " groups_plus_1"],
    cu_seqlens_k: Int[Tensor, " contexts_plus_1"],
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    kv_index: Int[Tensor, " groups"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "queries heads head_dim"]:
    """o_i = sum_j softmax_j(rope(q_i) . rope(k_j) scale) v_j over the tokens j of the context that i's group reads.

    rope gives what `apply_rotary` does, in the type of the tokens; scores, softmax and sum are in float32 or wider, and
    the sum is rounded once.
    """
    tables, cu_seqlens = (q_cos, q_sin, k_cos, k_sin), (cu_seqlens_q, cu_seqlens_k)
    weights = _attention_weights(q, k, *tables, *cu_seqlens, max_seqlen_q, max_seqlen_k, kv_index=kv_index, scale=scale)
    place_k, _ = _padded(cu_seqlens_k, max_seqlen_k, k.shape[0])
    if kv_index is not None:
        place_k = place_k[kv_index]
    v = F.pad(v.to(weights.dtype), (0, 0, 0, 0, 0, 1))
    padded = torch.einsum("ghqk,gkhd->gqhd", weights, v[place_k])
    token = torch.arange(q.shape[0], device=q.device)
    group = torch.searchsorted(cu_seqlens_q, token, right=True) - 1
    return padded[group, token - cu_seqlens_q[group]].to(q.dtype)


def visible_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k: Float[Tensor, "tokens heads head_dim"],
    v: Float[Tensor, "tokens heads head_dim"],
    cos: Float[Tensor, "tokens head_dim"] | None,
    sin: Float[Tensor, "tokens head_dim"] | None,
    cu_seqlens: Int[Tensor, " images_plus_1"],
    max_seqlen: int,
    *,
    scale: float | None = None,
) -> Float[Tensor, "tokens heads head_dim"]:
    """o_i = sum_j softmax_j(rope(q_i) . rope(k_j) scale) v_j over the tokens j of i's image."""
    return masked_cross_attention(
        q, k, v, cos, sin, cos, sin, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale
    )
