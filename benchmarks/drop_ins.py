"""What others do in the place of `sinkhorn_positionwise`, restated, and what each takes on a CPU, as Markdown.

PYTHONPATH=tests python -m benchmarks.drop_ins > benchmarks/results/cpu_drop_ins.md
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from os import getloadavg
from time import process_time

import torch
from pages import DOCS, run_page
from torch import Tensor


def lightly_sinkhorn(logits: Tensor, iterations: int = 3, epsilon: float = 1e-8) -> Tensor:
    """Of logits [images, positions, prototypes], already divided by the temperature: no constant in the exponent."""
    M = (logits - logits.amax(0)).exp()
    for _ in range(iterations):
        M = M / (M.sum(0) + epsilon)
        M = M / (M.sum(-1, keepdim=True) + epsilon)
    return M


def lightly_loss(
    teacher_logits: Tensor, student_logits: Tensor, teacher_index: Tensor, teacher: float = 0.06, student: float = 0.12
) -> Tensor:
    """Cross-entropy with the assignments at teacher_index [images, predicted] of all those of the teacher."""
    assignments = lightly_sinkhorn(teacher_logits.detach() / teacher)
    targets = assignments.take_along_dim(teacher_index[..., None], 1)
    return -(targets * (student_logits / student).log_softmax(-1)).sum(-1).mean()


def birder_sinkhorn_(M: Tensor, temperature: float, n_iterations: int, eps: float = 1e-8) -> Tensor:
    """The official formula with the temperature inside, over its argument [..., images, prototypes]."""
    M /= temperature
    M += 50 - M.amax(-2, keepdim=True)
    M.exp_()
    for _ in range(n_iterations):
        M /= M.sum(-2, keepdim=True) + eps
        M /= M.sum(-1, keepdim=True) + eps
    return M


def dino_sinkhorn(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Prototypes first, a whole of one: each prototype 1 / K, then each sample 1 / B; logits [samples, prototypes]."""
    Q = (logits / temperature).exp().T
    prototypes, samples = Q.shape
    Q /= Q.sum()
    for _ in range(n_iterations):
        Q /= Q.sum(1, keepdim=True)
        Q /= prototypes
        Q /= Q.sum(0, keepdim=True)
        Q /= samples
    return (Q * samples).T


def swav_sinkhorn(scores: Tensor, epsilon: float = 0.05, n_iterations: int = 3) -> Tensor:
    """The same by marginals r and c, which are multiplied by; scores [samples, prototypes]."""
    Q = (scores / epsilon).exp().T
    Q /= Q.sum()
    r, c = 1 / Q.shape[0], 1 / Q.shape[1]
    for _ in range(n_iterations):
        Q *= (r / Q.sum(1)).unsqueeze(1)
        Q *= (c / Q.sum(0)).unsqueeze(0)
    return (Q / Q.sum(0)).T


@dataclass(frozen=True)
class DropIn:
    """A function of others restated, and the name of its adapter in docs/drop_ins.md; both take `arguments`."""

    theirs: Callable[..., Tensor]
    adapter: str
    sizes: str
    arguments: Callable[[], tuple]


def _scores(*shape: int) -> Tensor:
    """Logits of a linear layer on L2-normalised features are of this size, or smaller."""
    return torch.randn(shape)


def _loss(images: int, positions: int, predicted: int, prototypes: int) -> tuple[Tensor, ...]:
    index = torch.rand(images, positions).argsort(1)[:, :predicted]
    return _scores(images, positions, prototypes), _scores(images, predicted, prototypes), index


LIGHTLY, LIGHTLY_LOSS = (lightly_sinkhorn, "lightly_sinkhorn_knopp"), (lightly_loss, "lightly_capi_loss")
BIRDER, DINO = (birder_sinkhorn_, "birder_sinkhorn_knopp_"), (dino_sinkhorn, "dino_sinkhorn_knopp_teacher")
SWAV = (swav_sinkhorn, "swav_assignments")
DROP_INS = (
    DropIn(*LIGHTLY, "64 images x 64 positions x 4096", lambda: (_scores(64, 64, 4096) / 0.06,)),
    DropIn(*LIGHTLY_LOSS, "64 images x 64 positions x 4096, 4 predicted", lambda: _loss(64, 64, 4, 4096)),
    DropIn(*BIRDER, "64 positions x 64 images x 4096", lambda: (_scores(64, 64, 4096), 0.06, 3)),
    DropIn(*BIRDER, "16 positions x 16 images x 1024", lambda: (_scores(16, 16, 1024), 0.06, 3)),
    DropIn(*DINO, "64 samples x 65536", lambda: (_scores(64, 65536), 0.06)),
    DropIn(*DINO, "1024 samples x 65536", lambda: (_scores(1024, 65536), 0.06)),
    DropIn(*DINO, "256 samples x 131072", lambda: (_scores(256, 131072), 0.06)),
    DropIn(*SWAV, "4096 samples x 3000", lambda: (torch.rand(4096, 3000) * 2 - 1,)),
    DropIn(*SWAV, "64 samples x 3000", lambda: (torch.rand(64, 3000) * 2 - 1,)),
)


def seconds(run: Callable[..., Tensor], arguments: tuple) -> float:
    """Of the processor, whatever else it does, for one call on fresh copies: one of them overwrites its argument."""
    arguments = tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)
    start = process_time()
    run(*arguments)
    return process_time() - start


def compare(drop_in: DropIn, ours: Callable[..., Tensor], rounds: int) -> tuple[float, float]:
    """Median seconds of the processor of theirs and of ours, of rounds that alternate after one that does not count."""
    torch.manual_seed(0)
    arguments = drop_in.arguments()
    taken = [(seconds(drop_in.theirs, arguments), seconds(ours, arguments)) for _ in range(rounds + 1)][1:]
    theirs, ours_seconds = zip(*taken, strict=True)
    return statistics.median(theirs), statistics.median(ours_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = " ".join(["PYTHONPATH=tests python -m benchmarks.drop_ins", *sys.argv[1:]])
    print("# In the place of others' functions, on a CPU\n")
    print(f"- {datetime.now(UTC):%Y-%m-%d}, CPU, 1 thread, PyTorch {torch.__version__}, float32, 3 iterations.")
    print(f"- Load average as it started: {getloadavg()[0]:.1f}.")
    print(f"- `{command}`; seconds of the processor, medians of {arguments.rounds} rounds that alternate.\n")
    print("| in the place of | sizes | restated | ours | speed against the restatement |")
    print("| --- | --- | ---: | ---: | ---: |")
    adapters = run_page(DOCS / "drop_ins.md")
    for drop_in in DROP_INS:
        theirs, ours = compare(drop_in, adapters[drop_in.adapter], arguments.rounds)
        figures = (f"{theirs * 1e3:.3g} ms", f"{ours * 1e3:.3g} ms", f"{theirs / ours:.2f}x")
        print("|", " | ".join((f"`{drop_in.adapter}`", drop_in.sizes, *figures)), "|", flush=True)


if __name__ == "__main__":
    main()
