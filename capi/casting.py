"""Layers compute in the type of their weights; inside `cast_weights` that of copies made once for many forwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils._pytree import tree_leaves

from capi.fp8 import Quantized, fp8_linear, quantized


class CastsWeights(nn.Module):
    """A layer that computes with `weights()`: copies of its parameters, stacked and cast, made once in `cast_weights`.

    Gradients reach the parameters through the copies, in the parameters' own type unless `WeightCopies` says otherwise.
    """

    _cast: tuple[Tensor | Quantized, ...] | None = None

    def stacks(self) -> tuple[tuple[nn.Parameter, ...], ...]:
        """For each of `weights()` the parameters whose rows it has, one after the other."""
        raise NotImplementedError

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        stacks = ([weight.to(dtype) for weight in stack] for stack in self.stacks())
        return tuple(torch.cat(stack) if len(stack) > 1 else stack[0] for stack in stacks)

    def weights(self) -> tuple[Tensor | Quantized, ...]:
        return self.cast(next(self.parameters()).dtype) if self._cast is None else self._cast


class WeightCopies:
    """Copies of the weights of layers, in memory that stays, for whoever updates the weights to write as well."""

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype):
        layers = [x for module in modules for x in module.modules() if isinstance(x, CastsWeights) and x.stacks()]
        with torch.no_grad():
            self._of = {layer: tuple(x.contiguous() for x in layer.cast(dtype)) for layer in layers}
        self.dtype = dtype
        self.parts = {
            weight: part
            for layer, copies in self._of.items()
            for stack, copy in zip(layer.stacks(), copies, strict=True)
            for weight, part in zip(stack, copy.split([len(weight) for weight in stack]), strict=True)
        }
        """Each weight's own part of a copy."""
        self.trained = [weight for weight in self.parts if weight.requires_grad]
        self._versions = self._current()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the weights again if PyTorch has written to any of them since."""
        if self._versions != (current := self._current()):
            self._versions = current
            torch._foreach_copy_(list(self.parts.values()), list(self.parts))

    def set_gradient_dtype(self, dtype: torch.dtype) -> None:
        """That of the gradients of weights that have none yet; in that of the copies nothing is cast."""
        for weight in self.trained:
            weight.grad_dtype = dtype

    def of(self, layer: CastsWeights) -> tuple[Tensor, ...] | None:
        """The weights of the layer, whose gradients reach the parameters; None where they are not kept here."""
        if layer not in self._of:
            return None
        return tuple(_Copied.apply(x, *stack) for x, stack in zip(self._of[layer], layer.stacks(), strict=True))

    def _current(self) -> list[int]:
        return [weight._version for weight in self.parts]


class _Copied(torch.autograd.Function):
    """A copy of weights, as if it had been made of them here; gradients in the type that the weights ask for."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, copy: Float[Tensor, "rows columns"], *weights: Float[Tensor, "_ columns"]
    ) -> Float[Tensor, "rows columns"]:
        ctx.rows, ctx.dtype = [len(weight) for weight in weights], weights[0].grad_dtype
        return copy.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Float[Tensor, "rows columns"]) -> tuple[Tensor | None, ...]:
        return None, *gradient.to(ctx.dtype).split(ctx.rows)


def linear(x: Float[Tensor, "tokens width"], weight: Tensor | Quantized) -> Float[Tensor, "tokens dim"]:
    """x weight^T."""
    return fp8_linear(x, weight) if isinstance(weight, Quantized) else F.linear(x, weight)


@contextmanager
def cast_weights(
    model: nn.Module, dtype: torch.dtype, copies: WeightCopies | None = None, *, fp8: bool = False
) -> Iterator[None]:
    """Inside, `model` computes in `dtype`, with copies of its weights made on entry, or kept already.

    With `fp8` the products with stacks of weights are in 8 bits; they have no gradients.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, CastsWeights)]
    try:
        for layer in layers:
            layer._cast = (copies and copies.of(layer)) or layer.cast(dtype)
            if fp8 and layer.stacks():
                layer._cast = tuple(map(quantized, layer._cast))
            for weight in tree_leaves(layer._cast):
                # As parameters are: else the compiler would take their sizes for varying ones.
                torch._dynamo.mark_static(weight)
        yield
    finally:
        for layer in layers:
            layer._cast = None
