"""Linear and attentive probes: a classifier for every pair of learning rate and weight decay, all trained at once.

The parameters of all stand in one tensor each, whose first axis is the probe.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

BETAS, _EPS = (0.9, 0.95), 1e-8
_INIT_STD = 0.02
_HEAD_DIM = 64

Parameters = dict[str, Tensor]
Batch = Callable[[Int[Tensor, "batch"], int], Float[Tensor, "batch *tokens dim"]]
"""Features of images, by their places and the number of the epoch, or -1 where nothing is trained."""


@dataclass(frozen=True)
class Grid:
    """What the probes are trained with; the defaults are the authors'."""

    learning_rates: Sequence[float] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
    """For batches of 256; in proportion for others."""
    weight_decays: Sequence[float] = (5e-4, 1e-3, 5e-2)
    """Of all but biases."""
    iterations: int = 12_500
    """Of which a tenth is a linear warm-up; a cosine to zero follows."""
    batch_size: int = 128

    def pairs(self) -> list[tuple[float, float]]:
        return list(product(self.learning_rates, self.weight_decays))


def linear_parameters(dim: int, n_classes: int, n_probes: int, generator: torch.Generator) -> Parameters:
    return {
        "weight": _truncated_normal((n_probes, dim, n_classes), generator),
        "bias": torch.zeros(n_probes, 1, n_classes),
    }


def linear_logits(parameters: Parameters, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "probes batch classes"]:
    """x W + b."""
    weight, bias = parameters["weight"], parameters["bias"]
    # One product for all probes.
    return (x @ weight.permute(1, 0, 2).flatten(1)).unflatten(1, (len(weight), -1)).transpose(0, 1) + bias


def attentive_parameters(dim: int, n_classes: int, n_probes: int, generator: torch.Generator) -> Parameters:
    return {
        "query": _truncated_normal((n_probes, dim), generator),
        "key": _truncated_normal((n_probes, dim, dim), generator),
        "value": _truncated_normal((n_probes, dim, dim), generator),
        "value_bias": torch.zeros(n_probes, 1, dim),
        **linear_parameters(dim, n_classes, n_probes, generator),
    }


def attentive_logits(
    parameters: Parameters, x: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, "probes batch classes"]:
    """W sum_n softmax_n(q.(K x_n) / sqrt(d)) (V x_n + v) + b, by heads of d = 64 channels, or one head.

    As (K^T q).x_n and V sum_n(...) x_n, which is the same and spares keys and values of every token. A bias of the keys
    adds the same to all scores, which softmax does not see.
    """
    query, key, value = (parameters[name] for name in ("query", "key", "value"))
    n_heads = x.shape[-1] // _HEAD_DIM if x.shape[-1] % _HEAD_DIM == 0 else 1
    query, key, value = (rearrange(t, "... (h d) -> ... h d", h=n_heads) for t in (query, key, value))
    asked = torch.einsum("pihd,phd->iph", key, query) / math.sqrt(query.shape[-1])
    weights = (x @ asked.flatten(1)).softmax(dim=1)  # [batch, tokens, probes * heads]
    pooled = rearrange(weights.transpose(1, 2) @ x, "b (p h) i -> p h b i", h=n_heads)
    pooled = rearrange(pooled @ value.transpose(1, 2), "p h b d -> p b (h d)") + parameters["value_bias"]
    return pooled @ parameters["weight"] + parameters["bias"]


def _truncated_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=_INIT_STD, generator=generator)


KINDS = {"linear": (linear_parameters, linear_logits), "attentive": (attentive_parameters, attentive_logits)}


