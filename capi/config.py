"""The whole configuration of a run: nested dataclasses, whose defaults are the paper's ViT-L/14.

A preset (`capi/presets/*.yaml`) or a command-line option overrides single fields.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_type_hints

import jsonargparse
import yaml

from capi.nested import SCHEDULES, check_extent, check_text

logger = logging.getLogger(__name__)


@dataclass
class ModelConfig:
    """Shape of the student; its exponential moving average has the same."""

    patch_size: int = 14
    """Side of a patch in pixels."""
    embed_dim: int = 1024
    """Width of the encoder."""
    num_heads: int = 16
    """Attention heads; embed_dim / num_heads must divide by 4."""
    encoder_depth: int = 24
    """Self-attention blocks of the encoder."""
    predictor_depth: int = 12
    """Cross-attention blocks of the predictor."""
    n_registers: int = 16
    """Register tokens; must divide by 4, unless their coordinates are zeros."""
    drop_path_rate: float = 0.2
    """Share of the images that each residual branch leaves out in training."""
    predictor_dim: int | None = None
    """Width of the predictor; null is that of the encoder."""
    predictor_heads: int | None = None
    """Attention heads of the predictor; null is as many as the encoder has."""
    register_coordinates: Literal["edge", "zeros"] = "edge"
    """Where registers lie: around the patches, or all in their first corner."""
    scale_registers: bool = True
    """Count the coordinates of registers from the visible patches; off counts from the whole image."""
    out_layer: int = -1
    """The encoder's layer that the teacher clusters and that features are of: 0 is before the first block, k behind the
    k-th, -1 the last. The predictor reads the last."""
    rope_max_frequency: float = 7.0
    """Highest rotary frequency, in periods over the side of an image."""
    rope_min_frequency: float = 7e-4
    """Lowest rotary frequency."""

    def __post_init__(self) -> None:
        # One name for one shape: configurations and files are compared.
        if self.predictor_dim == self.embed_dim:
            self.predictor_dim = None
        if self.predictor_heads == self.num_heads:
            self.predictor_heads = None

    def predictor_shape(self) -> tuple[int, int]:
        """Width and heads of the predictor."""
        dim = self.embed_dim if self.predictor_dim is None else self.predictor_dim
        return dim, self.num_heads if self.predictor_heads is None else self.predictor_heads


@dataclass
class MaskingConfig:
    """Which patches the student sees and which it predicts."""

    kind: Literal["inverse_block", "block", "random"] = "inverse_block"
    """Shape of the masked region."""
    mask_ratio: float | tuple[float, float] = 0.65
    """Share of the patches that is masked, or a range to draw it from for every image."""
    prediction_subsampling: float = 0.05
    """Share of the masked patches that is predicted (the authors advise 0.2)."""
    roll: bool = True
    """Shift block masks cyclically on both axes, so that every cell is masked equally often."""
    min_aspect: float = 0.5
    """Least aspect ratio of a block, rows over columns."""
    max_aspect: float | None = None
    """Largest aspect ratio of a block; null is the inverse of the least."""


@dataclass
class DataConfig:
    """Where images come from and how they are cropped."""

    source: str | None = None
    """synthetic, folder:PATH, hf:NAME[:CONFIGURATION] (Hugging Face, streamed) or wds:PATTERN (.tar shards)."""
    image_size: int = 224
    """Side of a training crop in pixels; must divide by the patch size."""
    crop_scale: tuple[float, float] = (0.6, 1.0)
    """Range of the crop's share of the image area."""
    hflip: bool = True
    """Flip half of the crops left to right."""
    num_workers: int = 8
    """Loader processes per rank; 0 loads in the training process."""
    read_timeout: float = 60.0
    """Seconds after which the read of a file is given up; it then counts as unreadable."""
    hf_split: str = "train"
    """Split of a Hugging Face data set."""
    image_key: str = "auto"
    """Column (hf; auto is "image") or file extension (wds; from the first dot on; auto is any image's) of the images.

    An extension may have dots and wildcards: left.jpg, *jpg."""
    shuffle_buffer: int = 10000
    """Samples that a streamed source shuffles among."""
    synthetic_size: int = 8192
    """Scenes in the synthetic training set."""


