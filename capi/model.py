"""The model: vision transformer student, predictor, prototype heads, and the teacher's online clustering.

Tokens are packed: the tokens of all images of a batch stand in one [tokens, dim] array, image after image, so that
images may keep different numbers of patches. State-dict keys are those of the authors' released code.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from capi.casting import CastsWeights
from capi.config import ClusteringConfig, ModelConfig
from capi.coordinates import Coordinates, grid_coordinates, with_registers
from capi.drop_path import Branches, DropPath, TakeRows
from capi.heads import OnlineClustering, PredictionHead
from capi.images import normalize_images, resized
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
            patches = normalize_images(patches.unsqueeze(-1)).squeeze(-1)
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
            if min(dim, heads) < 1 or dim % heads or (dim // heads) % 4:
                raise ValueError(f"{names} must be a multiple of 4, got {dim} / {heads}")
        if config.n_registers < 0:
            raise ValueError(f"model.n_registers must not be negative, got {config.n_registers}")
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
        # As timm and the official code call them.
        self.patch_size, self.embed_dim, self.num_prefix_tokens = config.patch_size, dim, config.n_registers
        self.encoder = Transformer(*encoder, config.encoder_depth, SelfAttention)
        self.decoder = Transformer(*predictor, config.predictor_depth, CrossAttention, dim)
        self.mask_token = nn.Parameter(torch.empty(1, predictor_dim))
        self.registers = nn.Parameter(torch.empty(1, config.n_registers, dim))
        self.patch_embed = PatchEmbed(3, dim, kernel_size=config.patch_size, stride=config.patch_size)
        self._kept: dict[tuple[tuple[int, int], torch.device], Coordinates] = {}
        self.enc_norm = RMSNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.dec_norm = RMSNorm(predictor_dim, eps=NORM_EPS, elementwise_affine=False)

    @property
    def out_layer(self) -> int:
        """The encoder's layer that features are of: how many of its blocks come before it."""
        return self.config.out_layer % (len(self.encoder.blocks) + 1)

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
        x, packed, counts = self._embed(images, masks)
        return self.enc_norm(self.encoder(x, packed, counts, branches=branches, n_blocks=layer)), packed, counts

    def _embed(
        self, images: Shaped[Tensor, "images 3 height width"], masks: Masks | None = None
    ) -> tuple[Float[Tensor, "tokens dim"], Packed, tuple[int, ...]]:
        """What goes into the encoder's first block."""
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
        return x, packed, counts

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
        self,
        images: Shaped[Tensor, "images 3 height width"],
        *,
        layers: Sequence[int] | None = None,
        resize: int | tuple[int, int] | Literal["multiple"] | None = None,
    ) -> tuple[
        Float[Tensor, "images predictor_dim"],
        Float[Tensor, "images registers dim"] | list[Float[Tensor, "images registers dim"]],
        Float[Tensor, "images rows columns dim"] | list[Float[Tensor, "images rows columns dim"]],
    ]:
        """Features of whole images: a global vector, the registers, and a map of patch features.

        The global vector is the mean, over all positions, of what the predictor's first block says of them.

        Args:
            layers: the layers whose registers and maps are wanted, which then are lists, in this order: 0 is what goes
                into the first block, k what comes out of the k-th, -1 the last. All have the encoder's final norm, as
                in the official code; it has no weights. By default `model.out_layer` alone, not in lists.
            resize: for images of any size: (height, width), the pixels of the shorter side, or "multiple", as
                `resized` has it.

        Raises:
            ValueError: sides that do not divide by the patch, or a layer that is not there.
        """
        if resize is not None:
            images = resized(images, self.config.patch_size, resize)
        grid, n_images, depth = self._grid(images), images.shape[0], len(self.encoder.blocks)
        if any(not -depth - 1 <= layer <= depth for layer in layers or ()):
            raise ValueError(f"layers must be numbers from {-depth - 1} to {depth}, got {list(layers)}")
        wanted = [self.out_layer] if layers is None else [layer % (depth + 1) for layer in layers]
        outputs = {}
        if wanted == [depth]:
            context, context_packed, _ = self.encode(images)
        else:
            x, context_packed, _ = self._embed(images)
            for number, block in enumerate(self.encoder.blocks):
                if number in wanted:
                    outputs[number] = self.enc_norm(x)
                x = block(x, context_packed)
            context = self.enc_norm(x)
        outputs[depth] = context
        coords = self._coordinates(grid, images.device).patches.repeat(n_images, 1)
        counts = (grid[0] * grid[1],) * n_images
        x = self.mask_token.to(context.dtype).expand(coords.shape[0], -1)
        predicted = self.dec_norm(self.decoder.blocks[0](x, pack(counts, coords), context, context_packed))
        global_vector = predicted.unflatten(0, (n_images, -1)).mean(1)
        pairs = [self._registers_and_map(outputs[number], grid) for number in wanted]
        if layers is None:
            return global_vector, *pairs[0]
        return global_vector, [registers for registers, _ in pairs], [feature_map for _, feature_map in pairs]

    def forward_features(
        self, images: Shaped[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images registers_and_patches dim"]:
        """The encoder's tokens, as timm has them: `num_prefix_tokens` registers, then the patches, row by row."""
        tokens, _, counts = self.encode(images, layer=self.out_layer)
        return tokens.unflatten(0, (-1, counts[0]))

    def _registers_and_map(
        self, tokens: Float[Tensor, "tokens dim"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "images registers dim"], Float[Tensor, "images rows columns dim"]]:
        n_registers, n_patches = self.config.n_registers, grid[0] * grid[1]
        registers, patches = tokens.unflatten(0, (-1, n_registers + n_patches)).split([n_registers, n_patches], dim=1)
        return registers, patches.unflatten(1, grid)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        rows, columns = (side // self.config.patch_size for side in images.shape[-2:])
        if images.shape[-2:] != (rows * self.config.patch_size, columns * self.config.patch_size):
            raise ValueError(
                f"image sides must be multiples of the patch size {self.config.patch_size}, got {tuple(images.shape)}; "
                "with resize= they are made so"
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
        self.follow_average()
        return self

    def follow_average(self) -> None:
        """Has the teacher assign by the moving average's head, if the configuration asks for it."""
        if self.teacher["head"].config.ema_head:
            self.teacher["head"].follow(self.student_ema.head)

    @torch.no_grad()
    def teacher_features(
        self, images: Shaped[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images positions dim"]:
        """What the moving average's encoder, as far as `model.out_layer`, says of every patch."""
        features, _, counts = self.student_ema.backbone.encode(images, layer=self.student_ema.backbone.out_layer)
        return features.unflatten(0, (len(counts), -1))[:, self.student_ema.backbone.config.n_registers :]
