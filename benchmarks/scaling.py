"""Estimates of training on 1, 8 and 64 GPUs: bytes that a step sends, its timeline, and images a second.

python -m benchmarks.scaling writes benchmarks/results/scaling.md and .png. No figure of them was measured: they follow
from measurements of one GPU and from assumptions on networks, and the page names each.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.scaling_plot import plot
from benchmarks.scaling_step import NODE, Network, Seconds, Shape, Task, end, shape_of, step, traffic
from capi.config import Config, load_config
from capi.metrics import training_flop_per_image

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class OneGPU:
    """What one H100 takes. `None`: not measured, and interpolated between the other models, as the page says."""

    preset: str
    batch: int
    step: float | None
    head: float | None
    """Of the clustering head, 256 positions, 512 images, 16384 prototypes."""
    products: float | None
    """Of that, its two matrix products."""
    update: float | None
    host: float
    """What the host needs to launch a step without a CUDA graph, which several processes do not use."""


# One H100 80GB HBM3, 2026-11-27, torch 2.11.0+cu130, Triton 3.6.0.
MEASURED = {
    "ViT-S/14": OneGPU("vits14", 512, 67.8e-3, 15.6e-3, 4.9e-3, 1.04e-3, 70.4e-3),
    "ViT-B/14": OneGPU("vitb14", 512, None, None, None, None, 70.4e-3),
    "ViT-L/14": OneGPU("vitl14", 256, 209.0e-3, 22.5e-3, 12.6e-3, 6.98e-3, 184.5e-3),
}
SOURCES = """\
| | ViT-S/14 | ViT-B/14 | ViT-L/14 | from |
| --- | ---: | ---: | ---: | --- |
| step in a CUDA graph, one GPU | 67.8 ms of 512 images | (not measured) | 209.0 ms of 256 images | measured 2026-11-27, `tuning-h100-2026-11-27/step_graph_*_second.log` |
| clustering head, 512 images | 15.6 ms | (not measured) | 22.5 ms | measured 2026-11-27, [notes](NOTES.md) |
| its two matrix products | 4.9 ms | (not measured) | 12.6 ms | measured 2026-11-27, profiles of an earlier commit |
| update, in one pass | 1.04 ms | (not measured) | 6.98 ms | measured 2026-11-27, `tuning-h100-2026-11-27/update.txt` |
| host, to launch a step | 70.4 ms | as ViT-S: as many launches | 184.5 ms | measured 2026-11-27, `step_graph_*.log`, on that host |
"""  # noqa: E501
# Per GPU and direction. NVLink 4 states 450 GB/s, a card 400 Gb/s; of either a share, as collectives reach.
NETWORKS = {
    "a 400 Gb/s card a GPU": Network(nvlink=360e9, nic=40e9, start=10e-6, nvlink_hop=1.5e-6, nic_hop=6e-6),
    "a 100 Gb/s card a GPU": Network(nvlink=360e9, nic=10e9, start=10e-6, nvlink_hop=1.5e-6, nic_hop=6e-6),
    "a 200 Gb/s card a node": Network(nvlink=360e9, nic=2.5e9, start=10e-6, nvlink_hop=1.5e-6, nic_hop=20e-6),
}
FIRST = next(iter(NETWORKS))


@dataclass(frozen=True)
class Model:
    name: str
    config: Config
    shape: Shape
    seconds: Seconds
    host: float


def models() -> Iterator[Model]:
    """The published models, with the time that each part of a step takes."""
    configs = {name: load_config(["--config", gpu.preset]) for name, gpu in MEASURED.items()}
    known = [name for name, gpu in MEASURED.items() if gpu.step is not None]
    for name, gpu in MEASURED.items():
        if gpu.step is None:
            gpu = _interpolated(gpu, configs[name], [(MEASURED[n], configs[n]) for n in known])
        yield Model(name, configs[name], shape := shape_of(configs[name]), _seconds(gpu, shape), gpu.host)


def _interpolated(gpu: OneGPU, config: Config, known: Iterable[tuple[OneGPU, Config]]) -> OneGPU:
    """Computes as many FLOP/s as the geometric mean of the others; the head is linear in the width of the features."""
    (small, of_small), (large, of_large) = known
    rates = [g.batch * training_flop_per_image(c) / g.step for g, c in ((small, of_small), (large, of_large))]
    place = (config.model.embed_dim - of_small.model.embed_dim) / (of_large.model.embed_dim - of_small.model.embed_dim)
    linear = {name: (1 - place) * getattr(small, name) + place * getattr(large, name) for name in ("head", "products")}
    trained = [sum(traffic(shape_of(c)).values()) for c in (of_small, config, of_large)]
    part = (trained[1] - trained[0]) / (trained[2] - trained[0])
    update = (1 - part) * small.update + part * large.update
    flop = gpu.batch * training_flop_per_image(config)
    return replace(gpu, step=flop / (rates[0] * rates[1]) ** 0.5, update=update, **linear)


def _seconds(gpu: OneGPU, shape: Shape) -> Seconds:
    """What is neither head nor update is the teacher's and the student's by their FLOP."""
    teacher, student = (sum(b.flop for b in shape.teacher), 3 * sum(b.flop for b in shape.student))
    encoders = (gpu.step - gpu.update) / gpu.batch - gpu.head / 512
    return Seconds(
        teacher=encoders * teacher / (teacher + student),
        products=gpu.products / 512,
        passes=(gpu.head - gpu.products) / 512,
        student=encoders * student / (teacher + student),
        update=gpu.update,
    )


def timeline(model: Model, ranks: int, network: Network, *, shard: bool = False) -> list[Task]:
    images = model.config.optim.batch_size // ranks
    micro_batch = min(images, model.config.run.micro_batch_size)
    return step(model.shape, model.seconds, network, ranks, images, micro_batch, shard=shard)


def _sent(model: Model) -> str:
    sizes = [size for name, size in traffic(model.shape).items() if name != "whether all is finite"]
    sizes.append(2 * sum(b.parameters for b in (*model.shape.student, *model.shape.student, *model.shape.teacher)))
    sizes.append(model.config.optim.batch_size * model.shape.feature_bytes)
    return f"| {model.name} | {' | '.join(f'{size / 1e6:,.1f}' for size in sizes)} |"


def _alone(model: Model) -> float:
    return end(timeline(model, 1, NETWORKS[FIRST]))


def _steps(model: Model) -> Iterator[str]:
    batch, alone = model.config.optim.batch_size, _alone(model)
    for ranks, way in ((1, "-"), (8, "DDP"), (8, "FSDP"), (64, "DDP"), (64, "FSDP")):
        tasks = timeline(model, ranks, NETWORKS[FIRST], shard=way == "FSDP")
        compute, network = (sum(t.seconds for t in tasks if t.stream == s) for s in ("compute", "network"))
        taken = end(tasks)
        host = model.host * -(-batch // ranks // model.config.run.micro_batch_size)
        milliseconds = " | ".join(f"{1e3 * t:.1f}" for t in (compute, network, taken - compute, taken))
        yield (
            f"| {model.name} | {ranks} | {way} | {milliseconds} "
            f"| {batch / taken:,.0f} | {alone / ranks / taken:.1%} | {host * 1e3:.0f} |"
        )


def _elsewhere(model: Model) -> Iterator[str]:
    alone = _alone(model)
    for way in ("DDP", "FSDP"):
        taken = [end(timeline(model, 64, network, shard=way == "FSDP")) for network in NETWORKS.values()]
        yield f"| {model.name} | {way} | {' | '.join(f'{t * 1e3:.0f} ({alone / 64 / t:.0%})' for t in taken)} |"


PAGE = """# Training on 8 and 64 GPUs: an estimate