@dataclass
class ClusteringConfig:
    """The teacher's prototypes and the losses against them."""

    n_prototypes: int = 16384
    """Clusters that patches are assigned to."""
    target_temperature: float = 0.06
    """Divides the teacher's logits before Sinkhorn-Knopp."""
    prediction_temperature: float = 0.12
    """Divides the teacher's logits in the clustering loss."""
    student_temperature: float = 0.12
    """Divides the student's logits in the prediction loss."""
    n_sinkhorn_iterations: int = 3
    """Sinkhorn-Knopp iterations, each over columns and rows."""
    positionwise: bool = True
    """Balance the assignments at each position separately; off balances all positions together."""
    queue_size: int = 0
    """Earlier images, over all ranks, that are balanced with those of a step: for batches that are small beside
    n_prototypes. Their features are kept, by every rank, and assigned anew at every step; losses are of the step's own
    images. They take part once there are so many. 0: none; else at least optim.batch_size."""
    bias: bool = True
    """Give the teacher's clustering layer a bias."""
    ema_head: bool = False
    """Assign by the moving average of the student's head, as iBOT does, rather than by a clustering that is trained.
    It is for comparison, and needs no bias, a predictor as wide as the encoder, and no sharding."""


@dataclass
class ScheduleConfig:
    """Linear warm-up from `start` to `base`, then a cosine towards `final` of which the share `truncate` is run."""

    base: float = 1e-3
    """Value at the end of the warm-up."""
    final: float = 0.0
    """Value after the last step."""
    start: float = 0.0
    """Value at step 0."""
    warmup_steps: int = 50_000
    """Steps of warm-up. A run with fewer steps than its preset warms up for takes a tenth of its own."""
    freeze_steps: int = 0
    """Steps at value 0 before the warm-up."""
    truncate: float = 0.8
    """Share of the cosine's half period that is run through."""


