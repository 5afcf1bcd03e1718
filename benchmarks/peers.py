"""What others do in the place of our operations: the official algorithm restated, and general attention kernels."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shapes import GPU
from benchmarks.timing import Unavailable
from capi_kernels import reference

# Compiling takes longer on a CPU than all else, so peers are compiled on a GPU only.
OFFICIAL = ("official_eager", "official_compiled") if GPU else ("official_eager",)
# Compiled without and with the recomputation of the official settings: the faster is the peer.
OFFICIAL_STEP = ("official_compiled", "official_recomputed", "official_eager") if GPU else ("official_eager",)
ATTENTION = ("sdpa_cudnn", "sdpa_flash", "varlen_attn", "flex_attention", "xformers") if GPU else ("sdpa",)


def official_sinkhorn(logits: Tensor, temperature: float, n_iterations: int, eps: float = 1e-8) -> Tensor:
    """The official formula, which divides the matrix by its sums in place, in the type of the logits."""
    M = logits / temperature
    M += 50 - M.amax(-2, keepdim=True)
    M = M.exp()
    for _ in range(n_iterations):
        M /= M.sum(-2, keepdim=True) + eps
        M /= M.sum(-1, keepdim=True) + eps
    return M


def official_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor,
    n_iterations: int,
    target_temperature: float = 0.06,
    prediction_temperature: float = 0.12,
) -> tuple[Tensor, Tensor]:
    """The official clustering loss of features [positions, images, dim], and the targets of the chosen rows."""
    features = F.normalize(features, dim=-1, eps=1e-7)
    logits = F.linear(features, weight.to(features.dtype), bias.to(features.dtype))
    assignments = official_sinkhorn(logits.detach(), target_temperature, n_iterations)
    log_softmax = F.log_softmax(logits.float() / prediction_temperature, dim=-1)
    loss = -(assignments.float() * log_softmax).sum(-1).mean()
    targets = assignments.transpose(0, 1).reshape(-1, len(weight)).index_select(0, rows)
    return loss, targets


def official_student_loss(logits: Tensor, targets: Tensor, temperature: float = 0.12) -> Tensor:
    """The official cross-entropy, in float32 and summed in float64."""
    loss = -(targets.float() * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1)
    return loss.double().sum() / len(loss)


def official(function: Callable, name: str) -> Callable:
    """The function as the peer called `name` runs it."""
    return torch.compile(function, dynamic=False) if name == "official_compiled" else function


@dataclass(frozen=True)
class Layout:
    """Packed queries and keys, of as many to each image."""

    images: int
    queries: int
    keys: int
    device: torch.device

    def cu_seqlens(self, tokens: int) -> Tensor:
        return torch.arange(0, (self.images + 1) * tokens, tokens, dtype=torch.int32, device=self.device)


def _rotate(q: Tensor, k: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.apply_rotary(q, q_cos, q_sin), reference.apply_rotary(k, k_cos, k_sin)


def attention(name: str, layout: Layout) -> Callable[..., Tensor]:
    """(q, k, v, q_cos, q_sin, k_cos, k_sin) -> out, all packed [tokens, heads, head_dim], by the peer of this name.

    The rotary embedding comes first, apart and, on a GPU, compiled.

    Raises:
        Unavailable: the peer is not installed, or does not run on this device.
    """
    kernels = {
        "sdpa": partial(_sdpa, backend=None),
        "sdpa_flash": partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
        "varlen_attn": _varlen,
        "flex_attention": _flex,
        "xformers": _xformers,
    }
    kernel = kernels[name](layout)
    rotate = torch.compile(_rotate, dynamic=False) if layout.device.type == "cuda" else _rotate

    def run(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        q, k = rotate(q, k, *tables)
        return kernel(q, k, v)

    return run


def _sdpa(layout: Layout, backend: SDPBackend | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense, which the layout allows where every image has as many tokens."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (layout.images, -1)).transpose(1, 2) for x in (q, k, v))
        if backend is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(0, 1)

    return run


def _varlen(layout: Layout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if find_spec("torch.nn.attention.varlen") is None:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.attention.varlen")
    if layout.device.type == "cpu":
        raise Unavailable("varlen_attn runs on a GPU only")
    from torch.nn.attention.varlen import varlen_attn

    lengths = (layout.cu_seqlens(layout.queries), layout.cu_seqlens(layout.keys), layout.queries, layout.keys)
    return lambda q, k, v: varlen_attn(q, k, v, *lengths)


def _flex(layout: Layout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Under a document mask, of which only the blocks that hold pairs of one document are visited."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = document_mask(layout)
    flex = torch.compile(flex_attention, dynamic=False) if layout.device.type == "cuda" else flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return flex(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return run


def document_mask(layout: Layout, block: int = 128):
    """FlexAttention's BlockMask of a query for the keys of its image, without ever forming [queries, keys]."""
    from torch.nn.attention.flex_attention import BlockMask

    n_queries, n_keys = layout.images * layout.queries, layout.images * layout.keys
    query_image, key_image = (
        torch.arange(layout.images, dtype=torch.int32, device=layout.device).repeat_interleave(tokens)
        for tokens in (layout.queries, layout.keys)
    )
    first = torch.arange(0, n_queries, block, device=layout.device)
    last = (first + block - 1).clamp(max=n_queries - 1)
    low = first // layout.queries * layout.keys // block
    high = ((last // layout.queries + 1) * layout.keys - 1) // block
    blocks = torch.arange(-(-n_keys // block), device=layout.device)
    # The block numbers that each row visits come first; how many they are stands beside them.
    indices = (low[:, None] + blocks).clamp(max=len(blocks) - 1)
    return BlockMask.from_kv_blocks(
        (high - low + 1).to(torch.int32)[None, None],
        indices.to(torch.int32)[None, None].contiguous(),
        BLOCK_SIZE=block,
        mask_mod=lambda batch, head, query, key: query_image[query] == key_image[key],
        seq_lengths=(n_queries, n_keys),
    )


def _xformers(layout: Layout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if find_spec("xformers") is None:
        raise Unavailable("xformers is not installed")
    if layout.device.type == "cpu":
        raise Unavailable("xformers runs on a GPU only")
    _load_cuda_12()
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(
        [layout.queries] * layout.images, [layout.keys] * layout.images, device=layout.device
    )
    return lambda q, k, v: memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]


def _load_cuda_12() -> None:
    """Loads the CUDA runtime that the wheel of xformers 0.0.35 is linked to, where it is installed beside another.

    Without it, under a PyTorch of CUDA 13, xformers finds no operator, though it calls PyTorch's own kernels.
    """
    if find_spec("nvidia") is not None and (package := find_spec("nvidia.cuda_runtime")) is not None:
        for folder in package.submodule_search_locations:
            for library in Path(folder).glob("lib/libcudart.so.12"):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
