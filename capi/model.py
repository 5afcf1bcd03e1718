"""The model: vision transformer student, predictor, prototype heads, and the teacher's online clustering.

Tokens are packed: the tokens of all images of a batch stand in one [tokens, dim] array, image after image, so that
images may keep different numbers of patches. State-dict keys are those of the authors' released code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from capi.config import ClusteringConfig, ModelConfig
from capi.masking import Masks, cumulative_lengths
from capi_kernels import clustering_head, masked_cross_attention, rotary_tables, visible_attention

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NORM_EPS = 1e-5
ROPE_MAX_FREQUENCY = 7.0  # periods over the side of an image
ROPE_MIN_FREQUENCY = 7e-4


def normalize_images(images: UInt8[Tensor, "images 3 height width"]) -> Float[Tensor, "images 3 height width"]:
    """Maps bytes to fp32 of ImageNet's mean 0 and standard deviation 1."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=images.device)[:, None, None]
    return (images / 255 - mean) / std


@dataclass(frozen=True)
class Packed:
    """Where the tokens of each image lie in a packed array, and where in the image they lie."""

    counts: tuple[int, ...]
    cu_seqlens: Int[Tensor, "images_plus_1"]
    coords: Float[Tensor, "tokens 2"]

    @property
    def max_seqlen(self) -> int:
        return max(self.counts, default=0)

    def subset(self, images: np.ndarray) -> tuple["Packed", Int[Tensor, "kept_tokens"]]:
        """The tokens of the chosen images alone, and their places in the whole array."""
        device = self.coords.device
        counts = tuple(self.counts[i] for i in images)
        if len(set(self.counts)) == 1:
            start = torch.from_numpy(images).to(device, non_blocking=True) * self.counts[0]
            tokens = (start[:, None] + torch.arange(self.counts[0], device=device)).reshape(-1)
        else:
            starts = np.concatenate([[0], np.cumsum(self.counts)])
            ranges = [np.arange(starts[i], starts[i + 1]) for i in images]
            tokens = torch.from_numpy(np.concatenate(ranges)).to(device, non_blocking=True)
        cu_seqlens = cumulative_lengths(counts).to(device, non_blocking=True)
        return Packed(counts, cu_seqlens, self.coords[tokens]), tokens


