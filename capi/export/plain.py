"""The encoder's evaluation forward in plain operations on [images, tokens, dim], for exporters that know no others.

Grids and coordinates are computed from the sizes of the images that come, so that a graph traced from it takes any.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from capi.coordinates import register_coordinates
from capi.model import Backbone
from capi.transformer import Block


class PlainEncoder(nn.Module):
    """What `Backbone` computes of normalised images, with its weights; equal up to rounding."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(
        self, images: Float[Tensor, "images 3 height width"]
    ) -> tuple[
        Float[Tensor, "images predictor_dim"],
        Float[Tensor, "images registers dim"],
        Float[Tensor, "images rows columns dim"],
    ]:
        model = self.backbone
        patches = F.conv2d(images, model.patch_embed.weight, model.patch_embed.bias, stride=model.patch_size)
        n_images, _, rows, columns = patches.shape
        grid = _grid_coordinates(patches)
        edge = register_coordinates(model.config, images.device)
        if model.config.scale_registers:
            edge = edge * grid.amax(0)  # The coordinates of one row alone are all zero.
        coords = torch.cat([edge, grid])
        layers = [torch.cat([model.registers.expand(n_images, -1, -1), patches.flatten(2).mT], dim=1)]
        for block in model.encoder.blocks:
            layers.append(_block(block, layers[-1], coords))
        context, features = model.enc_norm(layers[-1]), model.enc_norm(layers[model.out_layer])
        queries = model.mask_token.expand(n_images, grid.shape[0], -1)
        predicted = model.dec_norm(_block(model.decoder.blocks[0], queries, grid, context, coords))
        registers, feature_map = features[:, : model.num_prefix_tokens], features[:, model.num_prefix_tokens :]
        return predicted.mean(1), registers, feature_map.unflatten(1, (rows, columns))


def _grid_coordinates(patches: Float[Tensor, "images dim rows columns"]) -> Float[Tensor, "positions 2"]:
    """(row, column) of every patch, from 0 to 1."""
    rows, columns = patches.shape[2:]
    row, column = (torch.arange(n, device=patches.device) / torch.sym_max(n - 1, 1) for n in (rows, columns))
    return torch.stack([row[:, None].expand(rows, columns), column[None].expand(rows, columns)], dim=-1).flatten(0, 1)


def _block(
    block: Block,
    x: Float[Tensor, "images tokens dim"],
    coords: Float[Tensor, "tokens 2"],
    context: Float[Tensor, "images keys context_dim"] | None = None,
    context_coords: Float[Tensor, "keys 2"] | None = None,
) -> Float[Tensor, "images tokens dim"]:
    attention, mlp = block.residual1.fn, block.residual2.fn
    queries_from = block.residual1.norm(x)
    keys_from, keys_at = (queries_from, coords) if context is None else (context, context_coords)
    q, k, v = (
        projection(tokens).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for projection, tokens in (
            (attention.q_proj, queries_from),
            (attention.k_proj, keys_from),
            (attention.v_proj, keys_from),
        )
    )
    q, k = _rotated(q, coords @ attention.rope.freqs), _rotated(k, keys_at @ attention.rope.freqs)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + attention.proj(attended)
    return x + mlp.fc2(F.gelu(mlp.fc1(block.residual2.norm(x))))


def _rotated(
    x: Float[Tensor, "images heads tokens head_dim"], angle: Float[Tensor, "tokens head_dim"]
) -> Float[Tensor, "images heads tokens head_dim"]:
    x1, x2 = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-x2, x1], dim=-1) * angle.sin()
