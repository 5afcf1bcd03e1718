"""Files that hold an encoder, in the forms in which people have them: found, read, searched for its weights.

A file may be an exported encoder, a training checkpoint, or a PyTorch state dict: bare, nested in others, with the
prefixes of whatever wrapped the model. No code from a file is run.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor

from capi.checkpoint import is_checkpoint, load_checkpoint, newest_checkpoint
from capi.config import ModelConfig, config_of

EXPORTS = ("encoder.safetensors", "model.safetensors")
"""How an exported encoder is called in a run's folder, and in that of a Hugging Face repository."""
HEADS = "heads.safetensors"
"""What lies beside it: the teacher's clustering, and the student's head."""
# What DataParallel, torch.compile, FSDP and activation checkpointing put between the names of modules.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BARE = "a state dict"
# What of a configuration the weights do not show.
_UNSEEN = ("register_coordinates", "scale_registers", "out_layer", "rope_max_frequency", "rope_min_frequency")
_NO_WEIGHTS = {
    b"<": "it is an HTML or XML page",
    b"version https://git-lfs": "it is a Git LFS pointer; git lfs pull brings the file",
}


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder's weights as they stand in a file."""

    path: Path
    kind: str
    """What the file is, in words."""
    taken: str
    """The name of the encoder within it; empty where it is all there is."""
    state: dict[str, Tensor]
    """By the keys of `Backbone`; may lie in the mapped file."""
    head: dict[str, Tensor]
    """Those of the student's head beside it in the file, by the keys of `PredictionHead`; empty where there is none."""
    shape: ModelConfig
    run_config: Mapping | None
    """The configuration of the run, where it stands in the file."""

    def __str__(self) -> str:
        taken = f", of which {self.taken} is taken" if self.taken else ""
        return f"{self.path}: {self.kind}{taken}; {self.description}"

    @property
    def description(self) -> str:
        """The shape of the model, in words."""
        shape, (predictor_dim, predictor_heads) = self.shape, self.shape.predictor_shape()
        heads = f"{shape.num_heads} heads" + (f" and {predictor_heads}" if shape.predictor_heads else "")
        return (
            f"encoder {shape.encoder_depth} x {shape.embed_dim}, predictor {shape.predictor_depth} x {predictor_dim}, "
            f"{heads}, {shape.n_registers} registers, patches of {shape.patch_size}"
        )


def find_file(path: Path, weights: str = "ema") -> Path:
    """The file itself, or of a folder its exported encoder or newest checkpoint; ValueError if there is none.

    A student stands in checkpoints alone.
    """
    path = path.expanduser()
    if not path.is_dir() or is_checkpoint(path):
        return path
    exports = [path / name for name in EXPORTS if (path / name).is_file() and weights == "ema"]
    newest = newest_checkpoint(path.parent if path.name == "checkpoints" else path)
    found = [*exports, *([] if newest is None else [newest])]
    if not found:
        expected = "encoder.safetensors or checkpoints/step_*" if weights == "ema" else "checkpoints/step_*"
        raise ValueError(f"expected {expected} in {path}, found n{'either' if weights == 'ema' else 'one'}")
    return found[0]


