"""What no single field of a configuration can say: values that do not fit together."""

from collections.abc import Mapping
from dataclasses import asdict

from capi.config import Config, ScheduleConfig
from capi.nested import SCHEDULES

_MOST = 3.4e38  # of float32


def check_config(config: Config, world_size: int = 1) -> None:
    """Raises ValueError for values that do not fit together."""
    model, data, optim = config.model, config.data, config.optim
    _check_finite(asdict(config), "")
    if model.patch_size < 1:
        raise ValueError(f"model.patch_size must be at least 1, got {model.patch_size}")
    if data.image_size % model.patch_size or data.image_size < model.patch_size:
        raise ValueError(
            f"data.image_size must be a multiple of model.patch_size {model.patch_size}, got {data.image_size}"
        )
    if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        raise ValueError(f"data.crop_scale must be an ascending range in (0, 1], got {data.crop_scale}")
    if not 0 < model.rope_min_frequency <= model.rope_max_frequency:
        raise ValueError(
            f"model.rope_min_frequency must be positive and not above model.rope_max_frequency "
            f"{model.rope_max_frequency}, got {model.rope_min_frequency}"
        )
    if not 0 <= model.drop_path_rate < 1:
        raise ValueError(f"model.drop_path_rate must lie in [0, 1), got {model.drop_path_rate}")
    if optim.batch_size < 1 or optim.batch_size % world_size:
        raise ValueError(
            f"optim.batch_size must be a positive multiple of the {world_size} processes, got {optim.batch_size}"
        )
    local, micro = optim.batch_size // world_size, config.run.micro_batch_size
    if micro is not None and (micro < 1 or local % min(micro, local)):
        raise ValueError(f"run.micro_batch_size must divide the {local} images of a rank, got {micro}")
    if not 0 <= config.run.seed < 2**63:
        raise ValueError(f"run.seed must lie in [0, 2^63), got {config.run.seed}")
    if optim.steps < 1:
        raise ValueError(f"optim.steps must be at least 1, got {optim.steps}")
    for name in ("log_every", "checkpoint_every", "keep_checkpoints", "max_nan_steps"):
        if getattr(config.run, name) < 1:
            raise ValueError(f"run.{name} must be at least 1, got {getattr(config.run, name)}")
    for name in ("profile", "stop_timeout", "evaluate_every"):
        if not getattr(config.run, name) >= 0:
            raise ValueError(f"run.{name} must not be negative, got {getattr(config.run, name)}")
    if not config.distributed.timeout > 0:
        raise ValueError(f"distributed.timeout must be positive, got {config.distributed.timeout}")
    for name in ("target_temperature", "prediction_temperature", "student_temperature"):
        if not getattr(config.clustering, name) > 0:
            raise ValueError(f"clustering.{name} must be positive, got {getattr(config.clustering, name)}")
    if config.clustering.n_prototypes < 1:
        raise ValueError(f"clustering.n_prototypes must be at least 1, got {config.clustering.n_prototypes}")
    if config.clustering.n_sinkhorn_iterations < 1:
        iterations = config.clustering.n_sinkhorn_iterations
        raise ValueError(f"clustering.n_sinkhorn_iterations must be at least 1, got {iterations}")
    queue = config.clustering.queue_size
    if queue != 0 and (queue < optim.batch_size or queue % world_size):
        raise ValueError(
            f"clustering.queue_size must be 0, or at least optim.batch_size {optim.batch_size} and a multiple of the "
            f"{world_size} processes, got {queue}"
        )
    if config.clustering.ema_head and (
        config.clustering.bias or model.predictor_shape()[0] != model.embed_dim or config.distributed.shard != "none"
    ):
        raise ValueError(
            "clustering.ema_head needs clustering.bias false, model.predictor_dim as model.embed_dim and "
            f"distributed.shard none, got {config.clustering.bias}, {model.predictor_shape()[0]} for "
            f"{model.embed_dim}, and {config.distributed.shard}"
        )
    for name in ("betas", "clustering_betas"):
        if not all(0 <= beta < 1 for beta in getattr(optim, name) or ()):
            raise ValueError(f"optim.{name} must lie in [0, 1), got {getattr(optim, name)}")
    for name in ("eps", "clustering_eps"):
        if not (getattr(optim, name) or 0) >= 0:
            raise ValueError(f"optim.{name} must not be negative, got {getattr(optim, name)}")
    for name in SCHEDULES:
        schedule: ScheduleConfig = getattr(optim, name)
        for end in ("start", "base", "final"):
            if getattr(schedule, end) < 0:
                raise ValueError(f"optim.{name}.{end} must not be negative, got {getattr(schedule, end)}")
            if name == "momentum" and getattr(schedule, end) > 1:
                raise ValueError(f"optim.momentum.{end} must not be above 1, got {getattr(schedule, end)}")
        if schedule.warmup_steps < 0 or schedule.freeze_steps < 0:
            raise ValueError(f"optim.{name}.warmup_steps and .freeze_steps must not be negative, got {schedule}")
        if schedule.warmup_steps + schedule.freeze_steps > optim.steps:
            raise ValueError(
                f"optim.{name}: {schedule.freeze_steps} frozen and {schedule.warmup_steps} warm-up steps do not fit in "
                f"optim.steps {optim.steps}"
            )
    if not data.source:
        raise ValueError("data.source must name the images (folder:PATH, hf:NAME, wds:PATTERN or synthetic), got none")
    labelled = [name for name in ("evaluate_train", "evaluate_test") if getattr(config.run, name)]
    if len(labelled) == 1 or (config.run.evaluate_every and not labelled and data.source != "synthetic"):
        got = f"run.{labelled[0]} alone" if labelled else "neither"
        raise ValueError(f"run.evaluate_every needs both run.evaluate_train and run.evaluate_test, got {got}")


def _check_finite(values: Mapping, prefix: str) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_finite(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not abs(value) <= _MOST:
            raise ValueError(f"{prefix}{name} must be finite in float32, got {value}")