@dataclass
class OptimConfig:
    """Steps, batch, AdamW and schedules."""

    steps: int = 500_000
    """Optimiser steps, and the length of every schedule."""
    batch_size: int = 16384
    """Images per step over all ranks; also the batch of the Sinkhorn balancing."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas of the student."""
    eps: float = 1e-8
    """AdamW epsilon of the student."""
    weight_decay: float = 0.1
    """Weight decay of the student."""
    norm_weight_decay_multiplier: float = 0.1
    """Multiplies the weight decay of norm weights."""
    patch_embed_lr_multiplier: float = 0.2
    """Multiplies the learning rate of the patch embedding."""
    clustering_weight_decay: float = 0.01
    """Weight decay of the teacher's clustering layer."""
    clustering_betas: tuple[float, float] | None = None
    """AdamW betas of the clustering layer; null are those of the student."""
    clustering_eps: float | None = None
    """AdamW epsilon of the clustering layer; null is that of the student."""
    lr: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate of the student."""
    momentum: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(base=0.999, final=1.0, start=1.0))
    """Momentum of the exponential moving average."""
    clustering_lr: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(base=5e-4))
    """Learning rate of the clustering layer."""


@dataclass
class RunConfig:
    """Where and how a run executes; should not change its results beyond rounding."""

    output_dir: str = "runs/capi"
    """Run folder: configuration, metrics, checkpoints, encoder, pictures. Of several processes rank 0 keeps it; where
    all see it, each writes its part of the checkpoints."""
    resume: bool = True
    """Go on from the newest checkpoint of the run folder, if there is one; off moves what is there to DIR.1 (or .2 ...)
    and starts anew."""
    allow_changes: list[str] = field(default_factory=list)
    """Fields, such as [optim.steps, data.source], that may have other values than the run that is gone on with."""
    seed: int = 0
    """Seeds initialisation, data order, crops, masks and drop-path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type; weights stay fp32. auto is bf16 on a GPU that has it, else fp32. A run keeps what it began with."""
    teacher_precision: Literal["auto", "fp8"] = "auto"
    """fp8: the teacher's four products a block in 8 bits, from compute capability 8.9 on; on a CPU emulated.
    Not proven on a GPU: on an H100 some rows were more than 1 % off the emulation, and the reason is not known."""
    micro_batch_size: int | None = None
    """Most images of a rank that pass through the model at a time; None takes all of them. Fewer need less memory:
    Sinkhorn still balances the whole batch, and gradients are accumulated."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Fuse the pointwise work with torch.compile; auto does on a GPU."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay the step as one CUDA graph, so that no GPU waits for its host; it needs one process on a GPU, a
    masking.mask_ratio that is no range and no clustering.queue_size. auto does where it can."""
    checkpoint_activations: bool = False
    """Keep the inputs of the student's blocks alone and recompute the rest: less memory, a quarter more time."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    loggers: list[Literal["wandb", "mlflow"]] = field(default_factory=list)
    """Where else these lines go: wandb (its own WANDB_PROJECT, WANDB_MODE ...) and mlflow (MLFLOW_TRACKING_URI,
    MLFLOW_EXPERIMENT_NAME ...), of extras of these names."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints, which are written while training goes on."""
    keep_checkpoints: int = 3
    """Checkpoints that are kept."""
    profile: int = 0
    """Steps to trace, after eight and as many more: a table and a trace (profile.txt, .json.gz) in the run folder."""
    max_nan_steps: int = 3
    """Consecutive steps with a loss or gradient that is not finite after which the run stops."""
    stop_timeout: float = 15.0
    """Seconds that a stop signal waits for the end of the step; then the run leaves with the last whole one saved."""
    evaluate: bool = True
    """Draw pictures at every checkpoint, and finish with k-NN evaluations (on the held-out synthetic scenes)."""
    evaluate_every: int = 0
    """Steps between two evaluations of the moving average by k-NN and linear probes, and one at the end; 0: none. Rank
    0 evaluates for four minutes at most, and the other ranks wait."""
    evaluate_train: str | None = None
    """Labelled images that these learn from, as `python -m capi.evaluate --train` takes them (10000 of them, with masks
    500); the synthetic source needs none."""
    evaluate_test: str | None = None
    """Labelled images that they predict."""


@dataclass
class DistributedConfig:
    """How the processes of a run share the work; should not change its results beyond rounding."""

    shard: Literal["none", "full"] = "none"
    """full: each rank keeps a part of student, moving average and their optimiser, and gathers block after block."""
    timeout: float = 600.0
    """Seconds after which a rank that does not finish its step, or gives no sign of life, ends the run for it to be
    started again; ten times the median step where that is longer. Evaluations and checkpoints may take 20 minutes
    more, and so may the first steps."""


@dataclass
class Config:
    """A CAPI run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def micro_batch_size(config: Config, world_size: int = 1) -> int:
    """Images per rank that pass through the model at a time."""
    local = config.optim.batch_size // world_size
    return local if config.run.micro_batch_size is None else min(config.run.micro_batch_size, local)


PRESETS = Path(__file__).parent / "presets"


def load_config(argv: Sequence[str] | None = None) -> Config:
    """Reads a configuration from command-line arguments; without `--config` it starts from the preset `tiny`.

    `--config` takes a YAML file or the name of a preset. An unknown key, a key given twice or a value of the wrong type
    ends the program with a message that names it. Warm-ups that `optim.steps` is too short for become a tenth of it,
    which is logged, unless an option states them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    options = [_resolved(parser, option, value) for option, value in _options(argv)]
    if not any(option == "--config" for option, _ in options):
        options.insert(0, ("--config", str(_presets()["tiny"])))
    arguments = [option if value is None else f"{option}={value}" for option, value in options]
    config = _instance(parser, parser.parse_args(arguments))
    _fit_warmups(config.optim, stated={option for option, _ in options})
    return config