def read_weights(path: Path, weights: str = "ema") -> EncoderWeights:
    """Reads the encoder of a file; of several the moving average, which is the teacher, or the student.

    Raises:
        ValueError: the file cannot be read, holds anything but tensors and plain values, no such encoder or several,
            or says another shape of model than its weights have.
    """
    content, metadata = _load(path)
    kind, run_config, declared = _BARE, None, {}
    if "config" in metadata:
        kind, declared = "an exported encoder", _parse(metadata["config"], path)
    elif path.name == EXPORTS[1] and path.with_name("config.json").is_file():
        kind, declared = "an exported encoder", _parse(_text(path.with_name("config.json")), path)
    elif isinstance(content, Mapping) and {"trainer", "step", "config"} <= content.keys():
        kind, run_config = f"a training checkpoint after step {content['step']}", content["config"]
        declared = run_config.get("model") if isinstance(run_config, Mapping) else None
        if not isinstance(declared, Mapping):
            raise ValueError(f"{path} is a training checkpoint whose configuration of the model is missing")
    tensors = _tensors_of(content, path)
    prefix = _encoder_prefix(tensors, path, weights)
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    root = prefix.removesuffix("backbone.")
    head = {name.removeprefix(f"{root}head."): x for name, x in tensors.items() if name.startswith(f"{root}head.")}
    if not prefix:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "teacher.head."))}
    shape = _shape(state, path)
    if unseen := {name: declared[name] for name in _UNSEEN if declared.get(name) not in (None, getattr(shape, name))}:
        shape = config_of({"model": asdict(shape) | unseen}).model
    if unknown := declared.keys() - asdict(shape).keys():
        fields = ", ".join(sorted(map(str, unknown)))
        raise ValueError(f"{path} is of a newer version: its model's configuration has the unknown {fields}")
    _compare(declared, shape, f"the configuration in {path} does not fit its weights")
    return EncoderWeights(path, kind, prefix.removesuffix("."), state, head, shape, run_config)


def read_teacher_head(path: Path) -> dict[str, Tensor]:
    """The clustering's weights that belong to an encoder's file, by the keys of `OnlineClustering`.

    They stand in the file itself, or beside an exported encoder in `heads.safetensors` or in a checkpoint; empty where
    they are nowhere. ValueError: a file that cannot be read, or several such heads in it.
    """
    if path.name in EXPORTS:
        newest = newest_checkpoint(path.parent)
        if path.with_name(HEADS).is_file():
            path = path.with_name(HEADS)
        elif newest is not None:
            path = newest
    tensors = _tensors_of(_load(path)[0], path)
    of_teacher = re.compile(r"(?:.*\.)?teacher\.head\.(layer\.(?:weight|bias))")
    found = [(match[1], tensor) for name, tensor in tensors.items() if (match := of_teacher.fullmatch(name))]
    if len(dict(found)) < len(found):
        raise ValueError(f"{path} holds several clusterings: expected one teacher.head.layer.weight")
    return dict(found)


def check_shape(config: ModelConfig, weights: EncoderWeights) -> None:
    """Raises ValueError if the weights are not those of a model of this configuration, as far as they tell."""
    stated = {name: x for name, x in asdict(config).items() if weights.kind != _BARE or name not in _UNSEEN}
    _compare(stated, weights.shape, f"the weights of {weights.path} do not fit the model configuration")


def _compare(stated: Mapping, shape: ModelConfig, failure: str) -> None:
    for name, value in asdict(shape).items():
        if name in stated.keys() - {"drop_path_rate"} and stated[name] != value:
            raise ValueError(f"{failure}: it says {name} {stated[name]}, they have {value}")


def _load(path: Path) -> tuple[object, dict[str, str]]:
    """What a file of safetensors or of torch.save holds, and the former's metadata; of a checkpoint the model alone."""
    try:
        if path.is_dir():
            return load_checkpoint(path, "model."), {}
        with path.open("rb") as file:
            start = file.read(64)
        if start[8:9] == b"{":  # after the length of a header of safetensors, which may look like text
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if not start:
            raise ValueError("it is empty")
        for beginning, what in _NO_WEIGHTS.items():
            if start.lstrip().startswith(beginning):
                raise ValueError(what)
        # A Namespace of options often lies beside weights, and is data alone.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped: of a training checkpoint the encoder is the sixth part.
            zipped = start.startswith(b"PK")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped), {}
    except UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ValueError(f"{path} cannot be read as weights: no file of safetensors or torch.save") from error
        raise ValueError(
            f"{path} holds a pickled {found[1]}, and unpickling it could run code; expected tensors alone, as "
            "torch.save(model.state_dict(), path) writes them"
        ) from error
    except Exception as error:  # whatever a damaged file makes the loaders raise
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _parse(config: str, path: Path) -> Mapping:
    try:
        declared = json.loads(config)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the configuration in {path} is not JSON: {config[:80]}") from error
    if not isinstance(declared, dict):
        raise ValueError(f"the configuration in {path} must be a JSON object, got {config[:80]}")
    return declared


