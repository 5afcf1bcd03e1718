"""Trainings of a fraction of a second, and what they leave."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from capi.checkpoint import load_checkpoint, newest_checkpoint
from capi.config import Config, config_of, load_config
from capi.distributed import World
from capi.masking import Masks, sample_masks
from capi.step import Trainer

TINIEST = """
model: {patch_size: 4, embed_dim: 16, num_heads: 2, encoder_depth: 1, predictor_depth: 1, n_registers: 4,
        drop_path_rate: 0.3}
masking: {mask_ratio: [0.5, 0.7], prediction_subsampling: 0.5}
data: {source: synthetic, image_size: 16, num_workers: 0, synthetic_size: 64}
clustering: {n_prototypes: 16}
optim:
  steps: 6
  batch_size: 8
  lr: {base: 1.0e-3, warmup_steps: 2}
  momentum: {base: 0.9, start: 1.0, final: 1.0, warmup_steps: 2}
  clustering_lr: {base: 5.0e-4, warmup_steps: 2}
run: {log_every: 1, checkpoint_every: 3, evaluate: false, device: cpu}
"""
FIXED = ("--masking.mask_ratio", "0.6")


def tiniest(tmp_path: Path) -> list[str]:
    """Command-line arguments of a training into `tmp_path / "run"`."""
    (tmp_path / "tiniest.yaml").write_text(TINIEST)
    return ["--config", str(tmp_path / "tiniest.yaml"), "--run.output_dir", str(tmp_path / "run")]


def load_tiniest(tmp_path: Path, *options: str) -> Config:
    return load_config([*tiniest(tmp_path), *options])


def draw_batches(config: Config, seed: int, parts: int = 1) -> list[tuple[Tensor, Masks]]:
    """The images and masks of one step, in so many micro-batches."""
    size, n = config.data.image_size, config.optim.batch_size // parts
    grid = (size // config.model.patch_size,) * 2
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (parts, n, 3, size, size), dtype=torch.uint8, generator=generator)
    rngs = [[np.random.default_rng((seed, part, i)) for i in range(n)] for part in range(parts)]
    return [(of_part, sample_masks(config.masking, grid, of)) for of_part, of in zip(images, rngs, strict=True)]


def as_earlier_version(run_dir: Path) -> Path:
    """Makes of the newest checkpoint's folder the file that earlier versions wrote."""
    folder = newest_checkpoint(run_dir)
    content = load_checkpoint(folder)
    tensors = content["trainer"]
    trainer = Trainer(config_of(content["config"]), World(0, 1, torch.device("cpu")))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    content["trainer"] = {"model": tensors["model"]}
    for key, optimizer in zip(("student_optimizer", "clustering_optimizer"), trainer.optimizers, strict=True):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = {
            i: {state: tensors["optimizer"][f"{names[id(x)]}.{state}"] for state in ("step", "exp_avg", "exp_avg_sq")}
            for i, x in enumerate(parameters)
        }
        content["trainer"][key] = optimizer.state_dict() | {"state": states}
    torch.save(content, folder.with_name(f"{folder.name}.pt"))
    shutil.rmtree(folder)
    return folder.with_name(f"{folder.name}.pt")


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_equal_states(one: object, other: object, path: str = "") -> None:
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal_states(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal_states(a, b, f"{path}.{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
