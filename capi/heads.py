"""The heads: the student's cosine similarities to prototypes, and the teacher's online clustering."""

import logging

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from capi.config import ClusteringConfig
from capi.feature_queue import FeatureQueue
from capi_kernels import Potentials, clustering_head, clustering_targets

logger = logging.getLogger(__name__)


class WeightNormLinear(nn.Module):
    """x W^T with W = v g / (|v| + 1e-8), row by row."""

    def __init__(self, dim: int, n_prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(n_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(n_prototypes, dim))

    def weight(self) -> Float[Tensor, "prototypes dim"]:
        norm = self.weight_v.norm(dim=1, keepdim=True)
        return self.weight_v * (self.weight_g / (norm + 1e-8))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch prototypes"]:
        return F.linear(x, self.weight().to(x.dtype))


class PredictionHead(nn.Module):
    """The student's head: cosine similarities to the prototypes, scaled by g."""

    def __init__(self, dim: int, n_prototypes: int):
        super().__init__()
        self.last_layer = WeightNormLinear(dim, n_prototypes)

    def init_weights(self) -> "PredictionHead":
        nn.init.trunc_normal_(self.last_layer.weight_v, std=0.02)
        nn.init.ones_(self.last_layer.weight_g)
        return self

    def forward(self, x: Float[Tensor, "predicted dim"]) -> Float[Tensor, "predicted prototypes"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.last_layer(F.normalize(wide, dim=-1, eps=1e-12).to(x.dtype))


class OnlineClustering(nn.Module):
    """The teacher's head: a linear layer to the prototypes, trained on its own Sinkhorn-balanced assignment."""

    def __init__(self, dim: int, config: ClusteringConfig):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(dim, config.n_prototypes, bias=config.bias)
        self.queue: FeatureQueue | None = None
        self.images_of_queue = 0
        """Earlier images, of all ranks, that took part in the last balancing."""
        self.register_load_state_dict_pre_hook(OnlineClustering._fit_queue)

    def add_queue(self, n_positions: int, dtype: torch.dtype) -> None:
        """Has the last `clustering.queue_size` images balanced with those of a step, once there have been so many."""
        weight = self.layer.weight
        self.queue = FeatureQueue(self.config.queue_size, n_positions, weight.shape[1], dtype, weight.device)

    def init_weights(self) -> "OnlineClustering":
        nn.init.normal_(self.layer.weight)
        if self.layer.bias is not None:
            nn.init.zeros_(self.layer.bias)
        return self

    def forward(self, features: Float[Tensor, "images positions dim"]) -> tuple[Float[Tensor, ""], Potentials]:
        """The clustering loss over all patches, and the potentials of their assignments.

        Of a queue, the potentials of its share follow those of the batch, of which alone the loss is.
        """
        balanced, n_scored = features, None
        if self.queue is not None:
            share = self.queue.share()
            self.images_of_queue = 0 if share is None else self.config.queue_size
            if share is not None:
                balanced, n_scored = torch.cat([features, share]), len(features)
        out = clustering_head(
            balanced.transpose(0, 1),
            self.layer.weight,
            self.layer.bias,
            target_temperature=self.config.target_temperature,
            prediction_temperature=self.config.prediction_temperature,
            n_iterations=self.config.n_sinkhorn_iterations,
            positionwise=self.config.positionwise,
            n_scored=n_scored,
        )
        if self.queue is not None:
            self.queue.send(features)
        return out.loss, out.potentials

    @torch.no_grad()
    def follow(self, head: PredictionHead) -> None:
        """Takes over a student's head."""
        self.layer.weight.copy_(head.last_layer.weight())

    def store(self, finite: Bool[Tensor, ""]) -> None:
        """Puts the images of the last balancing into the queue, if there is one and the step is `finite`."""
        if self.queue is not None:
            self.queue.store(finite)

    def _fit_queue(self, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        """Has a queue begin anew where the saved one is of another size or none; the other way round it is left out."""
        prefix += "queue."
        saved = {name: tuple(x.shape) for name, x in state_dict.items() if name.startswith(prefix)}
        own = {} if self.queue is None else {prefix + name: x for name, x in self.queue.state_dict().items()}
        if saved == {name: tuple(x.shape) for name, x in own.items()}:
            return
        for name in saved:
            del state_dict[name]
        if self.queue is not None:
            self.queue.forget()
            state_dict |= own
            logger.info("the Sinkhorn queue of %d images begins empty", self.config.queue_size)

    def targets(
        self,
        features: Float[Tensor, "images positions dim"],
        potentials: Potentials,
        rows: Int[Tensor, "selected"],
        first_image: int = 0,
    ) -> Float[Tensor, "selected prototypes"]:
        """The assignments of the batch-flat `rows` of `features`, in their order.

        The potentials may be those of more images, of which the first of `features` is number `first_image`.
        """
        return clustering_targets(
            features.flatten(0, 1).index_select(0, rows),
            self.layer.weight,
            self.layer.bias,
            potentials,
            rows + first_image * features.shape[1],
            target_temperature=self.config.target_temperature,
        )
