"""What a run measures: collapse of the assignments, work done, and the files it is written to."""

import json
import logging
import math
import os
import re
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from io import BytesIO
from itertools import count
from pathlib import Path

import torch
from jaxtyping import Int
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from capi.checkpoint import write_atomically
from capi.config import Config
from capi.distributed import gather_columns, world_size
from capi.loggers import Logger

logger = logging.getLogger(__name__)

# Dense bf16 FLOP/s with fp32 accumulation, from NVIDIA's data sheets; the first name found as whole words wins.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def entropy_floor(batch: int, n_prototypes: int) -> float:
    """Least mean entropy ln(K/B) in nats of `batch` rows balanced over K prototypes (each used equally), at least 0."""
    return max(0.0, math.log(n_prototypes / batch))


def positional_mutual_information(
    positions: Int[Tensor, "tokens"],
    clusters: Int[Tensor, "tokens"],
    n_positions: int,
    n_prototypes: int,
    *,
    n_permutations: int = 4,
) -> tuple[float, float]:
    """Plug-in mutual information of position and cluster in nats, and what it shows by chance alone.

    The second figure is the mean over shuffles of the clusters (seeded): few tokens per (position, cluster) pair make
    two independent variables look dependent, so only the excess over it is evidence of positional collapse.
    """
    if positions.numel() == 0:
        raise ValueError("positions and clusters must hold at least one token, got none")
    generator = torch.Generator(device=positions.device).manual_seed(0)
    information = _mutual_information(positions, clusters, n_positions, n_prototypes)
    shuffled = [
        _mutual_information(
            positions,
            clusters[torch.randperm(clusters.numel(), generator=generator, device=clusters.device)],
            n_positions,
            n_prototypes,
        )
        for _ in range(n_permutations)
    ]
    return information, sum(shuffled) / n_permutations