**No figure below that names 8 or 64 GPUs was measured.** `python -m benchmarks.scaling` computes them from what one
H100 took and from assumptions on networks; a run on such a machine decides.

## What goes in

{sources}
ViT-B is taken to compute as many FLOP/s as the geometric mean of the others, its head to be linear in the width of
the features, its update in the number of parameters. What of a step is neither head nor update is divided between
teacher and student by FLOP. All but the update is taken to be proportional to the images.

Assumed: {node} GPUs a node; collectives within a node, then between nodes. Bytes per second that a GPU sends, and as
many that it receives, and seconds before the first arrive:

| network | within a node | between nodes | start | a hop within | a hop between |
| --- | ---: | ---: | ---: | ---: | ---: |
{networks}

Not in it: the host (its column stands apart), multiprocessors that collectives take from kernels, ranks that wait for
slower ones, images that come late, checkpoints.

## Megabytes that a step all-reduces

The same on any number of GPUs: column sums are of all positions and prototypes, gradients of all parameters, in
float32. Features are sent to nobody, as each rank balances the rows that it has; the last column says what gathering
them would send. With FSDP the student's gradients are scattered, and weights are gathered in bf16, for teacher and
student forward and for the student's backward, by every micro-batch. Two processes on a CPU were seen to all-reduce as
many bytes as this count says for their configuration (`tests/test_scaling.py`).

| | Sinkhorn | clustering gradient | student gradient | weights (FSDP, a micro-batch) | features, all images |
| --- | ---: | ---: | ---: | ---: | ---: |
{sent}

## A step of 16384 images, {first}

Milliseconds. `exposed` is what the step takes beyond computing: sending that no computing hides. `host`: what the host
of the measurements would need to launch the step, a micro-batch at a time; where it is the larger figure, the step is
bound by a host like that one, and the figures to its left are out of reach until several processes replay a graph too.

| model | GPUs | | computing | sending | exposed | step | images/s | of one GPU's, by GPU | host |
| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{steps}

## 64 GPUs on other networks

Step in milliseconds, and images per second of one GPU's, by GPU.

| model | | {others} |
| --- | --- |{rule}
{elsewhere}

![timelines](scaling.png)
"""


def report(everything: list[Model]) -> str:
    """The page of all estimates, in Markdown."""
    networks = [
        f"| {name} | {n.nvlink / 1e9:.0f} GB/s | {n.nic / 1e9:g} GB/s | {n.start * 1e6:.0f} us "
        f"| {n.nvlink_hop * 1e6:.1f} us | {n.nic_hop * 1e6:.0f} us |"
        for name, n in NETWORKS.items()
    ]
    return PAGE.format(
        sources=SOURCES,
        node=NODE,
        networks="\n".join(networks),
        sent="\n".join(map(_sent, everything)),
        first=FIRST,
        steps="\n".join(row for model in everything for row in _steps(model)),
        others=" | ".join(NETWORKS),
        rule=" ---: |" * len(NETWORKS),
        elsewhere="\n".join(row for model in everything for row in _elsewhere(model)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    everything = list(models())
    (out / "scaling.md").write_text(report(everything))
    rows = {
        f"{model.name}, {ranks} GPUs, {'FSDP' if shard else 'DDP'}": timeline(
            model, ranks, NETWORKS[FIRST], shard=shard
        )
        for ranks, shard in ((8, False), (64, False), (64, True))
        for model in everything
    }
    plot(rows, out / "scaling.png", f"A step of 16384 images, estimated; {FIRST}")


if __name__ == "__main__":
    main()