def _tensors_of(content: object, path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in _tensors(content, path):
        if name in tensors:
            raise ValueError(f"{path} holds the weights {name} twice, once in a wrapper")
        tensors[name] = tensor
    return tensors


def _tensors(content: object, path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries, by their dotted names without wrappers."""
    stack = [((), content)]
    while stack:
        names, value = stack.pop()
        if len(names) > 100:
            raise ValueError(f"{path} holds dictionaries nested without end")
        if isinstance(value, Tensor):
            parts = [part for name in names for part in str(name).split(".")]
            yield ".".join(part for part in parts if part not in _WRAPPERS), value
        elif isinstance(value, Mapping):
            stack += [((*names, name), child) for name, child in value.items()]


def _encoder_prefix(tensors: Mapping[str, Tensor], path: Path, weights: str) -> str:
    """What stands before the names of the encoder that is asked for."""
    last = "patch_embed.weight"
    prefixes = [name.removesuffix(last) for name in tensors if name == last or name.endswith(f".{last}")]
    prefixes = [prefix for prefix in prefixes if any(name.startswith(f"{prefix}encoder.blocks.") for name in tensors)]
    if not prefixes:
        found = f"{len(tensors)} tensors, such as {min(tensors)}" if tensors else "no tensors"
        raise ValueError(f"{path} holds no encoder of CAPI: expected names such as backbone.{last}, got {found}")

    def rank(prefix: str) -> int:
        words = re.split(r"[._]", prefix.lower())
        return 0 if "ema" in words else 1 if "teacher" in words else 2

    best = [prefix for prefix in prefixes if rank(prefix) == min(map(rank, prefixes))]
    if weights == "student":
        best = [prefix for prefix in prefixes if rank(prefix) == 2 and ("student" in prefix or len(prefixes) > 1)]
        if not best:
            found = " and ".join(prefix.removesuffix(".") or "one without a prefix" for prefix in prefixes)
            raise ValueError(f"{path} holds no student: expected a training checkpoint, got the encoder {found} alone")
    if len(best) > 1:
        names = ", ".join(sorted(prefix.removesuffix(".") or "one without a prefix" for prefix in best)[:5])
        raise ValueError(f"{path} holds several encoders, none of them called ema or teacher alone: {names}")
    return best[0]


def _shape(state: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """The configuration of the model whose weights these are."""
    try:
        dim, _, patch_size, _ = state["patch_embed.weight"].shape
        _, n_registers, _ = state["registers"].shape
        _, head_dim = state["encoder.blocks.0.residual1.fn.rope.freqs"].shape
        heads = dim // head_dim
        _, predictor_dim = state["mask_token"].shape
        _, head_dim = state["decoder.blocks.0.residual1.fn.rope.freqs"].shape
        predictor = {"predictor_dim": predictor_dim, "predictor_heads": predictor_dim // head_dim}
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"the shape of the model cannot be told from the weights of {path}: expected patch_embed.weight "
            "[dim, 3, patch, patch], registers [1, n, dim], mask_token [1, dim] and of encoder and decoder "
            "blocks.0.residual1.fn.rope.freqs [2, head_dim]"
        ) from error
    depths = [
        len({name.split(".")[2] for name in state if name.startswith(f"{stack}.blocks.")})
        for stack in ("encoder", "decoder")
    ]
    return ModelConfig(patch_size, dim, heads, *depths, n_registers=n_registers, drop_path_rate=0.0, **predictor)
