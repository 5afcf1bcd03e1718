"""The official code itself, from a checkout of facebookresearch/capi that CAPI_OFFICIAL names."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from torch import nn

from capi.config import Config


class _Stub(ModuleType, Loader, MetaPathFinder):
    """Stands in for packages that the official code imports for what a training step does not use."""

    def __init__(self, packages: set[str]):
        super().__init__("stub")
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (), {"__init__": lambda self, *_, **__: None})
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _importable(checkout: Path) -> Iterator[None]:
    """Lets the checkout's modules be imported, without fsdp.py, which sets the compiler up for every model."""
    packages = {"torchvision", "omegaconf", "xformers", "rich", "sklearn", "scipy", "datasets", "filelock", "submitit"}
    stub = _Stub({"fsdp", *(package for package in packages if find_spec(package) is None)})
    before, path = set(sys.modules), list(sys.path)
    sys.meta_path.insert(0, stub)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.meta_path.remove(stub)
        sys.path[:] = path
        # The checkout's own modules stay: torch.compile looks them up by name.
        for name in set(sys.modules) - before:
            if name.split(".")[0] in stub.packages:
                del sys.modules[name]


def checkout_path() -> Path | None:
    """Where the official code lies, if CAPI_OFFICIAL says so."""
    path = os.environ.get("CAPI_OFFICIAL")
    return Path(path).resolve() if path else None


def source() -> str:
    """What the peer is, for the results file."""
    path = checkout_path()
    if path is None:
        return "restated in plain PyTorch"
    command = ["git", "-C", str(path), "rev-parse", "--show-toplevel", "HEAD"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    # Copied without its history into another repository it would pass for a commit of that one.
    known = Path(lines[0]) == path
    return f"facebookresearch/capi {lines[1] if known else 'of an unknown commit'}"


@cache
def _train_capi() -> ModuleType:
    with _importable(checkout_path()):
        return importlib.import_module("train_capi")


def losses() -> tuple[Callable, Callable]:
    """do_teacher and do_student."""
    return _train_capi().do_teacher, _train_capi().do_student


def build_model(config: Config) -> nn.ModuleDict:
    modules = _train_capi()
    model, clustering = config.model, config.clustering
    block = {"attn_kwargs": {"num_heads": model.num_heads}}
    common = {"embed_dim": model.embed_dim, "drop_path_rate": model.drop_path_rate, "block_kwargs": block}
    sides = {}
    for side in ("student", "student_ema"):
        backbone = modules.EncoderDecoder(
            patch_size=model.patch_size,
            n_registers=model.n_registers,
            transformers_kwargs=common,
            encoder_kwargs={"depth": model.encoder_depth},
            decoder_kwargs={"depth": model.predictor_depth},
        )
        head = modules.L2NormLinear(model.embed_dim, clustering.n_prototypes)
        sides[side] = nn.ModuleDict({"backbone": backbone, "head": head})
    head = modules.OnlineClustering(
        model.embed_dim,
        clustering.n_prototypes,
        bias=True,
        n_sk_iter=clustering.n_sinkhorn_iterations,
        target_temp=clustering.target_temperature,
        pred_temp=clustering.prediction_temperature,
    )
    teacher = nn.ModuleDict({"backbone": sides["student_ema"]["backbone"], "head": head})
    return nn.ModuleDict({**sides, "teacher": teacher})


def parameter_groups(student: nn.Module, config: Config) -> list[dict]:
    """Parameters by their multipliers of learning rate and weight decay."""
    return _train_capi().get_params_groups(
        student,
        patch_embed_lr_mult=config.optim.patch_embed_lr_multiplier,
        rope_lr_mult=0.0,
        layernorm_wd_mult=config.optim.norm_weight_decay_multiplier,
    )