class Rope(nn.Module):
    """Frequencies of the two-dimensional rotary embedding, in radians over the image's side; never trained."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.freqs = nn.Parameter(torch.empty(2, head_dim), requires_grad=False)

    def init_weights(self) -> None:
        half = self.freqs.shape[1] // 2
        ratio = ROPE_MAX_FREQUENCY / ROPE_MIN_FREQUENCY
        frequencies = 2 * torch.pi * ROPE_MAX_FREQUENCY * ratio ** torch.linspace(0, -1, half // 2)
        self.freqs.zero_()
        self.freqs[0, :half] = frequencies.repeat(2)  # the row turns the first half of the channels
        self.freqs[1, half:] = frequencies.repeat(2)  # the column the second


class Attention(nn.Module):
    """Multi-head attention with rotary queries and keys, from tokens to themselves or to the encoder's output."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.rope = Rope(dim // num_heads)

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        packed: Packed,
        context: Float[Tensor, "context dim"] | None = None,
        context_packed: Packed | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        source = x if context is None else context
        q, k, v = (
            rearrange(tokens, "tokens (heads head_dim) -> tokens heads head_dim", heads=self.num_heads)
            for tokens in (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        )
        cos, sin = rotary_tables(packed.coords, self.rope.freqs)
        if context_packed is None:
            out = visible_attention(q, k, v, cos, sin, packed.cu_seqlens, packed.max_seqlen)
        else:
            out = masked_cross_attention(
                q,
                k,
                v,
                cos,
                sin,
                *rotary_tables(context_packed.coords, self.rope.freqs),
                packed.cu_seqlens,
                context_packed.cu_seqlens,
                packed.max_seqlen,
                context_packed.max_seqlen,
            )
        return self.proj(rearrange(out, "tokens heads head_dim -> tokens (heads head_dim)"))


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, with the weight in the type of x: mixed types would miss PyTorch's fused kernel."""

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        weight = self.weight.to(x.dtype) if self.elementwise_affine else None
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim, bias=False)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Residual(nn.Module):
    """x + fn(norm(x)); in training with drop-path, on a random subset of the images, re-weighted."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = RMSNorm(dim, eps=NORM_EPS)
        self.fn = fn


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.residual1 = Residual(dim, Attention(dim, num_heads))
        self.residual2 = Residual(dim, Mlp(dim))

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        packed: Packed,
        context: Float[Tensor, "context dim"] | None = None,
        context_packed: Packed | None = None,
        drop_path: "DropPath | None" = None,
    ) -> Float[Tensor, "tokens dim"]:
        attention, mlp = self.residual1, self.residual2
        if drop_path is None:
            x = x + attention.fn(attention.norm(x), packed, context, context_packed)
            return x + mlp.fn(mlp.norm(x))

        images, weight = drop_path.draw(len(packed.counts))
        kept, tokens = packed.subset(images)
        if context is not None and context_packed is not None:
            context_packed, context_tokens = context_packed.subset(images)
            context = context[context_tokens]
        out = attention.fn(attention.norm(x[tokens]), kept, context, context_packed)
        x = torch.index_add(x, 0, tokens, out.to(x.dtype), alpha=weight)

        images, weight = drop_path.draw(len(packed.counts))
        _, tokens = packed.subset(images)
        return torch.index_add(x, 0, tokens, mlp.fn(mlp.norm(x[tokens])).to(x.dtype), alpha=weight)


class DropPath:
    """Draws, on the host, which images a residual branch is computed for, and the weight that makes up for the rest."""

    def __init__(self, rate: float, rng: np.random.Generator):
        self.keep = 1 - rate
        self.rng = rng

    def draw(self, n_images: int) -> tuple[Int[np.ndarray, "kept"], float]:
        n_kept = max(int(n_images * self.keep), 1)
        return self.rng.permutation(n_images)[:n_kept], n_images / n_kept


class Transformer(nn.Module):
    def __init__(self, dim: int, num_heads: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))


class Backbone(nn.Module):
    """Encoder of visible patches and predictor of masked ones.

    Called on float images [images, 3, height, width] it is the evaluation forward; `predict` is what training needs.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, heads = config.embed_dim, config.num_heads
        if dim % heads or (dim // heads) % 4:
            raise ValueError(f"model.embed_dim / model.num_heads must be a multiple of 4, got {dim} / {heads}")
        if config.n_registers % 4:
            raise ValueError(f"model.n_registers must be a multiple of 4, got {config.n_registers}")
        if config.encoder_depth < 1 or config.predictor_depth < 1:
            depths = f"{config.encoder_depth} and {config.predictor_depth}"
            raise ValueError(f"model.encoder_depth and model.predictor_depth must be at least 1, got {depths}")
        self.config = config
        self.encoder = Transformer(dim, heads, config.encoder_depth)
        self.decoder = Transformer(dim, heads, config.predictor_depth)
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.registers = nn.Parameter(torch.empty(1, config.n_registers, dim))
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.enc_norm = RMSNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.dec_norm = RMSNorm(dim, eps=NORM_EPS, elementwise_affine=False)

    @torch.no_grad()
    def init_weights(self) -> "Backbone":
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.RMSNorm | nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, Rope):
                module.init_weights()
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.normal_(self.registers, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        return self

    def encode(
        self,
        images: Float[Tensor, "images 3 height width"],
        masks: Masks | None = None,
        drop_path: DropPath | None = None,
    ) -> tuple[Float[Tensor, "tokens dim"], Packed]:
        """Encodes registers and visible patches (all of them where there are no masks)."""
        grid = self._grid(images)
        n_images, n_tokens, n_registers = images.shape[0], grid[0] * grid[1], self.config.n_registers
        p = self.config.patch_size
        patches = rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=p, q=p)
        coords = _grid_coordinates(grid, images.device).repeat(n_images, 1)
        if masks is None:
            visible_counts: Sequence[int] = (n_tokens,) * n_images
        else:
            patches, coords = patches[masks.visible_indices], coords[masks.visible_indices]
            visible_counts = masks.visible_counts
        x = F.linear(patches, self.patch_embed.weight.flatten(1), self.patch_embed.bias)
        counts = tuple(n_registers + n for n in visible_counts)
        registers = self.registers.expand(n_images, -1, -1).to(x.dtype)
        if len(set(counts)) == 1:
            coords = coords.unflatten(0, (n_images, -1))
            low, high = coords.amin(1, keepdim=True), coords.amax(1, keepdim=True)
            register_coords = low + _register_coordinates(n_registers, images.device) * (high - low)
            coords = torch.cat([register_coords, coords], dim=1).flatten(0, 1)
            x = torch.cat([registers, x.unflatten(0, (n_images, -1))], dim=1).flatten(0, 1)
        else:
            x_parts, coords_parts = [], []
            edge = _register_coordinates(n_registers, images.device)
            chunks = zip(x.split(visible_counts), coords.split(visible_counts), registers, strict=True)
            for x_image, coords_image, registers_image in chunks:
                low, high = coords_image.amin(0), coords_image.amax(0)
                x_parts += [registers_image, x_image]
                coords_parts += [low + edge * (high - low), coords_image]
            x, coords = torch.cat(x_parts), torch.cat(coords_parts)
        packed = Packed(counts, cumulative_lengths(counts).to(x.device, non_blocking=True), coords)
        for block in self.encoder.blocks:
            x = block(x, packed, drop_path=drop_path)
        return self.enc_norm(x), packed

    def predict(
        self,
        images: Float[Tensor, "images 3 height width"],
        masks: Masks,
        drop_path: DropPath | None = None,
    ) -> Float[Tensor, "predicted dim"]:
        """Predicts the latents at `masks.predict_indices`, in their order, from the visible patches."""
        context, context_packed = self.encode(images, masks, drop_path)
        coords = _grid_coordinates(self._grid(images), images.device)
        coords = coords[masks.predict_indices % coords.shape[0]]
        packed = Packed(masks.predict_counts, masks.cu_predict, coords)
        x = self.mask_token.expand(coords.shape[0], -1).to(context.dtype)
        for block in self.decoder.blocks:
            x = block(x, packed, context, context_packed, drop_path)
        return self.dec_norm(x)

    def forward(
        self, images: Float[Tensor, "images 3 height width"]
    ) -> tuple[
        Float[Tensor, "images dim"],
        Float[Tensor, "images registers dim"],
        Float[Tensor, "images rows columns dim"],
    ]:
        """Features of whole images: a global vector, the registers, and a map of patch features.

        The global vector is the mean, over all positions, of what the predictor's first block says of them.
        """
        grid, n_images = self._grid(images), images.shape[0]
        context, context_packed = self.encode(images)
        coords = _grid_coordinates(grid, images.device).repeat(n_images, 1)
        counts = (grid[0] * grid[1],) * n_images
        packed = Packed(counts, cumulative_lengths(counts).to(images.device), coords)
        x = self.mask_token.expand(coords.shape[0], -1).to(context.dtype)
        predicted = self.dec_norm(self.decoder.blocks[0](x, packed, context, context_packed))
        features = context.unflatten(0, (n_images, -1))
        registers, patches = features.split([self.config.n_registers, counts[0]], dim=1)
        return predicted.unflatten(0, (n_images, -1)).mean(1), registers, patches.unflatten(1, grid)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        rows, columns = (side // self.config.patch_size for side in images.shape[-2:])
        if images.shape[-2:] != (rows * self.config.patch_size, columns * self.config.patch_size):
            raise ValueError(
                f"image sides must be multiples of the patch size {self.config.patch_size}, got {tuple(images.shape)}"
            )
        return rows, columns


def _grid_coordinates(grid: tuple[int, int], device: torch.device) -> Float[Tensor, "positions 2"]:
    """(row, column) of every patch, from 0 to 1."""
    rows, columns = (torch.linspace(0, 1, n, device=device) for n in grid)
    return torch.cartesian_prod(rows, columns)


def _register_coordinates(n: int, device: torch.device) -> Float[Tensor, "registers 2"]:
    """Points that walk the perimeter of the unit square."""
    step = torch.arange(n // 4, device=device) / max(n // 4, 1)
    zero, one = torch.zeros_like(step), torch.ones_like(step)
    sides = [(step, zero), (one, step), (1 - step, one), (zero, 1 - step)]
    return torch.cat([torch.stack(side, dim=1) for side in sides])


class WeightNormLinear(nn.Module):
    """x W^T with W = v g / (|v| + 1e-8), row by row."""

    def __init__(self, dim: int, n_prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(n_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(n_prototypes, dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch prototypes"]:
        norm = self.weight_v.norm(dim=1, keepdim=True)
        return F.linear(x, self.weight_v * (self.weight_g / (norm + 1e-8)))


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
        return self.last_layer(F.normalize(x, dim=-1, eps=1e-12))


class OnlineClustering(nn.Module):
    """The teacher's head: a linear layer to the prototypes, trained on its own Sinkhorn-balanced assignment."""

    def __init__(self, dim: int, config: ClusteringConfig):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(dim, config.n_prototypes)

    def init_weights(self) -> "OnlineClustering":
        nn.init.normal_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        return self

    def forward(
        self, features: Float[Tensor, "images positions dim"], rows: Int[Tensor, "selected"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "selected prototypes"]]:
        """The clustering loss over all patches, and the assignments of the batch-flat `rows`, in their order."""
        out = clustering_head(
            features.transpose(0, 1),
            self.layer.weight,
            self.layer.bias,
            rows,
            target_temperature=self.config.target_temperature,
            prediction_temperature=self.config.prediction_temperature,
            n_iterations=self.config.n_sinkhorn_iterations,
            positionwise=self.config.positionwise,
        )
        return out.loss, out.targets


class Student(nn.Module):
    def __init__(self, model: ModelConfig, n_prototypes: int):
        super().__init__()
        self.backbone = Backbone(model)
        self.head = PredictionHead(model.embed_dim, n_prototypes)

    def forward(
        self, images: Float[Tensor, "images 3 height width"], masks: Masks, drop_path: DropPath | None = None
    ) -> Float[Tensor, "predicted prototypes"]:
        """Logits of the prototypes at the predicted positions, in the order of `masks.predict_indices`."""
        return self.head(self.backbone.predict(images, masks, drop_path))


class CAPI(nn.Module):
    """Student, its exponential moving average (whose encoder is the teacher's), and the teacher's clustering."""

    def __init__(self, model: ModelConfig, clustering: ClusteringConfig):
        super().__init__()
        self.student = Student(model, clustering.n_prototypes)
        self.student_ema = Student(model, clustering.n_prototypes).requires_grad_(False)
        self.teacher = nn.ModuleDict({"head": OnlineClustering(model.embed_dim, clustering)})
        self.student_temperature = clustering.student_temperature

    def init_weights(self) -> "CAPI":
        self.student.backbone.init_weights()
        self.student.head.init_weights()
        self.teacher["head"].init_weights()
        self.student_ema.load_state_dict(self.student.state_dict())
        return self

    def cluster(
        self, images: Float[Tensor, "images 3 height width"], masks: Masks
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "predicted prototypes"]]:
        """The clustering loss over all patches, and the targets of the predicted ones."""
        with torch.no_grad():
            features, packed = self.student_ema.backbone.encode(images)
            features = features.unflatten(0, (len(packed.counts), -1))
            features = features[:, self.student_ema.backbone.config.n_registers :]
        return self.teacher["head"](features, masks.predict_indices)


def prediction_loss(
    logits: Float[Tensor, "predicted prototypes"],
    targets: Float[Tensor, "predicted prototypes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Mean over predictions of the cross-entropy -sum_k target_k log softmax(logits / temperature)_k, in fp32."""
    return -(targets.float() * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1).mean()


def target_entropy(targets: Float[Tensor, "predicted prototypes"]) -> Float[Tensor, ""]:
    """Mean entropy of the assignments, in nats."""
    return -torch.xlogy(targets.float(), targets.float()).sum(-1).mean()
