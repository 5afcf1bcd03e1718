"""The model: vision transformer student, predictor, prototype heads, and the teacher's online clustering.

Tokens are packed: the tokens of all images of a batch stand in one [tokens, dim] array, image after image, so that
images may keep different numbers of patches. State-dict keys are those of the authors' released code.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from capi.casting import CastsWeights
from capi.config import ClusteringConfig, ModelConfig
from capi.coordinates import Coordinates, grid_coordinates, with_registers
from capi.drop_path import Branches, DropPath, TakeRows
from capi.masking import Masks
from capi.transformer import (
    NORM_EPS,
    CrossAttention,
    Packed,
    RMSNorm,
    Rope,
    SelfAttention,
    Transformer,
    pack,
)
from capi_kernels import Potentials, clustering_head, clustering_targets

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(
    images: Shaped[Tensor, "*images channels height width"],
) -> Float[Tensor, "*images 3 height width"]:
    """Maps bytes [..., 3, height, width] to fp32 of ImageNet's mean 0 and standard deviation 1.

    Raises:
        TypeError: the images are not uint8; of floats it cannot be told whether they reach to 1 or to 255.
        ValueError: they have not three channels.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of torch.uint8, with values from 0 to 255, got {got}")
    if images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"images must have the shape [..., 3, height, width], got {tuple(images.shape)}")
    mean, std = (_channels(values, images).unsqueeze(2) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std


class PatchEmbed(nn.Conv2d, CastsWeights):
    """The convolution as a linear map of the patches, so that those that nobody sees are not computed."""

    def stacks(self) -> tuple[tuple[nn.Parameter, ...], ...]:
        return ()  # Padded, the weight is no stack of parameters.

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _padded(self.weight.flatten(1).to(dtype)), self.bias.to(dtype)

    def forward(
        self, images: Shaped[Tensor, "images 3 height width"], indices: Int[Tensor, "visible"] | None = None
    ) -> Float[Tensor, "tokens dim"]:
        weight, bias = self.weights()
        p, q = self.kernel_size
        patches = rearrange(images, "b c (h p) (w q) -> (b h w) c (p q)", p=p, q=q)
        if indices is not None:
            patches = patches.index_select(0, indices)
        if patches.dtype == torch.uint8:
            patches = (patches / 255 - _channels(IMAGENET_MEAN, patches)) / _channels(IMAGENET_STD, patches)
        return F.linear(_padded(patches.flatten(1).to(weight.dtype)), weight, bias)


def _padded(x: Shaped[Tensor, "rows channels"]) -> Shaped[Tensor, "rows padded"]:
    """With zeros up to a multiple of eight channels: of a patch's 588 cuBLAS makes no fast product."""
    return F.pad(x, (0, -x.shape[1] % 8)) if x.shape[1] % 8 else x


class Backbone(nn.Module):
    """Encoder of visible patches and predictor of masked ones.

    Called on float images [images, 3, height, width] it is the evaluation forward; `predict` is what training needs.
    Images of bytes are normalised on the way (`normalize_images`), those that are float already are not.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        encoder, predictor = (config.embed_dim, config.num_heads), config.predictor_shape()
        for (dim, heads), names in (
            (encoder, "model.embed_dim / model.num_heads"),
            (predictor, "width / heads of the predictor"),
        ):
            if heads < 1 or dim % heads or (dim // heads) % 4:
                raise ValueError(f"{names} must be a multiple of 4, got {dim} / {heads}")
        if config.register_coordinates == "edge" and config.n_registers % 4:
            raise ValueError(f"model.n_registers must be a multiple of 4, got {config.n_registers}")
        if config.encoder_depth < 1 or config.predictor_depth < 1:
            depths = f"{config.encoder_depth} and {config.predictor_depth}"
            raise ValueError(f"model.encoder_depth and model.predictor_depth must be at least 1, got {depths}")
        layers = config.encoder_depth + 1
        if not -layers <= config.out_layer < layers:
            raise ValueError(f"model.out_layer must lie from {-layers} to {layers - 1}, got {config.out_layer}")
        dim, predictor_dim = config.embed_dim, predictor[0]
        self.config = config
        self.out_layer = config.out_layer % layers
        self.encoder = Transformer(*encoder, config.encoder_depth, SelfAttention)
        self.decoder = Transformer(*predictor, config.predictor_depth, CrossAttention, dim)
        self.mask_token = nn.Parameter(torch.empty(1, predictor_dim))
        self.registers = nn.Parameter(torch.empty(1, config.n_registers, dim))
        self.patch_embed = PatchEmbed(3, dim, kernel_size=config.patch_size, stride=config.patch_size)
        self._kept: dict[tuple[tuple[int, int], torch.device], Coordinates] = {}
        self.enc_norm = RMSNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.dec_norm = RMSNorm(predictor_dim, eps=NORM_EPS, elementwise_affine=False)

    @torch.no_grad()
    def init_weights(self) -> "Backbone":
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.RMSNorm | nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, Rope):
                module.init_weights(self.config.rope_max_frequency, self.config.rope_min_frequency)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.normal_(self.registers, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        return self

    def encode(
        self,
        images: Shaped[Tensor, "images 3 height width"],
        masks: Masks | None = None,
        branches: Branches | None = None,
        layer: int | None = None,
    ) -> tuple[Float[Tensor, "tokens dim"], Packed, tuple[int, ...]]:
        """Encodes registers and visible patches (all of them without masks): tokens, their places and counts.

        As far as `layer`, by default the last.
        """
        grid = self._grid(images)
        n_images, n_tokens, n_registers = images.shape[0], grid[0] * grid[1], self.config.n_registers
        x = self.patch_embed(images, None if masks is None else masks.visible_indices)
        visible_counts = (n_tokens,) * n_images if masks is None else masks.visible_counts
        counts = tuple(n_registers + n for n in visible_counts)
        registers = self.registers.expand(n_images, -1, -1).to(x.dtype)
        of_grid = self._coordinates(grid, images.device)
        if masks is not None:
            coords = of_grid.patches.index_select(0, masks.visible_indices % n_tokens)
        if len(set(counts)) == 1:
            x = torch.cat([registers, x.unflatten(0, (n_images, -1))], dim=1).flatten(0, 1)
            if masks is None:
                packed = pack(counts, of_grid.tokens.repeat(n_images, 1))._replace(of_each=of_grid.tokens)
            else:
                coords = coords.unflatten(0, (n_images, -1))
                packed = pack(counts, with_registers(coords, of_grid.edge, self.config.scale_registers).flatten(0, 1))
        else:
            packed = pack(counts, coords)
            where = coords, masks.visible_indices // n_tokens, packed, self.config.scale_registers
            x, coords = _interleaved(registers, of_grid.edge, x, *where)
            packed = packed._replace(coords=coords)
        return self.enc_norm(self.encoder(x, packed, counts, branches=branches, n_blocks=layer)), packed, counts

    def predict(
        self,
        images: Shaped[Tensor, "images 3 height width"],
        masks: Masks,
        drop_path: DropPath | None = None,
    ) -> Float[Tensor, "predicted dim"]:
        """Predicts the latents at `masks.predict_indices`, in their order, from the visible patches."""
        context = self.encode(images, masks, None if drop_path is None else drop_path.encoder)
        branches = None if drop_path is None else drop_path.predictor
        coords = self._coordinates(self._grid(images), images.device).patches
        coords = coords.index_select(0, masks.predict_indices % coords.shape[0])
        packed = pack(masks.predict_counts, coords)
        # Written out, for the first block to be compiled as the others are.
        x = self.mask_token.to(context[0].dtype).expand(coords.shape[0], -1).contiguous()
        return self.dec_norm(self.decoder(x, packed, masks.predict_counts, *context, branches))

    def forward(
        self, images: Shaped[Tensor, "images 3 height width"]
    ) -> tuple[
        Float[Tensor, "images predictor_dim"],
        Float[Tensor, "images registers dim"],
        Float[Tensor, "images rows columns dim"],
    ]:
        """Features of whole images: a global vector, the registers, and a map of patch features.

        The global vector is the mean, over all positions, of what the predictor's first block says of them.
        """
        grid, n_images = self._grid(images), images.shape[0]
        context, context_packed, _ = self.encode(images)
        coords = self._coordinates(grid, images.device).patches.repeat(n_images, 1)
        counts = (grid[0] * grid[1],) * n_images
        x = self.mask_token.to(context.dtype).expand(coords.shape[0], -1)
        predicted = self.dec_norm(self.decoder.blocks[0](x, pack(counts, coords), context, context_packed))
        if self.out_layer < len(self.encoder.blocks):
            context, _, _ = self.encode(images, layer=self.out_layer)
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

    def _coordinates(self, grid: tuple[int, int], device: torch.device) -> Coordinates:
        """Made once for each grid and device, and kept: a CUDA graph reads them where they lie.

        Not kept is what has no memory of its own: a tracer's tensors, and those of a graph that is being captured.
        """
        if torch.compiler.is_compiling():
            return grid_coordinates(grid, self.config, device)
        if (grid, device) in self._kept:
            return self._kept[grid, device]
        with torch.inference_mode(False):  # Tensors made in it could be used in no other.
            coordinates = grid_coordinates(grid, self.config, device)
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if type(coordinates.tokens) is Tensor and not captured:
            self._kept[grid, device] = coordinates
        return coordinates


def _interleaved(
    registers: Float[Tensor, "images registers dim"],
    edge: Float[Tensor, "registers 2"],
    x: Float[Tensor, "visible dim"],
    coords: Float[Tensor, "visible 2"],
    image: Int[Tensor, "visible"],
    packed: Packed,
    scaled: bool,
) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens 2"]]:
    """Tokens and coordinates, registers before the patches of their image, as `with_registers` has them.

    In launches whose number does not depend on that of the images.
    """
    n_images, n_registers, _ = registers.shape
    start, patches = packed.cu_seqlens[:-1], packed.cu_seqlens.diff() - n_registers
    ascending = torch.arange(n_images * n_registers + len(x), device=x.device)
    of_registers = start.unsqueeze(1) + ascending[:n_registers]
    # A patch stands behind the registers of its own image and of all before it.
    of_patches = ascending[: len(x)] + (image + 1) * n_registers
    place = torch.cat([of_registers.flatten(), of_patches])
    tokens = torch.empty_like(place).scatter_(0, place, ascending)
    # The smallest and largest coordinates of each image's patches, of which the last stands for those it lacks.
    first = (start - ascending[:n_images] * n_registers).unsqueeze(1)
    some = first + torch.minimum(ascending[: packed.max_seqlen - n_registers], patches.unsqueeze(1) - 1)
    low, high = coords[some].aminmax(dim=1, keepdim=True)
    at = low + edge * (high - low) if scaled else edge.expand(n_images, -1, -1)
    coords = torch.cat([at.flatten(0, 1), coords]).index_select(0, tokens)
    return TakeRows.apply(torch.cat([registers.flatten(0, 1), x]), tokens, place), coords


def _channels(values: tuple[float, ...], like: Tensor) -> Float[Tensor, "3 1"]:
    # Made on the device: torch.tensor would copy from memory that is not pinned, and wait for the GPU.
    channel = torch.arange(3, device=like.device).unsqueeze(1)
    first, second, third = values
    return torch.where(channel == 0, first, torch.where(channel == 1, second, third))


class WeightNormLinear(nn.Module):
    """x W^T with W = v g / (|v| + 1e-8), row by row."""

    def __init__(self, dim: int, n_prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(n_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(n_prototypes, dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch prototypes"]:
        norm = self.weight_v.norm(dim=1, keepdim=True)
        return F.linear(x, (self.weight_v * (self.weight_g / (norm + 1e-8))).to(x.dtype))


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

    def init_weights(self) -> "OnlineClustering":
        nn.init.normal_(self.layer.weight)
        if self.layer.bias is not None:
            nn.init.zeros_(self.layer.bias)
        return self

    def forward(self, features: Float[Tensor, "images positions dim"]) -> tuple[Float[Tensor, ""], Potentials]:
        """The clustering loss over all patches, and the potentials of their assignments."""
        out = clustering_head(
            features.transpose(0, 1),
            self.layer.weight,
            self.layer.bias,
            target_temperature=self.config.target_temperature,
            prediction_temperature=self.config.prediction_temperature,
            n_iterations=self.config.n_sinkhorn_iterations,
            positionwise=self.config.positionwise,
        )
        return out.loss, out.potentials

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


class Student(nn.Module):
    def __init__(self, model: ModelConfig, n_prototypes: int):
        super().__init__()
        self.backbone = Backbone(model)
        self.head = PredictionHead(model.predictor_shape()[0], n_prototypes)

    def forward(
        self, images: Shaped[Tensor, "images 3 height width"], masks: Masks, drop_path: DropPath | None = None
    ) -> Float[Tensor, "predicted prototypes"]:
        """Logits of the prototypes at the predicted positions, in the order of `masks.predict_indices`."""
        return self.head(self.backbone.predict(images, masks, drop_path))

    def compile_pointwise(self) -> None:
        """Have torch.compile fuse what lies between the matrix products and the attention; state-dict keys stay."""
        # Encoder and predictor, with and without gradients, of one size and of any: by default eight would be too many.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        backbone = self.backbone
        for part in (*backbone.encoder.blocks, *backbone.decoder.blocks, backbone.patch_embed, self.head):
            part.forward = torch.compile(part.forward, fullgraph=True)


class CAPI(nn.Module):
    """Student, its exponential moving average (whose encoder is the teacher's), and the teacher's clustering."""

    def __init__(self, model: ModelConfig, clustering: ClusteringConfig):
        super().__init__()
        self.student = Student(model, clustering.n_prototypes)
        self.student_ema = Student(model, clustering.n_prototypes).requires_grad_(False)
        self.teacher = nn.ModuleDict({"head": OnlineClustering(model.embed_dim, clustering)})

    def init_weights(self) -> "CAPI":
        self.student.backbone.init_weights()
        self.student.head.init_weights()
        self.teacher["head"].init_weights()
        self.student_ema.load_state_dict(self.student.state_dict())
        return self

    @torch.no_grad()
    def teacher_features(
        self, images: Shaped[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images positions dim"]:
        """What the moving average's encoder, as far as `model.out_layer`, says of every patch."""
        features, _, counts = self.student_ema.backbone.encode(images, layer=self.student_ema.backbone.out_layer)
        return features.unflatten(0, (len(counts), -1))[:, self.student_ema.backbone.config.n_registers :]