def config_of(values: Mapping) -> Config:
    """The configuration with these values, as a run keeps them; ValueError for unknown keys and wrong types."""
    parser = _parser(exit_on_error=False)
    check_extent(values)
    try:
        return _instance(parser, parser.parse_object(dict(values)))
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _instance(parser: jsonargparse.ArgumentParser, values: jsonargparse.Namespace) -> Config:
    values.pop("config", None)
    _check_nulls(parser, values, Config, "")
    return Config(**vars(parser.instantiate(values)))


def _check_nulls(parser: jsonargparse.ArgumentParser, values: jsonargparse.Namespace, kind: type, prefix: str) -> None:
    """Ends the program where a field that must have a value is null: jsonargparse lets it pass in files."""
    for name, expected in get_type_hints(kind).items():
        value = values.get(name)
        if value is None and NoneType not in get_args(expected):
            parser.error(f"{prefix}{name} must have a value, got null")
        if is_dataclass(expected):
            _check_nulls(parser, value, expected, f"{prefix}{name}.")


def _parser(*, exit_on_error: bool = True) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m capi.train",
        usage="python -m capi.train [--config FILE] [--GROUP.FIELD VALUE ...]",
        description="Trains a CAPI encoder.",
        allow_abbrev=False,
        exit_on_error=exit_on_error,
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"a YAML file, or a preset ({', '.join(_presets())}); tiny by default. Later options win.",
    )
    parser.add_class_arguments(Config)
    return parser


def _presets() -> dict[str, Path]:
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Options and their values, written with a space or with an equals sign; None where none follows."""
    arguments = iter(argv)
    option = None
    for argument in arguments:
        if option is not None:
            has_value = not argument.startswith("--")
            yield option, argument if has_value else None
            option = None
            if has_value:
                continue
        if argument.startswith("--") and "=" in argument:
            yield tuple(argument.split("=", 1))
        elif argument.startswith("--"):
            option = argument
        else:
            yield argument, None
    if option is not None:
        yield option, None


def _resolved(parser: jsonargparse.ArgumentParser, option: str, value: str | None) -> tuple[str, str | None]:
    """The option with a preset's path in place of its name; what cannot be meant ends the program."""
    if value is None:
        return option, value
    if option == "--config":
        path = _presets().get(value, Path(value).expanduser())
        if not path.is_file():
            parser.error(f"--config takes a YAML file or a preset ({', '.join(_presets())}), got {value}")
        try:
            check_text(path.read_text(), place=f" of {value}")
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            parser.error(f"{value} cannot be read as YAML: {' '.join(str(error).split())}")
        except ValueError as error:
            parser.error(f"{value} cannot be read: {error}")
        return option, str(path)
    if value.startswith(("{", "[")) or option.removeprefix("--optim.") in SCHEDULES:
        try:
            check_text(value, option.removeprefix("--"), f" of {option}")
        except (yaml.YAMLError, ValueError) as error:
            parser.error(f"{option} {value[:80]} cannot be read: {' '.join(str(error).split())}")
    return option, value


def _fit_warmups(optim: OptimConfig, stated: set[str]) -> None:
    shortened = []
    for name in SCHEDULES:
        schedule: ScheduleConfig = getattr(optim, name)
        fits = schedule.freeze_steps + schedule.warmup_steps <= optim.steps
        if not fits and f"--optim.{name}.warmup_steps" not in stated:
            shortened.append(f"optim.{name} ({schedule.warmup_steps})")
            schedule.warmup_steps = optim.steps // 10
    if shortened:
        logger.warning(
            "optim.steps %d is too short for the warm-up of %s, which becomes %d steps",
            *(optim.steps, ", ".join(shortened), optim.steps // 10),
        )


def to_yaml(config: Config) -> str:
    """The whole configuration, in a form that `--config` reads back."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
