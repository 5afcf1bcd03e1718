"""Multinomial logistic regression by L-BFGS: |W|^2 / 2 + C sum_i cross-entropy(x_i W + b, y_i), the intercept free.

The problem of scikit-learn's and cuML's LogisticRegression, solved by PyTorch's own L-BFGS on the device of the
features: a data set such as ADE20K has five million patches.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

_CHUNK = 2**18

Solution = tuple[Float[Tensor, "dim classes"], Float[Tensor, "classes"]]


def fit_logistic(
    x: Float[Tensor, "items dim"],
    y: Int[Tensor, "items"],
    n_classes: int,
    inverse_penalties: Sequence[float],
    *,
    max_iterations: int = 1000,
    watch: Callable[[], None] = lambda: None,
) -> list[Solution]:
    """Weights and intercept for every C of `inverse_penalties`, ascending: each begins where the one before ended."""
    weight = torch.zeros(x.shape[1], n_classes, device=x.device, dtype=x.dtype, requires_grad=True)
    intercept = torch.zeros(n_classes, device=x.device, dtype=x.dtype, requires_grad=True)
    solutions = []
    bar = tqdm(inverse_penalties, desc="logistic regression", unit="C", disable=None, dynamic_ncols=True, leave=False)
    for inverse_penalty in bar:
        optimizer = torch.optim.LBFGS(
            [weight, intercept],
            max_iter=max_iterations,
            max_eval=2 * max_iterations,
            history_size=5,
            tolerance_grad=1e-6,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure(penalty: float = 1 / (inverse_penalty * len(x))) -> Tensor:
            """The objective over C and the number of items, and its gradient."""
            watch()
            weight.grad, intercept.grad = penalty * weight.detach(), torch.zeros_like(intercept)
            total = penalty / 2 * weight.detach().square().sum()
            for chunk, classes in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
                loss = F.cross_entropy(chunk @ weight + intercept, classes, reduction="sum") / len(x)
                loss.backward()
                total = total + loss.detach()
            return total

        optimizer.step(closure)
        solutions.append((weight.detach().clone(), intercept.detach().clone()))
    return solutions
