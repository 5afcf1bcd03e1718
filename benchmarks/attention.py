"""What the benchmarks of both attentions share: inputs, the check against float64, and the two directions."""

from collections.abc import Callable, Iterable
from functools import cache, lru_cache

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import OURS, check, rotated
from benchmarks.timing import Contestant
from capi.transformer import Rope
from capi_kernels import masked_cross_attention, reference, rotary_tables, visible_attention

CHECKED_TOKENS = 1024  # The float64 definition forms [heads, tokens, tokens] of every image that it is asked for.


class AttentionCase:
    """Packed inputs of one shape; keys are the queries themselves where `queries` is None."""

    def __init__(
        self,
        images: int,
        queries: int | None,
        keys: int,
        heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.self_attention = queries is None
        self.layout = peers.Layout(images, keys if queries is None else queries, keys, device)
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        self.inputs = cache(lambda: rotated(self._draw, device))
        self.references = cache(self._references)
        self.implementation = cache(self._implementation)
        self.checked: set[str] = set()

    def _draw(self, seed: int) -> tuple[Tensor, ...]:
        """q, k, v, dout, then the four tables."""
        layout = self.layout
        generator = torch.Generator(layout.device).manual_seed(seed)
        queries, keys = layout.images * layout.queries, layout.images * layout.keys

        def draw(tokens: int) -> Tensor:
            shape = (tokens, self.heads, self.head_dim)
            return torch.randn(shape, generator=generator, device=layout.device).to(self.dtype)

        rope = Rope(self.head_dim).to(layout.device)
        with torch.no_grad():
            rope.init_weights()
        tables = []
        for tokens in (queries, keys):
            coords = torch.rand(tokens, 2, generator=generator, device=layout.device)
            tables += rotary_tables(coords, rope.freqs)
        if self.self_attention:
            tables = tables[:2] * 2
        return draw(queries), draw(keys), draw(keys), draw(queries), *tables

    def _implementation(self, name: str) -> Callable[..., Tensor]:
        """(q, k, v, q_cos, q_sin, k_cos, k_sin) -> out."""
        if name != OURS:
            return peers.attention(name, self.layout)
        layout = self.layout
        cu_queries, cu_keys = layout.cu_seqlens(layout.queries), layout.cu_seqlens(layout.keys)
        if self.self_attention:
            return lambda q, k, v, cos, sin, *_: visible_attention(q, k, v, cos, sin, cu_queries, layout.queries)
        lengths = (cu_queries, cu_keys, layout.queries, layout.keys)
        return lambda *operands: masked_cross_attention(*operands, *lengths)

    def _subset(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The first images of q-like and k-like tensors, as many as the definition can hold."""
        layout = self.layout
        images = min(layout.images, max(1, CHECKED_TOKENS // max(layout.queries, layout.keys)))
        return [x[: images * (len(x) // layout.images)] for x in tensors]

    def _references(self) -> tuple[list[Tensor], list[Tensor]]:
        """Output and gradients of the definition in this dtype and in float64, of the images that are checked."""
        q, k, v, dout, *tables = self._subset(self.inputs()[0])
        images = len(q) // self.layout.queries
        layout = peers.Layout(images, self.layout.queries, self.layout.keys, self.layout.device)
        lengths = [layout.cu_seqlens(n) for n in (layout.queries, layout.keys)] + [layout.queries, layout.keys]
        results = []
        for dtype in (self.dtype, torch.float64):
            operands = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            wide = [x.to(torch.promote_types(dtype, x.dtype)) for x in tables]
            out = reference.masked_cross_attention(*operands, *wide, *lengths)
            results.append([out.detach(), *torch.autograd.grad(out, operands, dout.to(dtype))])
        return results[0], results[1]

    def enter(self, name: str, direction: str) -> Contestant:
        """What to time of an implementation that was checked against float64."""
        run, inputs = self.implementation(name), self.inputs()

        def arguments(round_number: int) -> tuple[Tensor, ...]:
            q, k, v, _, *tables = inputs[round_number % len(inputs)]
            return *(x.detach().requires_grad_() for x in (q, k, v)), *tables

        def arguments_and_dout(round_number: int) -> tuple[Tensor, ...]:
            return *arguments(round_number), inputs[round_number % len(inputs)][3]

        def forward(*operands: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
            *operands, dout = operands
            return run(*operands), tuple(operands[:3]), dout

        if name not in self.checked:
            out, operands, dout = forward(*arguments_and_dout(0))
            actual = [out.detach(), *torch.autograd.grad(out, operands, dout)]
            for got, same_dtype, oracle in zip(self._subset(actual), *self.references(), strict=True):
                check(name, got, same_dtype, oracle)
            self.checked.add(name)
        if direction == "forward":
            return Contestant(run, arguments, copies=len(inputs))
        return Contestant(torch.autograd.grad, arguments_and_dout, forward, copies=len(inputs))


@lru_cache(maxsize=1)
def attention_case(*arguments) -> AttentionCase:
    """The case that the tests of both directions share."""
    return AttentionCase(*arguments)
