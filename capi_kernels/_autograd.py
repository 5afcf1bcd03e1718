"""Autograd functions on the host, where each microsecond of a call counts beside small kernels."""

from collections.abc import Callable

import torch
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


def apply_of(function: type[Function]) -> Callable:
    """`function.apply`, without what torch.func alone needs: inputs bound to the signature of the forward.

    Its forward runs below autograd: the op that it calls is not asked for a gradient of its own.
    """

    def forward(ctx: FunctionCtx, *inputs: object) -> object:
        with torch._C._AutoDispatchBelowAutograd():
            output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    direct = type(function.__name__, (Function,), members)

    def apply(*inputs: object) -> object:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*inputs)
        return direct.apply(*inputs)

    return apply
