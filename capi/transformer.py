"""Transformer blocks over packed tokens: attention, MLP, and residual branches, all images or a subset (`drop_path`).

The tokens of all images of a batch stand in one [tokens, dim] array, image after image.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from capi.casting import CastsWeights, linear
from capi.drop_path import AddRows, Branches, Subset, TakeContext, TakeRows, sent, subsets
from capi.fp8 import Quantized
from capi.masking import cumulative_lengths
from capi_kernels import (
    cross_attention_weights,
    masked_cross_attention_kvpacked,
    rotary_tables,
    visible_attention_qkvpacked,
)

NORM_EPS = 1e-5


class Packed(NamedTuple):
    """Where the tokens of each image lie in a packed array, and where in the image they lie."""

    cu_seqlens: Int[Tensor, "images_plus_1"]
    coords: Float[Tensor, "tokens 2"]
    max_seqlen: int
    of_each: Float[Tensor, "max_seqlen 2"] | None = None
    """The coordinates of one image, where they are those of every image."""
    tables: tuple[Float[Tensor, "tokens head_dim"], Float[Tensor, "tokens head_dim"]] | None = None
    """The rotary tables, where they are those of every layer."""


def pack(counts: Sequence[int], coords: Float[Tensor, "tokens 2"]) -> Packed:
    """The images' numbers of tokens, which the host knows, and all their coordinates."""
    if len(set(counts)) == 1:  # Nothing is sent, so that a CUDA graph can hold it.
        cu_seqlens = torch.arange(len(counts) + 1, dtype=torch.int32, device=coords.device) * counts[0]
    else:
        cu_seqlens = sent(cumulative_lengths(counts), coords.device)
    return Packed(cu_seqlens, coords, max(counts, default=0))


@torch.library.custom_op("capi::add_product_", mutates_args=("x",))
def add_product_(x: Tensor, y: Tensor, weight: Tensor) -> None:
    """x += y weight^T. The compiler would make the sum and the product one `addmm` as well, but copy x before it."""
    x.addmm_(y, weight.mT)


@add_product_.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor) -> None:
    pass


@torch.library.custom_op("capi::project_heads", mutates_args=())
def project_heads(x: Tensor, weight: Tensor) -> Tensor:
    """out[token, head] = x[token, head] weight[head]^T. The compiler would copy what it made head by head."""
    out = x.new_empty((*x.shape[:2], weight.shape[1]))
    torch.bmm(x.transpose(0, 1), weight.mT, out=out.transpose(0, 1))
    return out


@project_heads.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[1]))


def _project_heads_backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return project_heads(dout, weight.mT), torch.bmm(dout.permute(1, 2, 0), x.transpose(0, 1))


