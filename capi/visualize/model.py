"""The whole model of a run: the student that answers, and the teacher's prototypes, which encoders alone lack."""

from pathlib import Path

from capi import pretrained
from capi.checkpoint import load_checkpoint, load_newest_checkpoint
from capi.config import Config, config_of
from capi.model import CAPI


def load_model(name: str) -> tuple[CAPI, Config]:
    """The model of a training checkpoint, or of the newest one of a run's folder, frozen, and the run's configuration.

    Raises:
        ValueError: there is no such path, no checkpoint in it, or it holds an encoder alone.
        OSError: the checkpoint cannot be read.
    """
    expected = "expected a training checkpoint, or the folder of a run with one"
    path = Path(name).expanduser()
    if path.is_dir():
        content = load_newest_checkpoint(path.parent if path.name == "checkpoints" else path)
        if content is None:
            raise ValueError(f"{name} has no checkpoints/step_*.pt, and prototypes are in these alone; {expected}")
    elif path.is_file() and (weights := pretrained.read(name)).run_config is not None:
        content = load_checkpoint(weights.path)
    elif path.is_file():
        raise ValueError(f"{name} is {weights.kind} without the teacher's prototypes; {expected}")
    elif name in pretrained.OFFICIAL_WEIGHTS:
        raise ValueError(f"{name} is an encoder without the teacher's prototypes; {expected}")
    else:
        raise ValueError(f"{expected}, got {name}")
    config = config_of(content["config"])
    model = CAPI(config.model, config.clustering)
    model.load_state_dict(content["trainer"]["model"])
    return model.eval().requires_grad_(False), config
