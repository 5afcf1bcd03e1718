"""What a run says of itself: at its start, and at every line of metrics."""

import logging
import time

import torch
from tqdm import tqdm

from capi.collapse import CollapseAlarm
from capi.config import Config
from capi.distributed import World, average
from capi.evaluate.on_the_way import Evaluator
from capi.metrics import AssignmentStatistics, MetricsWriter, entropy_floor, peak_flops, training_flop_per_image
from capi.profiling import HostTime
from capi.sharding import whole_average
from capi.step import StepResult, Trainer
from capi.step_graph import graphs_obstacle
from capi.stopping import StopRequest

logger = logging.getLogger("capi")


class Rates:
    """Images per second and the shares of time that the host waits for data and for the GPU, between two log lines."""

    def __init__(self, config: Config, world: World, host: HostTime):
        self.config, self.host, self.waits_for_device = config, host, world.device.type == "cuda"
        self.flop_per_image = training_flop_per_image(config)
        peak = peak_flops(world.device)
        self.peak = peak * world.size if peak else None
        self.reset()

    def reset(self) -> None:
        self.began, self.host_began, self.steps = time.perf_counter(), self.host.seconds(), 0

    def step_ends(self) -> None:
        self.steps += 1

    def leave_out(self, seconds: float) -> None:
        """Does not count the last so many seconds."""
        self.began += seconds

    def read(self) -> dict[str, float]:
        elapsed, host = time.perf_counter() - self.began, self.host.since(self.host_began)
        images_per_second = self.steps * self.config.optim.batch_size / elapsed
        values = {
            "images_per_second": images_per_second,
            "flops_per_second": images_per_second * self.flop_per_image,
            "data_wait": host.get("data wait", 0.0) / elapsed,
        }
        if self.waits_for_device:
            values["device_wait"] = host.get("device wait", 0.0) / elapsed
        if self.peak:
            values["mfu"] = values["flops_per_second"] / self.peak
        self.reset()
        return values


def log_step(
    trainer: Trainer,
    result: StepResult,
    step: int,
    statistics: AssignmentStatistics,
    alarm: CollapseAlarm,
    rates: Rates,
    writer: MetricsWriter | None,
    bar: tqdm,
) -> None:
    """Writes one line of metrics; the only place where a healthy step waits for the device."""
    config, world = trainer.config, trainer.world
    with trainer.host.phase("device wait"):
        loss, clustering_loss, entropy = average(
            torch.stack([result.loss, result.clustering_loss, result.target_entropy])
        ).tolist()
    assignments = statistics.read()
    if writer is None:
        return
    n_tokens = statistics.n_positions
    images = config.optim.batch_size + trainer.model.teacher["head"].images_of_queue
    sinkhorn_batch = images * (1 if config.clustering.positionwise else n_tokens)
    values = {
        "loss": loss,
        "clustering_loss": clustering_loss,
        "target_entropy": entropy,
        "target_entropy_floor": entropy_floor(sinkhorn_batch, config.clustering.n_prototypes),
        **assignments,
        **alarm.read(step, assignments),
        **rates.read(),
        "peak_memory_bytes": _peak_memory(world.device),
        "lr": result.lr,
        "momentum": result.momentum,
        "clustering_lr": result.clustering_lr,
        "time": time.time(),
    }
    writer.write(step, values)
    bar.set_postfix_str(
        f"loss {loss:.3f}, target entropy {entropy:.3f}, {values['images_per_second']:.0f} images/s", refresh=False
    )


def log_evaluation(
    trainer: Trainer,
    evaluator: Evaluator | None,
    step: int,
    rates: Rates,
    writer: MetricsWriter | None,
    stop: StopRequest,
) -> None:
    """Writes one line of scores of the moving average. The rates leave out the time that it takes.

    Called by all ranks, of which rank 0 alone has an evaluator and a writer.
    """
    began = time.perf_counter()
    with trainer.host.phase("evaluation"):
        model = whole_average(trainer.model, trainer.world)
        if model is None:
            return
        scores = evaluator.evaluate(model.student_ema.to(trainer.world.device).eval().backbone, stop)
    rates.leave_out(time.perf_counter() - began)
    if scores:
        writer.write(step, scores)
        logger.info("step %d: %s", step + 1, ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def announce(config: Config, trainer: Trainer, start: int) -> None:
    millions = sum(p.numel() for p in trainer.model.student.parameters()) / 1e6
    device = torch.cuda.get_device_name() if trainer.world.device.type == "cuda" else "CPU"
    logger.info(
        "%s: %.2f M student parameters, %d images a step over %d process(es) on %s, %s",
        *(config.run.output_dir, millions, config.optim.batch_size, trainer.world.size, device, trainer.compute_dtype),
    )
    obstacle = graphs_obstacle(config, trainer.world)
    if trainer.world.device.type == "cuda" and config.run.cuda_graphs == "auto" and obstacle is not None:
        logger.info("the host launches every step anew, without a CUDA graph: %s", obstacle)
    if trainer.sharded:
        update = ", not by the kernel that copies them as well" if trainer.world.device.type == "cuda" else ""
        logger.info("each process keeps a part of the weights (distributed.shard), updated by PyTorch%s", update)
    elif config.distributed.shard == "full":
        logger.info("nothing is sharded (distributed.shard): there is one process")
    if 0 < start < config.optim.steps:
        logger.info("resuming after step %d", start)
    if start >= config.optim.steps:
        logger.info("all %d steps are done already; for a new run choose another run.output_dir", start)
    tokens = (config.data.image_size // config.model.patch_size) ** 2
    images = config.optim.batch_size + config.clustering.queue_size
    batch = images * (1 if config.clustering.positionwise else tokens)
    floor = entropy_floor(batch, config.clustering.n_prototypes)
    if floor > 0:
        logger.warning(
            "the Sinkhorn batch of %d is smaller than the %d prototypes: balanced targets keep an entropy of at least "
            "ln(K/B) = %.2f nats; the authors train at about 0.5",
            *(batch, config.clustering.n_prototypes, floor),
        )
