"""Evaluates a run on its way, which must neither change a number of it nor hold it up for long."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from threading import Event, Thread

import torch

from capi.config import Config
from capi.evaluate.labelled import open_labelled
from capi.evaluate.probes import Grid
from capi.evaluate.protocol import evaluate_labelled
from capi.evaluate.synthetic import HeldOutScenes
from capi.stopping import StopRequest

logger = logging.getLogger("capi")

# The other ranks wait at their next collective, for which PyTorch allows them ten minutes.
_SECONDS = 240.0
_POLL_SECONDS = 0.05
_LIMITS = {"classification": (10_000, 5_000), "segmentation": (500, 250)}
_GRID = Grid(iterations=1000)
_SYNTHETIC = {
    "image_accuracy": "eval_image_knn",
    "image_linear": "eval_image_linear",
    "patch_accuracy": "eval_patch_knn",
    "patch_miou": "eval_patch_miou",
}


class GivenUp(Exception):
    """The time is over, or the run is to stop."""


class Evaluator:
    """Evaluates backbones on the images that a run's configuration names.

    Raises as `open_labelled` does.
    """

    def __init__(self, config: Config):
        self._config, self._scenes, self._sources = config, None, None
        if config.run.evaluate_train:
            pairs = (config.run.evaluate_train, "train"), (config.run.evaluate_test, "test")
            self._sources = [open_labelled(source, part) for source, part in pairs]

    def evaluate(self, backbone: torch.nn.Module, stop: StopRequest) -> dict[str, float]:
        """Scores by name; {} with a line in the log where it fails, takes more than four minutes or is told to stop.

        In a thread of its own, which is left behind where a read of an image does not return.
        """
        given_up, done = Event(), Future()

        def watch() -> None:
            if given_up.is_set():
                raise GivenUp("an evaluation was given up")

        Thread(target=self._work, args=(backbone, watch, done), daemon=True).start()
        deadline = time.monotonic() + _SECONDS
        while not done.done() and time.monotonic() < deadline and stop.signum is None:
            time.sleep(_POLL_SECONDS)
        given_up.set()
        try:
            if not done.done():
                why = "the run is to stop" if stop.signum is not None else f"{_SECONDS:.0f} s are over"
                raise GivenUp(f"given up: {why}")
            return done.result()
        except Exception as error:  # whatever goes wrong: a score is not worth a run
            logger.warning("no evaluation: %s", str(error).partition("\n")[0])
            return {}

    def _work(self, backbone: torch.nn.Module, watch: Callable[[], None], done: Future) -> None:
        device = next(backbone.parameters()).device
        compiled = self._config.run.compile == "on" or (self._config.run.compile == "auto" and device.type == "cuda")
        try:
            with (
                torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
                torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
            ):
                done.set_result(self._scores(backbone, watch))
        except BaseException as error:
            done.set_exception(error)

    def _scores(self, backbone: torch.nn.Module, watch: Callable[[], None]) -> dict[str, float]:
        if self._sources is None:
            self._scenes = self._scenes or HeldOutScenes(self._config)
            return {_SYNTHETIC[key]: score for key, score in self._scenes.evaluate(backbone, watch).items()}
        task = "classification" if self._sources[0].masks is None else "segmentation"
        image_size = self._config.data.image_size
        how = {"grid": _GRID, "crops": 0, "limits": _LIMITS[task], "watch": watch}
        evaluation = evaluate_labelled(backbone, *self._sources, image_size=image_size, **how)
        return {
            f"eval_{result['probe']}_{result['features'].replace(' + ', '_and_').replace(' ', '_')}": result[
                "accuracy" if task == "classification" else "mean_iou"
            ]
            for result in evaluation["results"]
        }