def train_probes(
    kind: str,
    batch: Batch,
    labels: Int[Tensor, "images"],
    n_classes: int,
    grid: Grid,
    watch: Callable[[], None] = lambda: None,
) -> Parameters:
    """Probes of `grid.pairs()`, trained by AdamW on cross-entropy on the labels' device; the same every time.

    `watch` is called before every step and may raise.
    """
    device, (make, logits_of) = labels.device, KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    dim = batch(torch.zeros(1, dtype=torch.int64, device=device), 0).shape[-1]
    parameters = make(dim, n_classes, len(grid.pairs()), generator)
    parameters = {name: tensor.to(device).requires_grad_() for name, tensor in parameters.items()}
    rates, decays = torch.tensor(grid.pairs(), device=device).T
    optimizer = _AdamW(parameters, rates * grid.batch_size / 256, decays)
    order = _orders(len(labels), grid.batch_size, generator)
    steps = tqdm(
        range(grid.iterations), desc=f"{kind} probes", unit="step", disable=None, dynamic_ncols=True, leave=False
    )
    for step in steps:
        watch()
        indices, epoch = next(order)
        indices = indices.to(device)
        logits = logits_of(parameters, batch(indices, epoch))
        target = labels[indices].expand(len(logits), -1)
        # Of every probe the mean over its batch: the probes' gradients do not meet.
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / len(indices)
        optimizer.step(torch.autograd.grad(loss, list(parameters.values())), _schedule(step, grid.iterations))
    return {name: tensor.detach() for name, tensor in parameters.items()}


def _orders(n: int, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, int]]:
    """Places of a batch and the epoch that its last one is of; an epoch's order follows the one before."""
    rest, epoch = torch.empty(0, dtype=torch.int64), -1
    while True:
        while len(rest) < batch_size:
            rest, epoch = torch.cat([rest, torch.randperm(n, generator=generator)]), epoch + 1
        yield rest[:batch_size], epoch
        rest = rest[batch_size:]


def _schedule(step: int, steps: int) -> float:
    """From 0 to 1 over the first tenth, then along a cosine back to 0."""
    warmup = steps // 10
    if step < warmup:
        return step / max(1, warmup - 1)
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup - 1))) / 2


class _AdamW:
    """torch.optim.AdamW with a learning rate and a weight decay for every probe, the first axis of the parameters."""

    def __init__(self, parameters: Parameters, rates: Float[Tensor, "probes"], decays: Float[Tensor, "probes"]):
        self._parameters, self._rates, self._decays, self._steps = parameters, rates, decays, 0
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters.values()]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], schedule: float) -> None:
        self._steps += 1
        for (name, p), (first, second), gradient in zip(
            self._parameters.items(), self._moments, gradients, strict=True
        ):
            rate, decay = (x.view(-1, *[1] * (p.ndim - 1)) for x in (schedule * self._rates, self._decays))
            if "bias" not in name:
                p.mul_(1 - rate * decay)
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            scale = (second / (1 - BETAS[1] ** self._steps)).sqrt_().add_(_EPS)
            p.sub_(rate / (1 - BETAS[0] ** self._steps) * first / scale)


@torch.no_grad()
def all_logits(
    kind: str, parameters: Parameters, batch: Batch, n_images: int
) -> Iterator[Float[Tensor, "probes images classes"]]:
    """Of each probe for the images, in their order, some at a time."""
    for chunk in torch.arange(n_images, device=parameters["weight"].device).split(256):
        yield KINDS[kind][1](parameters, batch(chunk, -1))


def predict(kind: str, parameters: Parameters, batch: Batch, n_images: int) -> Int[Tensor, "probes images"]:
    """The class that each probe finds likeliest for each of the images."""
    return torch.cat([logits.argmax(-1) for logits in all_logits(kind, parameters, batch, n_images)], dim=1)


def validate(
    kind: str, parameters: Parameters, batch: Batch, labels: Int[Tensor, "images"]
) -> tuple[Float[Tensor, "probes"], Float[Tensor, "probes"]]:
    """Accuracy and mean cross-entropy of each probe."""
    right, loss = [], []
    chunks = all_logits(kind, parameters, batch, len(labels))
    for logits, truth in zip(chunks, labels.split(256), strict=True):
        right.append(logits.argmax(-1) == truth)
        loss.append(F.cross_entropy(logits.transpose(1, 2), truth.expand(len(logits), -1), reduction="none"))
    return torch.cat(right, dim=1).double().mean(1), torch.cat(loss, dim=1).double().mean(1)
