"""What a training step computes and sends on each of several GPUs, and when: tasks of two streams, run in order.

Times are estimates: those of computing come from measurements on one GPU (`benchmarks.scaling`), those of sending from
the bandwidths and latencies of a `Network`. Not in it: the host, multiprocessors that collectives take from kernels,
ranks that wait for each other's slower steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from capi.config import Config
from capi.model import CAPI

FLOAT32, BFLOAT16 = 4, 2
LOGITS_BYTES = 1 << 30  # Of a chunk of the clustering head.
CHUNKS_IN_FLIGHT = 4  # Parts of it: while the sums of one are reduced, those of the next are computed.
BUCKET_BYTES = 25 << 20  # Gradients that DDP reduces together.
GATHERED_AHEAD = 2  # Blocks whose weights FSDP has gathered before they are computed.
NODE = 8  # GPUs that NVLink connects.


@dataclass(frozen=True)
class Network:
    """Bytes per second that a GPU sends while it receives as many, and seconds before the first arrive."""

    nvlink: float
    nic: float
    """Between nodes: of all cards of a node, the share of one GPU."""
    start: float
    """Of a collective, whatever it sends."""
    nvlink_hop: float
    nic_hop: float

    def reduce_scatter(self, size: float, ranks: int) -> float:
        """Seconds until each rank has the sum of its part of `size` bytes: within nodes, then between them."""
        if ranks == 1:
            return 0.0
        here, nodes = min(ranks, NODE), max(1, ranks // NODE)
        within = (here - 1) / here * size / self.nvlink
        between = (nodes - 1) / nodes * (size / here) / self.nic
        hops = (here - 1).bit_length() * self.nvlink_hop + (nodes - 1).bit_length() * self.nic_hop
        return self.start + hops + within + between

    def all_gather(self, size: float, ranks: int) -> float:
        """Seconds until every rank has all `size` bytes, of which each has a part: the same way back."""
        return self.reduce_scatter(size, ranks)

    def all_reduce(self, size: float, ranks: int) -> float:
        """The one after the other, started once."""
        return max(0.0, 2 * self.reduce_scatter(size, ranks) - (self.start if ranks > 1 else 0.0))


class Block(NamedTuple):
    """Layers that are computed one after the other, and their trained parameters."""

    name: str
    parameters: int
    flop: float
    """Of one image, forward."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a step that follow from its configuration."""

    student: Sequence[Block]
    """In the order of the forward pass."""
    teacher: Sequence[Block]
    clustering_parameters: int
    prototypes: int
    positions: int
    n_iterations: int
    feature_bytes: int
    """Of one image, in bf16."""