def _mutual_information(
    positions: Int[Tensor, "tokens"], clusters: Int[Tensor, "tokens"], n_positions: int, n_prototypes: int
) -> float:
    """I = sum_pk n_pk/N ln(n_pk N / (n_p n_k)), over the pairs that occur."""
    pairs, pair_counts = torch.unique(positions.long() * n_prototypes + clusters.long(), return_counts=True)
    position_counts = torch.bincount(positions, minlength=n_positions).double()
    cluster_counts = torch.bincount(clusters, minlength=n_prototypes).double()
    expected = position_counts[pairs // n_prototypes] * cluster_counts[pairs % n_prototypes] / positions.numel()
    information = (pair_counts * (pair_counts / expected).log()).sum() / positions.numel()
    return max(0.0, float(information))  # rounding may leave -1e-17


class AssignmentStatistics:
    """Counts which prototype the tokens at each position go to, on all ranks, from one `read` to the next.

    Of more than `max_tokens` tokens of all ranks together the newest are kept.
    """

    def __init__(self, n_positions: int, n_prototypes: int, *, max_tokens: int = 1 << 22) -> None:
        self.n_positions = n_positions
        self.n_prototypes = n_prototypes
        self._max_tokens = max_tokens
        self._n_tokens = 0
        self._tokens: deque[Tensor] = deque()  # int32 [2, tokens] of every update: positions, clusters

    def update(self, positions: Int[Tensor, "tokens"], clusters: Int[Tensor, "tokens"]) -> None:
        """Adds tokens of this rank by position and argmax cluster; does not wait for the device."""
        self._tokens.append(torch.stack([positions.detach().int(), clusters.detach().int()]))
        self._n_tokens += len(positions)
        while self._n_tokens * world_size() > self._max_tokens and len(self._tokens) > 1:
            self._n_tokens -= self._tokens.popleft().shape[1]

    def read(self) -> dict[str, int | float]:
        """The statistics of all ranks' tokens since the last read, which are then forgotten; {} if there are none.

        All ranks must call it, and all but rank 0 get {}. `positional_mi` and `positional_mi_floor` in nats,
        `dead_prototypes` the share of prototypes that none of the `assigned_tokens` tokens went to (with fewer tokens
        than prototypes some must be dead).
        """
        if not self._tokens:
            return {}
        tokens = torch.cat(list(self._tokens), dim=1)
        self._tokens.clear()
        self._n_tokens = 0
        gathered = gather_columns(tokens)
        if gathered is None:
            return {}
        positions, clusters = gathered
        information, floor = positional_mutual_information(positions, clusters, self.n_positions, self.n_prototypes)
        return {
            "positional_mi": information,
            "positional_mi_floor": floor,
            "dead_prototypes": 1 - torch.unique(clusters).numel() / self.n_prototypes,
            "assigned_tokens": clusters.numel(),
        }


class MetricsWriter:
    """Writes `metrics.jsonl` (one object a line) and TensorBoard events into a run folder, and to `loggers` the same.

    A run that resumes at `resume_step` first drops the lines of that step and later, and a torn last line. What cannot
    be written later on, of a full disk, is lost with a line in the log, and leaves nothing torn behind.
    """

    def __init__(self, run_dir: str | Path, resume_step: int = 0, loggers: Sequence[Logger] = ()) -> None:
        self._loggers = loggers
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] < resume_step] if path.exists() else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda file: file.write_text(text))
        self._lines = _Appender(path)
        # TensorBoard's own writer leaves it to a thread, which dies of a full disk with a traceback.
        place = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._events = _Appender(run_dir / f"events.out.tfevents.{place}.{next(_event_files)}")
        restart = SessionLog(status=SessionLog.START)
        self._add_events([Event(file_version="brain.Event:2"), Event(step=resume_step, session_log=restart)])

    def write(self, step: int, values: dict[str, int | float]) -> None:
        """Appends one line; a value that is not finite is written as null."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = json.dumps({"step": step, **finite}, allow_nan=False) + "\n"
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._lines.append(line.encode())
        self._add_events([Event(step=step, summary=Summary(value=scalars))])
        for other in self._loggers:
            other.log(step, values)

    def _add_events(self, events: list[Event]) -> None:
        records = BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        self._events.append(records.getvalue())

    def close(self) -> None:
        """Closes both files, and the loggers: as those of a failed run where an exception is on its way."""
        self._lines.close()
        self._events.close()
        for other in self._loggers:
            other.close(failed=sys.exc_info()[0] is not None)


_event_files = count()


class _Appender:
    """A file to which whole pieces are appended, or nothing of them."""

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)

    def append(self, piece: bytes) -> None:
        size = self._file.tell()
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            logger.error("%s: what was measured now is lost: %s", self._file.name, error.strerror)
            self._file.truncate(size)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, int | float | None]]:
    """The lines of a `metrics.jsonl`, without a torn last one; raises ValueError for another line that is no JSON."""
    lines = []
    # What follows the last newline was never finished.
    for number, line in enumerate(Path(path).read_text().split("\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {line[:80]}") from error
    return lines


def training_flop_per_image(config: Config) -> float:
    """Floating-point operations one image costs a training step: two per multiply-add of every matrix product.

    Backward passes cost twice the forward of what trains: all of the student, but only the weights of the teacher's
    clustering layer and of the patch embedding. The FLOP of the algorithm as published, whatever order of products is
    cheaper and whatever is computed twice, so that figures of implementations compare.
    """
    model, masking = config.model, config.masking
    d, (p, _), prototypes = model.embed_dim, model.predictor_shape(), config.clustering.n_prototypes
    tokens = (config.data.image_size // model.patch_size) ** 2
    ratio = masking.mask_ratio
    masked = int(tokens * (ratio if isinstance(ratio, int | float) else sum(ratio) / 2))
    visible = tokens - masked
    queries = int(masked * masking.prediction_subsampling)
    context = model.n_registers + visible

    def encoder(length: int, depth: int = model.encoder_depth) -> int:
        return depth * (24 * length * d**2 + 4 * length**2 * d)

    def patch_embedding(patches: int) -> int:
        return 2 * patches * 3 * model.patch_size**2 * d

    predictor = model.predictor_depth * (20 * queries * p**2 + 4 * context * d * p + 4 * queries * context * p)
    student_head = 2 * queries * p * prototypes
    teacher_head = 2 * tokens * d * prototypes
    student = 3 * (encoder(context) + predictor + student_head) + 2 * patch_embedding(visible)
    clustered = model.out_layer % (model.encoder_depth + 1)
    teacher = encoder(model.n_registers + tokens, clustered) + patch_embedding(tokens) + 2 * teacher_head
    return float(student + teacher)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the vendor states for a GPU, or None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Laptop parts and slices of a GPU (MIG) carry the name of a faster one.
    if re.search(r"\b(Laptop|Max-Q|MIG)\b", name):
        return None
    return next((peak for key, peak in _PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
