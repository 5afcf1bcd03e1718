"""Writes an encoder to the files of a format: whole ones, or none."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from capi import pretrained
from capi.checkpoint import write_atomically
from capi.config import Config, to_yaml
from capi.export.onnx import write_onnx
from capi.weight_files import HEADS, EncoderWeights, read_teacher_head

FORMATS = ("official", "safetensors", "hub", "onnx")


def export(
    name: str | Path, form: str, output: str | Path, *, weights: str = "ema", overwrite: bool = False
) -> list[Path]:
    """Writes an encoder to `output`, weights bit for bit as they are in its file.

    Args:
        name, weights: of the encoder, as `pretrained.load` has them.
        form: "official" is a file of torch.save under the official key names, which the official code loads;
            "safetensors" the same with the model's configuration; "hub" the folder of a Hugging Face repository, for
            `capi.hub.Encoder.from_pretrained`; "onnx" a graph for images of any size. All but the last bring heads and
            prototypes where these are at hand, the repository in a file of its own.
        output: the file or, of a repository, the folder; what is above it is made.
        overwrite: whether files that are there may be replaced.

    Returns:
        The files written.

    Raises:
        ValueError: an encoder that cannot be read, an unknown format, one whose packages are missing, or an output that
            is there already.
        OSError: a file could not be written; none is half written, and an earlier one is as it was.
    """
    output = Path(output).expanduser()
    if form not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {form}")
    _check_output(output, folder=form == "hub", overwrite=overwrite)
    found = pretrained.read(name, weights=weights)
    backbone = pretrained.build(found)
    teacher = read_teacher_head(found.path)
    run = pretrained.run_configuration(found)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the folder {output.parent} could not be made: {error.strerror}") from error
    if form == "hub":
        return _write_repository(output, found, teacher, run)
    if form == "onnx":
        write_onnx(output, backbone)
        return [output]
    tensors = _copies({"backbone.": found.state, "head.": found.head, "teacher.head.": teacher})
    if form == "official":
        write_atomically(output, lambda file: _save(tensors, file))
    else:
        metadata = {"config": json.dumps(asdict(found.shape if run is None else run.model))}
        write_atomically(output, lambda file: save_file(tensors, file, metadata))
    return [output]


def _check_output(output: Path, *, folder: bool, overwrite: bool) -> None:
    try:
        if folder and os.path.lexists(output) and not output.is_dir():
            raise ValueError(f"a repository is a folder: expected a path for one, got the file {output}")
        if not folder and output.is_dir():
            raise ValueError(f"expected the path of a file, got the folder {output}")
        taken = any(output.iterdir()) if folder and output.is_dir() else os.path.lexists(output)
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror}") from error
    if taken and not overwrite:
        raise ValueError(f"{output} is there already: expected another output, or --overwrite")


def _copies(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """By prefix and name; of their own memory, since views would be saved with all that they are views of."""
    return {
        prefix + name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for prefix, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as stream:  # Of a file that it opens itself PyTorch does not tell why a write failed.
        torch.save(tensors, stream)


def _write_repository(
    folder: Path, weights: EncoderWeights, teacher: dict[str, Tensor], run: Config | None
) -> list[Path]:
    try:
        from capi.hub import Encoder
    except ImportError as error:
        raise ValueError(f"a repository needs huggingface_hub (pip install 'capi[hub]'): {error}") from error
    heads = _copies({"teacher.head.": teacher, "student_ema.head.": weights.head})
    if run is not None:  # What is published tells no more of this machine than the data's source.
        run = replace(run, run=replace(run.run, output_dir=Path(run.run.output_dir).name))
    model = weights.shape if run is None else run.model
    with torch.device("meta"):
        encoder = Encoder(model)
    card = encoder.generate_model_card(
        name=folder.resolve().name,
        shape=weights.description,
        prototypes=len(teacher.get("layer.weight", ())),
        configuration=to_yaml(run).strip() if run is not None else None,
    )
    state = _copies({"": weights.state})
    writers: dict[str, Callable[[Path], object] | None] = {
        "model.safetensors": lambda file: save_file(state, file, {"format": "pt"}),
        HEADS: (lambda file: save_file(heads, file)) if heads else None,
        "config.yaml": None if run is None else lambda file: file.write_text(to_yaml(run)),
        "config.json": lambda file: file.write_text(json.dumps(asdict(model), indent=2)),
        "README.md": lambda file: file.write_text(f"{card}\n"),
    }
    fresh = not folder.exists()
    written = []
    try:
        folder.mkdir(exist_ok=True)
        for name, write in writers.items():
            if write is None:
                (folder / name).unlink(missing_ok=True)  # Another encoder's, which would pass for this one's.
            else:
                write_atomically(folder / name, write)
                written.append(folder / name)
    except BaseException:
        if fresh:
            for path in written:
                path.unlink(missing_ok=True)
            folder.rmdir()
        raise
    return written