project_heads.register_autograd(
    _project_heads_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def _product(
    y: Float[Tensor, "tokens width"], weight: Tensor | Quantized, onto: Float[Tensor, "tokens dim"] | None
) -> Float[Tensor, "tokens dim"]:
    """y weight^T, added to `onto` if that is given, in place but where the product is in 8 bits."""
    if onto is None:
        return linear(y, weight)
    if isinstance(weight, Quantized):
        return onto + linear(y, weight)
    add_product_(onto, y, weight)
    return onto


class Rope(nn.Module):
    """Frequencies of the two-dimensional rotary embedding, in radians over the image's side; never trained."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.freqs = nn.Parameter(torch.empty(2, head_dim), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rope":
        """`to(torch.bfloat16)` moves the frequencies and leaves them in float32: rounded, they turn by 0.1 radian."""
        exact = self.freqs.data
        super()._apply(fn, recurse)
        if torch.finfo(self.freqs.dtype).bits < torch.finfo(exact.dtype).bits:
            self.freqs.data = exact.to(self.freqs.device)
        return self

    def init_weights(self, highest: float = 7.0, lowest: float = 7e-4) -> None:
        """In periods over the image's side."""
        half = self.freqs.shape[1] // 2
        frequencies = 2 * torch.pi * highest * (highest / lowest) ** torch.linspace(0, -1, half // 2)
        self.freqs.zero_()
        self.freqs[0, :half] = frequencies.repeat(2)  # the row turns the first half of the channels
        self.freqs[1, half:] = frequencies.repeat(2)  # the column the second


class Attention(CastsWeights):
    """Multi-head attention with rotary queries and keys."""

    def __init__(self, dim: int, num_heads: int, context_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(context_dim, dim, bias=False)
        self.v_proj = nn.Linear(context_dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.rope = Rope(dim // num_heads)


class SelfAttention(Attention):
    """From the tokens of an image to themselves."""

    def stacks(self) -> tuple[tuple[nn.Parameter, ...], ...]:
        return (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight), (self.proj.weight,)

    def forward(
        self, x: Float[Tensor, "tokens dim"], packed: Packed, *, onto: Float[Tensor, "tokens dim"] | None = None
    ) -> Float[Tensor, "tokens dim"]:
        qkv_weight, proj_weight = self.weights()
        qkv = linear(x, qkv_weight).unflatten(-1, (3, self.num_heads, -1))
        tables = packed.tables or rotary_tables(packed.coords, self.rope.freqs)
        out = visible_attention_qkvpacked(qkv, *tables, packed.cu_seqlens, packed.max_seqlen)
        return _product(out.flatten(1), proj_weight, onto)


class CrossAttention(Attention):
    """From queries to the encoder's output."""

    def stacks(self) -> tuple[tuple[nn.Parameter, ...], ...]:
        return (self.q_proj.weight,), (self.k_proj.weight, self.v_proj.weight), (self.proj.weight,)

    def forward(
        self,
        x: Float[Tensor, "queries dim"],
        packed: Packed,
        context: Float[Tensor, "context context_dim"],
        context_packed: Packed,
        read: Float[Tensor, "images keys context_dim"] | None,
        *,
        onto: Float[Tensor, "queries dim"] | None = None,
    ) -> Float[Tensor, "queries dim"]:
        """With `read`, the context once more, image by image, the values are projected last.

        Rows of it beyond the context's tokens have no weight.
        """
        q_weight, kv_weight, proj_weight = self.weights()
        q = F.linear(x, q_weight).unflatten(-1, (self.num_heads, -1))
        where = (
            *rotary_tables(packed.coords, self.rope.freqs),
            *rotary_tables(context_packed.coords, self.rope.freqs),
            packed.cu_seqlens,
            context_packed.cu_seqlens,
            packed.max_seqlen,
        )
        if read is None:
            kv = F.linear(context, kv_weight).unflatten(-1, (2, self.num_heads, -1))
            out = masked_cross_attention_kvpacked(q, kv, *where, context_packed.max_seqlen)
        else:
            k_weight, v_weight = kv_weight.chunk(2)
            k = F.linear(context, k_weight).unflatten(-1, (self.num_heads, -1))
            weights = cross_attention_weights(q, k, *where, read.shape[1])  # [images, heads, queries, keys]
            # On a GPU the heads of a query stand together in memory, and nothing is copied.
            summed = torch.bmm(weights.transpose(1, 2).flatten(1, 2), read)  # [images, queries heads, context_dim]
            out = project_heads(summed.view(len(q), self.num_heads, -1), v_weight.unflatten(0, (self.num_heads, -1)))
        return _product(out.flatten(1), proj_weight, onto)


def _values_come_last(
    counts: Sequence[int], context_counts: Sequence[int], heads: int, dim: int, context_dim: int
) -> bool:
    """Whether to project the weighted sums of the context rather than the context: P (X W^T) = (P X) W^T.

    Values carry no rotary embedding, so both are the same; with few queries the second takes fewer FLOP. It needs as
    many tokens of every image, for P X to be a plain batched product.
    """
    queries, keys = counts[0], context_counts[0]
    equal = len(set(counts)) == len(set(context_counts)) == 1
    last = queries * context_dim * (heads * keys + dim)
    return equal and last < keys * dim * (queries + context_dim)


def _row(keys: int, device: torch.device) -> int:
    """How many keys to multiply with: of a multiple of 16 cuBLAS makes faster products."""
    return keys if device.type == "cpu" else -(-keys // 16) * 16


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, with the weight in the type of x: mixed types would miss PyTorch's fused kernel."""

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        weight = self.weight.to(x.dtype) if self.elementwise_affine else None
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Mlp(CastsWeights):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim, bias=False)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    def stacks(self) -> tuple[tuple[nn.Parameter, ...], ...]:
        return (self.fc1.weight,), (self.fc2.weight,)

    def forward(
        self, x: Float[Tensor, "tokens dim"], *, onto: Float[Tensor, "tokens dim"] | None = None
    ) -> Float[Tensor, "tokens dim"]:
        fc1, fc2 = self.weights()
        return _product(F.gelu(linear(x, fc1)), fc2, onto)


class Residual(nn.Module):
    """x + fn(norm(x), ...), in place if so told; on a subset of the images alone where one is given, re-weighted."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = RMSNorm(dim, eps=NORM_EPS)
        self.fn = fn

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        subset: Subset | None,
        *arguments: Tensor | Packed | None,
        in_place: bool = False,
    ) -> Float[Tensor, "tokens dim"]:
        if in_place:
            return self.fn(self.norm(x), *arguments, onto=x)
        if subset is None:
            return x + self.fn(self.norm(x), *arguments)
        kept = TakeRows.apply(x, subset.tokens, subset.place)
        return AddRows.apply(x, self.fn(self.norm(kept), *arguments), subset.tokens, subset.place, subset.weight)


def _restricted(packed: Packed, subset: Subset | None) -> Packed:
    if subset is None:
        return packed
    return Packed(subset.cu_seqlens, packed.coords.index_select(0, subset.tokens), packed.max_seqlen)


class Block(nn.Module):
    """Attention, to the tokens themselves or to a context, then an MLP: the unit that is compiled or recomputed."""

    def __init__(self, dim: int, attention: Attention):
        super().__init__()
        self.residual1 = Residual(dim, attention)
        self.residual2 = Residual(dim, Mlp(dim))

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        packed: Packed,
        context: Float[Tensor, "context context_dim"] | None = None,
        context_packed: Packed | None = None,
        attention_subset: Subset | None = None,
        context_subset: Subset | None = None,
        mlp_subset: Subset | None = None,
        values_last: bool = False,
        in_place: bool = False,
    ) -> Float[Tensor, "tokens dim"]:
        arguments = (_restricted(packed, attention_subset),)
        if context is not None:
            keys, read = context_packed.max_seqlen, None
            if values_last and context_subset is None:
                read = context.unflatten(0, (-1, keys))
            elif values_last:
                where = context_subset.tokens, context_subset.place, keys, _row(keys, context.device)
                context, read = TakeContext.apply(context, *where)
            elif context_subset is not None:
                context = TakeRows.apply(context, context_subset.tokens, context_subset.place)
            arguments += (context, _restricted(context_packed, context_subset), read)
        x = self.residual1(x, attention_subset, *arguments, in_place=in_place)
        return self.residual2(x, mlp_subset, in_place=in_place)


class Transformer(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, depth: int, attention: type[Attention], context_dim: int | None = None
    ):
        super().__init__()
        of_each = dim, num_heads, context_dim or dim
        self.blocks = nn.ModuleList(Block(dim, attention(*of_each)) for _ in range(depth))
        self.checkpoint_activations = False
        self.in_place = False
        """Without gradients and drop-path, add the residual branches to the x that is given, which is lost."""
        self.shares_tables = False
        """Where all images have the same coordinates, make rotary tables of one image, for all layers."""

    def have_equal_frequencies(self) -> bool:
        """Whether all layers do, as they do unless a checkpoint says otherwise; waits for the device."""
        first, *others = (block.residual1.fn.rope.freqs for block in self.blocks)
        return all(torch.equal(first, other) for other in others)

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        packed: Packed,
        counts: Sequence[int],
        context: Float[Tensor, "context context_dim"] | None = None,
        context_packed: Packed | None = None,
        context_counts: Sequence[int] = (),
        branches: Branches | None = None,
        n_blocks: int | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Through all blocks, or without drop-path through the first `n_blocks`."""
        blocks = list(self.blocks)[:n_blocks]
        depth = len(blocks)
        attention = of_context = mlp = [None] * depth
        if branches is not None:  # Those of the attentions, then those of the MLPs.
            chosen = subsets(branches, counts, packed.cu_seqlens)
            attention, mlp = chosen[:depth], chosen[depth:]
            if context is not None:
                of_context = subsets(branches.part(slice(depth)), context_counts, context_packed.cu_seqlens)
        elif self.shares_tables and packed.of_each is not None:
            tables = rotary_tables(packed.of_each, self.blocks[0].residual1.fn.rope.freqs)
            packed = packed._replace(tables=tuple(table.repeat(len(counts), 1) for table in tables))
        # Chosen here, on the host: in a compiled block it would be another condition to compile for.
        heads = self.blocks[0].residual1.fn.num_heads
        dims = (x.shape[1], x.shape[1] if context is None else context.shape[1])
        values_last = context is not None and _values_come_last(counts, context_counts, heads, *dims)
        in_place = self.in_place and branches is None and not torch.is_grad_enabled()
        for block, *chosen in zip(blocks, attention, of_context, mlp, strict=True):
            arguments = (x, packed, context, context_packed, *chosen, values_last, in_place)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        return x