def shape_of(config: Config) -> Shape:
    """The blocks of a configuration; parameters are counted, FLOP as in `capi.metrics.training_flop_per_image`."""
    with torch.device("meta"):
        model = CAPI(config.model, config.clustering)
    sizes = config.model
    side = config.data.image_size // sizes.patch_size
    positions, d, (p, _) = side * side, sizes.embed_dim, sizes.predictor_shape()
    masked = int(positions * config.masking.mask_ratio)
    queries = int(masked * config.masking.prediction_subsampling)
    context, visible = sizes.n_registers + positions - masked, positions - masked
    prototypes = config.clustering.n_prototypes

    def attention_and_mlp(tokens: int) -> int:
        return 24 * tokens * d**2 + 4 * tokens**2 * d

    def patches(tokens: int) -> int:
        return 2 * tokens * 3 * sizes.patch_size**2 * d

    cross = 20 * queries * p**2 + 4 * context * d * p + 4 * queries * context * p
    backbone, depth = model.student.backbone, (sizes.encoder_depth, sizes.predictor_depth)
    encoder, predictor = (_trained(m) // n for m, n in zip((backbone.encoder, backbone.decoder), depth, strict=True))
    head = _trained(model.student.head)
    rest = _trained(model.student) - head - encoder * depth[0] - predictor * depth[1]
    # The gradient of the patches' product goes to its weights alone: one product backward in the place of two.
    student = [Block("patches", rest, patches(visible) * 2 / 3)]
    student += [Block(f"encoder {i}", encoder, attention_and_mlp(context)) for i in range(depth[0])]
    student += [Block(f"predictor {i}", predictor, cross) for i in range(depth[1])]
    student += [Block("head", head, 2 * queries * p * prototypes)]
    clustered = sizes.out_layer % (depth[0] + 1)
    all_tokens = attention_and_mlp(sizes.n_registers + positions)
    teacher = [Block("patches", rest, patches(positions))]
    teacher += [Block(f"encoder {i}", encoder, all_tokens) for i in range(clustered)]
    return Shape(
        student,
        teacher,
        _trained(model.teacher),
        prototypes,
        positions,
        config.clustering.n_sinkhorn_iterations,
        positions * d * BFLOAT16,
    )


def _trained(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def traffic(shape: Shape) -> dict[str, int]:
    """Bytes of every kind that a step all-reduces without sharding, whatever the number of ranks."""
    return {
        # The largest logit of each column, then a sum an iteration.
        "Sinkhorn": (1 + shape.n_iterations) * shape.positions * shape.prototypes * FLOAT32,
        "clustering gradient": shape.clustering_parameters * FLOAT32,
        "student gradient": sum(block.parameters for block in shape.student) * FLOAT32,
        "whether all is finite": FLOAT32,
    }


@dataclass(frozen=True)
class Seconds:
    """Of one GPU, per image but for the update."""

    teacher: float
    products: float
    """The two of the clustering head."""
    passes: float
    """What else the head does: a read of the logits for each of Sinkhorn's sums, one more with a write behind it."""
    student: float
    """Forward and backward."""
    update: float


class Task(NamedTuple):
    name: str
    stream: Literal["compute", "network"]
    seconds: float
    after: tuple[int, ...] = ()
    """Numbers of the tasks that must have ended."""


def run(tasks: Sequence[Task]) -> list[tuple[float, float]]:
    """Start and end of every task: a stream does its own in the order in which they are issued."""
    times: list[tuple[float, float]] = []
    free = {"compute": 0.0, "network": 0.0}
    for task in tasks:
        start = max([free[task.stream], *(times[i][1] for i in task.after)])
        free[task.stream] = start + task.seconds
        times.append((start, start + task.seconds))
    return times


def end(tasks: Sequence[Task]) -> float:
    """Seconds from the first start to the last end."""
    return max(stop for _, stop in run(tasks))


class _Plan:
    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def add(self, name: str, stream: Literal["compute", "network"], seconds: float, *after: int) -> int:
        self.tasks.append(Task(name, stream, seconds, after))
        return len(self.tasks) - 1


def step(
    shape: Shape, seconds: Seconds, network: Network, ranks: int, images: int, micro_batch: int, *, shard: bool = False
) -> list[Task]:
    """A step of `images` a rank, `micro_batch` at a time; `shard` splits weights and optimiser states (FSDP)."""
    plan, micro_batches = _Plan(), -(-images // micro_batch)
    for _ in range(micro_batches):
        if shard:
            _sharded(plan, "teacher", shape.teacher, seconds.teacher * images / micro_batches, network, ranks)
        else:
            plan.add("teacher", "compute", seconds.teacher * images / micro_batches)
    _clustering_head(plan, shape, seconds, network, ranks, images)
    size = shape.clustering_parameters * FLOAT32
    waited = [plan.add("clustering gradient", "network", network.all_reduce(size, ranks), len(plan.tasks) - 1)]
    part = seconds.student * images / micro_batches
    for i in range(micro_batches):
        last = i == micro_batches - 1
        if shard:
            _sharded(plan, "student", shape.student, part / 3, network, ranks)
            sent = _sharded(plan, "student", shape.student[::-1], part * 2 / 3, network, ranks, reduce=last)
        else:
            plan.add("student", "compute", part / 3)
            sent = _backward(plan, shape.student[::-1], part * 2 / 3, network, ranks, reduce=last)
        waited += sent
    finite = plan.add("whether all is finite", "network", network.all_reduce(FLOAT32, ranks), *waited, _last(plan))
    plan.add("update", "compute", seconds.update / (ranks if shard else 1), finite)
    return plan.tasks


def _last(plan: _Plan) -> int:
    """The task of the compute stream that was issued last."""
    return max(i for i, task in enumerate(plan.tasks) if task.stream == "compute")


def _clustering_head(plan: _Plan, shape: Shape, seconds: Seconds, network: Network, ranks: int, images: int) -> None:
    """Positions in chunks, of which four parts take turns: their passes, and the reductions between these."""
    positions = max(1, LOGITS_BYTES // (images * shape.prototypes * BFLOAT16))
    for first in range(0, shape.positions, positions):
        here = min(positions, shape.positions - first)
        share = here / shape.positions * images
        n_parts = min(here, CHUNKS_IN_FLIGHT)
        read = seconds.passes * share / (shape.n_iterations + 2) / n_parts
        reduction = network.all_reduce(here / n_parts * shape.prototypes * FLOAT32, ranks)
        plan.add("clustering products", "compute", seconds.products * share / 2)
        reduced = []
        for _ in range(n_parts):
            summed = plan.add("Sinkhorn", "compute", read)
            reduced.append(plan.add("largest logits", "network", reduction, summed))
        reduced = [plan.add("column sums", "network", reduction, i) for i in reduced]
        for _ in range(shape.n_iterations - 1):
            summed = [plan.add("Sinkhorn", "compute", read, i) for i in reduced]
            reduced = [plan.add("column sums", "network", reduction, i) for i in summed]
        plan.add("clustering loss", "compute", 2 * read * n_parts, *reduced)
        plan.add("clustering products", "compute", seconds.products * share / 2)


def _backward(
    plan: _Plan, blocks: Sequence[Block], seconds: float, network: Network, ranks: int, *, reduce: bool
) -> list[int]:
    """Gradients are reduced in buckets, each as soon as it is full; the numbers of these tasks."""
    if not reduce:
        plan.add("student", "compute", seconds)
        return []
    sent, waiting = [], 0
    for block, part in zip(blocks, _parts(blocks, seconds), strict=True):
        done = plan.add("student", "compute", part)
        waiting += block.parameters * FLOAT32
        for size in _full_buckets(waiting, last=block is blocks[-1]):
            sent.append(plan.add("student gradient", "network", network.all_reduce(size, ranks), done))
            waiting -= size
    return sent


def _full_buckets(size: int, *, last: bool) -> Iterator[int]:
    yield from [BUCKET_BYTES] * (size // BUCKET_BYTES)
    if last and size % BUCKET_BYTES:
        yield size % BUCKET_BYTES


def _parts(blocks: Sequence[Block], seconds: float) -> list[float]:
    flop = sum(block.flop for block in blocks)
    return [seconds * block.flop / flop for block in blocks]


def _sharded(
    plan: _Plan,
    name: str,
    blocks: Sequence[Block],
    seconds: float,
    network: Network,
    ranks: int,
    *,
    reduce: bool = False,
) -> list[int]:
    """Each block's weights are gathered in bf16 before it is computed, and its gradients reduced to their owners."""
    gathers = [network.all_gather(block.parameters * BFLOAT16, ranks) for block in blocks]
    # While one is computed the next is there or on its way.
    before = [i for i, task in enumerate(plan.tasks) if task.stream == "compute"][-1:]
    gathered = [plan.add("weights", "network", gather, *before) for gather in gathers[:GATHERED_AHEAD]]
    sent = []
    for i, (block, part) in enumerate(zip(blocks, _parts(blocks, seconds), strict=True)):
        computed = plan.add(name, "compute", part, gathered[i])
        gathered += [plan.add("weights", "network", gather, computed) for gather in gathers[i + GATHERED_AHEAD :][:1]]
        if reduce:
            scatter = network.reduce_scatter(block.parameters * FLOAT32, ranks)
            sent.append(plan.add("student gradient", "network", scatter, computed))
    return sent
