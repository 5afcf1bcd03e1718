"""What the backward of a loss does whose gradient was computed with it: multiply by the gradient of what came after.

That is 1 where nothing did, and then there is nothing left to do. A GPU finds out by itself: to ask it, the host would
have to wait.
"""

import torch
from torch import Tensor


def times(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, a number, without reading or writing the gradient where the factor is 1.

    The backward's last: `gradient`, which it saved, holds the product, unless the graph is retained for another.
    """
    if not _is_used_up(gradient):
        # With one axis rather than none the factor is multiplied in its own type, not first rounded to that of the
        # gradient.
        return torch.mul(gradient, factor.reshape(1), out=torch.empty_like(gradient))
    if gradient.is_cuda:
        from capi_kernels.heads.gradients_triton import scale_

        with torch.cuda.device(gradient.device):
            scale_(gradient, factor)
    elif factor.item() != 1:
        torch.mul(gradient, factor.reshape(1), out=gradient)
    return gradient


def _is_used_up(gradient: Tensor) -> bool:
    """Whether nobody reads the saved tensor after this backward: as torch.compile asks before it reuses such memory."""
    if torch.compiler.is_compiling() or type(gradient) is not Tensor or gradient.is_meta:
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()
